"""How autograd sees a separable convolution with what follows it, and its public function.

Convolutions, bias, ReLU and the statistics of batch normalisation come first, then the normalisation. Backward, its
gradients are summed, and what it passes on is formed where the convolutions read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from btinet_kernels.backends import choose, kernels_for, requested_backend
from btinet_kernels.interaction.passes_op import (
    accumulation_dtype,
    converted,
    in_format_of,
    new_in_format_of,
    no_double_backward,
)
from btinet_kernels.separable import reference
from btinet_kernels.separable.reference import BatchNormWeights, SeparableWeights

OPERATOR = "fused_separable_conv"
MOST_WEIGHTS = 128  # of the 1×1 convolution for each position, where `auto` takes the kernels on the CPU
_WEIGHTS = "Tensor depthwise, Tensor pointwise, Tensor? bias"
_NORM = "Tensor? norm_weight, Tensor? norm_bias"
_OPTIONS = "int dilation, bool relu, float eps"


def fused_separable_conv(
    x: Tensor,
    weights: SeparableWeights,
    *,
    dilation: int = 1,
    relu: bool = False,
    norm: BatchNormWeights | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Depthwise convolution of three taps an axis, padded to keep the size, then 1×1; ReLU; batch normalisation.

    Args:
        x: ``[B, C, *spatial]``, one to three spatial dimensions. Contiguous and channels_last memory is read as it
            lies; other strides are honoured, more slowly.
        weights: see ``SeparableWeights``; they may stay float32 under half-precision activations.
        dilation: of the depthwise convolution.
        relu: whether a ReLU follows.
        norm: parameters and buffers of the batch normalisation that follows; None: there is none.
        training: normalise by the batch's statistics and update the running ones.
        momentum: of the running statistics.
        eps: added to the variance.

    Returns:
        ``[B, O, *spatial]`` in the dtype and memory format of ``x``.
    """
    _check(x, weights, norm, dilation)
    alone = training and x.shape[0] * x.shape[2:].numel() <= 1  # PyTorch says what is wrong with one value a channel
    served = choose(OPERATOR, x) != "reference" and not is_left_to_library(x, weights)
    if not served or x.shape[0] == 0 or alone:
        out = reference.separable(x, weights, dilation, relu)
        return out if norm is None else reference.normalise(out, norm, training, momentum, eps)
    if norm is not None and training:
        out, _, mean, variance = _differentiable(x, *weights, norm.weight, norm.bias, dilation, relu, eps)
        count = x.shape[0] * x.shape[2:].numel()
        with torch.no_grad():
            norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
            norm.running_var.lerp_((variance * (count / (count - 1))).to(norm.running_var.dtype), momentum)
        return out
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *weights, *(norm or ()))):
        out = _differentiable(x, *weights, None, None, dilation, relu, eps)[0]
        return out if norm is None else reference.normalise(out, norm, False, momentum, eps)
    return separable_inference(x, *weights, *(norm or [None] * 4), dilation, relu, eps)


def is_left_to_library(x: Tensor, weights: SeparableWeights) -> bool:
    """Whether `auto` leaves this call to the library: on the CPU, large products of few positions."""
    if x.ndim != weights.pointwise.ndim or requested_backend() != "auto" or not x.is_cpu:
        return False
    return weights.pointwise.numel() > MOST_WEIGHTS * x.shape[0] * x.shape[2:].numel()


def _check(x: Tensor, weights: SeparableWeights, norm: BatchNormWeights | None, dilation: int) -> None:
    if not 3 <= x.ndim <= 5:
        raise ValueError(f"x must be [B, C, *spatial] with one to three spatial dimensions; got {list(x.shape)}.")
    if dilation < 1:
        raise ValueError(f"dilation must be positive, got {dilation}.")
    channels, outputs, axes = x.shape[1], len(weights.pointwise), x.ndim - 2
    wanted = ([channels, 1, *[3] * axes], [outputs, channels, *[1] * axes], *[[outputs]] * 5)
    names = (*SeparableWeights._fields, *(f"norm.{name}" for name in BatchNormWeights._fields))
    for name, weight, shape in zip(names, (*weights, *(norm or ())), wanted, strict=False):
        if weight is not None and list(weight.shape) != shape:
            raise ValueError(f"{name} is {list(weight.shape)}, but for x {list(x.shape)} it must be {shape}.")


