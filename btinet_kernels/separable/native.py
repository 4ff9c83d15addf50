"""Separable convolutions on the CPU: thin callers of ``csrc/cpu/multi_scale.h``, with one scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from btinet_kernels.backends import native_module
from btinet_kernels.interaction.passes_op import new_in_format_of
from btinet_kernels.native_calls import call, dense, nowhere
from btinet_kernels.separable.reference import SeparableWeights


def separable(
    x: Tensor,
    weights: SeparableWeights,
    dilation: int,
    relu: bool,
    *,
    affine: Sequence[Tensor] = (),
    moments: Sequence[Tensor] = (),
) -> Tensor:
    """The convolution and ReLU; then ``factor · value + addend`` of ``affine``, each ``[O]``.

    ``moments``: two vectors ``[O]`` that receive mean and variance of the result.
    """
    out = new_in_format_of(x, len(weights.pointwise), x.shape[2:])
    finish = [t.data_ptr() for t in (*affine, *moments)] if affine else [0, 0, *(t.data_ptr() for t in moments)]
    finish += [0] * (4 - len(finish))
    call("separable", x, dense(x), _sizes(x, weights, dilation), _addresses(weights), dense(out), relu, finish)
    return out


def separable_backward(
    x: Tensor,
    grad: Tensor,
    value: Tensor,
    weights: SeparableWeights,
    dilation: int,
    relu: bool,
    arriving: Sequence[Tensor] = (),
) -> tuple[Tensor, SeparableWeights]:
    """Gradients of ``x`` and of the weights.

    Args:
        x: what the forward read.
        grad: gradient of the result.
        value: the result, for the ReLU and ``arriving``.
        weights: as in the forward.
        dilation: as in the forward.
        relu: as in the forward.
        arriving: factor, slope, addend ``[O]``: ``factor · grad + slope · value + addend`` takes the place of ``grad``.
    """
    out = torch.empty_like(x)
    gradient = SeparableWeights(*(torch.empty_like(t) for t in weights))  # type: ignore[arg-type]
    call(
        "separable_backward",
        x,
        dense(x),
        dense(grad),
        dense(value) if value.numel() else nowhere(grad),
        relu,
        [t.data_ptr() for t in arriving] or [0, 0, 0],
        _sizes(x, weights, dilation),
        _addresses(weights),
        dense(out),
        _sizes(x, weights, dilation),
        _addresses(gradient),
    )
    return out, gradient


def normalise(value: Tensor, affine: Sequence[Tensor], moments: Sequence[Tensor], eps: float) -> Tensor:
    """Batch normalisation by weight and bias, mean and variance, ``[O]`` each."""
    (weight, bias), (mean, variance) = affine, moments
    return F.batch_norm(value, mean, variance, weight, bias, eps=eps)


def norm_gradients(grad: Tensor, value: Tensor, moments: Sequence[Tensor], eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of the weight and of the bias of ``normalise``, from that of its result."""
    mean, variance = moments
    inverse = torch.rsqrt(variance + eps)
    backward = torch.ops.aten.native_batch_norm_backward
    _, d_weight, d_bias = backward(grad, value, mean, None, None, mean, inverse, True, eps, [False, True, True])
    return d_weight, d_bias


def _sizes(x: Tensor, weights: SeparableWeights, dilation: int) -> Any:
    outputs = len(weights.pointwise)
    return native_module.ScaleSizes(x.ndim - 2, [dilation], outputs, outputs, x.shape[1])


def _addresses(weights: SeparableWeights) -> list[int]:
    assert weights.bias is not None
    depthwise, pointwise, bias = (t.data_ptr() for t in (weights.depthwise, weights.pointwise, weights.bias))
    return [depthwise, 0, 0, pointwise, 0, 0, 0, bias, 0, 0]
