"""The mathematics in plain PyTorch, for any device and dtype."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

_CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


class SeparableWeights(NamedTuple):
    """Parameters of a separable convolution from C to O channels, three taps along each axis."""

    depthwise: Tensor  # [C, 1, 3, ...]
    pointwise: Tensor  # [O, C, 1, ...]
    bias: Tensor | None  # [O]


class BatchNormWeights(NamedTuple):
    """Parameters and buffers of the batch normalisation that follows; all ``[O]``."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor


def separable(x: Tensor, weights: SeparableWeights, dilation: int, relu: bool) -> Tensor:
    """``x [B, C, *spatial]`` → ``[B, O, *spatial]``."""
    convolution = _CONVOLUTIONS[x.ndim]
    filtered = convolution(x, weights.depthwise, padding=dilation, dilation=dilation, groups=x.shape[1])
    out = convolution(filtered, weights.pointwise, weights.bias)
    return F.relu(out) if relu else out


def normalise(x: Tensor, norm: BatchNormWeights, training: bool, momentum: float, eps: float) -> Tensor:
    """Batch normalisation; in training mode it updates the running statistics."""
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, training, momentum, eps)
