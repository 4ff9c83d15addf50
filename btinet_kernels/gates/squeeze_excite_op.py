"""Squeeze-and-excitation as autograd sees it, through the passes of the interaction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op
from torch.nn import functional as F

from btinet_kernels.backends import choose, requested_backend
from btinet_kernels.gates import squeeze_excite_reference as reference
from btinet_kernels.gates.squeeze_excite_reference import Activation, Gate, SqueezeExciteWeights
from btinet_kernels.interaction import reference as reference_passes
from btinet_kernels.interaction.passes_op import (
    accumulation_dtype,
    as_taken,
    converted,
    in_format_of,
    no_double_backward,
    passes_for,
    schema_of,
    statistics_backward_of,
)
from btinet_kernels.interaction.reference import Statistics, over_space

# Where `auto` takes the reference on the CPU although the kernels could serve; docs/squeeze_excite.md has the
# measurements. ATen's own passes are as fast as memory, so that only the backward is worth an operator.
SMALLEST_ON_CPU, SMALLEST_CONTIGUOUS_ON_CPU = 1 << 18, 1 << 21  # elements; channels_last, everything else
ATEN_DTYPES = (torch.float32, torch.float64)


def fused_squeeze_excite(
    x: Tensor, weights: SqueezeExciteWeights, *, act: Activation = "relu", gate: Gate = "sigmoid"
) -> Tensor:
    """Squeeze-and-excitation: ``x · gate(W₂ act(W₁ mean(x) + b₁) + b₂)``, the mean over the positions.

    Args:
        x: ``[B, C, *spatial]``, one to three spatial dimensions, any strides.
        weights: see ``SqueezeExciteWeights``; they may stay float32 under half-precision activations.
        act: ``"relu"`` or ``"silu"``.
        gate: ``"sigmoid"`` or ``"hardsigmoid"``.

    Returns:
        A tensor of the shape, dtype and memory format of ``x``.

    Raises:
        ValueError: shapes that do not fit, an unknown ``act`` or ``gate``.

    Source: arXiv 1709.01507, equations (2)-(4).
    """
    _check(x, weights, act, gate)
    if not squeeze_excite_is_served(x, weights):
        return _forward(reference_passes, x, weights, act, gate)[0]
    inputs = (x, *weights, act, gate)
    # What PyTorch generates for a custom operator goes through the schema twice for every argument.
    outputs = squeeze_excite(*inputs) if torch.compiler.is_compiling() else _SqueezeExcite.apply(*inputs)
    return outputs[0]


def squeeze_excite_is_served(x: Tensor, weights: SqueezeExciteWeights) -> bool:
    """Whether passes of this package take this call."""
    return choose("fused_squeeze_excite", x) != "reference" and not _reference_is_faster(x, weights)


def _reference_is_faster(x: Tensor, weights: SqueezeExciteWeights) -> bool:
    if x.device.type != "cpu" or x.dtype not in ATEN_DTYPES or requested_backend() != "auto":
        return False
    differentiated = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *weights))
    smallest = SMALLEST_ON_CPU if x.stride(1) == 1 else SMALLEST_CONTIGUOUS_ON_CPU
    return not differentiated or torch.compiler.is_compiling() or x.numel() < smallest


def _by_aten(passes: Any, x: Tensor) -> bool:
    """Whether the passes other than ``channel_dot`` are ATen's: the native ones pack tiles, as only products need."""
    return passes.__name__.endswith(".native") and x.dtype in ATEN_DTYPES


class WeightGradients(NamedTuple):
    """Of the mean ``[B, C]`` and of the weights there are."""

    mean: Tensor
    weights: list[Tensor]


def gates_backward(
    d_gates: Tensor, mean: Tensor, gates: Tensor, weights: SqueezeExciteWeights, act: str, gate: str
) -> WeightGradients:
    """Gradients of ``reference.channel_gates``, written out; ``gates`` is what it returned."""
    reduced = F.linear(mean, weights.reduce_weight, weights.reduce_bias)
    if act == "relu":
        hidden = F.relu(reduced)
        slope = (reduced > 0).to(reduced.dtype)
    else:
        share = torch.sigmoid(reduced)
        hidden = reduced * share
        slope = share + hidden * (1 - share)
    between = ((gates > 0) & (gates < 1)).to(gates.dtype)
    d_expanded = d_gates * (gates * (1 - gates) if gate == "sigmoid" else between / 6)
    d_reduced = (d_expanded @ weights.expand_weight) * slope
    of_weights = [d_reduced.t() @ mean, d_reduced.sum(0), d_expanded.t() @ hidden, d_expanded.sum(0)]
    there = [d for d, weight in zip(of_weights, weights, strict=True) if weight is not None]
    return WeightGradients(d_reduced @ weights.reduce_weight, there)


