"""Triton kernels of depthwise convolution and of its gradients.

A program walks through consecutive positions of one image, row-major, for a block of channels: the rows that its taps
reach stay in the L1 cache. ``geometry`` is ``reference.Geometry`` with tuples, ``strides`` are those of a tensor's
batch, channel, row and column.
"""

from __future__ import annotations

import triton
import triton.language as tl

from btinet_kernels.multi_scale.triton_depthwise import address, within
from btinet_kernels.normalization.triton_passes import vector_of


@triton.jit
def channels_of(block, channels, BLOCK_C: tl.constexpr):  # type: ignore[no-untyped-def]
    """A block of channels, and which of them there are, as a row."""
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    return c, (c < channels)[None, :]


@triton.jit
def sample_of(sample, c, strides):  # type: ignore[no-untyped-def]
    """Address of some channels of a sample, as a row."""
    return sample.to(tl.int64) * strides[0] + (c.to(tl.int64) * strides[1])[None, :]


@triton.jit
def steps_of(geometry, strides):  # type: ignore[no-untyped-def]
    """How far apart neighbouring taps lie, down and to the right."""
    dilation = geometry.dilation
    return tl.cast(dilation[0], tl.int64) * strides[2], tl.cast(dilation[1], tl.int64) * strides[3]


@triton.jit
def depthwise_of_parts(  # type: ignore[no-untyped-def]
    x,
    taps,  # [WIDE · HIGH, C]
    bias,  # [C], or None
    out,
    size,  # height and width of x
    x_strides,
    out_size,
    out_strides,
    channels,
    geometry,
    parts,
    tiles_per_part,
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The convolution at a part of an image's positions."""
    blocks, lane = tl.cdiv(channels, BLOCK_C), tl.program_id(0) // tl.cdiv(channels, BLOCK_C)
    c, in_c = channels_of(tl.program_id(0) % blocks, channels, BLOCK_C)
    x += sample_of(lane // parts, c, x_strides)
    out += sample_of(lane // parts, c, out_strides)
    shift = vector_of(bias, c, channels, 0.0)
    step_down, step_right = steps_of(geometry, x_strides)
    for tile in range(tiles_per_part):
        n = (lane % parts * tiles_per_part + tile) * BLOCK_N + tl.arange(0, BLOCK_N)
        row, column = n // out_size[1], n % out_size[1]
        inside = (n < out_size[0] * out_size[1])[:, None] & in_c
        top = row * geometry.stride[0] - geometry.padding[0]
        left = column * geometry.stride[1] - geometry.padding[1]
        corner = x + address(top, left, x_strides)[:, None]
        total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32) + shift
        for down in range(HIGH):  # not unrolled: what all taps load would not fit the registers
            y = top + down * geometry.dilation[0]
            for right in tl.static_range(WIDE):
                valid = inside & within(y, left + right * geometry.dilation[1], size[0], size[1])[:, None]
                value = tl.load(corner + down * step_down + right * step_right, valid, 0.0).to(tl.float32)
                total += value * tl.load(taps + (down * WIDE + right) * channels + c, c < channels, 0.0)[None, :]
        at = out + address(row, column, out_strides)[:, None]
        tl.store(at, total.to(out.dtype.element_ty), inside)


@triton.jit
def depthwise_input_gradient(  # type: ignore[no-untyped-def]
    d_out,
    taps,  # [WIDE · HIGH, C]
    d_x,
    size,  # height and width of x
    d_x_strides,
    out_size,
    d_out_strides,
    channels,
    geometry,
    parts,
    tiles_per_part,
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The convolution transposed. A program's positions lie a stride apart, so that the same taps reach all of them."""
    blocks, lane = tl.cdiv(channels, BLOCK_C), tl.program_id(0) // tl.cdiv(channels, BLOCK_C)
    c, in_c = channels_of(tl.program_id(0) % blocks, channels, BLOCK_C)
    phases = geometry.stride[0] * geometry.stride[1]
    first_row, first_column = lane % phases // geometry.stride[1], lane % geometry.stride[1]
    lane = lane // phases
    columns = tl.cdiv(size[1], geometry.stride[1])
    d_x += sample_of(lane // parts, c, d_x_strides)
    d_out += sample_of(lane // parts, c, d_out_strides)
    for tile in range(tiles_per_part):
        n = (lane % parts * tiles_per_part + tile) * BLOCK_N + tl.arange(0, BLOCK_N)
        row, column = n // columns * geometry.stride[0] + first_row, n % columns * geometry.stride[1] + first_column
        inside = within(row, column, size[0], size[1])[:, None] & in_c
        total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
        for down in range(HIGH):
            up = first_row + geometry.padding[0] - down * geometry.dilation[0]
            if up % geometry.stride[0] == 0:
                y = n // columns + up // geometry.stride[0]
                for right in tl.static_range(WIDE):
                    back = first_column + geometry.padding[1] - right * geometry.dilation[1]
                    if back % geometry.stride[1] == 0:
                        z = n % columns + back // geometry.stride[1]
                        valid = inside & within(y, z, out_size[0], out_size[1])[:, None]
                        upstream = tl.load(d_out + address(y, z, d_out_strides)[:, None], valid, 0.0).to(tl.float32)
                        tap = (down * WIDE + right) * channels
                        total += upstream * tl.load(taps + tap + c, c < channels, 0.0)[None, :]
        at = d_x + address(row, column, d_x_strides)[:, None]
        tl.store(at, total.to(d_x.dtype.element_ty), inside)


@triton.jit
def depthwise_weight_gradient_of_parts(  # type: ignore[no-untyped-def]
    x,
    d_out,
    gathered,  # [B, parts, HIGH · WIDE, C]
    size,  # height and width of x
    x_strides,
    out_size,
    d_out_strides,
    channels,
    geometry,
    parts,
    tiles_per_part,
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums for ROWS rows of taps, over a part of an image's positions."""
    blocks, lane = tl.cdiv(channels, BLOCK_C), tl.program_id(0) // tl.cdiv(channels, BLOCK_C)
    c, in_c = channels_of(tl.program_id(0) % blocks, channels, BLOCK_C)
    first_tap_row = lane % (HIGH // ROWS) * ROWS
    lane = lane // (HIGH // ROWS)
    x += sample_of(lane // parts, c, x_strides)
    d_out += sample_of(lane // parts, c, d_out_strides)
    step_down, step_right = steps_of(geometry, x_strides)
    sums = (tl.zeros((BLOCK_N, BLOCK_C), tl.float32),) * (ROWS * WIDE)
    for tile in range(tiles_per_part):
        n = (lane % parts * tiles_per_part + tile) * BLOCK_N + tl.arange(0, BLOCK_N)
        row, column = n // out_size[1], n % out_size[1]
        inside = (n < out_size[0] * out_size[1])[:, None] & in_c
        here = d_out + address(row, column, d_out_strides)[:, None]
        upstream = tl.load(here, inside, 0.0).to(tl.float32)
        top = row * geometry.stride[0] - geometry.padding[0] + first_tap_row * geometry.dilation[0]
        left = column * geometry.stride[1] - geometry.padding[1]
        corner = x + address(top, left, x_strides)[:, None]
        grown = ()
        for tap in tl.static_range(ROWS * WIDE):
            down, right = tap // WIDE * geometry.dilation[0], tap % WIDE * geometry.dilation[1]
            valid = inside & within(top + down, left + right, size[0], size[1])[:, None]
            further = tap // WIDE * step_down + tap % WIDE * step_right
            value = tl.load(corner + further, valid, 0.0).to(tl.float32)
            grown += (sums[tap] + upstream * value,)  # type: ignore[assignment]
        sums = grown
    gathered += (lane.to(tl.int64) * HIGH + first_tap_row) * WIDE * channels + c
    for tap in tl.static_range(ROWS * WIDE):
        tl.store(gathered + tap * channels, tl.sum(sums[tap], 0), c < channels)
