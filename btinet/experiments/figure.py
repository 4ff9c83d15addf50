"""The figure of an ablation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from btinet.experiments.results import HEADLINE, RunScores, VariantResult
from btinet.experiments.statistics import LEVEL

DRAWN = ("iou", "accuracy")
_MEAN_COLOUR, _RUN_COLOUR = "#0072b2", "#999999"


def ablation_figure(results: Sequence[RunScores], summary: Mapping[str, VariantResult], reference: str) -> Figure:
    """Return a row of axes per score: its runs with mean ± sd on the left, differences with intervals on the right."""
    figure = Figure(figsize=(10, 2 * (1.2 + 0.3 * len(summary))), layout="constrained")
    grid = figure.subplots(len(DRAWN), 2, sharey=True)
    for (left, right), score in zip(grid, DRAWN, strict=True):
        _draw_runs(left, results, summary, score)
        _draw_differences(right, summary, score)
        left.set_title(f"{HEADLINE[score]}: runs, mean ± sd")
        right.set_title(f"difference from {reference}, {LEVEL} % interval over images")
        left.set_yticks(range(len(summary)), list(summary), parse_math=False)
        for axes in (left, right):
            axes.grid(axis="x", alpha=0.3)
    grid[0][0].invert_yaxis()  # shared: the first variant on top
    return figure


def _draw_runs(axes: Axes, results: Sequence[RunScores], summary: Mapping[str, VariantResult], score: str) -> None:
    for place, (name, result) in enumerate(summary.items()):
        values = [r.scores[score] for r in results if r.run.variant == name and score in r.scores]
        axes.plot(values, [place] * len(values), "|", color=_RUN_COLOUR, markersize=9)
        whole = result.scores[score]
        if not math.isnan(whole.mean):
            sd = 0 if math.isnan(whole.sd) else whole.sd
            axes.errorbar(whole.mean, place, xerr=sd, fmt="o", color=_MEAN_COLOUR, capsize=3)


def _draw_differences(axes: Axes, summary: Mapping[str, VariantResult], score: str) -> None:
    axes.axvline(0, color="black", linewidth=0.8)
    for place, result in enumerate(summary.values()):
        difference = result.differences.get(score)
        if difference is None or math.isnan(difference.mean):
            continue
        if not math.isnan(difference.low):
            axes.plot([difference.low, difference.high], [place, place], color=_MEAN_COLOUR)
        axes.plot(difference.mean, place, "o", color=_MEAN_COLOUR)
