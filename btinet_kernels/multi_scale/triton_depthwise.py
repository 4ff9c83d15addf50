"""Triton kernels of the three dilated depthwise convolutions and of their gradients.

A program walks through consecutive positions of one image, row-major, for a block of channels: the rows that its taps
reach stay in the L1 cache. The maps of the scales lie side by side, ``[B, N, 3, C]``: rows of a matrix product.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def address(row, column, strides):  # type: ignore[no-untyped-def]
    """``strides``: batch, channel, row, column."""
    return row.to(tl.int64) * strides[2] + column.to(tl.int64) * strides[3]


@triton.jit
def within(row, column, height, width):  # type: ignore[no-untyped-def]
    """Whether there is such a position."""
    return (row >= 0) & (row < height) & (column >= 0) & (column < width)


@triton.jit
def maps_of_scale(  # type: ignore[no-untyped-def]
    x,
    taps,  # [3, 9, C]
    share,  # [B, 3]
    maps,  # [B, N, 3, C]
    d_maps,  # [B, N, 3, C]
    d_taps,  # [B, parts, 3, 9, C]
    height,
    width,
    strides,
    channels,
    parts,
    tiles_per_part,
    GRADIENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``share · convolution(x)`` for one scale; and, at every tap, ``Σ_n d_maps · x``: its gradient over the share."""
    blocks, count = tl.cdiv(channels, BLOCK_C), height * width
    scale = tl.program_id(0) % 3
    dilation = 1 << scale
    row_of_part = (tl.program_id(0) // 3 // blocks).to(tl.int64)
    sample = row_of_part // parts
    first = tl.program_id(0) // 3 // blocks % parts * tiles_per_part * BLOCK_N
    c = tl.program_id(0) // 3 % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = (c < channels)[None, :]
    x += sample * strides[0] + (c.to(tl.int64) * strides[1])[None, :]
    of_scale = sample * count * 3 * channels + scale * channels + c[None, :]
    taps += scale * 9 * channels + c
    weight = tl.load(share + sample * 3 + scale)
    step_down, step_right = dilation.to(tl.int64) * strides[2], dilation.to(tl.int64) * strides[3]
    kernel = ()  # in registers for the whole walk
    for tap in tl.static_range(9):
        kernel += (tl.load(taps + tap * channels, c < channels, 0.0)[None, :],)  # type: ignore[assignment]
    gathered = (tl.zeros((BLOCK_N, BLOCK_C), tl.float32),) * 9
    for tile in range(tiles_per_part):
        n = first + tile * BLOCK_N + tl.arange(0, BLOCK_N)
        row, column = n // width, n % width
        inside = (n < count)[:, None] & in_c
        here = of_scale + (n.to(tl.int64) * 3 * channels)[:, None]
        centre = x + address(row, column, strides)[:, None]
        if GRADIENT:
            upstream = tl.load(d_maps + here, inside, 0.0).to(tl.float32)
        total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
        collected = ()
        for tap in tl.static_range(9):
            y, z = row + (tap // 3 - 1) * dilation, column + (tap % 3 - 1) * dilation
            valid = inside & within(y, z, height, width)[:, None]
            further = (tap // 3 - 1) * step_down + (tap % 3 - 1) * step_right
            value = tl.load(centre + further, valid, 0.0).to(tl.float32)
            total += value * kernel[tap]
            if GRADIENT:
                collected += (gathered[tap] + upstream * value,)  # type: ignore[assignment]
        if GRADIENT:
            gathered = collected  # type: ignore[assignment]
        tl.store(maps + here, (weight * total).to(maps.dtype.element_ty), inside)
    if GRADIENT:
        d_taps += (row_of_part * 3 + scale) * 9 * channels + c
        for tap in tl.static_range(9):
            tl.store(d_taps + tap * channels, tl.sum(gathered[tap], 0), c < channels)


@triton.jit
def input_gradient(  # type: ignore[no-untyped-def]
    d_maps,  # [B, N, 3, C]
    taps,  # [3, 9, C]
    share,  # [B, 3]
    d_x,
    height,
    width,
    strides,
    channels,
    parts,
    tiles_per_part,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The convolutions transposed: ``Σ_scales share · Σ_taps tap · d_maps``."""
    blocks, count = tl.cdiv(channels, BLOCK_C), height * width
    sample = (tl.program_id(0) // blocks // parts).to(tl.int64)
    first = tl.program_id(0) // blocks % parts * tiles_per_part * BLOCK_N
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = (c < channels)[None, :]
    d_x += sample * strides[0] + (c.to(tl.int64) * strides[1])[None, :]
    d_maps += sample * count * 3 * channels + c[None, :]
    for tile in range(tiles_per_part):
        n = first + tile * BLOCK_N + tl.arange(0, BLOCK_N)
        row, column = n // width, n % width
        inside = (n < count)[:, None] & in_c
        total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
        # Not unrolled: 27 taps would be kept in registers.
        for scale in range(3):
            part = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
            for tap in tl.static_range(9):
                y, z = row - ((tap // 3 - 1) << scale), column - ((tap % 3 - 1) << scale)
                there = (y * width + z).to(tl.int64) * 3 * channels + scale * channels
                valid = inside & within(y, z, height, width)[:, None]
                upstream = tl.load(d_maps + there[:, None], valid, 0.0).to(tl.float32)
                part += upstream * tl.load(taps + (scale * 9 + tap) * channels + c, c < channels, 0.0)[None, :]
            total += part * tl.load(share + sample * 3 + scale)
        at = d_x + address(row, column, strides)[:, None]
        tl.store(at, total.to(d_x.dtype.element_ty), inside)
