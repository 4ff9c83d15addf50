"""What the operators share: how weights travel through a schema, and the passes of the backward."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.library import custom_op

from btinet_kernels.backends import serving
from btinet_kernels.interaction import reference
from btinet_kernels.interaction.reference import Context, GateWeights, InteractionWeights, Statistics


class LevelOptions(NamedTuple):
    """How a level computes; a schema carries the fields one by one."""

    signals: str  # "proxies", "variance", or "none" for TIM without a gate
    strength: float
    training: bool
    eps: float


def unwatched(x: Tensor) -> bool:
    """Whether neither autograd nor a dispatch mode nor a tensor subclass wants to know what is called: then an
    operator's own function may be called, without the dispatcher, which takes longer than a small kernel."""
    plain = type(x) in (Tensor, nn.Parameter) and not torch.is_grad_enabled()
    return plain and torch._C._len_torch_dispatch_stack() == 0


# Weights travel through a schema one by one, in the order of their NamedTuples: a list of them costs 0.1 ms a call.


def schema_of(*weights: type[NamedTuple]) -> str:
    """The weights' part of a schema."""
    return ", ".join(f"Tensor? {name}" for each in weights for name in each._fields)


def pack(weights: InteractionWeights, gate: GateWeights | None) -> list[Tensor | None]:
    """The weights one by one."""
    return [*weights, *(gate or [None] * len(GateWeights._fields))]


def unpack(
    packed: Sequence[Tensor | None], dtype: torch.dtype | None = None
) -> tuple[InteractionWeights, GateWeights | None]:
    """The inverse of ``pack``, converted to ``dtype`` if there is one."""
    split = len(InteractionWeights._fields)
    if dtype is not None:
        packed = converted(packed, dtype)
    gate = packed[split:]
    missing = gate[-1] is None
    return InteractionWeights(*packed[:split]), None if missing else GateWeights(*gate)  # type: ignore[arg-type]


def converted(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """The tensors in ``dtype``; itself where it has it already, without asking PyTorch to convert."""
    return [t if t is None or t.dtype == dtype else t.to(dtype) for t in tensors]


def accumulation_dtype(seg: Tensor) -> torch.dtype:
    """Dtype of statistics and vectors: float32, or float64 for float64."""
    return torch.promote_types(seg.dtype, torch.float32)


def passes_for(*dense: Tensor) -> Any:
    """The module whose passes take these tensors: ``native``, ``triton``, ``cuda`` or ``reference``."""
    return import_module(f"btinet_kernels.interaction.{serving(*dense)[0]}")


def active_shape(seg: Tensor, hidden: int) -> tuple[int, int, int]:
    """Shape of ``Statistics.active``."""
    return seg.shape[0], prod(seg.shape[2:]), (hidden + 7) // 8


def as_taken(passes: Any, dense: Tensor) -> Tensor:
    """The reference computes in the dtype it is given; the other backends store that dtype and compute in float32."""
    return dense.to(accumulation_dtype(dense)) if passes is reference else dense


def in_format_of(seg: Tensor, out: Tensor) -> Tensor:
    """``out`` with the strides that the fake kernels promise."""
    like = torch.empty_like(seg)
    return out if out.stride() == like.stride() else like.copy_(out)


def new_in_format_of(x: Tensor, channels: int, positions: Sequence[int]) -> Tensor:
    """An uninitialised, dense ``[B, channels, *positions]`` with the channels side by side where those of ``x`` are."""
    if x.stride(1) == 1 and not x.is_contiguous():
        return x.new_empty(x.shape[0], *positions, channels).movedim(-1, 1)
    return x.new_empty(x.shape[0], channels, *positions)


# The passes of the backward, custom ops of their own so that a compiler need not look inside.


@custom_op("btinet_kernels::channel_dot", mutates_args=())
def channel_dot(grad: Tensor, seg: Tensor) -> Tensor:
    """Backward pass A; see ``reference.channel_dot``."""
    passes = passes_for(grad, seg)
    return passes.channel_dot(as_taken(passes, grad), as_taken(passes, seg))


@channel_dot.register_fake
def _(grad, seg):  # type: ignore[no-untyped-def]
    return seg.new_empty(seg.shape[:2], dtype=accumulation_dtype(seg))


@custom_op("btinet_kernels::statistics_backward", mutates_args=())
def statistics_backward(
    seg: Tensor, grad: Tensor, scale: Tensor, mean: Tensor, d_mean: Tensor, d_variance: Tensor, d_edges: Tensor
) -> Tensor:
    """Backward pass B without a context: ``grad · scale`` plus the gradient through ``reference.statistics``.

    ``mean``: of seg, needed with ``d_variance``. Statistics that nothing depends on have empty gradients.
    """
    passes = passes_for(seg, grad)
    none = [scale.new_empty(0) for _ in range(5)]
    saved, gradient = Statistics(mean, *none), Statistics(d_mean, d_variance, d_edges, *none[:3])
    backward = statistics_backward_of(passes)
    out, _ = backward(as_taken(passes, seg), as_taken(passes, grad), scale, None, saved, gradient)
    return in_format_of(seg, out.to(seg.dtype))


@statistics_backward.register_fake
def _(seg, grad, scale, mean, d_mean, d_variance, d_edges):  # type: ignore[no-untyped-def]
    return torch.empty_like(seg)


def no_double_backward(ctx: Any, *upstream: Tensor) -> None:
    """The backward of a backward."""
    raise RuntimeError(
        "a fused operator cannot be differentiated twice; compute the first gradient inside "
        "btinet_kernels.use_backend('reference') as well as the forward pass."
    )


channel_dot.register_autograd(no_double_backward)
statistics_backward.register_autograd(no_double_backward)


def statistics_backward_of(passes: Any) -> Any:
    """The function of a backend that goes back through ``statistics``."""
    return _statistics_backward_reference if passes is reference else passes.statistics_backward


def _statistics_backward_reference(
    seg: Tensor, grad: Tensor, scale: Tensor, context: Context | None, saved: Statistics, gradient: Statistics
) -> tuple[Tensor, list[Tensor]]:
    variance, edges = gradient.variance.numel() > 0, gradient.edges.numel() > 0

    def passes(seg: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        of = Context(*weights, *[None] * (3 - len(weights))) if weights else None
        return tuple(reference.statistics(seg, of, variance=variance, edges=edges)[:4])

    weights = [] if context is None else [w for w in context if w is not None]
    # What was not asked for is an empty tensor on both sides.
    grad_seg, *grad_weights = torch.func.vjp(passes, seg, *weights)[1](tuple(gradient[:4]))
    return grad_seg + reference.scale_channels(grad, scale), list(grad_weights)
