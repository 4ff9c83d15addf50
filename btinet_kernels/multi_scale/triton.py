"""The fusion on NVIDIA GPUs: the depthwise convolutions by the kernels of ``triton_depthwise``, the products by cuBLAS.

The weighted maps of the scales, three times as large as x, go through memory once on the way to the product:
docs/kernels_gpu.md says why, and what that costs. They are stored in the dtype of x, and so are the weights that
multiply them. Results are written as rows of channels or as planes, as x lies; a gradient in planes is copied to rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from btinet_kernels.interaction.passes_op import in_format_of
from btinet_kernels.multi_scale.native import Kernels
from btinet_kernels.multi_scale.triton_depthwise import depthwise_input_gradient, depthwise_maps


def multi_scale(x: Tensor, kernels: Kernels, *, keep_between: bool = False) -> tuple[Tensor, Tensor]:
    """y, and t where it is to be kept and is not y."""
    maps, _ = depthwise_maps(x, _taps(kernels), kernels.share, 1)
    out = _product(_pointwise(x, kernels), kernels.bias, maps.flatten(2), x)
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
    taps = _taps(kernels)
    maps, d_taps = depthwise_maps(x, taps, kernels.share, 1, d_maps)
    d_pointwise = (d_t.t() @ maps.flatten(0, 1).flatten(1)).unflatten(1, (3, -1))
    d_x = depthwise_input_gradient(x, d_maps, taps, kernels.share, 1)
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
