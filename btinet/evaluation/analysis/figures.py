"""Pictures of an analysis: bars per decoder level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from btinet.evaluation.analysis.result import AFTER, BEFORE, STREAMS, LevelAnalysis
from btinet.evaluation.analysis.signals import TERCILES, SignalSummary
from btinet.evaluation.segmentation import Distribution

ARROWS = {"seg_to_clf": "seg→clf", "clf_to_seg": "clf→seg"}
TASKS = {"seg": "segmentation", "clf": "classification"}
_DIRECTION_COLOURS = {"seg_to_clf": "#d55e00", "clf_to_seg": "#0072b2"}  # of the stream that is changed
_TERCILE_COLOURS = {"easy": "#9ecae1", "medium": "#4292c6", "hard": "#08306b"}


def displacement_figure(levels: Mapping[str, LevelAnalysis]) -> Figure:
    """Return bars of the mean displacement per level and direction, before the gate and, where there is one, after it.

    Lines: standard error of the mean.
    """
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    axes = figure.subplots()
    bars = [(direction, stage) for direction in ARROWS for stage in (BEFORE, AFTER)]
    for place, (direction, stage) in enumerate(bars):
        found = [level.displacement.get(direction, {}).get(stage) for level in levels.values()]
        if any(found):
            look = {"color": _DIRECTION_COLOURS[direction], "alpha": 0.45 if stage == AFTER else 1.0}
            label = f"{ARROWS[direction]}, {stage.replace('_', ' ')}"
            _draw_bars(
                axes, [None if each is None else each.overall for each in found], place, len(bars), label=label, **look
            )
    _finish(axes, list(levels), "displacement")
    figure.legend(loc="outside upper center", ncols=len(bars), fontsize=8)
    return figure


def by_difficulty_figure(signals: Mapping[str, Mapping[str, SignalSummary]], unit: str) -> Figure:
    """Return bars of the mean of easy, medium and hard images per level: a row per task, a column per signal.

    Args:
        signals: name of the column → decoder level → its summary.
        unit: what the bars show.

    Lines: standard error of the mean.
    """
    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    grid = figure.subplots(len(STREAMS), len(signals), squeeze=False, sharex="col", sharey="col")
    for line, task in zip(grid, STREAMS, strict=True):
        for axes, (name, levels) in zip(line, signals.items(), strict=True):
            for place, group in enumerate(TERCILES):
                means = [summary.by_difficulty[task][group] for summary in levels.values()]
                _draw_bars(axes, means, place, len(TERCILES), label=group, color=_TERCILE_COLOURS[group])
            _finish(axes, list(levels), unit)
            axes.set_title(f"{name}, by difficulty of {TASKS[task]}", fontsize=9)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=8)
    return figure


def _draw_bars(axes: Axes, means: Sequence[Distribution | None], place: int, places: int, **look: Any) -> None:
    """Draw one bar per level, the ``place``-th of ``places`` beside each other; None and nan leave a gap."""
    width = 0.8 / places
    positions = np.arange(len(means)) + (place - (places - 1) / 2) * width
    heights = [np.nan if mean is None else mean.mean for mean in means]
    errors = [np.nan if mean is None or not mean.n else mean.sd / mean.n**0.5 for mean in means]
    axes.bar(positions, heights, width, yerr=errors, error_kw={"elinewidth": 1}, **look)


def _finish(axes: Axes, levels: Sequence[str], unit: str) -> None:
    axes.set_xticks(range(len(levels)), levels)
    axes.set_ylabel(f"mean {unit}")
    axes.grid(axis="y", alpha=0.3)
