"""Triton kernels of dual-path attention: two passes over x forward, two over it and the upstream gradient backward.

The passes that reduce take tiles of positions through some blocks of channels; what they leave in parts, over tiles
for the channels and over groups of channels for the positions, is combined in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from btinet_kernels.interaction.triton_tiles import offset_of, relu


@triton.jit
def summaries_of_tiles(  # type: ignore[no-untyped-def]
    x,
    sums,  # [B, tiles, C], over the positions of a tile
    maps,  # [B, groups, 2, N], over the channels of a group: maximum, sum over C
    size,
    strides,
    count,
    channels,
    tiles,
    groups,
    blocks_per_group,
    EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """What both gates are made of, in one read."""
    group = tl.program_id(0) % groups
    row = (tl.program_id(0) // groups).to(tl.int64)
    sample = row // tiles
    n = tl.program_id(0) // groups % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < count
    x += sample * strides[0] + offset_of(n, size, strides, EVEN)[:, None]
    top = tl.full((BLOCK_N, BLOCK_C), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for block in range(blocks_per_group):
        c = (group * blocks_per_group + block) * BLOCK_C + tl.arange(0, BLOCK_C)
        valid = inside[:, None] & (c < channels)[None, :]
        value = tl.load(x + (c.to(tl.int64) * strides[1])[None, :], valid, 0.0).to(tl.float32)
        top = tl.maximum(top, tl.where(valid, value, -float("inf")))
        total += value
        tl.store(sums + row * channels + c, tl.sum(value, 0), c < channels)
    average = tl.sum(total, 1) / channels
    # A maximum may skip NaN, a sum does not.
    largest = tl.where(average != average, average, tl.max(top, 1))
    maps += (sample * groups + group) * 2 * count
    tl.store(maps + n, largest, inside)
    tl.store(maps + count + n, average, inside)


@triton.jit
def gate_tiles(  # type: ignore[no-untyped-def]
    x,
    residual,
    channel_gate,  # [B, C]
    spatial_gate,  # [B, N]
    out,
    size,
    x_strides,
    residual_strides,
    out_strides,
    count,
    channels,
    X_EVEN: tl.constexpr,
    RESIDUAL_EVEN: tl.constexpr,
    OUT_EVEN: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``x · channel gate · spatial gate``, or ``ReLU(that + residual)``."""
    blocks, tiles = tl.cdiv(channels, BLOCK_C), tl.cdiv(count, BLOCK_N)
    # The reduction has read the last tiles last: starting there finds them in the L2 cache.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    c = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    n = program // blocks % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    sample = (program // blocks // tiles).to(tl.int64)
    valid = (n < count)[:, None] & (c < channels)[None, :]
    column = c.to(tl.int64)[None, :]
    at = sample * x_strides[0] + offset_of(n, size, x_strides, X_EVEN)[:, None] + column * x_strides[1]
    value = tl.load(x + at, valid, 0.0).to(tl.float32)
    value *= tl.load(channel_gate + sample * channels + c, c < channels, 0.0)[None, :]
    value *= tl.load(spatial_gate + sample * count + n, n < count, 0.0)[:, None]
    if RESIDUAL:
        at = sample * residual_strides[0] + offset_of(n, size, residual_strides, RESIDUAL_EVEN)[:, None]
        added = tl.load(residual + at + column * residual_strides[1], valid, 0.0)
        value = relu(value + added.to(tl.float32))
    at = sample * out_strides[0] + offset_of(n, size, out_strides, OUT_EVEN)[:, None] + column * out_strides[1]
    tl.store(out + at, value.to(out.dtype.element_ty), valid)


