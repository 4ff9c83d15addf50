"""The fusion on the CPU: thin callers of ``csrc/cpu/multi_scale.h``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from btinet_kernels.backends import native_module
from btinet_kernels.interaction.passes_op import accumulation_dtype
from btinet_kernels.multi_scale.reference import DILATIONS
from btinet_kernels.native_calls import call, dense, nowhere


class Kernels(NamedTuple):
    """What the kernels read, in the dtype that is computed in: ``t = Σ_i P_i (a_i u_i) + b``, ``y = F t + f``."""

    taps: Sequence[Tensor]  # three of [C, 1, 3, ...]
    pointwise: Sequence[Tensor]  # P: three of [M, C], all of the same strides; merged with F where that is cheaper
    share: Tensor  # a [B, 3]
    bias: Tensor  # b [B, M]
    fusion: Tensor | None  # F [O, M]; None: y = t
    fusion_bias: Tensor | None  # f [O]


def multi_scale(x: Tensor, kernels: Kernels, *, keep_between: bool = False) -> tuple[Tensor, Tensor]:
    """y, and t where it is to be kept and is not y."""
    out = torch.empty_like(x)
    between = torch.empty_like(x) if keep_between and kernels.fusion is not None else x.new_empty(0)
    call("multi_scale", x, _dense(x), *_weights(x, kernels), _dense(out), _dense(between, like=x))
    return out, between


def multi_scale_backward(x: Tensor, grad: Tensor, between: Tensor, kernels: Kernels) -> tuple[Tensor, Kernels]:
    """Gradients of ``x`` and of ``kernels``; the biases are not read."""
    out = torch.empty_like(x)
    middle = kernels.pointwise[0].shape[0]
    gradient = Kernels(
        [torch.empty_like(t) for t in kernels.taps],
        [kernels.share.new_empty(middle, x.shape[1]) for _ in kernels.pointwise],
        torch.empty_like(kernels.share),
        kernels.share.new_empty(len(kernels.share), middle),
        None if kernels.fusion is None else torch.empty_like(kernels.fusion),
        None if kernels.fusion is None else kernels.fusion.new_empty(len(kernels.fusion)),
    )
    sizes, addresses = _weights(x, kernels)
    call(
        "multi_scale_backward",
        x,
        _dense(x),
        _dense(grad),
        _dense(between, like=x),
        sizes,
        addresses,
        _dense(out),
        _sizes(x, gradient),
        _addresses(gradient),
    )
    return out, gradient


def _weights(x: Tensor, kernels: Kernels) -> tuple[Any, list[int]]:
    dtype, dense = accumulation_dtype(x), [*kernels.taps, kernels.share, kernels.bias]
    dense += [t for t in (kernels.fusion, kernels.fusion_bias) if t is not None]
    assert all(t.is_contiguous() and t.dtype == dtype for t in dense)
    assert all(p.stride(1) == 1 and p.dtype == dtype for p in kernels.pointwise)
    return _sizes(x, kernels), _addresses(kernels)


def _sizes(x: Tensor, kernels: Kernels) -> Any:
    middle, stride = kernels.pointwise[0].shape[0], kernels.pointwise[0].stride(0)
    outputs = middle if kernels.fusion is None else kernels.fusion.shape[0]
    return native_module.ScaleSizes(x.ndim - 2, DILATIONS, middle, outputs, stride)


def _addresses(kernels: Kernels) -> list[int]:
    tensors = [*kernels.taps, *kernels.pointwise, *kernels[2:]]
    return [0 if t is None else t.data_ptr() for t in tensors]


def _dense(tensor: Tensor, like: Tensor | None = None) -> Any:
    """A dense tensor; one that is empty is nowhere and has the shape of ``like``."""
    return dense(tensor) if tensor.numel() or like is None else nowhere(like)
