"""Triton kernels of the segmentation loss: the statistics of each image, and the gradient of the logits.

A program takes consecutive positions of an image, row-major, and forms what its filters see from logits and target: the
rows that they reach stay in the L1 cache. Filters see zeros outside of the image. N is the number of its positions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from btinet_kernels.interaction.triton_vectors_forward import log1p
from btinet_kernels.losses.reference import EPSILON, curvature_kernel

_ROWS = curvature_kernel()
# The curvature filter at the offsets (x, y) = (1, 0), (2, 0), (2, 1); it changes its sign when they are exchanged.
NEAR, FAR, OBLIQUE = tl.constexpr(_ROWS[2][3]), tl.constexpr(_ROWS[2][4]), tl.constexpr(_ROWS[3][4])
LEAST, MOST = tl.constexpr(EPSILON), tl.constexpr(1 - EPSILON)  # of a predicted probability
SUMS = tl.constexpr(10)
STATISTICS = tl.constexpr(8)


@triton.jit
def probability(logit):  # type: ignore[no-untyped-def]
    """The sigmoid, and the predicted probability: the sigmoid cut off at both ends. NaN stays NaN."""
    share = 1.0 / (1.0 + tl.exp(-logit))
    return share, tl.where(share < LEAST, LEAST, tl.where(share > MOST, MOST, share))


@triton.jit
def loaded(masks, sample, row, column, valid):  # type: ignore[no-untyped-def]
    """Logits and target in float32, 0 where not ``valid``."""
    y, x = row.to(tl.int64), column.to(tl.int64)
    of_logits = sample * masks.logits_batch + y * masks.logits_row + x * masks.logits_column
    of_target = sample * masks.target_batch + y * masks.target_row + x * masks.target_column
    logit, target = tl.load(masks.logits + of_logits, valid, 0.0), tl.load(masks.target + of_target, valid, 0)
    return logit.to(tl.float32), target.to(tl.float32)


@triton.jit
def maps_at(maps, sample, row, column, valid, MAPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Values of three maps at a position, 0 where not ``valid``.

    ``soft``, ``hard``: what the boundary is seen by, prediction, target; ``gradients``: d_curvature, d_sobel, zero.
    """
    if MAPS == "gradients":
        at = maps.planes + (2 * sample * maps.height + row) * maps.width + column
        d_sobel = tl.load(at + maps.height * maps.width, valid, 0.0)
        return tl.load(at, valid, 0.0), d_sobel, tl.zeros(row.shape, tl.float32)
    else:
        logit, target = loaded(maps, sample, row, column, valid)
        _, p = probability(logit)
        seen = tl.where(p > 0.5, 1.0, 0.0) if MAPS == "hard" else p
        return tl.where(valid, target - seen, 0.0), tl.where(valid, p, 0.0), target


