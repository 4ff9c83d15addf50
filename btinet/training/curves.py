"""The curves of a training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

_LINE_COLOURS = ("#0072b2", "#d55e00", "#009e73")


def curves_figure(epochs: Sequence[dict[str, Any]]) -> Figure:
    """Return losses and validation scores of ``metrics.jsonl`` by epoch.

    The stages follow each other; no line joins them, because each stage has its own loss.
    """
    figure = Figure(figsize=(6.4, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    stages = [epoch.get("stage", 1) for epoch in epochs]
    losses = (("train_loss", "train"), ("val_loss", "validation"))
    scores = (("val_iou", "IoU"), ("val_accuracy", "accuracy"), ("val_score", "combined score"))
    for axes, series, title in ((left, losses, "loss"), (right, scores, "validation scores")):
        for (key, label), marker, colour in zip(series, "os^", _LINE_COLOURS, strict=False):
            values = [_value(epoch.get(key)) for epoch in epochs]
            if not all(math.isnan(value) for value in values):
                xs, ys = _broken_between_stages(stages, values)
                axes.plot(xs, ys, label=label, marker=marker, color=colour, markersize=3.5, linewidth=1.5)
        for index in _stage_starts(stages):
            axes.axvline(index + 0.5, color="grey", linestyle=":", label=f"stage {stages[index]} begins")
        axes.set_title(title)
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    right.set_ylim(-0.02, 1.02)
    return figure


def _stage_starts(stages: Sequence[int]) -> list[int]:
    return [index for index in range(1, len(stages)) if stages[index] != stages[index - 1]]


def _broken_between_stages(stages: Sequence[int], values: Sequence[float]) -> tuple[list[float], list[float]]:
    xs: list[float] = [index + 1 for index in range(len(values))]
    ys = list(values)
    for index in reversed(_stage_starts(stages)):
        xs.insert(index, index + 0.5)
        ys.insert(index, math.nan)
    return xs, ys


def _value(number: Any) -> float:
    return float(number) if isinstance(number, int | float) else math.nan
