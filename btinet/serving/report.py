"""A training run and its evaluation as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from btinet.data.tables import read_table
from btinet.errors import UserError
from btinet.evaluation.figures import figure_png
from btinet.files import write_text
from btinet.models.checkpoint import CONFIG_NAME
from btinet.serving.report_figures import GateTable, gate_boxes_figure, gate_means_figure
from btinet.training.curves import curves_figure

_MEASURES = (
    ("IoU", "iou", 3),
    ("Dice", "dice", 3),
    ("sensitivity", "sensitivity", 3),
    ("precision", "precision", 3),
    ("HD95 (pixels)", "hd95", 1),
)
_CLASS_SCORES = (
    ("accuracy", "accuracy"),
    ("accuracy of always answering the most frequent class", "majority_accuracy"),
    ("balanced accuracy", "balanced_accuracy"),
    ("macro F1", "macro_f1"),
    ("weighted F1", "weighted_f1"),
    ("macro AUROC", "macro_auroc"),
)
_STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --paper: #ffffff; --line: #d5dae0; --soft: #f3f5f7; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --paper: #15181b; --line: #3a4047; --soft: #1f2428; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 56rem; padding: 1rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; border-bottom: 1px solid var(--line); }
.notice { padding: .75rem 1rem; background: var(--soft); border-left: .3rem solid #c77700; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
caption { text-align: left; font-size: .875rem; padding: .5rem 0; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; }
th[scope=row], thead th:first-child { text-align: left; font-weight: 600; }
thead th { background: var(--soft); }
figure { margin: 1rem 0; }
img { display: block; max-width: 100%; height: auto; margin: 0 auto; background: #ffffff; }
figcaption, footer { font-size: .875rem; }
"""


@dataclass(frozen=True)
class Report:
    """What a report is about.

    Attributes:
        run: run folder of the training.
        evaluation: folder that ``evaluate_run`` wrote.
        title: heading and title of the page.
        data_note: provenance and licence of the data, shown as given.
    """

    run: Path
    evaluation: Path
    title: str = "BTI-Net: a short demonstration"
    data_note: str = ""


