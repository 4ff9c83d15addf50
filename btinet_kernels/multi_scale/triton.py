"""The fusion on NVIDIA GPUs: the depthwise convolutions by the kernels of ``triton_depthwise``, the products by cuBLAS.

The weighted maps of the scales, three times as large as x, go through memory once on the way to the product:
docs/kernels_gpu.md says why, and what that costs. They are stored in the dtype of x, and so are the weights that
multiply them. Results are written as rows of channels or as planes, as x lies; a gradient in planes is copied to rows.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from btinet_kernels.interaction.passes_op import in_format_of
from btinet_kernels.interaction.triton_tiles import MOST_REGISTERS, channel_block, launch
from btinet_kernels.multi_scale.native import Kernels
from btinet_kernels.multi_scale.triton_depthwise import input_gradient, maps_of_scale

# Elements of a tile: eight for each thread of four warps, or four where each has sums of nine taps in registers.
TILE, TILE_WITH_SUMS = 1024, 512
# Eight for each multiprocessor of an H200. Beyond that, longer walks read fewer rows twice.
ENOUGH_PROGRAMS = 1056


def multi_scale(x: Tensor, kernels: Kernels, *, keep_between: bool = False) -> tuple[Tensor, Tensor]:
    """y, and t where it is to be kept and is not y."""
    maps, _ = _maps(x, kernels, None)
    out = _product(_pointwise(x, kernels), kernels.bias, maps, x)
    if kernels.fusion is None or kernels.fusion_bias is None:
        return out, x.new_empty(0)
    between, bias = out, kernels.fusion_bias.expand(len(x), -1)
    out = _product(kernels.fusion.to(x.dtype), bias, _positions(between), x)
    return out, between if keep_between else x.new_empty(0)


def multi_scale_backward(x: Tensor, grad: Tensor, between: Tensor, kernels: Kernels) -> tuple[Tensor, Kernels]:
    """Gradients of ``x`` and of ``kernels``; the biases are not read."""
    d_t, d_fusion, d_fusion_bias = _rows(grad), None, None
    if kernels.fusion is not None:
        d_fusion, d_fusion_bias = (d_t.t() @ _rows(between)).float(), d_t.sum(0, dtype=torch.float32)
        d_t = d_t @ kernels.fusion.to(x.dtype)
    d_bias = d_t.unflatten(0, (len(x), x.shape[2:].numel())).sum(1, dtype=torch.float32)
    d_maps = d_t @ _pointwise(x, kernels)
    maps, d_taps = _maps(x, kernels, d_maps)
    d_pointwise = (d_t.t() @ maps.flatten(0, 1)).unflatten(1, (3, -1))
    d_x, taps = torch.empty_like(x), _taps(kernels)
    if x.numel():
        programs, walk = _walk(x, TILE, scales=1)
        launch(input_gradient, programs, d_maps, taps, kernels.share, d_x, *_sizes(d_x), **walk)
    of_taps = torch.einsum("bs,bskc->skc", kernels.share, d_taps)
    # Copies: outputs of an operator share no memory.
    gradient = Kernels(
        [
            d.clone(memory_format=torch.contiguous_format).view(t.shape)
            for d, t in zip(of_taps.transpose(1, 2), kernels.taps, strict=True)
        ],
        [d.to(torch.float32, copy=True) for d in d_pointwise.unbind(1)],
        (d_taps * taps).sum((2, 3)),
        d_bias,
        d_fusion,
        d_fusion_bias,
    )
    return d_x, gradient


def _maps(x: Tensor, kernels: Kernels, d_maps: Tensor | None) -> tuple[Tensor, Tensor]:
    """The weighted maps ``[B, N, 3 C]``; with their gradient, that of the taps over the share, ``[B, 3, 9, C]``."""
    batch, channels = x.shape[:2]
    maps = x.new_empty(batch, x.shape[2:].numel(), 3 * channels)
    if not x.numel():
        return maps, kernels.share.new_zeros(batch, 3, 9, channels)
    programs, walk = _walk(x, TILE if d_maps is None else TILE_WITH_SUMS, scales=3)
    parts = 0 if d_maps is None else walk["parts"]
    gathered = kernels.share.new_empty(batch, parts, 3, 9, channels)
    launch(
        maps_of_scale,
        programs,
        x,
        _taps(kernels),
        kernels.share,
        maps,
        maps if d_maps is None else d_maps,
        gathered,
        *_sizes(x),
        GRADIENT=d_maps is not None,
        **walk,
    )
    return maps, gathered if d_maps is None else gathered.sum(1)


def _walk(x: Tensor, tile: int, scales: int) -> tuple[int, dict[str, Any]]:
    """How many programs there are, and how each walks."""
    batch, channels = x.shape[:2]
    block_c = channel_block(channels) if x.stride(1) == 1 else 16  # planes are read in long runs of positions
    block_n = tile // block_c
    tiles, lanes = triton.cdiv(x.shape[2:].numel(), block_n), batch * scales * triton.cdiv(channels, block_c)
    tiles_per_part = min(tiles, max(1, lanes * tiles // ENOUGH_PROGRAMS))
    parts = triton.cdiv(tiles, tiles_per_part)
    return lanes * parts, {
        "parts": parts,
        "tiles_per_part": tiles_per_part,
        "BLOCK_N": block_n,
        "BLOCK_C": block_c,
        "num_warps": 4,
        "maxnreg": MOST_REGISTERS,
    }


def _sizes(dense: Tensor) -> tuple[int, int, tuple[int, ...], int]:
    """Height, width, strides and channels."""
    return *dense.shape[2:], dense.stride(), dense.shape[1]


def _taps(kernels: Kernels) -> Tensor:
    """``[3, 9, C]``."""
    return torch.stack([t.flatten(1).t() for t in kernels.taps])


def _pointwise(x: Tensor, kernels: Kernels) -> Tensor:
    """``[M, 3 C]``."""
    return torch.cat([p.to(x.dtype) for p in kernels.pointwise], 1)


def _positions(dense: Tensor) -> Tensor:
    """``[B, N, C]``."""
    return dense.flatten(2).transpose(1, 2)


def _rows(dense: Tensor) -> Tensor:
    """``[B N, C]``: a view of channels_last memory."""
    return _positions(dense).flatten(0, 1)


def _product(weight: Tensor, bias: Tensor, positions: Tensor, x: Tensor) -> Tensor:
    """``positions @ weightᵀ + bias``, ``[B, N, K]`` by ``[M, K]`` plus ``[B, M]``, in the shape and format of x."""
    count, bias = positions.shape[1], bias.to(x.dtype)
    if x.stride(1) == 1:
        out = bias[:, None, :].expand(-1, count, -1).clone(memory_format=torch.contiguous_format)
        out.flatten(0, 1).addmm_(positions.flatten(0, 1), weight.t())
        out = out.transpose(1, 2)
    else:
        out = bias[:, :, None].expand(-1, -1, count).clone(memory_format=torch.contiguous_format)
        out.baddbmm_(weight.expand(len(x), -1, -1), positions.transpose(1, 2))
    return in_format_of(x, out.unflatten(2, x.shape[2:]))
