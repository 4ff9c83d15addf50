"""The mathematics of squeeze-and-excitation in plain PyTorch: the oracle every backend is compared with.

Source: arXiv 1709.01507, equations (2)-(4).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from btinet_kernels.interaction.reference import scale_channels

Activation = Literal["relu", "silu"]
Gate = Literal["sigmoid", "hardsigmoid"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "silu": F.silu}


def hardsigmoid(x: Tensor) -> Tensor:
    """Exact in float64, where ``F.hardsigmoid`` multiplies by a sixth rounded to float32."""
    return F.relu6(x + 3) / 6


GATES: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "hardsigmoid": hardsigmoid}


class SqueezeExciteWeights(NamedTuple):
    """Weights of squeeze-and-excitation. ``r`` is the reduced width."""

    reduce_weight: Tensor  # [r, C]
    reduce_bias: Tensor | None  # [r]
    expand_weight: Tensor  # [C, r]
    expand_bias: Tensor | None  # [C]


def squeeze_excite(x: Tensor, weights: SqueezeExciteWeights, act: str, gate: str) -> Tensor:
    """``x · gates``, the gates from the mean of ``x`` over the positions."""
    return scale_channels(x, channel_gates(x.flatten(2).mean(2), weights, act, gate))


def channel_gates(mean: Tensor, weights: SqueezeExciteWeights, act: str, gate: str) -> Tensor:
    """``[B, C]`` → ``[B, C]``, between 0 and 1."""
    hidden = ACTIVATIONS[act](F.linear(mean, weights.reduce_weight, weights.reduce_bias))
    return GATES[gate](F.linear(hidden, weights.expand_weight, weights.expand_bias))
