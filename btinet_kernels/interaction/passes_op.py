"""What the operators share: how weights travel through a schema, and the passes of the backward."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from btinet_kernels.backends import serving
from btinet_kernels.interaction import reference
from btinet_kernels.interaction.reference import Context, GateWeights, InteractionWeights, Statistics


class LevelOptions(NamedTuple):
    """How a level computes; a schema carries the fields one by one."""

    softmax: bool  # the context is pooled by a softmax, so there is a pooling weight
    signals: str  # "proxies", "variance", or "none" for TIM without a gate
    strength: float
    training: bool
    eps: float


# Weights travel through the schema as one list, in the order of their NamedTuples, without those that are None.


def pack(weights: InteractionWeights | None, gate: GateWeights | None) -> list[Tensor]:
    """The weights as one list."""
    return [tensor for tensor in (*(weights or ()), *(gate or ())) if tensor is not None]


def unpack(packed: Sequence[Tensor], softmax: bool, signals: str) -> tuple[InteractionWeights, GateWeights | None]:
    """The inverse of ``pack``; ``softmax``: there is a pooling weight; ``signals="none"``: there is no gate."""
    rest: list[Tensor | None] = list(packed)
    if not softmax:
        rest.insert(2, None)
    split = len(InteractionWeights._fields)
    return InteractionWeights(*rest[:split]), unpack_gate(rest[split:], signals)  # type: ignore[arg-type]


def unpack_gate(packed: Sequence[Tensor | None], signals: str) -> GateWeights | None:
    """The inverse of ``pack`` for a gate alone."""
    if signals == "none":
        return None
    return GateWeights(*packed) if signals == "proxies" else GateWeights(None, None, *packed)  # type: ignore[arg-type]


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
        "a fused interaction cannot be differentiated twice; compute the first gradient inside "
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
