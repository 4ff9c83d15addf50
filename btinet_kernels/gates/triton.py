"""Dual-path attention on NVIDIA GPUs: launches of the kernels in ``triton_dual_path`` and ``triton_spatial_path``.

Any strides and one to three spatial axes; float32, float16 and bfloat16 are stored, float32 is what is computed with.
docs/kernels_gpu.md says what each kernel costs.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from btinet_kernels.gates.reference import (
    KERNEL_WIDTH,
    DualPathSaved,
    DualPathWeights,
    channel_path,
    channel_path_backward,
)
from btinet_kernels.gates.triton_dual_path import (
    gate_gradients_of_tiles,
    gate_tiles,
    input_gradient_of_tiles,
    summaries_of_tiles,
)
from btinet_kernels.gates.triton_spatial_path import (
    convolution_gradient_of_parts,
    maps_gradient_of_tiles,
    spatial_gate_of_tiles,
)
from btinet_kernels.interaction.triton_tiles import (
    MOST_REGISTERS,
    channel_block,
    launch,
    layout_of,
    position_block,
    power_of_two,
)

# Two for each multiprocessor of an H200: with fewer, the channels of a tile are split among programs.
ENOUGH_PROGRAMS = 264


def dual_path(x: Tensor, residual: Tensor | None, weights: DualPathWeights) -> tuple[Tensor, DualPathSaved]:
    """See ``reference.dual_path``."""
    mean, maps = _summaries(x)
    hidden, channel_gate = channel_path(mean, weights)
    spatial_gate = _spatial_gate(maps, x, weights)
    out = torch.empty_like(x)
    if x.numel():
        programs, walk = _tiles(x)
        added = x if residual is None else residual
        of_x, of_added, of_out = layout_of(x), layout_of(added), layout_of(out)
        launch(
            gate_tiles,
            programs,
            x,
            added,
            channel_gate,
            spatial_gate,
            out,
            of_x.size,
            of_x.strides,
            of_added.strides,
            of_out.strides,
            maps.shape[2],
            x.shape[1],
            X_EVEN=of_x.even,
            RESIDUAL_EVEN=of_added.even,
            OUT_EVEN=of_out.even,
            RESIDUAL=residual is not None,
            **walk,
        )
    return out, DualPathSaved(mean, hidden, channel_gate, maps, spatial_gate)


def dual_path_backward(
    d_out: Tensor, x: Tensor, out: Tensor | None, saved: DualPathSaved, weights: DualPathWeights
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """See ``reference.dual_path_backward``."""
    count = x.shape[2:].numel()
    d_residual = None if out is None else torch.empty_like(out)
    d_channel_gate, d_spatial_gate, ties = _gate_gradients(d_out, x, out, d_residual, saved)
    d_mean, d_channel = channel_path_backward(d_channel_gate, saved, weights)
    d_maps, d_spatial = _spatial_gradients(d_spatial_gate, ties, x, saved, weights)
    d_x = torch.empty_like(x)
    if x.numel():
        programs, walk = _tiles(x)
        upstream = d_out if d_residual is None else d_residual
        of_upstream, of_x, of_d_x = layout_of(upstream), layout_of(x), layout_of(d_x)
        launch(
            input_gradient_of_tiles,
            programs,
            upstream,
            x,
            saved.channel_gate.contiguous(),
            saved.spatial_gate.contiguous(),
            d_mean / count,
            saved.maps.contiguous(),
            d_maps,
            d_x,
            of_x.size,
            of_upstream.strides,
            of_x.strides,
            of_d_x.strides,
            count,
            x.shape[1],
            UPSTREAM_EVEN=of_upstream.even,
            X_EVEN=of_x.even,
            D_X_EVEN=of_d_x.even,
            **walk,
        )
    return d_x, d_residual, [*d_channel, *d_spatial]


def _summaries(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the positions ``[B, C]``; maximum and mean over the channels ``[B, 2, N]``."""
    (batch, channels), count, layout = x.shape[:2], x.shape[2:].numel(), layout_of(x)
    walk = _reduction(x)
    tiles, groups = walk["tiles"], walk["groups"]
    vector = x.new_empty(0, dtype=torch.float32).new_empty
    sums, maps = vector(batch, tiles, channels), vector(batch, groups, 2, count)
    if x.numel():
        launch(
            summaries_of_tiles,
            batch * tiles * groups,
            x,
            sums,
            maps,
            layout.size,
            layout.strides,
            count,
            channels,
            EVEN=layout.even,
            **walk,
        )
    maps = torch.stack((maps[:, :, 0].amax(1), maps[:, :, 1].sum(1)), 1) if groups > 1 else maps[:, 0]
    return sums.sum(1) / count, maps


def _spatial_gate(maps: Tensor, x: Tensor, weights: DualPathWeights) -> Tensor:
    gate = maps.new_empty(len(maps), maps.shape[2])
    if maps.numel():
        programs, walk = _positions(x)
        launch(
            spatial_gate_of_tiles,
            programs,
            maps,
            weights.spatial_weight.contiguous(),
            weights.spatial_bias,
            gate,
            layout_of(x).size,
            maps.shape[2],
            **walk,
        )
    return gate


