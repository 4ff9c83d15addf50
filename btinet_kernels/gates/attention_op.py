"""The two ends of an attention gate as autograd sees them; what lies between is the caller's.

Both are operators of their own: the joint projection of skip and gating signal, and the gate that multiplies the skip.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from btinet_kernels.backends import choose, kernels_for, requested_backend
from btinet_kernels.gates import attention_native as native
from btinet_kernels.gates import attention_reference as reference
from btinet_kernels.gates.attention_reference import JointWeights
from btinet_kernels.interaction.passes_op import (
    accumulation_dtype,
    converted,
    new_in_format_of,
    no_double_backward,
)

# Where `auto` takes the reference on the CPU although the kernels could serve: ATen multiplies bfloat16 with
# instructions of its own, where the kernels widen it to float32; its products take planes as they lie, where the
# kernels turn them around; and without a gradient it is as fast where x has fewer elements than these.
SMALLEST_WITHOUT_GRADIENT = 1 << 22

JOINT, GATE = "fused_joint_projection", "fused_position_gate"


def fused_joint_projection(x: Tensor, g: Tensor, weights: JointWeights) -> Tensor:
    """``ReLU(W_x x + b_x + W_g g + b_g)``, without any of the intermediate tensors.

    Args:
        x: ``[B, C, *spatial]``, one to three spatial dimensions, any strides.
        g: ``[B, G, *spatial]``, of the same size.
        weights: see ``JointWeights``; they may stay float32 under half-precision activations.

    Returns:
        ``[B, K, *spatial]`` of the dtype and memory format of ``x``; where ``g`` has another dtype, of the dtype that
        both promote to.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check_sizes(JOINT, x, g, "g")
    ones, outputs = [1] * (x.ndim - 2), weights.x_weight.shape[0]
    expected = ([outputs, x.shape[1], *ones], [outputs], [outputs, g.shape[1], *ones], [outputs])
    for name, weight, shape in zip(JointWeights._fields, weights, expected, strict=True):
        if list(weight.shape) != shape:
            raise ValueError(f"{JOINT}: {name} is {list(weight.shape)}, but it must be {shape}.")
    x, g = _promoted(x, g)
    if choose(JOINT, x, g) == "reference" or (_by_default(x) and (x.stride(1) != 1 or _by_aten(x, g, *weights))):
        return reference.joint_projection(x, g, JointWeights(*(w.to(x.dtype) for w in weights)))
    return joint_projection(x, g, *weights) if torch.compiler.is_compiling() else _Joint.apply(x, g, *weights)


def fused_position_gate(x: Tensor, h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``x · σ(w · h + b)``: every position has one gate for all channels of ``x``.

    Args:
        x: ``[B, C, *spatial]``, one to three spatial dimensions, any strides.
        h: ``[B, K, *spatial]``, of the same size.
        weight: ``[1, K, 1, …]``, of a convolution of width 1.
        bias: ``[1]``. Both may stay float32 under half-precision activations.

    Returns:
        A tensor of the shape, dtype and memory format of ``x``; where ``h`` has another dtype, of the dtype that both
        promote to.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check_sizes(GATE, x, h, "h")
    for name, tensor, shape in (("weight", weight, [1, h.shape[1], *[1] * (x.ndim - 2)]), ("bias", bias, [1])):
        if list(tensor.shape) != shape:
            raise ValueError(f"{GATE}: {name} is {list(tensor.shape)}, but it must be {shape}.")
    x, h = _promoted(x, h)
    if choose(GATE, x, h) == "reference" or (_by_default(x) and _by_aten(x, h, weight, bias)):
        return reference.position_gate(x, h, weight.to(x.dtype), bias.to(x.dtype))
    inputs = (x, h, weight, bias)
    return (position_gate(*inputs) if torch.compiler.is_compiling() else _Gate.apply(*inputs))[0]


def _by_default(x: Tensor) -> bool:
    return x.device.type == "cpu" and requested_backend() == "auto"


def _by_aten(x: Tensor, *others: Tensor) -> bool:
    differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *others))
    return x.dtype == torch.bfloat16 or (not differentiated and x.numel() < SMALLEST_WITHOUT_GRADIENT)


def _check_sizes(operator: str, x: Tensor, other: Tensor, name: str) -> None:
    if not 3 <= x.ndim <= 5:
        raise ValueError(
            f"{operator}: x must be [B, C, *spatial] with one to three spatial dimensions, got {list(x.shape)}."
        )
    if other.ndim != x.ndim or other.shape[0] != x.shape[0] or other.shape[2:] != x.shape[2:]:
        raise ValueError(
            f"{operator}: {name} is {list(other.shape)}, but x is {list(x.shape)}; they may differ in channels only."
        )