@custom_op(
    "btinet_kernels::separable",
    mutates_args=(),
    schema=f"(Tensor x, {_WEIGHTS}, {_NORM}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def separable(
    x: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    dilation: int,
    relu: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The result; with a normalisation also its input, and mean and biased variance of that, ``[O]`` each."""
    weights = _weights_of(x, depthwise, pointwise, bias)
    vector, passes = weights.pointwise.new_empty, _passes_for(x)
    if norm_weight is None:
        return passes.separable(x, weights, dilation, relu), x.new_empty(0), vector(0), vector(0)
    moments = vector(len(pointwise)), vector(len(pointwise))
    value = passes.separable(x, weights, dilation, relu, moments=moments)
    out = passes.normalise(value, converted((norm_weight, norm_bias), weights.pointwise.dtype), moments, eps)
    return in_format_of(value, out), value, *moments


@separable.register_fake
def _(x, depthwise, pointwise, bias, norm_weight, norm_bias, dilation, relu, eps):  # type: ignore[no-untyped-def]
    out, vector = new_in_format_of(x, len(pointwise), x.shape[2:]), x.new_empty(0, dtype=accumulation_dtype(x))
    if norm_weight is None:
        return out, x.new_empty(0), vector, vector.new_empty(0)
    return out, torch.empty_like(out), vector.new_empty(len(pointwise)), vector.new_empty(len(pointwise))


@custom_op(
    "btinet_kernels::separable_inference",
    mutates_args=(),
    schema=(f"(Tensor x, {_WEIGHTS}, {_NORM}, Tensor? running_mean, Tensor? running_var, {_OPTIONS}) -> Tensor"),
)
def separable_inference(
    x: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    dilation: int,
    relu: bool,
    eps: float,
) -> Tensor:
    """The result in one pass, normalised by running statistics, without a gradient."""
    weights = _weights_of(x, depthwise, pointwise, bias)
    affine: Sequence[Tensor] = ()
    if norm_weight is not None:
        assert norm_bias is not None
        assert running_mean is not None
        assert running_var is not None
        dtype = weights.pointwise.dtype
        factor = norm_weight.to(dtype) * torch.rsqrt(running_var.to(dtype) + eps)
        affine = (factor, norm_bias.to(dtype) - running_mean.to(dtype) * factor)
    return _passes_for(x).separable(x, weights, dilation, relu, affine=affine)


@separable_inference.register_fake
def _(x, depthwise, pointwise, *others):  # type: ignore[no-untyped-def]
    return new_in_format_of(x, len(pointwise), x.shape[2:])


@custom_op(
    "btinet_kernels::separable_backward",
    mutates_args=(),
    schema=(
        f"(Tensor d_out, Tensor x, Tensor value, Tensor mean, Tensor variance, {_WEIGHTS}, {_NORM}, {_OPTIONS})"
        " -> Tensor[]"
    ),
)
def separable_gradient(
    d_out: Tensor,
    x: Tensor,
    value: Tensor,
    mean: Tensor,
    variance: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    dilation: int,
    relu: bool,
    eps: float,
) -> list[Tensor]:
    """Gradients of x and of every weight that is there. ``value``: what the ReLU gave, where anything needs it."""
    weights, passes = _weights_of(x, depthwise, pointwise, bias), _passes_for(x)
    arriving: Sequence[Tensor] = ()
    of_norm: list[Tensor] = []
    if norm_weight is not None:
        assert norm_bias is not None
        d_weight, d_bias = passes.norm_gradients(d_out, value, (mean, variance), eps)
        # d_value = weight / σ · (d_out − mean(d_out) − normalised · mean(d_out · normalised))
        count = d_out.shape[0] * d_out.shape[2:].numel()
        inverse = torch.rsqrt(variance + eps)
        factor = norm_weight.to(mean.dtype) * inverse
        slope = -factor * inverse * d_weight / count
        arriving = (factor, slope, -factor * d_bias / count - slope * mean)
        of_norm = [d_weight.to(norm_weight.dtype), d_bias.to(norm_bias.dtype)]
    d_x, gradient = passes.separable_backward(x, d_out, value, weights, dilation, relu, arriving)
    packed = (depthwise, pointwise, bias)
    of_weights = [g.to(w.dtype) for g, w in zip(gradient, packed, strict=True) if w is not None and g is not None]
    return [d_x, *of_weights, *of_norm]


@separable_gradient.register_fake
def _(d_out, x, value, mean, variance, *others):  # type: ignore[no-untyped-def]
    weights = [w for w in others[:5] if w is not None]
    return [torch.empty_like(x), *(torch.empty_like(w, memory_format=torch.contiguous_format) for w in weights)]


separable_gradient.register_autograd(no_double_backward)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, *weights, dilation, relu, eps = inputs
    out, value, mean, variance = output
    ctx.options = dilation, relu, eps
    if weights[3] is None and relu:
        value = out
    ctx.save_for_backward(x, value, mean, variance, *weights)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_out: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if d_out is None:
        return (None,) * 9
    saved = ctx.saved_tensors
    gradients = iter(separable_gradient(d_out, *saved, *ctx.options))
    inputs = (saved[0], *saved[4:])
    return *(None if t is None else next(gradients) for t in inputs), None, None, None


separable.register_autograd(_backward, setup_context=_setup)


class _Separable(torch.autograd.Function):
    """The operator as autograd sees it outside a compiler: what PyTorch generates costs more, see level_op."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return separable(*inputs)

    setup_context = staticmethod(_setup)
    backward = staticmethod(_backward)


def _differentiable(*inputs: Any) -> tuple[Tensor, ...]:
    return separable(*inputs) if torch.compiler.is_compiling() else _Separable.apply(*inputs)


def _passes_for(x: Tensor) -> Any:
    """The module whose kernels take x."""
    return import_module(f"btinet_kernels.separable.{kernels_for(x, OPERATOR)}")


def _weights_of(x: Tensor, depthwise: Tensor, pointwise: Tensor, bias: Tensor | None) -> SeparableWeights:
    """The weights, dense and in the dtype that is computed in; a bias of zeros where there is none."""
    dtype = accumulation_dtype(x)
    if bias is None:
        bias = pointwise.new_zeros(len(pointwise))
    return SeparableWeights(*(t.to(dtype).contiguous() for t in (depthwise, pointwise, bias)))
