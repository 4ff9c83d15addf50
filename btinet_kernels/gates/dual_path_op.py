"""Dual-path attention as autograd sees it: schemas, fake kernels, backward formula, and the public function."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from btinet_kernels.backends import choose, serving
from btinet_kernels.gates import reference
from btinet_kernels.gates.reference import KERNEL_WIDTH, DualPathSaved, DualPathWeights
from btinet_kernels.interaction.passes_op import (
    accumulation_dtype,
    converted,
    in_format_of,
    no_double_backward,
)

OPERATOR = "fused_dual_path_attention"
_SAVED = ", ".join(f"Tensor {name}" for name in DualPathSaved._fields)
_WEIGHTS = ", ".join(f"Tensor {name}" for name in DualPathWeights._fields)


def fused_dual_path_attention(x: Tensor, weights: DualPathWeights, residual: Tensor | None = None) -> Tensor:
    """Channel gate times spatial gate, ``x · σ(W₂ ReLU(W₁ mean_n x + b₁) + b₂) · σ(conv₇(max_c x, mean_c x))``.

    Args:
        x: ``[B, C, *spatial]``, one to three spatial dimensions, any strides.
        weights: see ``DualPathWeights``; they may stay float32 under half-precision activations.
        residual: of the same shape as ``x``; the result is then ``ReLU(gated x + residual)``.

    Returns:
        A tensor of the shape, dtype and memory format of ``x``; where ``residual`` has another dtype, of the dtype that
        both promote to.

    Source: arXiv 2603.01295.
    """
    _check(x, weights, residual)
    if residual is not None and residual.dtype != x.dtype:
        dtype = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(dtype), residual.to(dtype)
    if choose(OPERATOR, x) == "reference":
        return _forward(reference, x, residual, weights)[0]
    return _differentiable(x, residual, *weights)[0]


def _check(x: Tensor, weights: DualPathWeights, residual: Tensor | None) -> None:
    if not 3 <= x.ndim <= 5:
        raise ValueError(
            f"{OPERATOR}: x must be [B, C, *spatial] with one to three spatial dimensions, got {_shape(x)}."
        )
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"{OPERATOR}: residual is {_shape(residual)}, but x is {_shape(x)}; they must agree in shape.")
    channels, hidden = x.shape[1], weights.hidden_weight.shape[0]
    kernel = [KERNEL_WIDTH] * (x.ndim - 2)
    expected = ([hidden, channels], [hidden], [channels, hidden], [channels], [1, 2, *kernel], [1])
    for name, weight, shape in zip(DualPathWeights._fields, weights, expected, strict=True):
        if _shape(weight) != shape:
            raise ValueError(f"{OPERATOR}: {name} is {_shape(weight)}, but for x {_shape(x)} it must be {shape}.")


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def _forward(
    passes: Any, x: Tensor, residual: Tensor | None, weights: Sequence[Tensor]
) -> tuple[Tensor, DualPathSaved]:
    """The result in x's dtype, and what the backward needs. Differentiable where ``passes`` is the reference."""
    with torch.autocast(x.device.type, enabled=False):
        taken = DualPathWeights(*converted(weights, accumulation_dtype(x)))  # type: ignore[arg-type]
        added = None if residual is None else _as_taken(passes, residual)
        out, saved = passes.dual_path(_as_taken(passes, x), added, taken)
    return out.to(x.dtype), saved


def _as_taken(passes: Any, dense: Tensor) -> Tensor:
    """The reference computes in the dtype it is given; the other backends store that dtype and compute in float32."""
    return dense.to(accumulation_dtype(dense)) if passes is reference else dense


def _passes_for(*dense: Tensor) -> Any:
    """The module whose passes take these tensors: ``native``, ``triton`` or ``reference``."""
    return import_module(f"btinet_kernels.gates.{serving(*dense, operator=OPERATOR)[0]}")


@custom_op(
    "btinet_kernels::dual_path",
    mutates_args=(),
    schema=f"(Tensor x, Tensor? residual, {_WEIGHTS}) -> ({', '.join(['Tensor'] * 6)})",
)
def dual_path(x: Tensor, residual: Tensor | None, *weights: Tensor) -> tuple[Tensor, ...]:
    """The result, and ``DualPathSaved``."""
    out, saved = _forward(_passes_for(x), x, residual, weights)
    return in_format_of(x, out), *saved


@dual_path.register_fake
def _(x, residual, *weights):  # type: ignore[no-untyped-def]
    vectors = x.new_empty(0, dtype=accumulation_dtype(x))
    batch, channels, positions = x.shape[0], x.shape[1], x.shape[2:].numel()
    return (
        torch.empty_like(x),
        vectors.new_empty(batch, channels),
        vectors.new_empty(batch, weights[0].shape[0]),
        vectors.new_empty(batch, channels),
        vectors.new_empty(batch, 2, positions),
        vectors.new_empty(batch, positions),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, *weights = inputs
    out, *saved = output
    ctx.save_for_backward(x, None if residual is None else out, *saved, *weights)
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)


@custom_op(
    "btinet_kernels::dual_path_backward",
    mutates_args=(),
    schema=f"(Tensor d_out, Tensor x, Tensor? out, {_SAVED}, {_WEIGHTS}) -> Tensor[]",
)
def dual_path_gradient(d_out: Tensor, x: Tensor, out: Tensor | None, *rest: Tensor) -> list[Tensor]:
    """Gradients of x, of the weights and, where there is ``out``, of the residual."""
    saved, weights = _split(rest)
    passes = _passes_for(d_out, x)
    with torch.autocast(x.device.type, enabled=False):
        taken = DualPathWeights(*converted(weights, saved.mean.dtype))  # type: ignore[arg-type]
        result = None if out is None else _as_taken(passes, out)
        d_x, d_residual, d_weights = passes.dual_path_backward(
            _as_taken(passes, d_out), _as_taken(passes, x), result, saved, taken
        )
    of_weights = [d.to(w.dtype) for d, w in zip(d_weights, weights, strict=True)]
    of_residual = [] if out is None else [in_format_of(out, d_residual.to(x.dtype))]
    return [in_format_of(x, d_x.to(x.dtype)), *of_weights, *of_residual]


def _split(rest: Sequence[Tensor]) -> tuple[DualPathSaved, DualPathWeights]:
    split = len(DualPathSaved._fields)
    return DualPathSaved(*rest[:split]), DualPathWeights(*rest[split:])


@dual_path_gradient.register_fake
def _(d_out, x, out, *rest):  # type: ignore[no-untyped-def]
    weights = _split(rest)[1]
    like = [torch.empty_like(w, memory_format=torch.contiguous_format) for w in weights]
    return [torch.empty_like(x), *like, *([] if out is None else [torch.empty_like(out)])]


dual_path_gradient.register_autograd(no_double_backward)


def _backward(ctx: Any, d_out: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    x, out, *rest = ctx.saved_tensors
    if d_out is None:
        return (None,) * (2 + len(DualPathWeights._fields))
    d_x, *d_weights = dual_path_gradient(d_out, x, out, *rest)
    d_residual = None if out is None else d_weights.pop()
    return d_x, d_residual, *d_weights


dual_path.register_autograd(_backward, setup_context=_setup)


class _DualPath(torch.autograd.Function):
    """``dual_path`` as autograd sees it outside a compiler, cheaper than what PyTorch generates for the operator."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return dual_path(*inputs)

    setup_context = staticmethod(_setup)
    backward = staticmethod(_backward)


def _differentiable(*inputs: Any) -> tuple[Tensor, ...]:
    return dual_path(*inputs) if torch.compiler.is_compiling() else _DualPath.apply(*inputs)
