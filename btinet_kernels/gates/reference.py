"""The mathematics of the gates in plain PyTorch, any dtype: the oracle every backend is compared with.

``x`` is ``[B, C, *spatial]`` with one to three spatial dimensions; N the number of positions.

Source: arXiv 2603.01295 (dual-path attention of the residual blocks).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

KERNEL_WIDTH = 7  # of the spatial path's convolution, along every axis

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class DualPathWeights(NamedTuple):
    """Weights of dual-path attention; ``h`` is the width of the channel path."""

    hidden_weight: Tensor  # [h, C]
    hidden_bias: Tensor  # [h]
    gate_weight: Tensor  # [C, h]
    gate_bias: Tensor  # [C]
    spatial_weight: Tensor  # [1, 2, 7, …], as many sevens as spatial dimensions
    spatial_bias: Tensor  # [1]


class DualPathSaved(NamedTuple):
    """What the forward pass leaves for the backward pass."""

    mean: Tensor  # [B, C], over the positions
    hidden: Tensor  # [B, h], of the channel path, after its ReLU
    channel_gate: Tensor  # [B, C]
    maps: Tensor  # [B, 2, N]: maximum and mean over the channels
    spatial_gate: Tensor  # [B, N]


def dual_path(x: Tensor, residual: Tensor | None, weights: DualPathWeights) -> tuple[Tensor, DualPathSaved]:
    """``x · channel gate · spatial gate``, or ``ReLU(that + residual)``; and what led to it."""
    convolution = _CONVOLUTIONS[x.ndim - 2]
    mean = x.flatten(2).mean(2)
    hidden, channel_gate = channel_path(mean, weights)
    maps = torch.cat((x.amax(1, keepdim=True), x.mean(1, keepdim=True)), 1)
    padding = KERNEL_WIDTH // 2
    spatial_gate = torch.sigmoid(convolution(maps, weights.spatial_weight, weights.spatial_bias, padding=padding))
    out = x * _over_space(channel_gate, x) * spatial_gate
    if residual is not None:
        out = F.relu(out + residual)
    return out, DualPathSaved(mean, hidden, channel_gate, maps.flatten(2), spatial_gate.flatten(1))


def channel_path(mean: Tensor, weights: DualPathWeights) -> tuple[Tensor, Tensor]:
    """Hidden units ``[B, h]`` and the gate ``[B, C]``."""
    hidden = F.relu(F.linear(mean, weights.hidden_weight, weights.hidden_bias))
    return hidden, torch.sigmoid(F.linear(hidden, weights.gate_weight, weights.gate_bias))


def dual_path_backward(
    d_out: Tensor, x: Tensor, out: Tensor | None, saved: DualPathSaved, weights: DualPathWeights
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Gradients of x, of the residual (None without ``out``, the forward result) and of the weights."""
    dims, positions = x.ndim - 2, x.shape[2:]
    channel_gate = _over_space(saved.channel_gate, x)
    spatial_gate, maps = saved.spatial_gate.reshape(-1, 1, *positions), saved.maps.reshape(-1, 2, *positions)
    d_attention = d_out if out is None else d_out.masked_fill(out <= 0, 0)
    product = d_attention * x

    d_mean, d_channel = channel_path_backward((product * spatial_gate).flatten(2).sum(2), saved, weights)
    d_spatial = (product * channel_gate).sum(1, keepdim=True) * spatial_gate * (1 - spatial_gate)
    d_maps, *d_convolution = torch.ops.aten.convolution_backward(
        d_spatial,
        maps,
        weights.spatial_weight,
        bias_sizes=[1],
        stride=[1] * dims,
        padding=[KERNEL_WIDTH // 2] * dims,
        dilation=[1] * dims,
        transposed=False,
        output_padding=[0] * dims,
        groups=1,
        output_mask=[True, True, True],
    )
    largest = x == maps[:, :1]
    d_top = d_maps[:, :1] / largest.sum(1, keepdim=True)  # shared evenly, as torch.amax does

    shift = _over_space(d_mean, x) / positions.numel() + d_maps[:, 1:] / x.shape[1]
    d_x = d_attention * channel_gate * spatial_gate + shift + largest * d_top
    return d_x, None if out is None else d_attention, [*d_channel, *d_convolution]


def channel_path_backward(
    d_gate: Tensor, saved: DualPathSaved, weights: DualPathWeights
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of the mean and of the path's weights, from that of the gate."""
    d_gate = d_gate * saved.channel_gate * (1 - saved.channel_gate)
    d_hidden = (d_gate @ weights.gate_weight) * (saved.hidden > 0)
    d_weights = [d_hidden.t() @ saved.mean, d_hidden.sum(0), d_gate.t() @ saved.hidden, d_gate.sum(0)]
    return d_hidden @ weights.hidden_weight, d_weights


def _over_space(vector: Tensor, dense: Tensor) -> Tensor:
    return vector.reshape(*vector.shape, *[1] * (dense.ndim - 2))
