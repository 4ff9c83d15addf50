"""Triton kernels of batch normalisation with an activation: moments of the channels, the result, both gradients.

The passes that reduce leave a part for each run of positions of a sample; parts are combined in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from btinet_kernels.interaction.triton_tiles import offset_of, relu
from btinet_kernels.interaction.triton_vectors_forward import sigmoid


@triton.jit
def activation(z, ACT: tl.constexpr):  # type: ignore[no-untyped-def]
    """``reference.activation``."""
    if ACT == "relu":
        return relu(z)
    elif ACT == "silu":
        return z * sigmoid(z)
    else:
        return z


@triton.jit
def activation_gradient(upstream, z, ACT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The gradient of ``z``."""
    if ACT == "relu":
        return tl.where(z <= 0, 0.0, upstream)
    elif ACT == "silu":
        share = sigmoid(z)
        return upstream * share * (1 + z * (1 - share))
    else:
        return upstream


@triton.jit
def vector_of(values, c, channels, OTHERWISE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Values of some channels, as a row; there may be none."""
    if values is None:
        return tl.full((1, c.shape[0]), OTHERWISE, tl.float32)
    else:
        return tl.load(values + c, c < channels, OTHERWISE)[None, :]


@triton.jit
def moments_of_parts(  # type: ignore[no-untyped-def]
    x,
    sums,  # [B, parts, C]
    squares,  # [B, parts, C], around the part's own mean
    size,
    strides,
    count,
    channels,
    parts,
    tiles_per_part,
    EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums and squares of a part of a sample's positions, for some of the channels."""
    blocks = tl.cdiv(channels, BLOCK_C)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) // blocks % parts * tiles_per_part * BLOCK_N
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = (c < channels)[None, :]
    x += row // parts * strides[0] + (c.to(tl.int64) * strides[1])[None, :]
    # Welford's recurrence: nothing cancels where the mean is large beside the deviations.
    mean = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    square = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for tile in range(tiles_per_part):
        n = first + tile * BLOCK_N + tl.arange(0, BLOCK_N)
        valid = (n < count)[:, None] & in_c
        value = tl.load(x + offset_of(n, size, strides, EVEN)[:, None], valid, 0.0).to(tl.float32)
        apart = tl.where(valid, value - mean, 0.0)
        mean += apart * (1.0 / (tile + 1))
        square += apart * (value - mean)
    seen = tl.cdiv(tl.maximum(count - first - tl.arange(0, BLOCK_N), 0), BLOCK_N)  # tiles that have such a position
    seen = tl.minimum(seen, tiles_per_part).to(tl.float32)[:, None]
    total = tl.sum(seen * mean, 0)
    apart = mean - (total / tl.minimum(count - first, tiles_per_part * BLOCK_N).to(tl.float32))[None, :]
    tl.store(sums + row * channels + c, total, c < channels)
    tl.store(squares + row * channels + c, tl.sum(square + seen * apart * apart, 0), c < channels)


@triton.jit
def values_before(part, parts, part_size, count):  # type: ignore[no-untyped-def]
    """How many positions lie in the parts before this one."""
    return part // parts * count + tl.minimum(part % parts * part_size, count)


