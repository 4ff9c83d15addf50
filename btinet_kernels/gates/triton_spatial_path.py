"""Triton kernels of the spatial gate: a convolution of width 7 of the two maps, and its gradients.

A line is the seven taps that differ along the last axis only: 1, 7 or 49 of them. The maps, ``[B, 2, N]``, are small
and stay in the L2 cache. Unlike the library's convolutions these never round to tf32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def shift_of(size, line, tap, LINES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where a tap lies: depth, row and column, and positions further."""
    depth, row, column = 0, line - LINES // 2, tap - 3
    if LINES == 49:
        depth, row = line // 7 - 3, line % 7 - 3
    return depth, row, column, (depth * size[1] + row) * size[2] + column


@triton.jit
def within(n, size, depth, row, column):  # type: ignore[no-untyped-def]
    """Whether there is a position that far from position ``n``."""
    z, y, x = n // (size[2] * size[1]) + depth, n // size[2] % size[1] + row, n % size[2] + column
    return (z >= 0) & (z < size[0]) & (y >= 0) & (y < size[1]) & (x >= 0) & (x < size[2])


@triton.jit
def spatial_gate_of_tiles(  # type: ignore[no-untyped-def]
    maps,  # [B, 2, N]
    weight,  # [2, LINES, 7]
    bias,
    gate,  # [B, N]
    size,
    count,
    LINES: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``σ(convolution(maps))``."""
    tiles = tl.cdiv(count, BLOCK_N)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    n = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < count
    maps += sample * 2 * count
    tap = tl.arange(0, 8)[None, :]
    total = tl.zeros((BLOCK_N, 8), tl.float32)
    for line in range(LINES):
        depth, row, column, further = shift_of(size, line, tap, LINES)
        valid = inside[:, None] & (tap < 7) & within(n[:, None], size, depth, row, column)
        at, of_tap = n[:, None] + further, weight + line * 7 + tap
        total += tl.load(maps + at, valid, 0.0) * tl.load(of_tap, tap < 7, 0.0)
        total += tl.load(maps + count + at, valid, 0.0) * tl.load(of_tap + LINES * 7, tap < 7, 0.0)
    tl.store(gate + sample * count + n, tl.sigmoid(tl.sum(total, 1) + tl.load(bias)), inside)


@triton.jit
def maps_gradient_of_tiles(  # type: ignore[no-untyped-def]
    d_gate,  # [B, N]
    gate,  # [B, N]
    weight,  # [2, LINES, 7]
    ties,  # [B, N]
    d_maps,  # [B, 2, N]: for each channel that holds the maximum; for each channel
    size,
    count,
    channels,
    LINES: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The convolution transposed, and what a channel gets of it."""
    tiles = tl.cdiv(count, BLOCK_N)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    n = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < count
    d_gate += sample * count
    gate += sample * count
    tap = tl.arange(0, 8)[None, :]
    d_maximum, d_average = tl.zeros((BLOCK_N, 8), tl.float32), tl.zeros((BLOCK_N, 8), tl.float32)
    for line in range(LINES):
        depth, row, column, further = shift_of(size, line, tap, LINES)
        valid = inside[:, None] & (tap < 7) & within(n[:, None], size, -depth, -row, -column)
        at, of_tap = n[:, None] - further, weight + line * 7 + tap
        share = tl.load(gate + at, valid, 0.0)
        upstream = tl.load(d_gate + at, valid, 0.0) * share * (1 - share)
        d_maximum += upstream * tl.load(of_tap, tap < 7, 0.0)
        d_average += upstream * tl.load(of_tap + LINES * 7, tap < 7, 0.0)
    d_maps += sample * 2 * count
    # Channels that tie for the maximum share evenly, as torch.amax has it.
    tl.store(d_maps + n, tl.sum(d_maximum, 1) / tl.load(ties + sample * count + n, inside, 1.0), inside)
    tl.store(d_maps + count + n, tl.sum(d_average, 1) / channels, inside)


@triton.jit
def convolution_gradient_of_parts(  # type: ignore[no-untyped-def]
    d_gate,  # [B, N]
    gate,  # [B, N]
    maps,  # [B, 2, N]
    partial,  # [parts, LINES, 2, 8]: a line's taps of both maps; the eighth of the first is the bias
    size,
    batch,
    count,
    tiles_per_part,
    LINES: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gradients of one line's weights and of the bias, over some of the positions of the batch."""
    line, part = tl.program_id(0) % LINES, (tl.program_id(0) // LINES).to(tl.int64)
    k = tl.arange(0, 16)[None, :]
    depth, row, column, further = shift_of(size, line, k % 8, LINES)
    total = tl.zeros((BLOCK_N, 16), tl.float32)
    for tile in range(tiles_per_part):
        at = (part * tiles_per_part + tile) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = at // count < batch
        share = tl.load(gate + at, inside, 0.0)
        upstream = tl.load(d_gate + at, inside, 0.0) * share * (1 - share)
        sample, n = (at // count)[:, None], (at % count)[:, None]
        valid = inside[:, None] & (k % 8 < 7) & within(n, size, depth, row, column)
        value = tl.load(maps + (sample * 2 + k // 8) * count + n + further, valid, 0.0)
        total += upstream[:, None] * tl.where(k == 7, 1.0, value)
    tl.store(partial + (part * LINES + line) * 16 + tl.arange(0, 16), tl.sum(total, 0))
