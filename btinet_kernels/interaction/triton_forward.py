"""Triton kernels that read the dense tensor into statistics, and those that write the result.

A program reduces one tile, positions times channels, and a second kernel combines the tiles in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from btinet_kernels.interaction.triton_tiles import add_context, has_next, offset_of, relu, step_of


@triton.jit
def statistics_of_tiles(  # type: ignore[no-untyped-def]
    seg,
    weight,
    bias,
    pool_weight,
    sums,  # [B, tiles, C]
    squares,  # [B, tiles, C], around the tile's own mean
    edges,  # [B, tiles, H_BLOCKS]
    pooled,  # [B, tiles, h]
    shares,  # [B, tiles, 2]: largest logit, Σ exp(logit - largest)
    active,  # [B, N, ⌈h/8⌉]
    size,
    strides,
    count,
    channels,
    hidden,
    tiles,
    EVEN: tl.constexpr,
    CONTEXT: tl.constexpr,
    SOFTMAX: tl.constexpr,
    VARIANCE: tl.constexpr,
    ACTIVE: tl.constexpr,
    EDGE_AXES: tl.constexpr,  # 0: no edges
    PRECISION: tl.constexpr,
    H_BLOCKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One read of a tile. Programs of the same tile share its channels' moments and split the context's columns."""
    program = tl.program_id(0)
    h_block = program % H_BLOCKS
    row = (program // H_BLOCKS).to(tl.int64)
    first = program // H_BLOCKS % tiles * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    inside = n < count
    members = tl.minimum(count - first, BLOCK_N).to(tl.float32)
    seg += row // tiles * strides[0]
    here = offset_of(n, size, strides, EVEN)
    h = h_block * BLOCK_H + tl.arange(0, BLOCK_H)
    context = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
    roughness = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for block in range(tl.cdiv(channels, BLOCK_C)):
        c = block * BLOCK_C + tl.arange(0, BLOCK_C)
        if CONTEXT:
            value, context = add_context(
                context, seg, weight, here, c, h, inside, channels, hidden, strides[1], PRECISION
            )
        else:
            at = seg + here[:, None] + (c.to(tl.int64) * strides[1])[None, :]
            value = tl.load(at, inside[:, None] & (c < channels)[None, :], 0.0).to(tl.float32)
        if block % H_BLOCKS == h_block:
            total = tl.sum(value, 0)
            tl.store(sums + row * channels + c, total, c < channels)
            if VARIANCE:
                centred = tl.where(inside[:, None], value - total / members, 0.0)
                tl.store(squares + row * channels + c, tl.sum(centred * centred, 0), c < channels)
            for axis in tl.static_range(EDGE_AXES):
                linked = (inside & has_next(n, size, axis))[:, None] & (c < channels)[None, :]
                there = offset_of(n + step_of(size, axis), size, strides, EVEN)
                neighbour = tl.load(seg + there[:, None] + (c.to(tl.int64) * strides[1])[None, :], linked, 0.0)
                roughness += tl.where(linked, tl.abs(neighbour.to(tl.float32) - value), 0.0)
    if EDGE_AXES > 0:
        tl.store(edges + row * H_BLOCKS + h_block, tl.sum(roughness))
    if CONTEXT:
        context += tl.load(bias + h, h < hidden, 0.0)[None, :]
        if ACTIVE:
            place = (1 << (tl.arange(0, BLOCK_H) % 8))[None, :]
            bits = tl.where((context > 0) & (h < hidden)[None, :], place, 0)
            packed = tl.sum(tl.reshape(bits, (BLOCK_N, BLOCK_H // 8, 8)), 2).to(tl.uint8)
            width = (hidden + 7) // 8
            byte = h_block * (BLOCK_H // 8) + tl.arange(0, BLOCK_H // 8)
            at = active + ((row // tiles * count + n) * width)[:, None] + byte[None, :]
            tl.store(at, packed, inside[:, None] & (byte < width)[None, :])
        context = tl.where(inside[:, None], relu(context), 0.0)
        if SOFTMAX:
            logit = tl.sum(context * tl.load(pool_weight + h, h < hidden, 0.0)[None, :], 1)
            logit = tl.where(inside, logit, -float("inf"))
            top = tl.max(logit, 0)
            share = tl.exp(logit - top)
            context *= share[:, None]
            tl.store(shares + row * 2, top)
            tl.store(shares + row * 2 + 1, tl.sum(share, 0))
        tl.store(pooled + row * hidden + h, tl.sum(context, 0), h < hidden)


@triton.jit
def statistics_of_samples(  # type: ignore[no-untyped-def]
    sums,
    squares,
    edges,
    pooled,
    shares,
    mean_out,
    variance_out,
    edges_out,
    pooled_out,
    log_sum_exp_out,
    count,
    channels,
    hidden,
    tiles,
    tile_size,
    edge_parts,
    CONTEXT: tl.constexpr,
    SOFTMAX: tl.constexpr,
    VARIANCE: tl.constexpr,
    EDGES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Combine what `statistics_of_tiles` left: a program takes some columns of one sample."""
    blocks = tl.cdiv(tl.maximum(channels, hidden), BLOCK)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    first_block = tl.program_id(0) % blocks == 0
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    t = tl.arange(0, BLOCK_T)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, tiles, BLOCK_T):
        at = (sample * tiles + first + t)[:, None] * channels + column[None, :]
        valid = (first + t < tiles)[:, None] & (column < channels)[None, :]
        total += tl.sum(tl.load(sums + at, valid, 0.0), 0)
    mean = total / count
    tl.store(mean_out + sample * channels + column, mean, column < channels)
    if VARIANCE:
        square = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, tiles, BLOCK_T):
            at = (sample * tiles + first + t)[:, None] * channels + column[None, :]
            valid = (first + t < tiles)[:, None] & (column < channels)[None, :]
            members = tl.maximum(tl.minimum(count - (first + t) * tile_size, tile_size), 1).to(tl.float32)[:, None]
            apart = tl.load(sums + at, valid, 0.0) / members - mean[None, :]
            square += tl.sum(tl.where(valid, tl.load(squares + at, valid, 0.0) + members * apart * apart, 0.0), 0)
        tl.store(variance_out + sample * channels + column, square / count, column < channels)
    if EDGES:
        parts = tiles * edge_parts
        roughness = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, parts, BLOCK):
            part = first + tl.arange(0, BLOCK)
            roughness += tl.load(edges + sample * parts + part, part < parts, 0.0)
        edge = tl.sum(roughness, 0) / (1.0 * channels * count)
        tl.store(edges_out + sample, edge, first_block)
    if CONTEXT:
        weight = 1.0 * count
        top = 0.0
        if SOFTMAX:
            tops = tl.full((BLOCK_T,), -float("inf"), tl.float32)
            for first in range(0, tiles, BLOCK_T):
                at = shares + (sample * tiles + first + t) * 2
                tops = tl.maximum(tops, tl.load(at, first + t < tiles, -float("inf")))
            top = tl.max(tops, 0)
            weights = tl.zeros((BLOCK_T,), tl.float32)
            for first in range(0, tiles, BLOCK_T):
                at = shares + (sample * tiles + first + t) * 2
                share = tl.exp(tl.load(at, first + t < tiles, -float("inf")) - top)
                weights += tl.load(at + 1, first + t < tiles, 0.0) * share
            weight = tl.sum(weights, 0)
            tl.store(log_sum_exp_out + sample, top + tl.log(weight), first_block)
        total = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, tiles, BLOCK_T):
            at = (sample * tiles + first + t)[:, None] * hidden + column[None, :]
            part = tl.load(pooled + at, (first + t < tiles)[:, None] & (column < hidden)[None, :], 0.0)
            if SOFTMAX:
                tops = tl.load(shares + (sample * tiles + first + t) * 2, first + t < tiles, -float("inf"))
                part *= tl.exp(tops - top)[:, None]
            total += tl.sum(part, 0)
        tl.store(pooled_out + sample * hidden + column, total / weight, column < hidden)


@triton.jit
def combine_sums(partial, out, tail, parts, columns, split, BLOCK_T: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sum ``[rows, parts, columns]`` over the parts, in a fixed order; columns from ``split`` on go to ``tail``."""
    blocks = tl.cdiv(columns, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    t = tl.arange(0, BLOCK_T)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, parts, BLOCK_T):
        at = (row * parts + first + t)[:, None] * columns + column[None, :]
        total += tl.sum(tl.load(partial + at, (first + t < parts)[:, None] & (column < columns)[None, :], 0.0), 0)
    tl.store(out + row * split + column, total, column < split)
    tl.store(tail + row * (columns - split) + column - split, total, (column >= split) & (column < columns))


@triton.jit
def channel_dot_of_parts(  # type: ignore[no-untyped-def]
    grad,
    seg,
    out,  # [B, parts, C]
    size,
    grad_strides,
    seg_strides,
    count,
    channels,
    parts,
    tiles_per_part,
    GRAD_EVEN: tl.constexpr,
    SEG_EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum of ``grad · seg`` over a part of a sample's positions, for some of the channels."""
    blocks = tl.cdiv(channels, BLOCK_C)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    grad += row // parts * grad_strides[0] + (c.to(tl.int64) * grad_strides[1])[None, :]
    seg += row // parts * seg_strides[0] + (c.to(tl.int64) * seg_strides[1])[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    first = tl.program_id(0) // blocks % parts * tiles_per_part * BLOCK_N
    for tile in range(tiles_per_part):
        n = first + tile * BLOCK_N + tl.arange(0, BLOCK_N)
        valid = (n < count)[:, None] & (c < channels)[None, :]
        upstream = tl.load(grad + offset_of(n, size, grad_strides, GRAD_EVEN)[:, None], valid, 0.0)
        value = tl.load(seg + offset_of(n, size, seg_strides, SEG_EVEN)[:, None], valid, 0.0)
        total += upstream.to(tl.float32) * value.to(tl.float32)
    tl.store(out + row * channels + c, tl.sum(total, 0), c < channels)


@triton.jit
def apply_to_tiles(  # type: ignore[no-untyped-def]
    base,
    enhanced,
    factor,  # [B, C] to scale, [B] to interpolate
    out,
    size,
    base_strides,
    enhanced_strides,
    out_strides,
    count,
    channels,
    BASE_EVEN: tl.constexpr,
    ENHANCED_EVEN: tl.constexpr,
    OUT_EVEN: tl.constexpr,
    INTERPOLATE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``base · factor[b, c]``, or ``base + factor[b] · (enhanced - base)``."""
    blocks, tiles = tl.cdiv(channels, BLOCK_C), tl.cdiv(count, BLOCK_N)
    # The reduction has read the last tiles last: starting there finds them in the L2 cache.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    c = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    n = program // blocks % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    sample = (program // blocks // tiles).to(tl.int64)
    valid = (n < count)[:, None] & (c < channels)[None, :]
    column = c.to(tl.int64)[None, :]
    at = sample * base_strides[0] + offset_of(n, size, base_strides, BASE_EVEN)[:, None] + column * base_strides[1]
    value = tl.load(base + at, valid, 0.0).to(tl.float32)
    if INTERPOLATE:
        at = sample * enhanced_strides[0] + offset_of(n, size, enhanced_strides, ENHANCED_EVEN)[:, None]
        goal = tl.load(enhanced + at + column * enhanced_strides[1], valid, 0.0).to(tl.float32)
        value += tl.load(factor + sample) * (goal - value)
    else:
        value *= tl.load(factor + sample * channels + c, c < channels, 0.0)[None, :]
    at = sample * out_strides[0] + offset_of(n, size, out_strides, OUT_EVEN)[:, None] + column * out_strides[1]
    tl.store(out + at, value.to(out.dtype.element_ty), valid)
