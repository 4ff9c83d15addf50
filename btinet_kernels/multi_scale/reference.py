"""The mathematics of multi-scale context fusion in plain PyTorch: the oracle every backend is compared with.

Three separable convolutions of dilation 1, 2 and 4 read the same ``[B, C, *spatial]``; each is weighted per image, and
their sum passes a 1×1 convolution. Source: arXiv 2603.01295, equations (9), (10).

The two 1×1 convolutions in a row are one: ``F(Σ_i a_i (P_i u_i + b_i)) + f = Σ_i (F P_i)(a_i u_i) + bias``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

DILATIONS = (1, 2, 4)
_CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


class ScaleWeights(NamedTuple):
    """What a fusion learns; C channels, S hidden units of the network that weighs the scales."""

    depthwise1: Tensor  # [C, 1, 3, ...], a 3 for each spatial axis
    depthwise2: Tensor
    depthwise4: Tensor
    pointwise1: Tensor  # [C, C, 1, ...]
    pointwise2: Tensor
    pointwise4: Tensor
    pointwise_bias1: Tensor  # [C]
    pointwise_bias2: Tensor
    pointwise_bias4: Tensor
    hidden_weight: Tensor  # [S, C]
    hidden_bias: Tensor  # [S]
    share_weight: Tensor  # [3, S]
    share_bias: Tensor  # [3]
    fusion_weight: Tensor  # [C, C, 1, ...]
    fusion_bias: Tensor  # [C]


def shares(mean: Tensor, weights: ScaleWeights) -> Tensor:
    """How much of each scale an image gets, from the means of its channels: ``[B, C]`` → ``[B, 3]``."""
    hidden = F.relu(F.linear(mean, weights.hidden_weight, weights.hidden_bias))
    return torch.softmax(F.linear(hidden, weights.share_weight, weights.share_bias), 1)


def multi_scale(x: Tensor, weights: ScaleWeights) -> Tensor:
    """Fuse the scales of ``x``, ``[B, C, *spatial]``."""
    convolution, channels = _CONVOLUTIONS[x.ndim], x.shape[1]
    share = shares(x.flatten(2).mean(2), weights)
    weighted = []
    for i, dilation in enumerate(DILATIONS):
        filtered = convolution(x, weights[i], padding=dilation, dilation=dilation, groups=channels)
        scale = convolution(filtered, weights[3 + i], weights[6 + i])
        weighted.append(scale * share[:, i].reshape(-1, *[1] * (x.ndim - 1)))
    return convolution(weighted[0] + weighted[1] + weighted[2], weights.fusion_weight, weights.fusion_bias)
