"""How the losses of the tasks become one: fixed, scheduled, learned and averaged weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from btinet.training.objective import CLF, SEG, Losses

RAMP_EPOCHS, RAMP_STEP, RAMP_SEG_END, RAMP_CLF_END = 15, 0.007, 0.92, 0.08
DYNAMIC_TEMPERATURE = 2.0

Rows = Sequence[Mapping[str, Any]]


class Weighting(nn.Module):
    """Fixed weights.

    Args:
        weights: task → weight.

    Attributes:
        weights: those of the present epoch.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        super().__init__()
        self.initial = dict(weights)
        self.weights = dict(weights)

    def begin(self, epoch: int, rows: Rows) -> None:
        """Before an epoch of stage 1, counted from 0; ``rows``: what was measured in those before it."""

    def forward(self, losses: Losses) -> Tensor:
        """The losses of a batch → what is minimised."""
        return torch.stack([self.weights[task] * loss for task, loss in losses.items()]).sum()


class ScheduledWeighting(Weighting):
    """What the official code intended: weight moves from classification to segmentation for 15 epochs, and back."""

    def begin(self, epoch: int, rows: Rows) -> None:
        """See ``Weighting``."""
        self.weights = dict(self.initial)
        if epoch < RAMP_EPOCHS:
            moved = RAMP_STEP * (epoch + 1)
            self.weights[SEG] = min(RAMP_SEG_END, self.weights[SEG] + moved)
            self.weights[CLF] = max(RAMP_CLF_END, self.weights[CLF] - moved)


class DynamicAverageWeighting(Weighting):
    """Dynamic weight average: a task whose training loss falls more slowly gets more weight.

    With T tasks, the initial weights are multiplied by T·softmax(r/2), where r is the quotient of the task's mean
    losses in the last epoch and the one before it, and 1 in the first two epochs.

    Source: Liu, Johns and Davison, CVPR 2019, arXiv 1803.10704, equation (7).
    """

    def begin(self, epoch: int, rows: Rows) -> None:
        """See ``Weighting``."""
        self.weights = dict(self.initial)
        if epoch < 2:
            return
        before, last = ({task: row[f"train_{task}_loss"] for task in self.initial} for row in rows[epoch - 2 : epoch])
        # A loss of 0 has nothing left to fall.
        rates = {
            task: math.exp(last[task] / before[task] / DYNAMIC_TEMPERATURE) if before[task] else 1 for task in last
        }
        share = len(rates) / sum(rates.values())
        self.weights = {task: self.initial[task] * share * rate for task, rate in rates.items()}


class UncertaintyWeighting(Weighting):
    """Homoscedastic uncertainty: Σ exp(−s)·loss + s/2 with a learned log-variance s for each task.

    They begin where exp(−s) is the given weight. ``weights`` holds those at the beginning of the epoch.

    Source: Kendall, Gal and Cipolla, CVPR 2018, arXiv 1705.07115, equation (10).
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        super().__init__(weights)
        self.log_variances = nn.ParameterDict(
            {task: nn.Parameter(torch.tensor(-math.log(weight))) for task, weight in weights.items()}
        )

    def begin(self, epoch: int, rows: Rows) -> None:
        """See ``Weighting``."""
        self.weights = {task: math.exp(-s.item()) for task, s in self.log_variances.items()}

    def forward(self, losses: Losses) -> Tensor:
        """See ``Weighting``."""
        logs = self.log_variances
        return torch.stack([torch.exp(-logs[task]) * loss + logs[task] / 2 for task, loss in losses.items()]).sum()


WEIGHTINGS: dict[str, type[Weighting]] = {
    "fixed": Weighting,
    "scheduled": ScheduledWeighting,
    "uncertainty": UncertaintyWeighting,
    "dynamic_average": DynamicAverageWeighting,
}
