"""Batch normalisation on NVIDIA GPUs: launches of the kernels in ``triton_passes``.

Any strides and up to three spatial axes; float32, float16 and bfloat16 are stored, float32 is what is computed with.
docs/kernels_gpu.md says what each kernel costs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from btinet_kernels.interaction.triton import combine_parts
from btinet_kernels.interaction.triton_tiles import channel_block, launch, layout_of, position_block, power_of_two
from btinet_kernels.normalization.native import Vectors
from btinet_kernels.normalization.triton_passes import (
    combine_moments,
    moments_of_parts,
    norm_gradient_of_parts,
    norm_input_gradient_of_tiles,
    normalise_tiles,
)

# Eight for each multiprocessor of an H200. Beyond that, programs take more tiles each and leave fewer parts.
ENOUGH_PROGRAMS = 1056
# Elements of a tile that is summed: sixteen for each thread of four warps, with two sums.
TILE = 2048
ROWS = 64  # of parts that one program combines


class Parts(NamedTuple):
    """Runs of positions that sums are left for."""

    samples: int
    of_sample: int
    size: int  # positions in a part; a sample's last one may have fewer
    positions: int  # of a sample


def batch_norm(x: Tensor, weights: Vectors, moments: Vectors | None, eps: float, act: str) -> list[Tensor]:
    """The result; where ``moments`` are not given, also the mean and variance of each channel, found in x."""
    found = _moments(x) if moments is None else []
    out = torch.empty_like(x)
    programs, tiles = _tiles(x)
    of_x, of_out = layout_of(x), layout_of(out)
    launch(
        normalise_tiles,
        programs,
        x,
        *(moments or found),
        *weights,
        out,
        eps,
        of_x.size,
        of_x.strides,
        of_out.strides,
        x.shape[2:].numel(),
        x.shape[1],
        X_EVEN=of_x.even,
        OUT_EVEN=of_out.even,
        ACT=act,
        **tiles,
    )
    return [out, *found]


def batch_norm_backward(
    x: Tensor, d_out: Tensor, weights: Vectors, moments: Vectors, *, training: bool, eps: float, act: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of the weight and of the bias; through the moments too where ``training``."""
    d_weight, d_bias = weight_gradients(x, d_out, weights, moments, eps, act)
    d_x = torch.empty_like(x)
    programs, tiles = _tiles(x)
    of_d_out, of_x, of_d_x = layout_of(d_out), layout_of(x), layout_of(d_x)
    launch(
        norm_input_gradient_of_tiles,
        programs,
        d_out,
        x,
        *moments,
        *weights,
        d_weight,
        d_bias,
        d_x,
        eps,
        x.numel() // x.shape[1],
        of_x.size,
        of_d_out.strides,
        of_x.strides,
        of_d_x.strides,
        x.shape[2:].numel(),
        x.shape[1],
        D_OUT_EVEN=of_d_out.even,
        X_EVEN=of_x.even,
        D_X_EVEN=of_d_x.even,
        ACT=act,
        TRAINING=training,
        **tiles,
    )
    return d_x, d_weight, d_bias


def weight_gradients(
    x: Tensor, d_out: Tensor, weights: Vectors, moments: Vectors, eps: float, act: str
) -> tuple[Tensor, Tensor]:
    """Gradients of the weight and of the bias, ``[C]``."""
    channels = x.shape[1]
    programs, parts, walk = _walk(x)
    gathered = x.new_empty(parts.samples * parts.of_sample, 2, channels, dtype=torch.float32)
    of_d_out, of_x = layout_of(d_out), layout_of(x)
    launch(
        norm_gradient_of_parts,
        programs,
        d_out,
        x,
        *moments,
        *weights,
        gathered,
        eps,
        of_x.size,
        of_d_out.strides,
        of_x.strides,
        parts.positions,
        channels,
        parts.of_sample,
        D_OUT_EVEN=of_d_out.even,
        X_EVEN=of_x.even,
        ACT=act,
        **walk,
    )
    d_bias, d_weight = gathered.new_empty(channels), gathered.new_empty(channels)
    combine_parts(gathered, d_bias, d_weight, 1, len(gathered))
    return d_weight, d_bias


def combined_moments(sums: Tensor, squares: Tensor, parts: Parts, mean: Tensor, variance: Tensor) -> None:
    """Fill ``mean`` and ``variance`` ``[C]`` from the sums ``[parts, C]`` and the squares around each part's mean."""
    channels, parts_per_row = sums.shape[1], 1
    while True:
        groups = triton.cdiv(len(sums), ROWS)
        last = groups == 1
        into = (mean, variance) if last else (sums.new_empty(groups, channels), sums.new_empty(groups, channels))
        launch(
            combine_moments,
            groups * triton.cdiv(channels, 32),
            sums,
            squares,
            *into,
            parts.positions,
            channels,
            parts.samples * parts.of_sample,
            parts.of_sample,
            parts.size,
            parts_per_row,
            LAST=last,
            BLOCK_T=ROWS,
            BLOCK=32,
            num_warps=4,
        )
        if last:
            return
        (sums, squares), parts_per_row = into, parts_per_row * ROWS


def _moments(x: Tensor) -> list[Tensor]:
    """Mean and variance of each channel."""
    channels, layout = x.shape[1], layout_of(x)
    programs, parts, walk = _walk(x)
    sums, squares = (x.new_empty(parts.samples * parts.of_sample, channels, dtype=torch.float32) for _ in range(2))
    launch(
        moments_of_parts,
        programs,
        x,
        sums,
        squares,
        layout.size,
        layout.strides,
        parts.positions,
        channels,
        parts.of_sample,
        EVEN=layout.even,
        **walk,
    )
    mean, variance = sums.new_empty(channels), sums.new_empty(channels)
    combined_moments(sums, squares, parts, mean, variance)
    return [mean, variance]


def _walk(x: Tensor) -> tuple[int, Parts, dict[str, Any]]:
    """How many programs a pass that sums has, what parts they leave, and how each walks."""
    (batch, channels), count = x.shape[:2], x.shape[2:].numel()
    block_c = channel_block(channels) if x.stride(1) == 1 else 16  # planes are read in long runs of positions
    block_n, blocks = position_block(batch, count, most=TILE // block_c), triton.cdiv(channels, block_c)
    tiles = triton.cdiv(count, block_n)
    tiles_per_part = min(tiles, max(1, batch * tiles * blocks // ENOUGH_PROGRAMS))
    parts = Parts(batch, triton.cdiv(tiles, tiles_per_part), tiles_per_part * block_n, count)
    return (
        batch * parts.of_sample * blocks,
        parts,
        {"tiles_per_part": tiles_per_part, "BLOCK_N": block_n, "BLOCK_C": block_c, "num_warps": 4},
    )


def _tiles(x: Tensor) -> tuple[int, dict[str, int]]:
    """Programs and blocks of a pass that writes."""
    (batch, channels), count = x.shape[:2], x.shape[2:].numel()
    block_n, block_c = power_of_two(count, 16, 64), power_of_two(channels, 16, 64)
    programs = batch * triton.cdiv(count, block_n) * triton.cdiv(channels, block_c)
    num_warps = 4 if x.stride(1) == 1 else 8  # planes of odd sizes would spill with four
    return programs, {"BLOCK_N": block_n, "BLOCK_C": block_c, "num_warps": num_warps}
