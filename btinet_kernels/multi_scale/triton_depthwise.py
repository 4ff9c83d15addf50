"""Triton kernels of dilated depthwise convolutions and of their gradients, and their launches.

There are one or several scales S, each of twice the dilation of the one before; several are weighted by shares. A
program walks through consecutive positions of one image, row-major, for a block of channels: the rows that its taps
reach stay in the L1 cache. The maps of the scales lie side by side, ``[B, N, S, C]``: rows of a matrix product.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from btinet_kernels.interaction.triton_tiles import MOST_REGISTERS, channel_block, launch

# Elements of a tile: eight for each thread of four warps, or four where each has sums of nine taps in registers.
TILE, TILE_WITH_SUMS = 1024, 512
# Eight for each multiprocessor of an H200. Beyond that, longer walks read fewer rows twice.
ENOUGH_PROGRAMS = 1056


@triton.jit
def address(row, column, strides):  # type: ignore[no-untyped-def]
    """``strides``: batch, channel, row, column."""
    return row.to(tl.int64) * strides[2] + column.to(tl.int64) * strides[3]


@triton.jit
def within(row, column, height, width):  # type: ignore[no-untyped-def]
    """Whether there is such a position."""
    return (row >= 0) & (row < height) & (column >= 0) & (column < width)


@triton.jit
def share_of(share, index):  # type: ignore[no-untyped-def]
    """A share, or 1 where there are none."""
    if share is None:
        return 1.0
    else:
        return tl.load(share + index)


@triton.jit
def maps_of_scale(  # type: ignore[no-untyped-def]
    x,
    taps,  # [S, 9, C]
    share,  # [B, S], or None
    maps,  # [B, N, S, C]
    d_maps,  # [B, N, S, C]
    d_taps,  # [B, parts, S, 9, C]
    height,
    width,
    strides,
    channels,
    dilation,  # of the first scale
    parts,
    tiles_per_part,
    SCALES: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``share · convolution(x)`` for one scale; and, at every tap, ``Σ_n d_maps · x``: its gradient over the share."""
    blocks, count = tl.cdiv(channels, BLOCK_C), height * width
    scale = tl.program_id(0) % SCALES
    reach = dilation << scale
    row_of_part = (tl.program_id(0) // SCALES // blocks).to(tl.int64)
    sample = row_of_part // parts
    first = tl.program_id(0) // SCALES // blocks % parts * tiles_per_part * BLOCK_N
    c = tl.program_id(0) // SCALES % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = (c < channels)[None, :]
    x += sample * strides[0] + (c.to(tl.int64) * strides[1])[None, :]
    of_scale = sample * count * SCALES * channels + scale * channels + c[None, :]
    taps += scale * 9 * channels + c
    weight = share_of(share, sample * SCALES + scale)
    step_down, step_right = reach.to(tl.int64) * strides[2], reach.to(tl.int64) * strides[3]
    kernel = ()  # in registers for the whole walk
    for tap in tl.static_range(9):
        kernel += (tl.load(taps + tap * channels, c < channels, 0.0)[None, :],)  # type: ignore[assignment]
    gathered = (tl.zeros((BLOCK_N, BLOCK_C), tl.float32),) * 9
    for tile in range(tiles_per_part):
        n = first + tile * BLOCK_N + tl.arange(0, BLOCK_N)
        row, column = n // width, n % width
        inside = (n < count)[:, None] & in_c
        here = of_scale + (n.to(tl.int64) * SCALES * channels)[:, None]
        centre = x + address(row, column, strides)[:, None]
        if GRADIENT:
            upstream = tl.load(d_maps + here, inside, 0.0).to(tl.float32)
        total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
        collected = ()
        for tap in tl.static_range(9):
            y, z = row + (tap // 3 - 1) * reach, column + (tap % 3 - 1) * reach
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
        d_taps += (row_of_part * SCALES + scale) * 9 * channels + c
        for tap in tl.static_range(9):
            tl.store(d_taps + tap * channels, tl.sum(gathered[tap], 0), c < channels)


@triton.jit
def input_gradient(  # type: ignore[no-untyped-def]
    d_maps,  # [B, N, S, C]
    taps,  # [S, 9, C]
    share,  # [B, S], or None
    d_x,
    height,
    width,
    strides,
    channels,
    dilation,  # of the first scale
    parts,
    tiles_per_part,
    SCALES: tl.constexpr,
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
    d_maps += sample * count * SCALES * channels + c[None, :]
    for tile in range(tiles_per_part):
        n = first + tile * BLOCK_N + tl.arange(0, BLOCK_N)
        row, column = n // width, n % width
        inside = (n < count)[:, None] & in_c
        total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
        # Not unrolled: 27 taps would be kept in registers.
        for scale in range(SCALES):
            reach = dilation << scale
            part = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
            for tap in tl.static_range(9):
                y, z = row - (tap // 3 - 1) * reach, column - (tap % 3 - 1) * reach
                there = (y * width + z).to(tl.int64) * SCALES * channels + scale * channels
                valid = inside & within(y, z, height, width)[:, None]
                upstream = tl.load(d_maps + there[:, None], valid, 0.0).to(tl.float32)
                part += upstream * tl.load(taps + (scale * 9 + tap) * channels + c, c < channels, 0.0)[None, :]
            total += part * share_of(share, sample * SCALES + scale)
        at = d_x + address(row, column, strides)[:, None]
        tl.store(at, total.to(d_x.dtype.element_ty), inside)


def depthwise_maps(
    x: Tensor, taps: Tensor, share: Tensor | None, dilation: int, d_maps: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Maps ``[B, N, S, C]`` of taps ``[S, 9, C]``; given their gradient, also that of taps over share, [B, S, 9, C]."""
    (batch, channels), scales = x.shape[:2], len(taps)
    maps = x.new_empty(batch, x.shape[2:].numel(), scales, channels)
    if not x.numel():
        return maps, taps.new_zeros(batch, scales, 9, channels)
    tile = TILE if d_maps is None else TILE_WITH_SUMS
    programs, walks = walk(x, maps.shape[1], tile, lanes=scales)
    gathered = taps.new_empty(batch, 0 if d_maps is None else walks["parts"], scales, 9, channels)
    launch(
        maps_of_scale,
        programs,
        x,
        taps,
        share,
        maps,
        maps if d_maps is None else d_maps,
        gathered,
        *_sizes(x),
        dilation,
        SCALES=scales,
        GRADIENT=d_maps is not None,
        **walks,
    )
    return maps, gathered if d_maps is None else gathered.sum(1)


def depthwise_input_gradient(x: Tensor, d_maps: Tensor, taps: Tensor, share: Tensor | None, dilation: int) -> Tensor:
    """Gradient of x from that of its maps, in the format of x."""
    d_x = torch.empty_like(x)
    if x.numel():
        programs, walks = walk(x, x.shape[2:].numel(), TILE, lanes=1)
        launch(input_gradient, programs, d_maps, taps, share, d_x, *_sizes(d_x), dilation, SCALES=len(taps), **walks)
    return d_x


def walk(x: Tensor, positions: int, tile: int, lanes: int) -> tuple[int, dict[str, Any]]:
    """How many programs there are, ``lanes`` for each part of the positions of an image like ``x`` and block of its
    channels, and how each walks."""
    batch, channels = x.shape[:2]
    block_c = channel_block(channels) if x.stride(1) == 1 else 16  # planes are read in long runs of positions
    block_n = tile // block_c
    tiles, lanes = triton.cdiv(positions, block_n), batch * lanes * triton.cdiv(channels, block_c)
    tiles_per_part = min(tiles, max(1, lanes * tiles // ENOUGH_PROGRAMS))
    parts = triton.cdiv(tiles, tiles_per_part)
    return lanes * parts, {
        "parts": parts,
        "tiles_per_part": tiles_per_part,
        "BLOCK_N": block_n,
        "BLOCK_C": block_c,
        "num_warps": 4,
        "maxnreg": MOST_REGISTERS,
    }


def _sizes(dense: Tensor) -> tuple[int, int, tuple[int, ...], int]:
    """Height, width, strides and channels."""
    return *dense.shape[2:], dense.stride(), dense.shape[1]
