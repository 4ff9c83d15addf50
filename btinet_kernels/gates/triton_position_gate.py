"""Triton kernels of the position gate: a program takes all channels of some positions, so that each is read once."""

from __future__ import annotations

import triton
import triton.language as tl

from btinet_kernels.interaction.triton_tiles import offset_of
from btinet_kernels.interaction.triton_vectors_forward import sigmoid


@triton.jit
def position_gate_of_tiles(  # type: ignore[no-untyped-def]
    x,
    h,
    weight,  # [K]
    bias,
    out,
    gate,  # [B, N]
    size,
    x_strides,
    h_strides,
    out_strides,
    count,
    channels,
    hidden,
    X_EVEN: tl.constexpr,
    H_EVEN: tl.constexpr,
    OUT_EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``x · σ(weight · h + bias)``."""
    tiles = tl.cdiv(count, BLOCK_N)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    n = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (n < count)[:, None]
    x += sample * x_strides[0] + offset_of(n, size, x_strides, X_EVEN)[:, None]
    h += sample * h_strides[0] + offset_of(n, size, h_strides, H_EVEN)[:, None]
    out += sample * out_strides[0] + offset_of(n, size, out_strides, OUT_EVEN)[:, None]
    logit = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for first in range(0, hidden, BLOCK_C):
        k = first + tl.arange(0, BLOCK_C)
        value = tl.load(h + (k.to(tl.int64) * h_strides[1])[None, :], inside & (k < hidden)[None, :], 0.0)
        logit += value.to(tl.float32) * tl.load(weight + k, k < hidden, 0.0)[None, :]
    share = sigmoid(tl.sum(logit, 1) + tl.load(bias))
    tl.store(gate + sample * count + n, share, n < count)
    for first in range(0, channels, BLOCK_C):
        c = (first + tl.arange(0, BLOCK_C)).to(tl.int64)[None, :]
        valid = inside & (c < channels)
        value = tl.load(x + c * x_strides[1], valid, 0.0).to(tl.float32) * share[:, None]
        tl.store(out + c * out_strides[1], value.to(out.dtype.element_ty), valid)


@triton.jit
def position_gate_gradient_of_tiles(  # type: ignore[no-untyped-def]
    d_out,
    x,
    h,
    gate,  # [B, N]
    weight,  # [K]
    d_x,
    d_h,
    gathered,  # [B · tiles, K + 1], of the weight and of the bias
    size,
    d_out_strides,
    x_strides,
    h_strides,
    d_x_strides,
    d_h_strides,
    count,
    channels,
    hidden,
    D_OUT_EVEN: tl.constexpr,
    X_EVEN: tl.constexpr,
    H_EVEN: tl.constexpr,
    D_X_EVEN: tl.constexpr,
    D_H_EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradients of x and h, and a tile's sums for those of the weight and the bias."""
    tiles = tl.cdiv(count, BLOCK_N)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    n = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (n < count)[:, None]
    share = tl.load(gate + sample * count + n, n < count, 0.0)
    d_out += sample * d_out_strides[0] + offset_of(n, size, d_out_strides, D_OUT_EVEN)[:, None]
    x += sample * x_strides[0] + offset_of(n, size, x_strides, X_EVEN)[:, None]
    h += sample * h_strides[0] + offset_of(n, size, h_strides, H_EVEN)[:, None]
    d_x += sample * d_x_strides[0] + offset_of(n, size, d_x_strides, D_X_EVEN)[:, None]
    d_h += sample * d_h_strides[0] + offset_of(n, size, d_h_strides, D_H_EVEN)[:, None]
    product = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for first in range(0, channels, BLOCK_C):
        c = (first + tl.arange(0, BLOCK_C)).to(tl.int64)[None, :]
        valid = inside & (c < channels)
        upstream = tl.load(d_out + c * d_out_strides[1], valid, 0.0).to(tl.float32)
        product += upstream * tl.load(x + c * x_strides[1], valid, 0.0).to(tl.float32)
        tl.store(d_x + c * d_x_strides[1], (upstream * share[:, None]).to(d_x.dtype.element_ty), valid)
    d_logit = tl.sum(product, 1) * share * (1 - share)
    gathered += tl.program_id(0).to(tl.int64) * (hidden + 1)
    tl.store(gathered + hidden, tl.sum(d_logit, 0))
    for first in range(0, hidden, BLOCK_C):
        k = first + tl.arange(0, BLOCK_C)
        column = k.to(tl.int64)[None, :]
        valid = inside & (column < hidden)
        value = tl.load(h + column * h_strides[1], valid, 0.0).to(tl.float32)
        tl.store(gathered + k, tl.sum(d_logit[:, None] * value, 0), k < hidden)
        of_h = d_logit[:, None] * tl.load(weight + k, k < hidden, 0.0)[None, :]
        tl.store(d_h + column * d_h_strides[1], of_h.to(d_h.dtype.element_ty), valid)