@triton.jit
def combine_moments(  # type: ignore[no-untyped-def]
    sums,  # [rows, C]
    squares,  # [rows, C], around the row's own mean
    mean,  # [⌈rows/BLOCK_T⌉, C], sums again where not LAST
    variance,  # [⌈rows/BLOCK_T⌉, C], squares again where not LAST
    count,  # positions of a sample
    channels,
    everything,  # parts of all samples
    parts,  # of a sample
    part_size,  # positions in a part; a sample's last one may have fewer
    parts_per_row,
    LAST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Moments of BLOCK_T rows of parts together."""
    blocks = tl.cdiv(channels, BLOCK)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    row = group * BLOCK_T + tl.arange(0, BLOCK_T)
    begin = values_before(tl.minimum(row * parts_per_row, everything), parts, part_size, count)
    end = values_before(tl.minimum((row + 1) * parts_per_row, everything), parts, part_size, count)
    members = (end - begin).to(tl.float32)
    valid = (members > 0)[:, None] & (column < channels)[None, :]
    at = row[:, None] * channels + column[None, :]
    part = tl.load(sums + at, valid, 0.0)
    total, size = tl.sum(part, 0), tl.sum(members, 0)
    apart = part / tl.maximum(members, 1.0)[:, None] - (total / size)[None, :]
    square = tl.load(squares + at, valid, 0.0) + members[:, None] * apart * apart
    square = tl.sum(tl.where(valid, square, 0.0), 0)
    if LAST:
        total /= size
        square /= size
    tl.store(mean + group * channels + column, total, column < channels)
    tl.store(variance + group * channels + column, square, column < channels)


@triton.jit
def normalise_tiles(  # type: ignore[no-untyped-def]
    x,
    mean,
    variance,
    weight,  # or None
    bias,  # or None
    out,
    eps,
    size,
    x_strides,
    out_strides,
    count,
    channels,
    X_EVEN: tl.constexpr,
    OUT_EVEN: tl.constexpr,
    ACT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The activation of the normalised tile."""
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
    factor = vector_of(weight, c, channels, 1.0) / tl.sqrt(vector_of(variance, c, channels, 1.0) + eps)
    z = (value - vector_of(mean, c, channels, 0.0)) * factor + vector_of(bias, c, channels, 0.0)
    at = sample * out_strides[0] + offset_of(n, size, out_strides, OUT_EVEN)[:, None] + column * out_strides[1]
    tl.store(out + at, activation(z, ACT).to(out.dtype.element_ty), valid)


@triton.jit
def norm_gradient_of_parts(  # type: ignore[no-untyped-def]
    d_out,
    x,
    mean,
    variance,
    weight,  # or None
    bias,  # or None
    gathered,  # [B, parts, 2, C]: gradients of the bias and of the weight
    eps,
    size,
    d_out_strides,
    x_strides,
    count,
    channels,
    parts,
    tiles_per_part,
    D_OUT_EVEN: tl.constexpr,
    X_EVEN: tl.constexpr,
    ACT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``Σ d_z`` and ``Σ d_z · normalised`` over a part of a sample's positions, for some of the channels."""
    blocks = tl.cdiv(channels, BLOCK_C)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) // blocks % parts * tiles_per_part * BLOCK_N
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    d_out += row // parts * d_out_strides[0] + (c.to(tl.int64) * d_out_strides[1])[None, :]
    x += row // parts * x_strides[0] + (c.to(tl.int64) * x_strides[1])[None, :]
    centre, inverse = vector_of(mean, c, channels, 0.0), 1.0 / tl.sqrt(vector_of(variance, c, channels, 1.0) + eps)
    factor, addend = vector_of(weight, c, channels, 1.0), vector_of(bias, c, channels, 0.0)
    of_bias = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    of_weight = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for tile in range(tiles_per_part):
        n = first + tile * BLOCK_N + tl.arange(0, BLOCK_N)
        valid = (n < count)[:, None] & (c < channels)[None, :]
        upstream = tl.load(d_out + offset_of(n, size, d_out_strides, D_OUT_EVEN)[:, None], valid, 0.0).to(tl.float32)
        value = tl.load(x + offset_of(n, size, x_strides, X_EVEN)[:, None], valid, 0.0).to(tl.float32)
        normalised = (value - centre) * inverse
        d_z = activation_gradient(upstream, normalised * factor + addend, ACT)
        of_bias += d_z
        of_weight += d_z * normalised
    gathered += row * 2 * channels + c
    tl.store(gathered, tl.sum(of_bias, 0), c < channels)
    tl.store(gathered + channels, tl.sum(of_weight, 0), c < channels)


@triton.jit
def norm_input_gradient_of_tiles(  # type: ignore[no-untyped-def]
    d_out,
    x,
    mean,
    variance,
    weight,  # or None
    bias,  # or None
    d_weight,
    d_bias,
    d_x,
    eps,
    values,  # of a channel
    size,
    d_out_strides,
    x_strides,
    d_x_strides,
    count,
    channels,
    D_OUT_EVEN: tl.constexpr,
    X_EVEN: tl.constexpr,
    D_X_EVEN: tl.constexpr,
    ACT: tl.constexpr,
    TRAINING: tl.constexpr,  # the moments are those of x
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``weight / σ · (d_z − mean(d_z) − normalised · mean(d_z · normalised))``, or its first term alone."""
    blocks, tiles = tl.cdiv(channels, BLOCK_C), tl.cdiv(count, BLOCK_N)
    program = tl.num_programs(0) - 1 - tl.program_id(0)  # last read, first found in the L2 cache
    c = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    n = program // blocks % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    sample = (program // blocks // tiles).to(tl.int64)
    valid = (n < count)[:, None] & (c < channels)[None, :]
    column = c.to(tl.int64)[None, :]
    at = sample * d_out_strides[0] + offset_of(n, size, d_out_strides, D_OUT_EVEN)[:, None] + column * d_out_strides[1]
    upstream = tl.load(d_out + at, valid, 0.0).to(tl.float32)
    at = sample * x_strides[0] + offset_of(n, size, x_strides, X_EVEN)[:, None] + column * x_strides[1]
    value = tl.load(x + at, valid, 0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt(vector_of(variance, c, channels, 1.0) + eps)
    factor = vector_of(weight, c, channels, 1.0)
    normalised = (value - vector_of(mean, c, channels, 0.0)) * inverse
    result = activation_gradient(upstream, normalised * factor + vector_of(bias, c, channels, 0.0), ACT)
    if TRAINING:
        average = vector_of(d_bias, c, channels, 0.0) + normalised * vector_of(d_weight, c, channels, 0.0)
        result -= average / values
    at = sample * d_x_strides[0] + offset_of(n, size, d_x_strides, D_X_EVEN)[:, None] + column * d_x_strides[1]
    tl.store(d_x + at, (result * factor * inverse).to(d_x.dtype.element_ty), valid)
