"""Triton kernels of the gradient through the statistics of the dense tensor."""

from __future__ import annotations

import triton
import triton.language as tl

from btinet_kernels.interaction.triton_tiles import (
    add_context,
    add_exact_product,
    has_next,
    offset_of,
    relu,
    step_of,
)


@triton.jit
def softmax_context_gradient(  # type: ignore[no-untyped-def]
    seg,
    weight,
    bias,
    pool_weight,
    log_sum_exp,
    pooled,
    d_pooled,
    d_context,  # [B, N, h], gradient of the context before its ReLU
    d_pool_weight,  # [B, tiles, h]
    size,
    strides,
    count,
    channels,
    hidden,
    tiles,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Recompute the context of a tile and differentiate its pooling by a softmax."""
    row = tl.program_id(0).to(tl.int64)
    sample = row // tiles
    n = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < count
    seg += sample * strides[0]
    here = offset_of(n, size, strides, EVEN)
    h = tl.arange(0, BLOCK_H)
    in_h = h < hidden
    context = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
    for block in range(tl.cdiv(channels, BLOCK_C)):
        c = block * BLOCK_C + tl.arange(0, BLOCK_C)
        _, context = add_context(context, seg, weight, here, c, h, inside, channels, hidden, strides[1], PRECISION)
    context = relu(context + tl.load(bias + h, in_h, 0.0)[None, :])
    direction = tl.load(pool_weight + h, in_h, 0.0)[None, :]
    upstream = tl.load(d_pooled + sample * hidden + h, in_h, 0.0)[None, :]
    typical = tl.load(pooled + sample * hidden + h, in_h, 0.0)[None, :]
    share = tl.exp(tl.sum(context * direction, 1) - tl.load(log_sum_exp + sample))
    share = tl.where(inside, share, 0.0)
    # The gradient of a logit: its position's share of what its context gains over the pooled one.
    d_logit = (share * (tl.sum(context * upstream, 1) - tl.sum(typical * upstream)))[:, None]
    tl.store(d_pool_weight + row * hidden + h, tl.sum(tl.where(inside[:, None], context * d_logit, 0.0), 0), in_h)
    d_active = tl.where(context > 0, share[:, None] * upstream + d_logit * direction, 0.0)
    at = d_context + ((sample * count + n) * hidden)[:, None] + h[None, :]
    tl.store(at, d_active, inside[:, None] & in_h[None, :])


@triton.jit
def statistics_gradient(  # type: ignore[no-untyped-def]
    seg,
    grad,
    scale,
    weight,
    active,  # uint8 [B, N, ⌈h/8⌉] where the context's ReLU passed, or d_context of a softmax
    mean,
    d_mean,
    d_variance,
    d_edges,
    d_pooled,
    out,
    d_weights,  # [parts, h C + h]: weight, then bias
    size,
    seg_strides,
    grad_strides,
    out_strides,
    batch,
    count,
    channels,
    hidden,
    tiles,
    samples_per_part,
    tiles_per_part,
    SEG_EVEN: tl.constexpr,
    GRAD_EVEN: tl.constexpr,
    OUT_EVEN: tl.constexpr,
    VARIANCE: tl.constexpr,
    EDGE_AXES: tl.constexpr,
    AVERAGE: tl.constexpr,  # the context was pooled by its mean
    SOFTMAX: tl.constexpr,
    DENSE: tl.constexpr,  # write the gradient of seg
    WEIGHTS: tl.constexpr,  # write the gradient of the context's weights; needs H_LOOP = 1
    SEG_TERMS: tl.constexpr,
    OUT_TERMS: tl.constexpr,
    PRECISION: tl.constexpr,
    H_GROUPS: tl.constexpr,
    H_LOOP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """``grad · scale`` plus the gradient through the statistics, for some channels of some samples' tiles."""
    c_blocks = tl.cdiv(channels, BLOCK_C)
    c_block = tl.program_id(0) % c_blocks
    group = tl.program_id(0) // c_blocks % H_GROUPS
    part = (tl.program_id(0) // c_blocks // H_GROUPS).to(tl.int64)
    tile_parts = tl.cdiv(tiles, tiles_per_part)
    first_sample = part // tile_parts * samples_per_part
    first_tile = tl.program_id(0) // c_blocks // H_GROUPS % tile_parts * tiles_per_part
    c = c_block * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < channels
    column = c.to(tl.int64)[None, :]
    width = (hidden + 7) // 8
    h = group * BLOCK_H + tl.arange(0, BLOCK_H)
    weights = tl.zeros((BLOCK_H, BLOCK_C), tl.float32)
    biases = tl.zeros((BLOCK_H,), tl.float32)
    for sample in range(first_sample, tl.minimum(first_sample + samples_per_part, batch)):
        vectors = sample * channels + c
        if DENSE:
            factor = tl.load(scale + vectors, in_c, 0.0)[None, :]
            constant = (tl.load(d_mean + vectors, in_c, 0.0) / count)[None, :]
            if VARIANCE:
                # constant + slope · (value - centre); multiplied out it would cancel
                centre = tl.load(mean + vectors, in_c, 0.0)[None, :]
                slope = (2 * tl.load(d_variance + vectors, in_c, 0.0) / count)[None, :]
            if EDGE_AXES > 0:
                steepness = tl.load(d_edges + sample) / (1.0 * channels * count)
        gathered = tl.zeros((BLOCK_H, BLOCK_C), tl.float32)
        counted = tl.zeros((BLOCK_H,), tl.float32)
        for tile in range(first_tile, tl.minimum(first_tile + tiles_per_part, tiles)):
            n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            inside = n < count
            valid = inside[:, None] & in_c[None, :]
            here = seg + sample * seg_strides[0] + column * seg_strides[1]
            value = tl.load(here + offset_of(n, size, seg_strides, SEG_EVEN)[:, None], valid, 0.0)
            if DENSE:
                grad_at = sample * grad_strides[0] + offset_of(n, size, grad_strides, GRAD_EVEN)[:, None]
                upstream = tl.load(grad + grad_at + column * grad_strides[1], valid, 0.0).to(tl.float32)
                result = upstream * factor + constant
                if VARIANCE:
                    result += slope * (value.to(tl.float32) - centre)
                for axis in tl.static_range(EDGE_AXES):
                    step = step_of(size, axis)
                    up = (inside & has_next(n, size, axis))[:, None] & in_c[None, :]
                    there = offset_of(n + step, size, seg_strides, SEG_EVEN)[:, None]
                    rise = tl.load(here + there, up, 0.0).to(tl.float32) - value.to(tl.float32)
                    result -= tl.where(up & (rise > 0), steepness, 0.0) - tl.where(up & (rise < 0), steepness, 0.0)
                    down = (inside & (n >= step) & has_next(n - step, size, axis))[:, None] & in_c[None, :]
                    there = offset_of(n - step, size, seg_strides, SEG_EVEN)[:, None]
                    rise = value.to(tl.float32) - tl.load(here + there, down, 0.0).to(tl.float32)
                    result += tl.where(down & (rise > 0), steepness, 0.0) - tl.where(down & (rise < 0), steepness, 0.0)
            if AVERAGE or SOFTMAX:
                for turn in range(H_LOOP):
                    h_block = group * H_LOOP + turn
                    column_h = h_block * BLOCK_H + tl.arange(0, BLOCK_H)
                    in_h = column_h < hidden
                    if DENSE:
                        kernel_at = weight + column_h[:, None].to(tl.int64) * channels + c[None, :]
                        kernel = tl.load(kernel_at, in_h[:, None] & in_c[None, :], 0.0)
                        if AVERAGE:
                            share = tl.load(d_pooled + sample * hidden + column_h, in_h, 0.0) / count
                            kernel *= share[:, None]
                    if AVERAGE:
                        byte = h_block * (BLOCK_H // 8) + tl.arange(0, BLOCK_H // 8)
                        byte_at = active + ((sample * count + n) * width)[:, None] + byte[None, :]
                        packed = tl.load(byte_at, inside[:, None] & (byte < width)[None, :], 0).to(tl.int32)
                        bits = (packed[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
                        passed = tl.reshape(bits, (BLOCK_N, BLOCK_H)).to(tl.float32)
                        if DENSE:
                            result = add_exact_product(passed.to(tl.bfloat16), kernel, result, OUT_TERMS)
                        if WEIGHTS:
                            gathered = add_exact_product(tl.trans(passed.to(tl.bfloat16)), value, gathered, SEG_TERMS)
                    else:
                        value_at = active + ((sample * count + n) * hidden)[:, None] + column_h[None, :]
                        passed = tl.load(value_at, inside[:, None] & in_h[None, :], 0.0)
                        if DENSE:
                            result = tl.dot(passed, kernel, result, input_precision=PRECISION)
                        if WEIGHTS:
                            gathered = tl.dot(
                                tl.trans(passed), value.to(tl.float32), gathered, input_precision=PRECISION
                            )
                    if WEIGHTS and c_block == 0:
                        counted += tl.sum(passed, 0)
            if DENSE:
                out_at = sample * out_strides[0] + offset_of(n, size, out_strides, OUT_EVEN)[:, None]
                tl.store(out + out_at + column * out_strides[1], result.to(out.dtype.element_ty), valid)
        if WEIGHTS:
            if AVERAGE:
                upstream_h = tl.load(d_pooled + sample * hidden + h, h < hidden, 0.0) / count
                gathered *= upstream_h[:, None]
                counted *= upstream_h
            weights += gathered
            biases += counted
    if WEIGHTS:
        d_weights += part * hidden * (channels + 1)
        in_w = (h < hidden)[:, None] & in_c[None, :]
        tl.store(d_weights + h[:, None].to(tl.int64) * channels + c[None, :], weights, in_w)
        if c_block == 0:
            tl.store(d_weights + hidden * channels + h, biases, h < hidden)
