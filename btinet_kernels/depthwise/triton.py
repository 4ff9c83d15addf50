"""Depthwise convolution on NVIDIA GPUs: launches of the kernels in ``triton_passes``.

Contiguous, channels_last and any other strides are read and written as they lie. docs/kernels_gpu.md says what each
kernel costs.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import triton
from torch import Tensor

from btinet_kernels.depthwise.reference import Geometry
from btinet_kernels.depthwise.triton_passes import (
    depthwise_input_gradient,
    depthwise_of_parts,
    depthwise_weight_gradient_of_parts,
)
from btinet_kernels.interaction.triton_tiles import launch
from btinet_kernels.multi_scale.triton_depthwise import walk

# Elements of a tile: sixteen for each thread of four warps share the taps that they load; four where each has sums.
TILE, TILE_WITH_SUMS = 2048, 512
MOST_SUMS = 9  # that a thread keeps of each of its elements: of a larger kernel, programs take one row each


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """See ``native.depthwise``."""
    out = geometry.new_result(x, weight)
    programs, walks = walk(out, out.shape[2:].numel(), TILE, lanes=1)
    launch(
        depthwise_of_parts,
        programs,
        x,
        _taps(weight),
        bias,
        out,
        tuple(x.shape[2:]),
        x.stride(),
        tuple(out.shape[2:]),
        out.stride(),
        *_laid(weight, geometry),
        **_kernel(weight),
        **walks,
    )
    return out


def depthwise_backward(x: Tensor, d_out: Tensor, weight: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """See ``native.depthwise_backward``."""
    d_x = torch.empty_like(x)
    size, out_size, laid, kernel = tuple(x.shape[2:]), tuple(d_out.shape[2:]), _laid(weight, geometry), _kernel(weight)
    apart = [triton.cdiv(n, stride) for n, stride in zip(size, geometry.stride, strict=True)]
    programs, walks = walk(d_x, prod(apart), TILE, lanes=prod(geometry.stride))
    of_d_x = size, d_x.stride(), out_size, d_out.stride()
    launch(depthwise_input_gradient, programs, d_out, _taps(weight), d_x, *of_d_x, *laid, **kernel, **walks)
    high, wide = weight.shape[2:]
    rows = high if high * wide <= MOST_SUMS else 1
    programs, walks = walk(x, d_out.shape[2:].numel(), TILE_WITH_SUMS, lanes=high // rows)
    gathered = weight.new_empty(len(x), walks["parts"], high * wide, len(weight))
    of_x = size, x.stride(), out_size, d_out.stride()
    launch(depthwise_weight_gradient_of_parts, programs, x, d_out, gathered, *of_x, *laid, ROWS=rows, **kernel, **walks)
    return d_x, gathered.sum((0, 1)).t().contiguous().view(weight.shape)


def _taps(weight: Tensor) -> Tensor:
    """``[HIGH · WIDE, C]``: what neighbouring threads load lies side by side."""
    return weight.flatten(1).t().contiguous()


def _laid(weight: Tensor, geometry: Geometry) -> tuple[int, Geometry]:
    """Channels, and the geometry as the kernels take it."""
    return len(weight), Geometry(*(tuple(each) for each in geometry))  # type: ignore[arg-type]


def _kernel(weight: Tensor) -> dict[str, Any]:
    return {"HIGH": weight.shape[2], "WIDE": weight.shape[3]}