@triton.jit
def gate_gradients_of_tiles(  # type: ignore[no-untyped-def]
    d_out,
    x,
    out,
    channel_gate,  # [B, C]
    spatial_gate,  # [B, N]
    maximum,  # [B, 2, N], of which the first is read
    d_residual,
    d_channel,  # [B, tiles, C]: Σ_n gradient · x · spatial gate
    d_spatial,  # [B, groups, 2, N]: Σ_c gradient · x · channel gate; how many channels hold the maximum
    size,
    d_out_strides,
    x_strides,
    out_strides,
    d_residual_strides,
    count,
    channels,
    tiles,
    groups,
    blocks_per_group,
    D_OUT_EVEN: tl.constexpr,
    X_EVEN: tl.constexpr,
    OUT_EVEN: tl.constexpr,
    D_RESIDUAL_EVEN: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradients of both gates, in one read; and with a residual its own, which is what passes the ReLU."""
    group = tl.program_id(0) % groups
    row = (tl.program_id(0) // groups).to(tl.int64)
    sample = row // tiles
    n = tl.program_id(0) // groups % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < count
    d_out += sample * d_out_strides[0] + offset_of(n, size, d_out_strides, D_OUT_EVEN)[:, None]
    x += sample * x_strides[0] + offset_of(n, size, x_strides, X_EVEN)[:, None]
    if RESIDUAL:
        out += sample * out_strides[0] + offset_of(n, size, out_strides, OUT_EVEN)[:, None]
        d_residual += sample * d_residual_strides[0]
        d_residual += offset_of(n, size, d_residual_strides, D_RESIDUAL_EVEN)[:, None]
    gate = tl.load(spatial_gate + sample * count + n, inside, 0.0)[:, None]
    top = tl.load(maximum + sample * 2 * count + n, inside, 0.0)[:, None]
    total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    ties = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for block in range(blocks_per_group):
        c = (group * blocks_per_group + block) * BLOCK_C + tl.arange(0, BLOCK_C)
        valid = inside[:, None] & (c < channels)[None, :]
        column = c.to(tl.int64)[None, :]
        value = tl.load(x + column * x_strides[1], valid, 0.0).to(tl.float32)
        upstream = tl.load(d_out + column * d_out_strides[1], valid, 0.0)
        if RESIDUAL:
            upstream = tl.where(tl.load(out + column * out_strides[1], valid, 0.0) <= 0, 0.0, upstream)
            tl.store(d_residual + column * d_residual_strides[1], upstream.to(d_residual.dtype.element_ty), valid)
        ties += tl.where(valid & (value == top), 1.0, 0.0)
        product = upstream.to(tl.float32) * value
        total += product * tl.load(channel_gate + sample * channels + c, c < channels, 0.0)[None, :]
        tl.store(d_channel + row * channels + c, tl.sum(product * gate, 0), c < channels)
    d_spatial += (sample * groups + group) * 2 * count
    tl.store(d_spatial + n, tl.sum(total, 1), inside)
    tl.store(d_spatial + count + n, tl.sum(ties, 1), inside)


@triton.jit
def input_gradient_of_tiles(  # type: ignore[no-untyped-def]
    upstream,  # of what the gates give
    x,
    channel_gate,  # [B, C]
    spatial_gate,  # [B, N]
    d_channel,  # [B, C], for every position
    maximum,  # [B, 2, N], of which the first is read
    d_maps,  # [B, 2, N]: for each channel that holds the maximum; for each channel
    d_x,
    size,
    upstream_strides,
    x_strides,
    d_x_strides,
    count,
    channels,
    UPSTREAM_EVEN: tl.constexpr,
    X_EVEN: tl.constexpr,
    D_X_EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``gradient · gates`` plus what comes back through both gates."""
    blocks, tiles = tl.cdiv(channels, BLOCK_C), tl.cdiv(count, BLOCK_N)
    program = tl.num_programs(0) - 1 - tl.program_id(0)  # last read, first found in the L2 cache
    c = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    n = program // blocks % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    sample = (program // blocks // tiles).to(tl.int64)
    in_c, inside = c < channels, n < count
    valid = inside[:, None] & in_c[None, :]
    column, of_channels, of_maps = c.to(tl.int64)[None, :], sample * channels + c, sample * 2 * count + n
    at = sample * upstream_strides[0] + offset_of(n, size, upstream_strides, UPSTREAM_EVEN)[:, None]
    result = tl.load(upstream + at + column * upstream_strides[1], valid, 0.0).to(tl.float32)
    result *= tl.load(channel_gate + of_channels, in_c, 0.0)[None, :]
    result *= tl.load(spatial_gate + sample * count + n, inside, 0.0)[:, None]
    result += tl.load(d_channel + of_channels, in_c, 0.0)[None, :]
    result += tl.load(d_maps + of_maps + count, inside, 0.0)[:, None]
    at = sample * x_strides[0] + offset_of(n, size, x_strides, X_EVEN)[:, None] + column * x_strides[1]
    top = tl.load(maximum + of_maps, inside, 0.0)[:, None]
    holds = (tl.load(x + at, valid, 0.0).to(tl.float32) == top).to(tl.float32)
    result += holds * tl.load(d_maps + of_maps, inside, 0.0)[:, None]
    at = sample * d_x_strides[0] + offset_of(n, size, d_x_strides, D_X_EVEN)[:, None] + column * d_x_strides[1]
    tl.store(d_x + at, result.to(d_x.dtype.element_ty), valid)
