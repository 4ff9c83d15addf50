"""How autograd sees batch normalisation with an activation, and its public function."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from btinet_kernels.backends import choose, kernels_for, requested_backend
from btinet_kernels.interaction.passes_op import accumulation_dtype, converted, no_double_backward, unwatched
from btinet_kernels.normalization import reference
from btinet_kernels.normalization.reference import ACTIVATIONS, Act

OPERATOR = "fused_batch_norm_act"
SMALLEST = 1 << 17  # elements; below, `auto` leaves it to ATen, whose calls cost less


def fused_batch_norm_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    act: Act = "identity",
) -> Tensor:
    """``act((x - mean) / sqrt(variance + eps) · weight + bias)``, mean and variance of each channel.

    Args:
        x: ``[B, C, *spatial]``, up to three spatial dimensions, any strides.
        weight: ``[C]`` or None; may stay float32 under a half-precision ``x``, as all the vectors may.
        bias: ``[C]`` or None.
        running_mean: ``[C]``; updated in place where ``training``, used where not. None: there is none.
        running_var: ``[C]``, likewise; the update is by the variance with Bessel's correction, as in
            ``torch.nn.functional.batch_norm``.
        training: normalise by the moments of ``x``.
        momentum: share of the new batch in the running statistics.
        eps: added to the variance.
        act: ``"identity"``, ``"relu"`` or ``"silu"``.

    Returns:
        A tensor of the shape, dtype and memory format of ``x``. Only x and vectors are kept for the backward.

    Raises:
        ValueError: shapes that do not fit, an unknown ``act``, one value per channel in training, or no running
            statistics in evaluation.

    Source: arXiv 1502.03167, algorithm 1.
    """
    vectors = (weight, bias, running_mean, running_var)
    _check(x, vectors, training, act)
    if not batch_norm_is_served(x, act):
        return reference.batch_norm_act(x, *vectors, training, momentum, eps, act)
    moments = (None, None) if training else (running_mean, running_var)
    inputs = (x, weight, bias, *moments, eps, act)
    # What PyTorch generates for a custom operator goes through the schema twice for every argument.
    out, mean, variance = batch_norm(*inputs) if torch.compiler.is_compiling() else _BatchNorm.apply(*inputs)
    if training:
        if running_mean is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        if running_var is not None:
            count = x.numel() // x.shape[1]
            running_var.lerp_((variance * (count / (count - 1))).to(running_var.dtype), momentum)
    return out


def batch_norm_is_served(x: Tensor, act: str) -> bool:
    """Whether kernels take this call."""
    if choose(OPERATOR, x) == "reference" or x.numel() == 0:
        return False
    if requested_backend() != "auto":
        return True
    # A compiler fuses plain operations with their neighbours; on rows of channels alone ATen is as fast as memory.
    by_aten = torch.compiler.is_compiling() or (act == "identity" and x.stride(1) == 1 and x.is_cpu)
    return not by_aten and x.numel() >= SMALLEST


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    eps: float,
    act: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result; mean and variance ``[C]`` of x where they are not given, else empty tensors."""
    vectors, passes = _vectors_of(x, weight, bias, mean, variance), _passes_for(x)
    if mean is not None:
        return passes.batch_norm(x, vectors[:2], vectors[2:], eps, act)[0], *_no_moments(x)
    out, mean, variance = passes.batch_norm(x, vectors[:2], None, eps, act)
    return out, mean, variance


batch_norm = custom_op(
    "btinet_kernels::batch_norm",
    _forward,
    mutates_args=(),
    schema="(Tensor x, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? variance, float eps, str act)"
    " -> (Tensor, Tensor, Tensor)",
)


@batch_norm.register_fake
def _(x, weight, bias, mean, variance, eps, act):  # type: ignore[no-untyped-def]
    if mean is not None:
        return torch.empty_like(x), *_no_moments(x)
    of_x = x.new_empty(x.shape[1], dtype=accumulation_dtype(x))
    return torch.empty_like(x), of_x, torch.empty_like(of_x)


def _no_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(0, dtype=accumulation_dtype(x)), x.new_empty(0, dtype=accumulation_dtype(x))


def _gradient(
    d_out: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    training: bool,
    eps: float,
    act: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of the weight and of the bias, the last two in the dtype that is computed in."""
    vectors = _vectors_of(x, weight, bias, mean, variance)
    passes = _passes_for(x)
    return passes.batch_norm_backward(x, d_out, vectors[:2], vectors[2:], training=training, eps=eps, act=act)


batch_norm_gradient = custom_op(
    "btinet_kernels::batch_norm_backward",
    _gradient,
    mutates_args=(),
    schema="(Tensor d_out, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor variance, bool training,"
    " float eps, str act) -> (Tensor, Tensor, Tensor)",
)


@batch_norm_gradient.register_fake
def _(d_out, x, weight, bias, mean, variance, training, eps, act):  # type: ignore[no-untyped-def]
    d_weight = x.new_empty(x.shape[1], dtype=accumulation_dtype(x))
    return torch.empty_like(x), d_weight, torch.empty_like(d_weight)


batch_norm_gradient.register_autograd(no_double_backward)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, *moments, ctx.eps, ctx.act = inputs
    ctx.training = moments[0] is None
    ctx.save_for_backward(x, weight, bias, *(output[1:] if ctx.training else moments))
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_out: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 4  # of the moments and the options
    if d_out is None:
        return None, None, None, *nothing
    x, weight, bias, mean, variance = ctx.saved_tensors
    gradient = _gradient if unwatched(d_out) else batch_norm_gradient
    d_x, *gradients = gradient(d_out, x, weight, bias, mean, variance, ctx.training, ctx.eps, ctx.act)
    return (
        d_x,
        *(None if v is None else d.to(v.dtype) for d, v in zip(gradients, (weight, bias), strict=True)),
        *nothing,
    )


batch_norm.register_autograd(_backward, setup_context=_setup)


class _BatchNorm(torch.autograd.Function):
    """``batch_norm`` as autograd sees it outside a compiler."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:  # with setup_context every call inspects the signature
        outputs = (_forward if unwatched(inputs[0]) else batch_norm)(*inputs)
        _setup(ctx, inputs, outputs)
        return outputs

    backward = staticmethod(_backward)


def _passes_for(x: Tensor) -> Any:
    """The module whose kernels take x."""
    return import_module(f"btinet_kernels.normalization.{kernels_for(x, OPERATOR)}")


def _vectors_of(x: Tensor, *vectors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The vectors, dense and in the dtype that is computed in."""
    return tuple(None if v is None else v.contiguous() for v in converted(vectors, accumulation_dtype(x)))


def _check(x: Tensor, vectors: tuple[Tensor | None, ...], training: bool, act: str) -> None:
    if act not in ACTIVATIONS:
        raise ValueError(f"act must be 'identity', 'relu' or 'silu', got {act!r}.")
    if not 2 <= x.ndim <= 5:
        raise ValueError(f"x must be [B, C, *spatial] with up to three spatial dimensions, got {list(x.shape)}.")
    for name, vector in zip(("weight", "bias", "running_mean", "running_var"), vectors, strict=True):
        if vector is not None and vector.shape != x.shape[1:2]:
            raise ValueError(f"{name} must be [{x.shape[1]}] for x {list(x.shape)}, got {list(vector.shape)}.")
    if training and x.numel() == x.shape[1]:
        raise ValueError(f"expected more than one value per channel in training, got x {list(x.shape)}.")
    if not training and (vectors[2] is None or vectors[3] is None):
        raise ValueError("running_mean and running_var are needed in evaluation.")