def _spatial_gradients(
    d_gate: Tensor, ties: Tensor, x: Tensor, saved: DualPathSaved, weights: DualPathWeights
) -> tuple[Tensor, list[Tensor]]:
    """Of the maps, as every channel has it, ``[B, 2, N]``; of the convolution's weight and bias."""
    batch, count = d_gate.shape
    programs, walk = _positions(x)
    size, lines = layout_of(x).size, walk["LINES"]
    block_n = 64
    tiles = triton.cdiv(batch * count, block_n)
    tiles_per_part = max(1, tiles * lines // (4 * ENOUGH_PROGRAMS))
    parts = triton.cdiv(tiles, tiles_per_part)
    d_maps, partial = d_gate.new_empty(batch, 2, count), d_gate.new_empty(parts, lines, 2, 8)
    if d_gate.numel():
        gate, weight = saved.spatial_gate.contiguous(), weights.spatial_weight.contiguous()
        launch(maps_gradient_of_tiles, programs, d_gate, gate, weight, ties, d_maps, size, count, x.shape[1], **walk)
        launch(
            convolution_gradient_of_parts,
            parts * lines,
            d_gate,
            gate,
            saved.maps.contiguous(),
            partial,
            size,
            batch,
            count,
            tiles_per_part,
            LINES=lines,
            BLOCK_N=block_n,
            num_warps=4,
        )
    of_lines = partial.sum(0)
    d_weight = of_lines[..., :7].transpose(0, 1).contiguous().view(weights.spatial_weight.shape)
    return d_maps, [d_weight, of_lines[0, 0, 7:].clone()]


def _gate_gradients(
    d_out: Tensor, x: Tensor, out: Tensor | None, d_residual: Tensor | None, saved: DualPathSaved
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the gates, ``[B, C]`` and ``[B, N]``; how many channels hold a position's maximum. d_residual is filled."""
    (batch, channels), count = x.shape[:2], x.shape[2:].numel()
    walk = _reduction(x)
    tiles, groups = walk["tiles"], walk["groups"]
    d_channel, d_spatial = saved.mean.new_empty(batch, tiles, channels), saved.mean.new_empty(batch, groups, 2, count)
    if x.numel():
        result, passed = (x, x) if out is None or d_residual is None else (out, d_residual)
        of_d_out, of_x, of_out, of_residual = (layout_of(t) for t in (d_out, x, result, passed))
        launch(
            gate_gradients_of_tiles,
            batch * tiles * groups,
            d_out,
            x,
            result,
            saved.channel_gate.contiguous(),
            saved.spatial_gate.contiguous(),
            saved.maps.contiguous(),
            passed,
            d_channel,
            d_spatial,
            of_x.size,
            of_d_out.strides,
            of_x.strides,
            of_out.strides,
            of_residual.strides,
            count,
            channels,
            D_OUT_EVEN=of_d_out.even,
            X_EVEN=of_x.even,
            OUT_EVEN=of_out.even,
            D_RESIDUAL_EVEN=of_residual.even,
            RESIDUAL=out is not None,
            **walk,
        )
    of_positions = d_spatial.sum(1)
    return d_channel.sum(1), of_positions[:, 0].contiguous(), of_positions[:, 1].contiguous()


def _reduction(x: Tensor) -> dict[str, int]:
    """Tiles of positions, groups of channels, and how a program walks through its group."""
    batch, channels = x.shape[:2]
    count, block_c = x.shape[2:].numel(), channel_block(channels)
    block_n = position_block(batch, count, most=64)
    tiles, blocks = triton.cdiv(count, block_n), triton.cdiv(channels, block_c)
    blocks_per_group = max(1, min(blocks, blocks * batch * tiles // ENOUGH_PROGRAMS))
    return {
        "tiles": tiles,
        "groups": triton.cdiv(blocks, blocks_per_group),
        "blocks_per_group": blocks_per_group,
        "BLOCK_N": block_n,
        "BLOCK_C": block_c,
        "num_warps": 4,
        "maxnreg": MOST_REGISTERS,
    }


def _tiles(x: Tensor) -> tuple[int, dict[str, int]]:
    """Programs and blocks of a pass that writes."""
    block_n, block_c = 64, power_of_two(x.shape[1], 16, 64)
    programs = len(x) * triton.cdiv(x.shape[2:].numel(), block_n) * triton.cdiv(x.shape[1], block_c)
    return programs, {"BLOCK_N": block_n, "BLOCK_C": block_c, "num_warps": 4}


def _positions(x: Tensor) -> tuple[int, dict[str, int]]:
    """Programs and blocks of a pass over the maps; how many lines the convolution has."""
    block_n = 64
    lines = KERNEL_WIDTH ** (x.ndim - 3)
    return len(x) * triton.cdiv(x.shape[2:].numel(), block_n), {"LINES": lines, "BLOCK_N": block_n, "num_warps": 4}
