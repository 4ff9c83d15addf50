"""Separable convolutions on NVIDIA GPUs: the fusion's depthwise kernels and the products of ``triton_products``.

Convolved values go through memory once in each direction, in the dtype of x, and so do the weights that multiply them:
docs/kernels_gpu.md says why, and what that costs. Contiguous, channels_last and any other strides are read and written
as they lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from btinet_kernels.interaction.passes_op import new_in_format_of
from btinet_kernels.interaction.triton import combine_parts
from btinet_kernels.interaction.triton_tiles import MOST_REGISTERS, launch, power_of_two, product_precision
from btinet_kernels.multi_scale.triton_depthwise import depthwise_input_gradient, depthwise_maps
from btinet_kernels.normalization.triton import Parts, batch_norm, combined_moments, weight_gradients
from btinet_kernels.separable.reference import SeparableWeights
from btinet_kernels.separable.triton_products import (
    batch_layout,
    convolved_gradient_of_tiles,
    pointwise_gradient_of_parts,
    product_of_tiles,
)

# Two for each multiprocessor of an H200: with fewer, tiles shrink, and the rows of a weight's gradient are split.
ENOUGH_PROGRAMS = 264
# Of what a product sums over at a time: more would spill in float32, whose operands are split for the tensor cores.
BYTES = 64


def separable(
    x: Tensor,
    weights: SeparableWeights,
    dilation: int,
    relu: bool,
    *,
    affine: Sequence[Tensor] = (),
    moments: Sequence[Tensor] = (),
) -> Tensor:
    """See ``native.separable``."""
    out = new_in_format_of(x, len(weights.pointwise), x.shape[2:])
    convolved, _ = depthwise_maps(x, _taps(weights), None, dilation)
    rows, (outputs, channels), layout = _rows(x), weights.pointwise.shape[:2], batch_layout(out)
    walk = _tiles(x, outputs, channels)
    tiles = triton.cdiv(rows, walk["BLOCK_N"])
    sums, squares = (out.new_empty(tiles, outputs, dtype=torch.float32) if moments else None for _ in range(2))
    launch(
        product_of_tiles,
        tiles * triton.cdiv(outputs, walk["BLOCK_O"]),
        convolved,
        weights.pointwise.to(x.dtype),
        weights.bias,
        *(affine or (None, None)),
        out,
        sums,
        squares,
        layout.size,
        layout.strides,
        rows,
        channels,
        outputs,
        EVEN=layout.even,
        RELU=relu,
        **walk,
    )
    if sums is not None and squares is not None:
        combined_moments(sums, squares, Parts(1, tiles, walk["BLOCK_N"], rows), *moments)
    return out


def separable_backward(
    x: Tensor,
    grad: Tensor,
    value: Tensor,
    weights: SeparableWeights,
    dilation: int,
    relu: bool,
    arriving: Sequence[Tensor] = (),
) -> tuple[Tensor, SeparableWeights]:
    """See ``native.separable_backward``."""
    taps, coefficients = _taps(weights), torch.stack(tuple(arriving)) if arriving else None
    value = value if value.numel() else grad
    d_convolved = _convolved_gradient(x, grad, value, weights, coefficients, relu)
    convolved, d_taps = depthwise_maps(x, taps, None, dilation, d_convolved)
    d_pointwise, d_bias = _pointwise_gradient(convolved, grad, value, weights, coefficients, relu)
    d_depthwise = d_taps.sum((0, 1)).t().contiguous().view(weights.depthwise.shape)
    d_x = depthwise_input_gradient(x, d_convolved, taps, None, dilation)
    return d_x, SeparableWeights(d_depthwise, d_pointwise, d_bias)


def normalise(value: Tensor, affine: Sequence[Tensor], moments: Sequence[Tensor], eps: float) -> Tensor:
    """See ``native.normalise``."""
    return batch_norm(value, affine, moments, eps, "identity")[0]


def norm_gradients(grad: Tensor, value: Tensor, moments: Sequence[Tensor], eps: float) -> tuple[Tensor, Tensor]:
    """See ``native.norm_gradients``."""
    return weight_gradients(value, grad, (None, None), moments, eps, "identity")


def _convolved_gradient(
    x: Tensor, grad: Tensor, value: Tensor, weights: SeparableWeights, coefficients: Tensor | None, relu: bool
) -> Tensor:
    """``[R, C]``."""
    rows, (outputs, channels) = _rows(x), weights.pointwise.shape[:2]
    d_convolved = x.new_empty(rows, channels)
    walk = _tiles(x, channels, outputs)
    walk["BLOCK_O"], walk["BLOCK_C"] = walk["BLOCK_C"], walk["BLOCK_O"]
    of_grad, of_value = batch_layout(grad), batch_layout(value)
    launch(
        convolved_gradient_of_tiles,
        triton.cdiv(rows, walk["BLOCK_N"]) * triton.cdiv(channels, walk["BLOCK_C"]),
        grad,
        value,
        coefficients,
        weights.pointwise.to(x.dtype),
        d_convolved,
        of_grad.size,
        of_grad.strides,
        of_value.size,
        of_value.strides,
        rows,
        channels,
        outputs,
        GRAD_EVEN=of_grad.even,
        VALUE_EVEN=of_value.even,
        RELU=relu,
        **walk,
    )
    return d_convolved


def _pointwise_gradient(
    convolved: Tensor, grad: Tensor, value: Tensor, weights: SeparableWeights, coefficients: Tensor | None, relu: bool
) -> tuple[Tensor, Tensor]:
    """Of the 1×1 convolution's weight and bias."""
    rows, (outputs, channels) = _rows(grad), weights.pointwise.shape[:2]
    # Every block of channels forms what arrives once more: they are wide.
    block_n, block_o, block_c = BYTES // grad.itemsize, power_of_two(outputs, 16, 64), power_of_two(channels, 16, 128)
    blocks = triton.cdiv(outputs, block_o) * triton.cdiv(channels, block_c)
    tiles = triton.cdiv(rows, block_n)
    # A part is written and read again: it should gather from many times the rows that it is as large as.
    wanted = min(2 * ENOUGH_PROGRAMS // blocks, rows // (4 * min(outputs, channels)))
    tiles_per_part = triton.cdiv(tiles, max(1, wanted))
    parts = triton.cdiv(tiles, tiles_per_part)
    gathered = weights.pointwise.new_empty(parts, outputs * (channels + 1))
    of_grad, of_value = batch_layout(grad), batch_layout(value)
    launch(
        pointwise_gradient_of_parts,
        parts * blocks,
        grad,
        value,
        coefficients,
        convolved,
        gathered,
        of_grad.size,
        of_grad.strides,
        of_value.size,
        of_value.strides,
        rows,
        channels,
        outputs,
        tiles_per_part,
        GRAD_EVEN=of_grad.even,
        VALUE_EVEN=of_value.even,
        RELU=relu,
        BLOCK_N=block_n,
        BLOCK_O=block_o,
        BLOCK_C=block_c,
        **_options(block_o * block_c),
    )
    d_pointwise, d_bias = torch.empty_like(weights.pointwise), gathered.new_empty(outputs)
    combine_parts(gathered, d_pointwise, d_bias, 1, parts)
    return d_pointwise, d_bias


def _tiles(x: Tensor, columns: int, inner: int) -> dict[str, Any]:
    """Blocks of a product ``[R, columns]``: its columns are BLOCK_O, the channels that it sums over BLOCK_C."""
    rows, block_o, block_n = _rows(x), power_of_two(columns, 16, 64), 128
    while block_n > 32 and triton.cdiv(rows, block_n) * triton.cdiv(columns, block_o) < ENOUGH_PROGRAMS:
        block_n //= 2
    block_n = power_of_two(rows, 16, block_n)
    blocks = {"BLOCK_N": block_n, "BLOCK_O": block_o, "BLOCK_C": power_of_two(inner, 16, BYTES // x.itemsize)}
    return blocks | _options(block_n * block_o)


def _options(tile: int) -> dict[str, Any]:
    """How a product is compiled that has ``tile`` sums."""
    return {
        "PRECISION": product_precision(),
        "num_warps": 8 if tile >= 4096 else 4,
        "num_stages": 3,
        "maxnreg": MOST_REGISTERS,
    }


def _rows(x: Tensor) -> int:
    return x.shape[0] * x.shape[2:].numel()


def _taps(weights: SeparableWeights) -> Tensor:
    """``[1, 9, C]``."""
    return weights.depthwise.flatten(1).t().contiguous()[None]
