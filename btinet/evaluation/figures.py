"""Pictures of an evaluation, drawn with matplotlib's objects so that no global state is touched."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from btinet.files import atomic_path

TRUTH_COLOUR = "#00d5ff"
PREDICTION_COLOUR = "#ffd400"
_LONGEST_SIDE = 1024
_TITLE_LENGTH = 30


@dataclass(frozen=True)
class Case:
    """One image to show: uint8 [H, W, 1 or 3], its two masks bool [H, W], and the lines written above it."""

    image: np.ndarray
    target: np.ndarray
    prediction: np.ndarray
    title: tuple[str, ...]


def draw_case(axes: Axes, case: Case) -> None:
    """Draw an image with the outline of its truth and of its prediction."""
    step = -(-max(case.image.shape[:2]) // _LONGEST_SIDE)
    image = case.image[::step, ::step]
    axes.imshow(image[..., 0] if image.shape[2] == 1 else image, cmap="gray", vmin=0, vmax=255)
    _outline(axes, case.prediction[::step, ::step], PREDICTION_COLOUR, "solid")
    _outline(axes, case.target[::step, ::step], TRUTH_COLOUR, "dashed")
    height, width = image.shape[:2]
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(height - 0.5, -0.5)
    axes.set_xticks([])
    axes.set_yticks([])
    title = "\n".join(_shortened(line) for line in case.title)
    axes.set_title(title, fontsize=8, parse_math=False)


def cases_figure(rows: Mapping[str, Sequence[Case]]) -> Figure:
    """Return one picture with a labelled row of cases per entry and a legend of the two outlines."""
    columns = max(len(cases) for cases in rows.values())
    figure = Figure(figsize=(0.5 + 2.5 * max(columns, 2), 0.5 + 2.8 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for line, (name, cases) in zip(grid, rows.items(), strict=True):
        for axes in line[len(cases) :]:
            axes.set_axis_off()
        for axes, case in zip(line, cases, strict=False):
            draw_case(axes, case)
        line[0].set_ylabel(name, fontsize=11, fontweight="bold")
    handles = [
        Line2D([], [], color=TRUTH_COLOUR, linestyle="dashed", label="truth"),
        Line2D([], [], color=PREDICTION_COLOUR, label="prediction"),
    ]
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=2, labelcolor="white")
    legend.get_frame().set(facecolor="#333333", alpha=1.0)
    return figure


def confusion_figure(confusion: Sequence[Sequence[int]], classes: Sequence[str]) -> Figure:
    """Return a confusion matrix, rows = label, columns = predicted: counts, coloured by share of the row."""
    counts = np.asarray(confusion)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = 2.2 + 0.8 * len(classes)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.subplots()
    names = [_shortened(name) for name in classes]
    heat_map(axes, share, rows=names, columns=names, texts=counts.astype(str))
    axes.tick_params(axis="x", rotation=30)
    for label in axes.get_xticklabels():
        label.set(horizontalalignment="right", rotation_mode="anchor")
    axes.set_xlabel("predicted class")
    axes.set_ylabel("label")
    figure.colorbar(axes.images[0], ax=axes, label="share of the label's images", shrink=0.8)
    return figure


def heat_map(axes: Axes, values: np.ndarray, *, rows: Sequence[str], columns: Sequence[str], texts: np.ndarray) -> None:
    """Draw ``values`` [R, C] in 0..1 as a labelled grid with one text per cell; nan cells stay white."""
    axes.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, parse_math=False)
    axes.set_yticks(range(len(rows)), rows, parse_math=False)
    for (row, column), value in np.ndenumerate(values):
        colour = "white" if value > 0.65 else "black"
        axes.text(column, row, str(texts[row, column]), ha="center", va="center", color=colour)


def figure_png(figure: Figure, dpi: int = 130) -> bytes:
    """Return ``figure`` as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def save_figure(figure: Figure, path: Path) -> None:
    """Write ``figure`` as a PNG file, whole or not at all; raises ``UserError`` when it cannot."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(figure_png(figure))


def _outline(axes: Axes, mask: np.ndarray, colour: str, style: str) -> None:
    if mask.any():
        # The frame of zeros closes the outline of a lesion that touches the edge of the image.
        rows, columns = (np.arange(-1, length + 1) for length in mask.shape)
        axes.contour(
            columns,
            rows,
            np.pad(mask, 1).astype(float),
            levels=[0.5],
            colors=colour,
            linestyles=style,
            linewidths=1.4,
        )


def _shortened(text: str) -> str:
    return text if len(text) <= _TITLE_LENGTH else "…" + text[1 - _TITLE_LENGTH :]