def _promoted(x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    if x.dtype == other.dtype:
        return x, other
    dtype = torch.promote_types(x.dtype, other.dtype)
    return x.to(dtype), other.to(dtype)


def _taken(x: Tensor, *weights: Tensor) -> list[Tensor]:
    """The weights in the dtype that is computed in."""
    return converted(weights, accumulation_dtype(x))  # type: ignore[return-value]


def _gate_passes_for(x: Tensor) -> Any:
    """The module whose kernels gate x."""
    return import_module(f"btinet_kernels.gates.attention_{kernels_for(x, GATE)}")


def _like(weights: tuple[Tensor, ...]) -> list[Tensor]:
    return [torch.empty_like(w, memory_format=torch.contiguous_format) for w in weights]


@custom_op(
    "btinet_kernels::joint_projection",
    mutates_args=(),
    schema="(Tensor x, Tensor g, Tensor x_weight, Tensor x_bias, Tensor g_weight, Tensor g_bias) -> Tensor",
)
def joint_projection(
    x: Tensor, g: Tensor, x_weight: Tensor, x_bias: Tensor, g_weight: Tensor, g_bias: Tensor
) -> Tensor:
    """See ``fused_joint_projection``."""
    of_x, of_g, x_bias, g_bias = _taken(x, x_weight, g_weight, x_bias, g_bias)
    return native.joint_projection(x, g, of_x, of_g, x_bias + g_bias)


@joint_projection.register_fake
def _(x, g, x_weight, x_bias, g_weight, g_bias):  # type: ignore[no-untyped-def]
    return new_in_format_of(x, x_weight.shape[0], x.shape[2:])


@custom_op(
    "btinet_kernels::joint_projection_backward",
    mutates_args=(),
    schema="(Tensor d_out, Tensor out, Tensor x, Tensor g, Tensor x_weight, Tensor g_weight) -> Tensor[]",
)
def joint_projection_gradient(
    d_out: Tensor, out: Tensor, x: Tensor, g: Tensor, x_weight: Tensor, g_weight: Tensor
) -> list[Tensor]:
    """Gradients of x, g, x_weight, g_weight and of either bias."""
    gradients = native.joint_projection_backward(d_out, out, x, g, *_taken(x, x_weight, g_weight))
    return [*gradients[:2], *(d.to(x_weight.dtype) for d in gradients[2:])]


@joint_projection_gradient.register_fake
def _(d_out, out, x, g, x_weight, g_weight):  # type: ignore[no-untyped-def]
    return [torch.empty_like(x), torch.empty_like(g), *_like((x_weight, g_weight)), x_weight.new_empty(len(x_weight))]


joint_projection_gradient.register_autograd(no_double_backward)


def _joint_setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    x, g, x_weight, _, g_weight, _ = inputs
    ctx.save_for_backward(output, x, g, x_weight, g_weight)


def _joint_backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, ...]:
    d_x, d_g, d_x_weight, d_g_weight, d_bias = joint_projection_gradient(d_out, *ctx.saved_tensors)
    return d_x, d_g, d_x_weight, d_bias, d_g_weight, d_bias.clone()


joint_projection.register_autograd(_joint_backward, setup_context=_joint_setup)


class _Joint(torch.autograd.Function):
    """``joint_projection`` as autograd sees it outside a compiler, cheaper than what PyTorch generates."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        return joint_projection(*inputs)

    setup_context = staticmethod(_joint_setup)
    backward = staticmethod(_joint_backward)


@custom_op(
    "btinet_kernels::position_gate",
    mutates_args=(),
    schema="(Tensor x, Tensor h, Tensor weight, Tensor bias) -> (Tensor, Tensor)",
)
def position_gate(x: Tensor, h: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The gated tensor, and the gates ``[B, N]``."""
    return _gate_passes_for(x).position_gate(x, h, *_taken(x, weight, bias))


@position_gate.register_fake
def _(x, h, weight, bias):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), x.new_empty(x.shape[0], x.shape[2:].numel(), dtype=accumulation_dtype(x))


@custom_op(
    "btinet_kernels::position_gate_backward",
    mutates_args=(),
    schema="(Tensor d_out, Tensor x, Tensor h, Tensor gate, Tensor weight) -> Tensor[]",
)
def position_gate_gradient(d_out: Tensor, x: Tensor, h: Tensor, gate: Tensor, weight: Tensor) -> list[Tensor]:
    """Gradients of x, h, weight and bias."""
    gradients = _gate_passes_for(x).position_gate_backward(d_out, x, h, gate, *_taken(x, weight))
    return [*gradients[:2], *(d.to(weight.dtype) for d in gradients[2:])]


@position_gate_gradient.register_fake
def _(d_out, x, h, gate, weight):  # type: ignore[no-untyped-def]
    return [torch.empty_like(x), torch.empty_like(h), *_like((weight,)), weight.new_empty(1)]


position_gate_gradient.register_autograd(no_double_backward)


def _gate_setup(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    x, h, weight, _ = inputs
    ctx.save_for_backward(x, h, output[1], weight)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gate_backward(ctx: Any, d_out: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    return (None,) * 4 if d_out is None else tuple(position_gate_gradient(d_out, *ctx.saved_tensors))


position_gate.register_autograd(_gate_backward, setup_context=_gate_setup)


class _Gate(torch.autograd.Function):
    """``position_gate`` as autograd sees it outside a compiler, cheaper than what PyTorch generates."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        return position_gate(*inputs)

    setup_context = staticmethod(_gate_setup)
    backward = staticmethod(_gate_backward)
