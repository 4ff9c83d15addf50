"""Evaluation of a training run on one split of its data, or on other data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.progress import track

from btinet.data.images import read_image
from btinet.data.masks import MaskFormat
from btinet.data.preprocessing import resize_image, resize_mask
from btinet.data.samples import Sample
from btinet.evaluation.classification import ClassificationScores, classification_scores
from btinet.evaluation.figures import Case, cases_figure, confusion_figure, save_figure
from btinet.evaluation.run_data import RunOptions, read_run_data
from btinet.evaluation.segmentation import (
    HD95Empty,
    SegmentationScores,
    SegmentationSummary,
    segmentation_scores,
    summarise_segmentation,
)
from btinet.evaluation.tables import write_csv, write_json
from btinet.models.checkpoint import load_checkpoint
from btinet.serving.predictor import Precision, Predictor, signal_columns

CASES_PER_ROW = 3


@dataclass(frozen=True)
class EvaluateOptions(RunOptions):
    """What to evaluate, and how; the results go to ``evaluation-SPLIT`` unless ``out`` says otherwise.

    Attributes:
        eval_size: resolution of the scores: "native" (each image's own size) or "model" (size of the
            network's input).
        hd95_empty: HD95 of an image where exactly one mask is empty: the image diagonal, infinity, or left
            out.
        precision: "float32" or "bfloat16"; see ``Predictor``.
    """

    eval_size: Literal["native", "model"] = "native"
    hd95_empty: HD95Empty = "diagonal"
    precision: Precision = "float32"


@dataclass(frozen=True)
class Summary:
    """Scores of one evaluation.

    Attributes:
        run, data, out: folders (``data`` may be a CSV file).
        split, eval_size, hd95_empty, precision: as in ``EvaluateOptions``.
        images: number of images evaluated.
        image_size: height and width of the network's input.
        threshold: lesion probability above which a pixel is lesion.
        images_without_mask: images for which nobody drew a mask; they count for the classes only.
        segmentation: lesion scores; several mask classes together; None when no image has a mask and of a network that
            only classifies.
        segmentation_by_class: those of each mask class where there are several.
        classification: class scores; None when no image is labelled and of a network that only segments.
        baselines: mean IoU of an all-background and an all-foreground answer on the same images, per column; empty
            where ``segmentation`` is None.
    """

    run: str
    data: str
    out: str
    split: str
    images: int
    eval_size: str
    image_size: tuple[int, int]
    threshold: float
    hd95_empty: str
    precision: str
    images_without_mask: int
    segmentation: SegmentationSummary | None
    segmentation_by_class: dict[str, SegmentationSummary]
    classification: ClassificationScores | None
    baselines: dict[str, dict[str, float]]


@dataclass(frozen=True)
class ImageResult:
    """What the network says about one image, and how good its mask is.

    Attributes:
        sample: the image.
        size: height and width at which the mask was scored.
        segmented: whether the network segments at all.
        scores: of the mask, its classes taken together; None where nobody drew one.
        by_class: of each class, where there are several mask classes.
        probabilities: float64 [K], of the classes; empty of a network that only segments.
        signals: gates and proxies, see ``signal_columns``.
    """

    sample: Sample
    size: tuple[int, int]
    segmented: bool
    scores: SegmentationScores | None
    by_class: dict[str, SegmentationScores | None]
    probabilities: np.ndarray
    signals: dict[str, float]


def evaluate_run(options: EvaluateOptions) -> Summary:
    """Evaluate a run and write ``per_image.csv``, ``summary.json``, ``cases.png`` and
    ``confusion_matrix.png``.

    ``cases.png`` shows the best, median and worst lesion images by Dice and is left out when no image has a
    lesion; ``confusion_matrix.png`` is left out when no image is labelled. Of a network for one task, only that is
    scored.

    Raises:
        UserError: the run, its data or its split cannot be read or do not belong together, the split is
            empty, or a result cannot be written.
    """
    predictor = Predictor(load_checkpoint(options.run), options.device, precision=options.precision)
    data = read_run_data(options, predictor.classes)
    reader = Reader(predictor, options.eval_size, MaskFormat(data.mask_threshold, predictor.mask_classes))
    results = list(evaluate_images(reader, data.samples, options.batch_size, options.hd95_empty))

    classes = data.classes
    labels = [result.sample.label for result in results]
    probabilities = np.stack([result.probabilities for result in results])
    labelled = probabilities.size > 0 and any(label >= 0 for label in labels)
    segmentations = [result.scores for result in results if result.scores is not None]
    out = options.out or options.folder / f"evaluation-{options.split}"
    summary = Summary(
        run=str(options.folder),
        data=str(data.path),
        out=str(out),
        split=options.split,
        images=len(results),
        eval_size=options.eval_size,
        image_size=predictor.preprocessing.image_size,
        threshold=predictor.threshold,
        hd95_empty=options.hd95_empty,
        precision=options.precision,
        images_without_mask=sum(result.sample.masks is None for result in results),
        segmentation=summarise_segmentation(segmentations) if segmentations else None,
        segmentation_by_class={
            name: summarise_segmentation([scores for result in results if (scores := result.by_class[name])])
            for name in results[0].by_class
        },
        classification=classification_scores(labels, probabilities, classes) if labelled else None,
        baselines=_baselines(results),
    )
    rows = [_row(result, classes) for result in results]
    write_csv(out / "per_image.csv", rows, list(rows[0]))
    _write_cases(out / "cases.png", reader, results)
    if summary.classification is None:
        (out / "confusion_matrix.png").unlink(missing_ok=True)
    else:
        save_figure(confusion_figure(summary.classification.confusion, classes), out / "confusion_matrix.png")
    write_json(out / "summary.json", asdict(summary))
    return summary


def choose_cases(dice: Sequence[float], per_row: int = CASES_PER_ROW) -> dict[str, list[int]]:
    """Choose the positions of the best, median and worst values, each at most once, without empty rows."""
    order = sorted(range(len(dice)), key=lambda index: -dice[index])
    count = max(1, min(per_row, len(order) // 3))
    start = (len(order) - count) // 2
    best, worst = order[:count], order[max(count, len(order) - count) :]
    middle = [index for index in order[start : start + count] if index not in best and index not in worst]
    return {name: row for name, row in (("best", best), ("median", middle), ("worst", worst)) if row}


class Reader:
    """Reads samples at the resolution of the scores, and holds the predictor that takes them."""

    def __init__(self, predictor: Predictor, eval_size: str, mask_format: MaskFormat) -> None:
        self.predictor = predictor
        self.size = predictor.preprocessing.image_size if eval_size == "model" else None
        self.mask_format = mask_format

    def read(self, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
        """The image uint8 [H, W, C] and its mask as numbers of classes [H, W], all 0 where nobody drew one."""
        image = read_image(sample.image, self.predictor.preprocessing.channels)
        height, width = image.shape[:2]
        mask = self.mask_format.read(sample.masks or (), height, width)
        if self.size is None:
            return image, mask
        return resize_image(image, self.size), resize_mask(mask, self.size)


def evaluate_images(
    reader: Reader, samples: Sequence[Sample], batch_size: int, hd95_empty: HD95Empty = "diagonal"
) -> Iterator[ImageResult]:
    """Predict and score ``samples`` in their order, batch by batch; see ``segmentation_scores`` for ``hd95_empty``."""
    starts = range(0, len(samples), batch_size)
    for start in track(starts, "Evaluating", console=Console(stderr=True), transient=True):
        batch = samples[start : start + batch_size]
        pairs = [reader.read(sample) for sample in batch]
        predictions = reader.predictor([image for image, _ in pairs])
        for sample, (_, target), prediction in zip(batch, pairs, predictions, strict=True):
            scores: dict[str, SegmentationScores | None] = {"": None}
            if prediction.numbers is not None:
                names = reader.mask_format.classes
                pairs_of = {"": (prediction.numbers > 0, target > 0)}
                if len(names) > 1:
                    planes = (reader.mask_format.planes(numbers) for numbers in (prediction.numbers, target))
                    pairs_of |= {name: pair for name, *pair in zip(names, *planes, strict=True)}
                scores = {
                    name: None if sample.masks is None else segmentation_scores(*pair, hd95_empty=hd95_empty)
                    for name, pair in pairs_of.items()
                }
            height, width = target.shape
            signals = signal_columns(prediction, reader.predictor.proxy_names)
            segmented, of_all, shape = prediction.numbers is not None, scores.pop(""), (height, width)
            yield ImageResult(sample, shape, segmented, of_all, scores, prediction.class_probabilities, signals)


def _baselines(results: Sequence[ImageResult]) -> dict[str, dict[str, float]]:
    # Without a lesion, all background is right (IoU 1) and all foreground is wrong (IoU 0).
    drawn = [(result.scores.target_pixels, math.prod(result.size)) for result in results if result.scores]
    if not drawn:
        return {}
    background = [float(pixels == 0) for pixels, _ in drawn]
    foreground = [pixels / size for pixels, size in drawn]
    lesion = [pixels > 0 for pixels, _ in drawn]
    return {
        name: {
            "lesion_images": float(np.mean(np.array(values)[lesion])) if any(lesion) else math.nan,
            "all_images": float(np.mean(values)) if drawn else math.nan,
        }
        for name, values in (("all_background_iou", background), ("all_foreground_iou", foreground))
    }


def _row(result: ImageResult, classes: Sequence[str]) -> dict[str, Any]:
    height, width = result.size
    row: dict[str, Any] = {
        "image": result.sample.id,
        "label": classes[result.sample.label] if result.sample.label >= 0 else "",
    }
    if result.probabilities.size:
        row["predicted"] = classes[int(result.probabilities.argmax())]
        row |= {f"prob_{name}": value for name, value in zip(classes, result.probabilities.tolist(), strict=True)}
    if result.segmented:
        row |= _score_columns(result.scores, "")
    for name, scores in result.by_class.items():
        row |= _score_columns(scores, name)
    return row | {"height": height, "width": width, **result.signals}


def _score_columns(scores: SegmentationScores | None, mask_class: str) -> dict[str, Any]:
    """Empty cells without a mask."""
    names = [field.name for field in fields(SegmentationScores)]
    ending = f"_{mask_class}" if mask_class else ""
    return {name + ending: getattr(scores, name, None) for name in names}


def _write_cases(path: Path, reader: Reader, results: Sequence[ImageResult]) -> None:
    lesion = [(r, r.scores.dice) for r in results if r.scores is not None and r.scores.target_pixels > 0]
    if not lesion:
        path.unlink(missing_ok=True)
        return
    chosen = choose_cases([dice for _, dice in lesion])
    rows: Mapping[str, list[Case]] = {
        name: [_case(reader, *lesion[index]) for index in indices] for name, indices in chosen.items()
    }
    save_figure(cases_figure(rows), path)


def _case(reader: Reader, result: ImageResult, dice: float) -> Case:
    image, target = reader.read(result.sample)
    (prediction,) = reader.predictor([image])
    assert prediction.mask is not None
    classes, label = reader.predictor.classes, result.sample.label
    truth = classes[label] if label >= 0 else "not labelled"
    if prediction.class_probabilities.size:
        truth += f" → {classes[int(prediction.class_probabilities.argmax())]}"
    title = (result.sample.id, f"Dice {dice:.3f}", truth)
    return Case(image, target > 0, prediction.mask, title)
