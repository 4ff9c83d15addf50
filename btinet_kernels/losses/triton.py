"""The statistics of the segmentation loss on NVIDIA GPUs: launches of the kernels in ``triton_passes``.

A tile's sums are float32, what is made of them float64. docs/kernels_gpu.md says what each kernel costs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from btinet_kernels.interaction.triton_tiles import launch
from btinet_kernels.losses.reference import MaskStatistics
from btinet_kernels.losses.triton_passes import (
    SUMS,
    logit_gradient_of_tiles,
    mask_statistics_of_images,
    mask_sums_of_tiles,
    response_gradients_of_tiles,
)

# Positions: two for each thread of four warps. With four the registers are all but used up.
TILE = 256


class Masks(NamedTuple):
    """Logits and target of the images, ``[B, 1, height, width]``, and their strides, in a tuple without tuples.

    Triton 3.6 loses those on the way to a function of a function.
    """

    logits: Tensor
    target: Tensor  # float32, or zeros and ones in bytes or bits
    height: int
    width: int
    logits_batch: int
    logits_row: int
    logits_column: int
    target_batch: int
    target_row: int
    target_column: int


class Responses(NamedTuple):
    """What ``response_gradients_of_tiles`` leaves, ``[B, 2, height, width]``."""

    planes: Tensor
    height: int
    width: int


def statistics(logits: Tensor, target: Tensor, *, hard_boundary: bool, cross_entropy: bool) -> tuple[Tensor, Tensor]:
    """See ``native.statistics``."""
    batch, (tiles, count) = len(logits), _tiles(logits)
    result = logits.new_empty(batch, len(MaskStatistics._fields), dtype=torch.float64)
    sobel_mean = logits.new_empty(batch, dtype=torch.float64)
    if not batch:
        return result, sobel_mean
    parts = logits.new_empty(batch, SUMS.value, tiles, dtype=torch.float32)
    launch(
        mask_sums_of_tiles,
        batch * tiles,
        parts,
        _masks(logits, target),
        tiles,
        HARD=hard_boundary,
        CROSS_ENTROPY=cross_entropy,
        BLOCK_N=TILE,
        num_warps=4,
    )
    launch(mask_statistics_of_images, batch, parts, result, sobel_mean, count, tiles, BLOCK_T=128, num_warps=4)
    return result, sobel_mean


def statistics_backward(
    d_statistics: Tensor, logits: Tensor, target: Tensor, sobel_mean: Tensor, *, hard_boundary: bool
) -> Tensor:
    """See ``native.statistics_backward``."""
    out = torch.empty_like(logits)
    batch, (tiles, count), gradient = len(logits), _tiles(logits), d_statistics.contiguous()
    if not batch:
        return out
    masks, planes = _masks(logits, target), logits.new_empty(batch, 2, count, dtype=torch.float32)
    options = {"HARD": hard_boundary, "BLOCK_N": TILE, "num_warps": 4}
    launch(response_gradients_of_tiles, batch * tiles, planes, masks, gradient, sobel_mean, tiles, **options)
    responses = Responses(planes, *logits.shape[2:])
    launch(logit_gradient_of_tiles, batch * tiles, out, _strides(out), masks, responses, gradient, tiles, **options)
    return out


def _tiles(logits: Tensor) -> tuple[int, int]:
    """Tiles and positions of an image."""
    count = logits.shape[2:].numel()
    return triton.cdiv(count, TILE), count


def _masks(logits: Tensor, target: Tensor) -> Masks:
    height, width = logits.shape[2:]
    return Masks(logits, target, height, width, *_strides(logits), *_strides(target))


def _strides(masks: Tensor) -> tuple[int, int, int]:
    """Of batch, row and column."""
    return masks.stride(0), masks.stride(2), masks.stride(3)