def _forward(
    passes: Any, x: Tensor, weights: Sequence[Tensor | None], act: str, gate: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, the gates, the mean. Differentiable where ``passes`` is."""
    with torch.autocast(x.device.type, enabled=False):
        dense = as_taken(passes, x)
        mean = passes.statistics(dense, None, variance=False, edges=False).mean
        gates = _gates(mean, weights, act, gate)
        return passes.scale_channels(dense, gates).to(x.dtype), gates, mean


def _forward_by_aten(x: Tensor, weights: Sequence[Tensor | None], act: str, gate: str) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        mean = x.flatten(2).mean(2)
        gates = _gates(mean, weights, act, gate)
        return torch.mul(x, over_space(gates, x), out=torch.empty_like(x)), gates, mean


def _gates(mean: Tensor, weights: Sequence[Tensor | None], act: str, gate: str) -> Tensor:
    of = SqueezeExciteWeights(*converted(weights, mean.dtype))  # type: ignore[arg-type]
    return reference.channel_gates(mean, of, act, gate)


_WEIGHTS = schema_of(SqueezeExciteWeights)
_OPTIONS = "str act, str gate"


@custom_op(
    "btinet_kernels::squeeze_excite",
    mutates_args=(),
    schema=f"(Tensor x, {_WEIGHTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
)
def squeeze_excite(x: Tensor, *weights_and_options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gated tensor, the gates and the mean."""
    *weights, act, gate = weights_and_options
    passes = passes_for(x)
    if _by_aten(passes, x):
        return _forward_by_aten(x, weights, act, gate)
    out, gates, mean = _forward(passes, x, weights, act, gate)
    return in_format_of(x, out), gates, mean


@squeeze_excite.register_fake
def _(x, *weights_and_options):  # type: ignore[no-untyped-def]
    gates = x.new_empty(x.shape[:2], dtype=accumulation_dtype(x))
    return torch.empty_like(x), gates, torch.empty_like(gates)


@custom_op(
    "btinet_kernels::squeeze_excite_backward",
    mutates_args=(),
    schema=f"(Tensor d_out, Tensor x, Tensor gates, Tensor mean, {_WEIGHTS}, {_OPTIONS}) -> Tensor[]",
)
def squeeze_excite_gradient(
    d_out: Tensor, x: Tensor, gates: Tensor, mean: Tensor, *weights_and_options: Any
) -> list[Tensor]:
    """Gradients of ``x`` and of the weights there are."""
    *weights, act, gate = weights_and_options
    passes = passes_for(x, d_out)
    dense, grad_dense = as_taken(passes, x), as_taken(passes, d_out)
    with torch.autocast(x.device.type, enabled=False):
        of = SqueezeExciteWeights(*converted(weights, mean.dtype))  # type: ignore[arg-type]
        gradient = gates_backward(passes.channel_dot(grad_dense, dense), mean, gates, of, act, gate)
        if _by_aten(passes, x):
            shift = over_space(gradient.mean / max(x[0, 0].numel() if len(x) else 1, 1), x)
            d_x = torch.addcmul(shift, d_out, over_space(gates, x), out=torch.empty_like(x))
        else:
            none = [mean.new_empty(0)] * 5
            d_x, _ = statistics_backward_of(passes)(
                dense, grad_dense, gates, None, Statistics(mean, *none), Statistics(gradient.mean, *none)
            )
    there = [w for w in weights if w is not None]
    return [
        in_format_of(x, d_x.to(x.dtype)),
        *(d.to(w.dtype) for d, w in zip(gradient.weights, there, strict=True)),
    ]


@squeeze_excite_gradient.register_fake
def _(d_out, x, gates, mean, *weights_and_options):  # type: ignore[no-untyped-def]
    there = [w for w in weights_and_options[:-2] if w is not None]
    return [torch.empty_like(x), *(torch.empty_like(w, memory_format=torch.contiguous_format) for w in there)]


squeeze_excite_gradient.register_autograd(no_double_backward)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, *weights, ctx.act, ctx.gate = inputs
    ctx.save_for_backward(x, *output[1:], *weights)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_out: Tensor | None, *_: Any) -> tuple[Any, ...]:
    x, gates, mean, *weights = ctx.saved_tensors
    if d_out is None:
        return (None,) * (len(weights) + 3)
    d_x, *d_weights = squeeze_excite_gradient(d_out, x, gates, mean, *weights, ctx.act, ctx.gate)
    given = iter(d_weights)
    return d_x, *(None if w is None else next(given) for w in weights), None, None


squeeze_excite.register_autograd(_backward, setup_context=_setup)


class _SqueezeExcite(torch.autograd.Function):
    """``squeeze_excite`` as autograd sees it outside a compiler."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        return squeeze_excite(*inputs)

    setup_context = staticmethod(_setup)
    backward = staticmethod(_backward)


def _check(x: Tensor, weights: SqueezeExciteWeights, act: str, gate: str) -> None:
    if act not in reference.ACTIVATIONS:
        raise ValueError(f"act must be 'relu' or 'silu', got {act!r}.")
    if gate not in reference.GATES:
        raise ValueError(f"gate must be 'sigmoid' or 'hardsigmoid', got {gate!r}.")
    if not 3 <= x.ndim <= 5:
        raise ValueError(f"x must be [B, C, *spatial] with one to three spatial dimensions, got {list(x.shape)}.")
    reduced, channels = weights.reduce_weight.shape[0], x.shape[1]
    expected = ((reduced, channels), (reduced,), (channels, reduced), (channels,))
    for name, weight, shape in zip(SqueezeExciteWeights._fields, weights, expected, strict=True):
        if weight is not None and tuple(weight.shape) != shape:
            raise ValueError(f"{name} must be {list(shape)} for {channels} channels, got {list(weight.shape)}.")
