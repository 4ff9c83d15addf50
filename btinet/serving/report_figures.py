"""The charts of a report."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from btinet.evaluation.figures import heat_map

_SEG_COLOUR, _CLF_COLOUR = "#0072b2", "#d55e00"


@dataclass(frozen=True)
class GateTable:
    """Gates of a set of images.

    Attributes:
        levels: names of the L gated decoder levels, coarse to fine; empty for a model without gates.
        labels: class name of each of the N images.
        seg, clf: gates [N][L] of the two streams.
    """

    levels: tuple[str, ...]
    labels: tuple[str, ...]
    seg: list[list[float]]
    clf: list[list[float]]

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names that occur, in alphabetical order."""
        return tuple(sorted(set(self.labels)))

    def mean(self, stream: list[list[float]], label: str) -> list[float]:
        """Return the mean gate per level of ``stream`` (``seg`` or ``clf``) over the images of one class."""
        chosen = [gates for gates, name in zip(stream, self.labels, strict=True) if name == label]
        return [float(value) for value in np.mean(chosen, axis=0)]


def gate_means_figure(gates: GateTable) -> Figure:
    """Return two heat maps, segmentation and classification gates: classes by levels."""
    classes = gates.classes
    figure = Figure(figsize=(6.4, 1.2 + 0.45 * len(classes)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, stream, title in zip(panels, (gates.seg, gates.clf), ("segmentation", "classification"), strict=True):
        means = np.array([gates.mean(stream, name) for name in classes])
        texts = np.array([[f"{value:.2f}" for value in row] for row in means])
        heat_map(axes, means, rows=classes, columns=gates.levels, texts=texts)
        axes.set_title(f"{title} gate")
    return figure


def gate_boxes_figure(gates: GateTable) -> Figure:
    """Return box plots of both gates per level (median, quartiles, whiskers to 1.5 interquartile ranges)."""
    figure = Figure(figsize=(6.4, 2.6), layout="constrained")
    axes = figure.subplots()
    positions = np.arange(len(gates.levels))
    streams = (
        (gates.seg, _SEG_COLOUR, -0.18, "segmentation"),
        (gates.clf, _CLF_COLOUR, 0.18, "classification"),
    )
    for stream, colour, offset, label in streams:
        axes.boxplot(
            np.array(stream),
            positions=positions + offset,
            widths=0.3,
            patch_artist=True,
            boxprops={"facecolor": colour, "alpha": 0.6, "label": label},
            medianprops={"color": "black"},
            flierprops={"markersize": 3},
            manage_ticks=False,
        )
    handles, labels = axes.get_legend_handles_labels()
    first = [labels.index(name) for name in dict.fromkeys(labels)]
    axes.legend([handles[index] for index in first], [labels[index] for index in first], fontsize=8)
    axes.set_xticks(positions, gates.levels)
    axes.set_ylim(-0.02, 1.02)
    axes.set_ylabel("gate")
    axes.grid(axis="y", alpha=0.3)
    return figure
