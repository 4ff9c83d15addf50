"""Triton kernels of the 1×1 convolution: the product with what follows it, and the products of its gradient.

A row is a position of the whole batch, of which there are fewer than 2^31; dense tensors are addressed by
`batch_layout`. Convolved values are rows of channels, ``[R, C]``, whatever the format of the dense tensors.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from btinet_kernels.interaction.triton_tiles import Layout, add_product, layout_of, offset_of, relu


@triton.jit
def product_of_tiles(  # type: ignore[no-untyped-def]
    convolved,  # [R, C]
    weight,  # [O, C]
    bias,  # [O]
    factor,  # [O], or None
    addend,  # [O], or None
    out,
    sums,  # [tiles, O], or None
    squares,  # [tiles, O], around the tile's own mean
    size,
    strides,
    rows,
    channels,
    outputs,
    EVEN: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``factor · ReLU(convolved @ weightᵀ + bias) + addend``, or less of it; and sums of what is stored."""
    blocks = tl.cdiv(outputs, BLOCK_O)
    tile = tl.program_id(0) // blocks
    row = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    o = tl.program_id(0) % blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    inside, in_o = row < rows, o < outputs
    convolved += row.to(tl.int64)[:, None] * channels
    weight += o.to(tl.int64)[:, None] * channels
    value = tl.zeros((BLOCK_N, BLOCK_O), tl.float32)
    for first in range(0, channels, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        in_c = (c < channels)[None, :]
        left = tl.load(convolved + c[None, :], inside[:, None] & in_c, 0.0)
        right = tl.load(weight + c[None, :], in_o[:, None] & in_c, 0.0)
        value = add_product(left, tl.trans(right), value, PRECISION)
    value += tl.load(bias + o, in_o, 0.0)[None, :]
    if RELU:
        value = relu(value)
    if factor is not None:
        value = value * tl.load(factor + o, in_o, 0.0)[None, :] + tl.load(addend + o, in_o, 0.0)[None, :]
    stored = value.to(out.dtype.element_ty)
    at = offset_of(row, size, strides, EVEN)[:, None] + (o.to(tl.int64) * strides[1])[None, :]
    tl.store(out + at, stored, inside[:, None] & in_o[None, :])
    if sums is not None:
        value = tl.where(inside[:, None], stored.to(tl.float32), 0.0)
        total = tl.sum(value, 0)
        members = tl.minimum(rows - tile * BLOCK_N, BLOCK_N).to(tl.float32)
        centred = tl.where(inside[:, None], value - (total / members)[None, :], 0.0)
        of_tile = tile.to(tl.int64) * outputs + o
        tl.store(sums + of_tile, total, in_o)
        tl.store(squares + of_tile, tl.sum(centred * centred, 0), in_o)


@triton.jit
def arriving(grad, value, coefficients, o, outputs, valid, RELU: tl.constexpr):  # type: ignore[no-untyped-def]
    """What reaches the product: ``factor · grad + slope · value + addend``, and 0 where the ReLU did not pass."""
    upstream = tl.load(grad, valid, 0.0).to(tl.float32)
    if RELU or coefficients is not None:
        stored = tl.load(value, valid, 0.0).to(tl.float32)
    if coefficients is not None:
        in_o = o < outputs
        factor = tl.load(coefficients + o, in_o, 0.0)[None, :]
        slope = tl.load(coefficients + outputs + o, in_o, 0.0)[None, :]
        addend = tl.load(coefficients + 2 * outputs + o, in_o, 0.0)[None, :]
        upstream = tl.where(valid, factor * upstream + (slope * stored + addend), 0.0)
    if RELU:
        upstream = tl.where(stored <= 0, 0.0, upstream)
    return upstream


@triton.jit
def convolved_gradient_of_tiles(  # type: ignore[no-untyped-def]
    grad,
    value,  # what the forward stored, where the ReLU or the coefficients need it
    coefficients,  # [3, O]: factor, slope, addend; or None
    weight,  # [O, C]
    d_convolved,  # [R, C]
    grad_size,
    grad_strides,
    value_size,
    value_strides,
    rows,
    channels,
    outputs,
    GRAD_EVEN: tl.constexpr,
    VALUE_EVEN: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``arriving @ weight``."""
    blocks = tl.cdiv(channels, BLOCK_C)
    row = tl.program_id(0) // blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    inside, in_c = (row < rows)[:, None], (c < channels)[None, :]
    grad += offset_of(row, grad_size, grad_strides, GRAD_EVEN)[:, None]
    value += offset_of(row, value_size, value_strides, VALUE_EVEN)[:, None]
    total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for first in range(0, outputs, BLOCK_O):
        o = first + tl.arange(0, BLOCK_O)
        column, in_o = o.to(tl.int64), o < outputs
        of_grad, of_value = grad + (column * grad_strides[1])[None, :], value + (column * value_strides[1])[None, :]
        left = arriving(of_grad, of_value, coefficients, o, outputs, inside & in_o[None, :], RELU)
        right = tl.load(weight + (column * channels)[:, None] + c[None, :], in_o[:, None] & in_c, 0.0)
        total = add_product(left.to(weight.dtype.element_ty), right, total, PRECISION)
    at = row.to(tl.int64)[:, None] * channels + c[None, :]
    tl.store(d_convolved + at, total.to(d_convolved.dtype.element_ty), inside & in_c)


@triton.jit
def pointwise_gradient_of_parts(  # type: ignore[no-untyped-def]
    grad,
    value,  # what the forward stored, where the ReLU or the coefficients need it
    coefficients,  # [3, O]: factor, slope, addend; or None
    convolved,  # [R, C]
    gathered,  # [parts, O C + O]: of the weight, then of the bias
    grad_size,
    grad_strides,
    value_size,
    value_strides,
    rows,
    channels,
    outputs,
    tiles_per_part,
    GRAD_EVEN: tl.constexpr,
    VALUE_EVEN: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``arrivingᵀ @ convolved`` and the sum of what arrives, over a part of the rows."""
    c_blocks, o_blocks = tl.cdiv(channels, BLOCK_C), tl.cdiv(outputs, BLOCK_O)
    c_block = tl.program_id(0) % c_blocks
    part = tl.program_id(0) // c_blocks // o_blocks
    c = c_block * BLOCK_C + tl.arange(0, BLOCK_C)
    o = tl.program_id(0) // c_blocks % o_blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    in_c, in_o = (c < channels)[None, :], o < outputs
    grad += (o.to(tl.int64) * grad_strides[1])[None, :]
    value += (o.to(tl.int64) * value_strides[1])[None, :]
    of_weight = tl.zeros((BLOCK_O, BLOCK_C), tl.float32)
    of_bias = tl.zeros((BLOCK_O,), tl.float32)
    for tile in range(tiles_per_part):
        row = (part * tiles_per_part + tile) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (row < rows)[:, None]
        of_grad = grad + offset_of(row, grad_size, grad_strides, GRAD_EVEN)[:, None]
        of_value = value + offset_of(row, value_size, value_strides, VALUE_EVEN)[:, None]
        left = arriving(of_grad, of_value, coefficients, o, outputs, inside & in_o[None, :], RELU)
        right = tl.load(convolved + row.to(tl.int64)[:, None] * channels + c[None, :], inside & in_c, 0.0)
        of_weight = add_product(tl.trans(left.to(right.dtype)), right, of_weight, PRECISION)
        if c_block == 0:
            of_bias += tl.sum(left, 0)
    begin, end = part.to(tl.int64) * outputs * (channels + 1), (part + 1).to(tl.int64) * outputs * (channels + 1)
    at = gathered + begin + o.to(tl.int64)[:, None] * channels + c[None, :]
    tl.store(at, of_weight, in_o[:, None] & in_c)
    if c_block == 0:
        tl.store(gathered + end - outputs + o, of_bias, in_o)


def batch_layout(dense: Tensor) -> Layout:
    """Layout of ``[B, C, height, width]`` whose positions count through the samples as well."""
    merged = dense.view(*dense.shape[:2], -1) if layout_of(dense).even else dense
    return layout_of(merged.transpose(0, 1).unsqueeze(0))
