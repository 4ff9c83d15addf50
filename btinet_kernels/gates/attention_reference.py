"""The mathematics of the two ends of an attention gate in plain PyTorch: the oracle every backend is compared with.

Source: arXiv 1804.03999, equations (1), (2), as in the decoder of arXiv 2606.29102.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


class JointWeights(NamedTuple):
    """Two convolutions of width 1 whose results are added; K channels from C and G."""

    x_weight: Tensor  # [K, C, 1, …]
    x_bias: Tensor  # [K]
    g_weight: Tensor  # [K, G, 1, …]
    g_bias: Tensor  # [K]


def joint_projection(x: Tensor, g: Tensor, weights: JointWeights) -> Tensor:
    """``ReLU(W_x x + b_x + W_g g + b_g)``."""
    convolution = _CONVOLUTIONS[x.ndim]
    return F.relu(convolution(x, weights.x_weight, weights.x_bias) + convolution(g, weights.g_weight, weights.g_bias))


def position_gate(x: Tensor, h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``x · σ(w · h + b)``, one gate for all channels of a position; ``weight``: ``[1, K, 1, …]``."""
    return x * torch.sigmoid(_CONVOLUTIONS[x.ndim](h, weight, bias))
