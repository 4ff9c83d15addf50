"""One decoder level, TIM alone or with its gate, as autograd sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from btinet_kernels.interaction import reference
from btinet_kernels.interaction.passes_op import (
    LevelOptions,
    accumulation_dtype,
    active_shape,
    as_taken,
    in_format_of,
    no_double_backward,
    passes_for,
    statistics_backward_of,
    unpack,
)
from btinet_kernels.interaction.reference import Context, InteractionWeights, Statistics
from btinet_kernels.interaction.vectors_backward import level_backward


def level_vectors(
    stats: Statistics,
    clf: Tensor,
    packed: Sequence[Tensor],
    options: LevelOptions,
) -> tuple[Tensor, ...]:
    """Scale of the dense stream, new clf, gates, proxies, batch mean, batch variance."""
    dtype = stats.mean.dtype
    weights, gate = unpack([tensor.to(dtype) for tensor in packed], options.softmax, options.signals)
    base = clf.to(dtype)
    enhanced = reference.enhance(
        stats, base, weights, strength=options.strength, training=options.training, eps=options.eps
    )
    if gate is None:
        gates, proxies = base.new_empty(0), base.new_empty(0)
        return (
            enhanced.modulation,
            enhanced.clf.to(clf.dtype),
            gates,
            proxies,
            enhanced.batch_mean,
            enhanced.batch_var,
        )
    result = reference.gate_of_level(stats, enhanced, base, gate, options.signals)  # type: ignore[arg-type]
    scale = 1 + result.gates[:, :1] * (enhanced.modulation - 1)
    clf_out = base + result.gates[:, 1:] * (enhanced.clf - base)
    return scale, clf_out.to(clf.dtype), *result, enhanced.batch_mean, enhanced.batch_var


def level_forward(
    passes: Any,
    seg: Tensor,
    clf: Tensor,
    packed: Sequence[Tensor],
    options: LevelOptions,
    *,
    for_backward: bool = False,
) -> tuple[Tensor, ...]:
    """Both passes around the vectors; returns what ``level`` returns. Differentiable where ``passes`` is.

    ``for_backward``: compute what ``statistics_backward`` wants to find in the statistics.
    """
    with torch.autocast(seg.device.type, enabled=False):
        dense = as_taken(passes, seg)
        weights = [w.to(accumulation_dtype(seg)) for w in packed[: 3 if options.softmax else 2]]
        context = Context(weights[0], weights[1], weights[2] if options.softmax else None)
        proxies = options.signals == "proxies"
        edges = proxies and reference.has_edge_energy(seg)
        variance = options.signals == "variance"
        stats = passes.statistics(dense, context, variance=variance, edges=edges, active=for_backward)
        if proxies and not edges:
            stats = stats._replace(edges=stats.mean.new_zeros(seg.shape[0]))
        vectors_of = getattr(passes, "level_vectors", level_vectors)
        scale, *vectors = vectors_of(stats, clf, packed, options)
        return passes.scale_channels(dense, scale).to(seg.dtype), *vectors, scale, *stats


@custom_op("btinet_kernels::task_interaction", mutates_args=())
def level(
    seg: Tensor,
    clf: Tensor,
    weights: list[Tensor],
    softmax: bool,
    signals: str,
    strength: float,
    training: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """TIM, gated unless ``signals`` is "none".

    Returns seg, clf, gates, proxies, batch mean and variance (empty in inference), the scale of seg, ``Statistics``.
    """
    options = LevelOptions(softmax, signals, strength, training, eps)
    out, *rest = level_forward(passes_for(seg), seg, clf, weights, options, for_backward=True)
    if not training:  # an output may not alias the running statistics
        rest[3:5] = [rest[5].new_empty(0), rest[5].new_empty(0)]
    return in_format_of(seg, out), *rest  # type: ignore[return-value]


@level.register_fake
def _(seg, clf, weights, softmax, signals, strength, training, eps):  # type: ignore[no-untyped-def]
    batch, channels = seg.shape[:2]
    vectors = seg.new_empty(0, dtype=accumulation_dtype(seg))
    proxies = {"none": 0, "proxies": 3, "variance": 2}[signals]
    norm = vectors.new_empty(clf.shape[1] if training else 0)
    return (
        torch.empty_like(seg),
        torch.empty_like(clf, memory_format=torch.contiguous_format),
        vectors.new_empty(batch, 2) if proxies else vectors.new_empty(0),
        vectors.new_empty(batch, proxies) if proxies else vectors.new_empty(0),
        norm,
        torch.empty_like(norm),
        vectors.new_empty(batch, channels),
        vectors.new_empty(batch, channels),
        vectors.new_empty(batch, channels) if signals == "variance" else vectors.new_empty(0),
        vectors.new_empty(batch) if signals == "proxies" else vectors.new_empty(0),
        vectors.new_empty(batch, weights[0].shape[0]),
        vectors.new_empty(batch) if softmax else vectors.new_empty(0),
        seg.new_empty(0 if softmax else active_shape(seg, weights[0].shape[0]), dtype=torch.uint8),
    )


def _level_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    seg, clf, weights, *options = inputs
    ctx.options = LevelOptions(*options)
    scale, stats = output[6], output[7:]
    ctx.save_for_backward(seg, clf, scale, *stats, *weights)
    ctx.mark_non_differentiable(*output[4:])


@custom_op("btinet_kernels::task_interaction_backward", mutates_args=())
def level_gradient(
    upstream: list[Tensor],
    seg: Tensor,
    clf: Tensor,
    scale: Tensor,
    stats: list[Tensor],
    weights: list[Tensor],
    softmax: bool,
    signals: str,
    strength: float,
    training: bool,
    eps: float,
) -> list[Tensor]:
    """Gradients of seg, of clf and of the weights, without the running statistics.

    ``upstream``: of the first four results of ``level``; ``stats``: what it returned.
    """
    options = LevelOptions(softmax, signals, strength, training, eps)
    grad_seg, grad_clf, grad_gates, grad_proxies = upstream
    passes, statistics = passes_for(seg, grad_seg), Statistics(*stats)
    dense, grad_dense = as_taken(passes, seg), as_taken(passes, grad_seg)
    dtype = scale.dtype
    with torch.autocast(seg.device.type, enabled=False):
        converted = [tensor.to(dtype) for tensor in weights]
        gradient = getattr(passes, "level_backward", level_backward)(
            statistics,
            clf.to(dtype),
            *unpack(converted, softmax, signals),
            options,
            d_scale=passes.channel_dot(grad_dense, dense),
            d_clf_out=grad_clf.to(dtype),
            d_gates=grad_gates,
            d_proxies=grad_proxies,
        )
        if signals == "proxies" and not reference.has_edge_energy(seg):
            gradient.stats[2] = gradient.stats[2].new_empty(0)
        context = Context(converted[0], converted[1], converted[2] if softmax else None)
        of_stats = Statistics(*gradient.stats, *(scale.new_empty(0) for _ in range(2)))
        backward = statistics_backward_of(passes)
        d_dense, d_context = backward(dense, grad_dense, scale, context, statistics, of_stats)
    like = [weight for n, weight in enumerate(weights) if n not in running_statistics(softmax)]
    d_weights = [*d_context, *gradient.weights, *gradient.gate]
    return [
        in_format_of(seg, d_dense.to(seg.dtype)),
        gradient.clf.to(clf.dtype),
        *(d.to(weight.dtype) for d, weight in zip(d_weights, like, strict=True)),
    ]


@level_gradient.register_fake
def _(upstream, seg, clf, scale, stats, weights, softmax, signals, strength, training, eps):  # type: ignore[no-untyped-def]
    like = [weight for n, weight in enumerate(weights) if n not in running_statistics(softmax)]
    rows = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (clf, *like)]
    return [torch.empty_like(seg), *rows]


level_gradient.register_autograd(no_double_backward)


def running_statistics(softmax: bool) -> tuple[int, int]:
    """Where the packed weights hold the running mean and variance."""
    first = InteractionWeights._fields.index("running_mean") - (0 if softmax else 1)
    return first, first + 1


def _level_backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
    seg, clf, scale, *rest = ctx.saved_tensors
    stats, weights = rest[: len(Statistics._fields)], rest[len(Statistics._fields) :]
    options: LevelOptions = ctx.options
    d_seg, d_clf, *d_weights = level_gradient(list(upstream[:4]), seg, clf, scale, stats, weights, *options)
    for n in running_statistics(options.softmax):
        d_weights.insert(n, None)
    return d_seg, d_clf, d_weights, None, None, None, None, None


level.register_autograd(_level_backward, setup_context=_level_setup)
