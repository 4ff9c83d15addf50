"""Evaluation of a training run on one split of its data, or on other data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from rich.console import Console
from rich.progress import track

from btinet.data.images import read_image
from btinet.data.layout_options import LayoutOptions
from btinet.data.masks import MaskFormat
from btinet.data.preprocessing import resize_image, resize_mask
from btinet.data.samples import Collection, Sample
from btinet.data.source import DataSource
from btinet.data.splits import read_split
from btinet.errors import UserError
from btinet.evaluation.classification import ClassificationScores, classification_scores
from btinet.evaluation.figures import Case, cases_figure, confusion_figure, save_figure
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
class EvaluateOptions:
    """What to evaluate, and how.

    Attributes:
        run: run folder, or its ``model.safetensors``.
        data: data set; default: the one the run was trained on. Give it when the data has moved, or, with
            split "all", to evaluate on other data with the same class names.
        dataset: layout of the data; default: the run's own, or "auto" when ``data`` is given.
        layout_options, manifest: with ``data``, see ``DataSource``; otherwise the run's own.
        split: "train", "val" or "test" of the run's ``split.csv``, or "all" images without looking at the
            split.
        out: folder for the results; default: ``evaluation-SPLIT`` in the run folder.
        eval_size: resolution of the scores: "native" (each image's own size) or "model" (size of the
            network's input).
        device: "auto", "cpu", "cuda" or "cuda:N".
        batch_size: images per forward pass.
        hd95_empty: HD95 of an image where exactly one mask is empty: the image diagonal, infinity, or left
            out.
        precision: "float32" or "bfloat16"; see ``Predictor``.
    """

    run: Path
    data: Path | None = None
    dataset: str | None = None
    split: Literal["train", "val", "test", "all"] = "test"
    out: Path | None = None
    eval_size: Literal["native", "model"] = "native"
    device: str = "auto"
    batch_size: int = 8
    hd95_empty: HD95Empty = "diagonal"
    precision: Precision = "float32"
    layout_options: LayoutOptions = field(default_factory=LayoutOptions)
    manifest: Path | None = None


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
class _Result:
    sample: Sample
    size: tuple[int, int]
    segmented: bool  # False of a network that only classifies
    scores: SegmentationScores | None  # without a mask
    by_class: dict[str, SegmentationScores | None]  # where there are several mask classes
    probabilities: np.ndarray  # empty of a network that only segments
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
    if options.batch_size < 1:
        raise UserError(f"batch size {options.batch_size}: expected at least 1.")
    folder = options.run if options.run.is_dir() else options.run.parent
    predictor = Predictor(load_checkpoint(options.run), options.device, precision=options.precision)
    source, config = _data_source(options, folder)
    mask_format = MaskFormat(config.get("mask_threshold"), predictor.mask_classes)
    collection = source.read(predictor.classes)
    samples = _chosen_samples(options.split, folder, collection)
    reader = _Reader(predictor, options.eval_size, mask_format)
    results = list(_evaluate(reader, samples, options.batch_size, options.hd95_empty))

    classes = collection.classes
    labels = [result.sample.label for result in results]
    probabilities = np.stack([result.probabilities for result in results])
    labelled = probabilities.size > 0 and any(label >= 0 for label in labels)
    segmentations = [result.scores for result in results if result.scores is not None]
    out = options.out or folder / f"evaluation-{options.split}"
    summary = Summary(
        run=str(folder),
        data=str(source.path),
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


class _Reader:
    """Reads samples at the resolution of the scores and predicts them."""

    def __init__(self, predictor: Predictor, eval_size: str, mask_format: MaskFormat) -> None:
        self.predictor = predictor
        self.size = predictor.preprocessing.image_size if eval_size == "model" else None
        self.mask_format = mask_format

    def read(self, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
        """The image and its mask as numbers of classes; all 0 where nobody drew one."""
        image = read_image(sample.image, self.predictor.preprocessing.channels)
        height, width = image.shape[:2]
        mask = self.mask_format.read(sample.masks or (), height, width)
        if self.size is None:
            return image, mask
        return resize_image(image, self.size), resize_mask(mask, self.size)


def _evaluate(reader: _Reader, samples: Sequence[Sample], batch_size: int, hd95_empty: HD95Empty) -> Iterator[_Result]:
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
            segmented, of_all = prediction.mask is not None, scores.pop("")
            yield _Result(sample, (height, width), segmented, of_all, scores, prediction.class_probabilities, signals)


def _data_source(options: EvaluateOptions, folder: Path) -> tuple[DataSource, dict[str, Any]]:
    """Where the data is, and the options of the run."""
    config = _read_config(folder / "config.yaml")
    if options.data is not None:
        given = DataSource(options.data, options.dataset or "auto", options.layout_options, options.manifest)
        return given, config
    if options.manifest is not None or options.layout_options != LayoutOptions():
        raise UserError("--manifest, --curated, --labels, --lesion-groups: belong to --data; give it too.")
    if not config.get("data"):
        raise UserError(f"{folder / 'config.yaml'}: names no data; say with --data where the data set lies.")
    data = Path(config["data"])
    if not data.exists():
        raise UserError(f"{data}: the data of this run is no longer there; say with --data where it lies now.")
    source = DataSource.from_options(config)
    return replace(source, dataset=options.dataset or source.dataset), config


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: is not a readable YAML file; restore the one the training wrote.") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected options as 'name: value' lines; restore the one the training wrote.")
    return config


def _chosen_samples(split: str, folder: Path, collection: Collection) -> list[Sample]:
    if split == "all":
        chosen = list(collection.samples)
    else:
        assigned = read_split(folder / "split.csv", collection)
        chosen = [sample for sample in collection.samples if assigned.get(sample.id) == split]
    if not chosen:
        raise UserError(f"{folder / 'split.csv'}: split {split!r} holds no image of {collection.root}; choose another.")
    return chosen


def _baselines(results: Sequence[_Result]) -> dict[str, dict[str, float]]:
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


def _row(result: _Result, classes: Sequence[str]) -> dict[str, Any]:
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


def _write_cases(path: Path, reader: _Reader, results: Sequence[_Result]) -> None:
    lesion = [(r, r.scores.dice) for r in results if r.scores is not None and r.scores.target_pixels > 0]
    if not lesion:
        path.unlink(missing_ok=True)
        return
    chosen = choose_cases([dice for _, dice in lesion])
    rows: Mapping[str, list[Case]] = {
        name: [_case(reader, *lesion[index]) for index in indices] for name, indices in chosen.items()
    }
    save_figure(cases_figure(rows), path)


def _case(reader: _Reader, result: _Result, dice: float) -> Case:
    image, target = reader.read(result.sample)
    (prediction,) = reader.predictor([image])
    assert prediction.mask is not None
    classes, label = reader.predictor.classes, result.sample.label
    truth = classes[label] if label >= 0 else "not labelled"
    if prediction.class_probabilities.size:
        truth += f" → {classes[int(prediction.class_probabilities.argmax())]}"
    title = (result.sample.id, f"Dice {dice:.3f}", truth)
    return Case(image, target > 0, prediction.mask, title)
