"""The summary of an evaluation as tables in the terminal."""

from __future__ import annotations

import math

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from btinet.evaluation.classification import ClassificationScores
from btinet.evaluation.evaluate import Summary
from btinet.evaluation.segmentation import MEASURES, SegmentationColumn, SegmentationSummary

MEASURE_NAMES = {
    "iou": "IoU",
    "dice": "Dice",
    "sensitivity": "sensitivity",
    "precision": "precision",
    "hd95": "HD95 (pixels)",
}


def definitions(summary: Summary) -> list[str]:
    """Return the definitions behind the scores of ``summary``, one sentence each."""
    height, width = summary.image_size
    size = "each image's own size" if summary.eval_size == "native" else f"{height} × {width} pixels"
    one_empty = {"diagonal": "the image diagonal", "inf": "infinity", "exclude": "left out"}[summary.hd95_empty]
    return [
        f"Lesion scores: foreground only, lesion probability above {summary.threshold:g}, per image at {size}, "
        "then averaged; pooled scores count the pixels of all images together. sd divides by n-1.",
        "Lesion images have a target that is not empty. In all images, two empty masks give IoU = Dice = 1 and "
        "HD95 = 0; undefined sensitivity and precision are left out (see n). A missed lesion has an empty "
        "prediction; a false alarm is any predicted lesion pixel in an image without lesion.",
        "HD95: larger of the two directed 95th percentiles of Euclidean distances between boundary pixels; one "
        f"empty mask: {one_empty}.",
        "Class scores: most probable class; means run over the classes that occur; AUROC is one-versus-rest.",
    ]


def print_summary(summary: Summary, console: Console | None = None) -> None:
    """Print the tables of an evaluation and the definitions they use."""
    console = console or Console()
    console.print(
        f"[bold]{summary.images} images[/bold] of split {summary.split!r}, scored at {summary.eval_size} size.",
        highlight=False,
    )
    if summary.segmentation is not None:
        console.print(_segmentation_table(summary.segmentation, summary.baselines))
    elif summary.images_without_mask < summary.images:
        console.print("The network does not segment: no lesion scores.")
    if summary.images_without_mask:
        console.print(f"{summary.images_without_mask} images have no mask and count for the classes only.")
    if summary.segmentation_by_class:
        console.print(_mask_class_table(summary.segmentation_by_class))
    if summary.classification is None:
        console.print("No image is labelled, or the network does not classify: no class scores.")
    else:
        console.print(_classification_table(summary.classification))
        console.print(_class_table(summary.classification))
    for sentence in definitions(summary):
        console.print(f"[dim]{escape(sentence)}[/dim]", highlight=False)
    console.print(f"Written to {escape(summary.out)}", highlight=False, soft_wrap=True)


def number(value: float, digits: int = 3) -> str:
    """Return ``value`` with fixed digits; an undefined one as a dash."""
    if math.isnan(value):
        return "–"
    return f"{value:.{digits}f}"


def _segmentation_table(scores: SegmentationSummary, baselines: dict[str, dict[str, float]]) -> Table:
    columns = scores.lesion_images, scores.all_images
    table = Table(title="Segmentation: mean ± sd (median)", box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for heading in ("", "lesion images", "n", "all images", "n"):
        table.add_column(heading, justify="left" if not heading else "right")
    for measure in MEASURES:
        digits = 1 if measure == "hd95" else 3
        cells = [cell for column in columns for cell in _measure_cells(column, measure, digits)]
        table.add_row(MEASURE_NAMES[measure], *cells)
    for name, attribute in (("pooled IoU", "pooled_iou"), ("pooled Dice", "pooled_dice")):
        lesion, every = (number(getattr(column, attribute)) for column in columns)
        table.add_row(name, lesion, "", every, "")
    for name, key in (
        ("all background IoU", "all_background_iou"),
        ("all foreground IoU", "all_foreground_iou"),
    ):
        values = baselines[key]
        table.add_row(name, number(values["lesion_images"]), "", number(values["all_images"]), "")
    table.add_row("images", str(scores.lesion_images.images), "", str(scores.all_images.images), "")
    table.add_row("missed lesions", str(scores.lesion_images.n_missed), "", "", "")
    rate = number(scores.false_positive_rate)
    of = f"{scores.false_positives} of {scores.images_without_lesion} ({rate})"
    table.add_row("false alarms", "", "", of, "")
    return table


def _mask_class_table(by_class: dict[str, SegmentationSummary]) -> Table:
    table = Table(title="Mask classes, on the images that show them: mean ± sd (median)", box=SIMPLE_HEAD)
    for heading in ("", "images", *(MEASURE_NAMES[name] for name in MEASURES)):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, scores in by_class.items():
        column = scores.lesion_images
        cells = [_measure_cells(column, measure, 1 if measure == "hd95" else 3)[0] for measure in MEASURES]
        table.add_row(escape(name), str(column.images), *cells)
    return table


def _measure_cells(column: SegmentationColumn, measure: str, digits: int) -> tuple[str, str]:
    values = column.measures[measure]
    text = f"{number(values.mean, digits)} ± {number(values.sd, digits)} ({number(values.median, digits)})"
    return text, str(values.n)


def _classification_table(scores: ClassificationScores) -> Table:
    table = Table(title="Classification", box=SIMPLE_HEAD)
    table.add_column("")
    table.add_column("all classes", justify="right")
    table.add_row("accuracy", number(scores.accuracy))
    majority = f'accuracy of always "{escape(scores.majority_class)}"'
    table.add_row(majority, number(scores.majority_accuracy))
    table.add_row("balanced accuracy", number(scores.balanced_accuracy))
    table.add_row("macro F1", number(scores.macro_f1))
    table.add_row("weighted F1", number(scores.weighted_f1))
    table.add_row("macro AUROC", number(scores.macro_auroc))
    table.add_row("labelled images", str(scores.images))
    table.add_row("images without label, ignored", str(scores.ignored))
    if scores.absent_classes:
        table.add_row("classes without an image", escape(", ".join(scores.absent_classes)))
    return table


def _class_table(scores: ClassificationScores) -> Table:
    table = Table(title="Per class", box=SIMPLE_HEAD)
    for heading in ("class", "images", "sensitivity", "specificity", "AUROC"):
        table.add_column(heading, justify="left" if heading == "class" else "right")
    for name in scores.support:
        table.add_row(
            escape(name),
            str(scores.support[name]),
            number(scores.sensitivity[name]),
            number(scores.specificity[name]),
            number(scores.auroc[name]),
        )
    return table