def write_report(path: Path, report: Report) -> None:
    """Write one self-contained HTML file: styles inside, pictures as data, no script, no external resource.

    Raises:
        UserError: the run or the evaluation lacks a file, a file is damaged, or ``path`` cannot be written.
    """
    summary = _read_json(report.evaluation / "summary.json")
    epochs = read_metrics(report.run / "metrics.jsonl")
    gates = read_gates(report.evaluation / "per_image.csv")
    try:
        body = _body(report, summary, epochs, gates)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{report.evaluation / 'summary.json'}: is not the summary that this version writes ({error!r}); "
            "evaluate the run again."
        ) from error
    write_text(
        path,
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(report.title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n",
    )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read ``metrics.jsonl``, one object per epoch.

    Raises:
        UserError: missing, damaged, or without an epoch.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        epochs = [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: expected one JSON object per epoch ({error}); train again.") from error
    if not epochs or not all(isinstance(epoch, dict) for epoch in epochs):
        raise UserError(f"{path}: expected one JSON object per epoch and found none; train again.")
    return epochs


def read_gates(path: Path) -> GateTable:
    """Read the gates out of a ``per_image.csv``.

    Raises:
        UserError: missing or damaged.
    """
    rows = [row for _, row in read_table(path, ["image", "label"])]
    names = list(rows[0]) if rows else []
    levels = tuple(name.removeprefix("gate_seg_") for name in names if name.startswith("gate_seg_"))
    try:
        values = {
            stream: [[float(row[f"gate_{stream}_{level}"]) for level in levels] for row in rows]
            for stream in ("seg", "clf")
        }
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: the gate columns are not complete ({error}); evaluate again.") from error
    return GateTable(levels, tuple(row["label"] or "not labelled" for row in rows), values["seg"], values["clf"])


def _body(report: Report, summary: dict[str, Any], epochs: list[dict[str, Any]], gates: GateTable) -> str:
    sections = [
        f"<header><h1>{escape(report.title)}</h1>",
        '<p class="notice">This is a demonstration of software, trained for a short time on few images. '
        "It is <strong>not a medical device</strong>, its numbers say nothing about clinical use, and nobody "
        "should be diagnosed with it.</p></header>\n<main>",
        _training_section(report, epochs),
        _segmentation_section(report, summary),
        _classification_section(report, summary),
        _gate_section(gates),
        "</main>",
    ]
    if report.data_note:
        sections.append(f"<footer><h2>Data</h2><p>{escape(report.data_note)}</p></footer>")
    return "\n".join(sections)


def _training_section(report: Report, epochs: list[dict[str, Any]]) -> str:
    splits = _split_counts(report.run / "split.csv")
    rows = [(name, [str(count) for count in counts]) for name, counts in splits.items()]
    stages = sorted({int(epoch.get("stage", 1)) for epoch in epochs})
    lengths = [f"{sum(int(epoch.get('stage', 1)) == stage for epoch in epochs)} in stage {stage}" for stage in stages]
    seconds = sum(float(epoch.get("seconds") or 0.0) for epoch in epochs)
    return _section(
        "Training",
        f"<p>One network ({escape(_network(report.run / CONFIG_NAME))}) learned two tasks at once: to "
        "outline the lesion and to name its class. "
        f"Epochs: {escape(', '.join(lengths))}; {seconds / 60:.1f} minutes in all.</p>",
        _table("Images per class and split.", ["class", "train", "val", "test"], rows),
        _figure(
            figure_png(curves_figure(epochs)),
            "Line charts of the training: losses on the left, validation scores on the right, by epoch.",
            "Losses and validation scores by epoch; each stage has its own loss, so compare within a stage only.",
        ),
    )


def _segmentation_section(report: Report, summary: dict[str, Any]) -> str:
    scores = summary["segmentation"]
    if scores is None:
        return _section("Segmentation", "<p>No evaluated image has a mask, or the network does not segment.</p>")
    lesion, every = scores["lesion_images"], scores["all_images"]
    columns = (lesion, every)
    rows = [
        (name, [_mean_sd(column["measures"][key], digits) for column in columns]) for name, key, digits in _MEASURES
    ]
    rows += [(name, [_number(column[key]) for column in columns]) for name, key in _pooled()]
    for name, key in (
        ("IoU of all background", "all_background_iou"),
        ("IoU of all foreground", "all_foreground_iou"),
    ):
        baseline = summary["baselines"][key]
        rows.append((name, [_number(baseline["lesion_images"]), _number(baseline["all_images"])]))
    rows.append(("images", [str(lesion["images"]), str(every["images"])]))
    rows.append(("missed lesions", [str(lesion["n_missed"]), ""]))
    rows.append(("false alarms", ["", f"{scores['false_positives']} of {scores['images_without_lesion']}"]))
    height, width = summary["image_size"]
    size = "each image's own size" if summary["eval_size"] == "native" else f"{height} × {width} pixels"
    policy = {"diagonal": "the image diagonal", "inf": "infinity", "exclude": "left out"}[summary["hd95_empty"]]
    caption = (
        f"Split “{summary['split']}”: mean ± sd over images, lesion pixels only, probability above "
        f"{summary['threshold']:g}, at {size}. HD95 where exactly one mask is empty: {policy}."
    )
    cases = report.evaluation / "cases.png"
    picture = (
        _figure(
            _read_bytes(cases),
            "Best, median and worst cases: images with the outlines of the true and of the predicted lesion.",
            "Best, median and worst cases by Dice among the images with a lesion.",
        )
        if cases.is_file()
        else "<p>No evaluated image has a lesion.</p>"
    )
    tables = _table(caption, ["score", "lesion images", "all images"], rows)
    if by_class := summary.get("segmentation_by_class"):
        columns = tuple(scores["lesion_images"] for scores in by_class.values())
        rows = [
            (name, [_mean_sd(column["measures"][key], digits) for column in columns]) for name, key, digits in _MEASURES
        ]
        rows.append(("images", [str(column["images"]) for column in columns]))
        tables += _table("Each mask class, on the images that show it.", ["score", *by_class], rows)
    return _section("Segmentation", tables, picture)


def _pooled() -> tuple[tuple[str, str], ...]:
    return (("IoU, pixels pooled", "pooled_iou"), ("Dice, pixels pooled", "pooled_dice"))


def _classification_section(report: Report, summary: dict[str, Any]) -> str:
    scores = summary["classification"]
    if scores is None:
        return _section("Classification", "<p>No evaluated image is labelled.</p>")
    overall = [(name, [_number(scores[key])]) for name, key in _CLASS_SCORES]
    measures = ("sensitivity", "specificity", "auroc")
    rows = [
        (name, [str(count), *(_number(scores[measure][name]) for measure in measures)])
        for name, count in scores["support"].items()
    ]
    absent = scores["absent_classes"]
    return _section(
        "Classification",
        _table(f"{scores['images']} labelled images.", ["score", "value"], overall),
        _table("Per class.", ["class", "images", "sensitivity", "specificity", "AUROC"], rows),
        f"<p>Classes without an image, left out of the means: {escape(', '.join(absent))}.</p>" if absent else "",
        _figure(
            _read_bytes(report.evaluation / "confusion_matrix.png"),
            "Confusion matrix: number of images per label and predicted class.",
            "Labels against predicted classes.",
        ),
    )


def _gate_section(gates: GateTable) -> str:
    if not gates.levels:
        return _section("Gates", "<p>This model's tasks exchange nothing that is gated, so there are no gates.</p>")
    heading = ["class", *(f"{stream} {level}" for stream in ("seg", "clf") for level in gates.levels)]
    rows = [
        (name, [_number(value) for stream in (gates.seg, gates.clf) for value in gates.mean(stream, name)])
        for name in gates.classes
    ]
    return _section(
        "Gates",
        "<p>At each decoder level, a gate between 0 and 1 decides how much of the other task's features is "
        "let in: one for the segmentation stream (seg), one for the classification stream (clf). Level d1 is "
        "the coarsest. Gates are not calibrated probabilities.</p>",
        _table("Mean gate by label and level.", heading, rows),
        _picture(gate_means_figure, gates, "Heat maps of the mean gates by label and level.", "Mean gates."),
        _picture(gate_boxes_figure, gates, "Box plots of the gates by level.", "Spread over the evaluated images."),
    )


def _network(path: Path) -> str:
    content = _read_json(path)
    try:
        height, width = content["preprocessing"]["image_size"]
        return f"BTI-Net with the encoder {content['model']['backbone']}, input {height} × {width} pixels"
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: is not a model configuration ({error!r}); train again.") from error


def _split_counts(path: Path) -> dict[str, list[int]]:
    counts: dict[str, list[int]] = {}
    for _, row in read_table(path, ["image", "label", "split"]):
        line = counts.setdefault(row["label"] or "not labelled", [0, 0, 0])
        if row["split"] in ("train", "val", "test"):
            line[("train", "val", "test").index(row["split"])] += 1
    return dict(sorted(counts.items()))


def _section(heading: str, *parts: str) -> str:
    return f"<section>\n<h2>{escape(heading)}</h2>\n" + "\n".join(part for part in parts if part) + "\n</section>"


def _table(caption: str, heading: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heading)
    body = "\n".join(
        f'<tr><th scope="row">{escape(name)}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
        for name, cells in rows
    )
    return (
        f'<div class="scroll"><table><caption>{escape(caption)}</caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def _picture(draw: Callable[[GateTable], Figure], gates: GateTable, alt: str, caption: str) -> str:
    return _figure(figure_png(draw(gates)), alt, caption)


def _figure(png: bytes, alt: str, caption: str) -> str:
    data = base64.b64encode(png).decode("ascii")
    return (
        f'<figure><img alt="{escape(alt)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _mean_sd(values: dict[str, Any], digits: int) -> str:
    return f"{_number(values['mean'], digits)} ± {_number(values['sd'], digits)}"


def _number(value: Any, digits: int = 3) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return value if isinstance(value, str) else f"{value:.{digits}f}"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is not readable as JSON ({error}); make it again.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object; make it again.")
    return value


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: could not be read ({error.strerror or error}); evaluate the run again.") from error