@triton.jit
def filtered(maps, sample, row, column, inside, MAPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The curvature filter of the first of the maps, the horizontal Sobel filter of the others.

    Each is exactly zero wherever its map is constant: what is added is also subtracted.
    """
    near = tl.zeros(row.shape, tl.float32)
    far, oblique, of_second, of_third = near, near, near, near
    for offset in tl.static_range(25):
        down, right = offset // 5 - 2, offset % 5 - 2
        distance = down * down + right * right  # squared
        if (distance > 0) & (distance < 8):
            y, x = row + down, column + right
            valid = inside & (y >= 0) & (y < maps.height) & (x >= 0) & (x < maps.width)
            first, second, third = maps_at(maps, sample, y, x, valid, MAPS)
            if down * down > right * right:
                first = -first
            if distance == 1:
                near += first
            elif distance == 4:
                far += first
            elif distance == 5:
                oblique += first
            if distance <= 2:
                of_second += second * (right * (2 - down * down))
                of_third += third * (right * (2 - down * down))
    return near * NEAR + far * FAR + oblique * OBLIQUE, of_second, of_third


@triton.jit
def positions_of(program, maps, tiles, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """A program's sample and tile; its positions, their rows and columns, and which of them there are."""
    sample, tile = (program // tiles).to(tl.int64), program % tiles
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    return sample, tile, n, n // maps.width, n % maps.width, n < maps.height * maps.width


@triton.jit
def mask_sums_of_tiles(  # type: ignore[no-untyped-def]
    parts,  # [B, SUMS, tiles]
    masks,
    tiles,
    HARD: tl.constexpr,
    CROSS_ENTROPY: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sums over a tile, in the order of ``mask_statistics_of_images``."""
    sample, tile, _, row, column, inside = positions_of(tl.program_id(0), masks, tiles, BLOCK_N)
    logit, t = loaded(masks, sample, row, column, inside)
    p = tl.where(inside, probability(logit)[1], 0.0)
    r, of_p, of_target = filtered(masks, sample, row, column, inside, "hard" if HARD else "soft")
    entropy = tl.zeros((BLOCK_N,), tl.float32)
    if CROSS_ENTROPY:
        # Where the target is 0 or 1 the first two terms cancel exactly on its side.
        entropy = ((1 - t) * logit - tl.minimum(logit, 0.0)) + log1p(tl.exp(-tl.abs(logit)))
        entropy = tl.where(inside, entropy, 0.0)
    parts += sample * SUMS * tiles + tile
    tl.store(parts, tl.sum(t * p, 0))
    tl.store(parts + tiles, tl.sum((1 - t) * p, 0))
    tl.store(parts + 2 * tiles, tl.sum(t * (1 - p), 0))
    tl.store(parts + 3 * tiles, tl.sum(t, 0))
    tl.store(parts + 4 * tiles, tl.sum(entropy, 0))
    tl.store(parts + 5 * tiles, tl.sum(tl.abs(r), 0))
    tl.store(parts + 6 * tiles, tl.sum(of_target, 0))
    tl.store(parts + 7 * tiles, tl.sum(of_target * of_target, 0))
    tl.store(parts + 8 * tiles, tl.sum(of_p, 0))
    tl.store(parts + 9 * tiles, tl.sum(of_p * of_p, 0))


@triton.jit
def total_of(parts, tiles, BLOCK_T: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sum of an image's tiles, in a fixed order and float64."""
    total = tl.zeros((BLOCK_T,), tl.float64)
    for first in range(0, tiles, BLOCK_T):
        tile = first + tl.arange(0, BLOCK_T)
        total += tl.load(parts + tile, tile < tiles, 0.0).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def mask_statistics_of_images(parts, statistics, sobel_mean, count, tiles, BLOCK_T: tl.constexpr):  # type: ignore[no-untyped-def]
    """``MaskStatistics`` of an image, and the mean Sobel response to its prediction."""
    sample = tl.program_id(0).to(tl.int64)
    parts += sample * SUMS * tiles
    statistics += sample * STATISTICS
    for k in tl.static_range(6):
        total = total_of(parts + k * tiles, tiles, BLOCK_T)
        if k >= 3:
            total /= count
        tl.store(statistics + k, total)
    for k in tl.static_range(2):
        mean = total_of(parts + (6 + 2 * k) * tiles, tiles, BLOCK_T) / count
        square = total_of(parts + (7 + 2 * k) * tiles, tiles, BLOCK_T) / count
        tl.store(statistics + 6 + k, square - mean * mean)
        if k == 1:
            tl.store(sobel_mean + sample, mean)


@triton.jit
def response_gradients_of_tiles(  # type: ignore[no-untyped-def]
    planes,  # [B, 2, N]: d_curvature, not written where HARD; d_sobel
    masks,
    d_statistics,  # [B, STATISTICS]
    sobel_mean,  # [B]
    tiles,
    HARD: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gradients of the prediction through the filters' responses, before the filters are transposed."""
    sample, _, n, row, column, inside = positions_of(tl.program_id(0), masks, tiles, BLOCK_N)
    count = masks.height * masks.width
    planes += 2 * sample * count
    d_statistics += sample * STATISTICS
    r, of_p, _ = filtered(masks, sample, row, column, inside, "soft")
    if not HARD:  # else the prediction in it is constant wherever it has a derivative
        slope = (tl.load(d_statistics + 5) / count).to(tl.float32)
        tl.store(planes + n, tl.where(r > 0, -slope, tl.where(r < 0, slope, r)), inside)
    deviation = of_p - tl.load(sobel_mean + sample).to(tl.float32)
    slope = (2 * tl.load(d_statistics + 7) / count).to(tl.float32)
    tl.store(planes + count + n, slope * deviation, inside)


@triton.jit
def logit_gradient_of_tiles(  # type: ignore[no-untyped-def]
    d_logits,
    strides,  # of d_logits
    masks,
    responses,
    d_statistics,  # [B, STATISTICS]
    tiles,
    HARD: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The gradient of the logits. The curvature filter is its own transpose, the Sobel filter its negative one."""
    sample, _, _, row, column, inside = positions_of(tl.program_id(0), masks, tiles, BLOCK_N)
    d_statistics += sample * STATISTICS
    of_hit, of_spread, of_missed = tl.load(d_statistics), tl.load(d_statistics + 1), tl.load(d_statistics + 2)
    of_entropy = (tl.load(d_statistics + 4) / (masks.height * masks.width)).to(tl.float32)
    logit, t = loaded(masks, sample, row, column, inside)
    share, _ = probability(logit)
    from_curvature, from_sobel, _ = filtered(responses, sample, row, column, inside, "gradients")
    d_prediction = of_spread.to(tl.float32) + (of_hit - of_spread - of_missed).to(tl.float32) * t - from_sobel
    if not HARD:
        d_prediction += from_curvature
    # None where the prediction is cut off, nor at either end, as torch 2.15 has it.
    slope = tl.where((share > LEAST) & (share < MOST), share * (1 - share), 0.0)
    gradient = d_prediction * slope + of_entropy * (share - t)
    at = sample * strides[0] + row.to(tl.int64) * strides[1] + column.to(tl.int64) * strides[2]
    tl.store(d_logits + at, gradient.to(d_logits.dtype.element_ty), inside)
