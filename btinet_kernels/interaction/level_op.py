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
    schema_of,
    statistics_backward_of,
    unpack,
)
from btinet_kernels.interaction.reference import Context, GateWeights, InteractionWeights, Statistics
from btinet_kernels.interaction.vectors_backward import level_backward


def level_vectors(
    stats: Statistics,
    clf: Tensor,
    weights: InteractionWeights,
    gate: GateWeights | None,
    options: LevelOptions,
) -> tuple[Tensor, ...]:
    """Scale of the dense stream, new clf, gates, proxies, batch mean, batch variance."""
    enhanced = reference.enhance(
        stats, clf, weights, strength=options.strength, training=options.training, eps=options.eps
    )
    if gate is None:
        gates, proxies = clf.new_empty(0), clf.new_empty(0)
        return (
            enhanced.modulation,
            enhanced.clf,
            gates,
            proxies,
            enhanced.batch_mean,
            enhanced.batch_var,
        )
    result = reference.gate_of_level(stats, enhanced, clf, gate, options.signals)  # type: ignore[arg-type]
    scale = 1 + result.gates[:, :1] * (enhanced.modulation - 1)
    clf_out = clf + result.gates[:, 1:] * (enhanced.clf - clf)
    return scale, clf_out, *result, enhanced.batch_mean, enhanced.batch_var


def level_forward(
    passes: Any,
    seg: Tensor,
    clf: Tensor,
    packed: Sequence[Tensor | None],
    options: LevelOptions,
    *,
    for_backward: bool = False,
) -> tuple[Tensor, ...]:
    """Both passes around the vectors; returns what ``level`` returns. Differentiable where ``passes`` is.

    ``for_backward``: compute what ``statistics_backward`` wants to find in the statistics.
    """
    with torch.autocast(seg.device.type, enabled=False):
        dense = as_taken(passes, seg)
        dtype = accumulation_dtype(seg)
        weights, gate = unpack(packed, dtype)
        proxies, variance = options.signals == "proxies", options.signals == "variance"
        edges = proxies and reference.has_edge_energy(seg)
        stats = passes.statistics(dense, Context(*weights[:3]), variance=variance, edges=edges, active=for_backward)
        if proxies and not edges:
            stats = stats._replace(edges=stats.mean.new_zeros(seg.shape[0]))
        vectors_of = getattr(passes, "level_vectors", level_vectors)
        scale, new_clf, *rest = vectors_of(stats, clf.to(dtype), weights, gate, options)
        out = passes.scale_channels(dense, scale).to(seg.dtype)
        return out, new_clf.to(clf.dtype), *rest, scale, *stats


_PROXIES = {"none": 0, "proxies": 3, "variance": 2}  # how many there are
_WEIGHTS = schema_of(InteractionWeights, GateWeights)
_OPTIONS = "str signals, float strength, bool training, float eps"
_STATISTICS = ", ".join(f"Tensor {name}" for name in Statistics._fields)


@custom_op(
    "btinet_kernels::task_interaction",
    mutates_args=(),
    schema=f"(Tensor seg, Tensor clf, {_WEIGHTS}, {_OPTIONS}) -> ({', '.join(['Tensor'] * 13)})",
)
def level(seg: Tensor, clf: Tensor, *weights_and_options: Any) -> tuple[Tensor, ...]:
    """TIM, gated unless ``signals`` is "none".

    Returns seg, clf, gates, proxies, batch mean and variance (empty in inference), the scale of seg, ``Statistics``.
    """
    packed, options = _weights_and_options(weights_and_options)
    out, *rest = level_forward(passes_for(seg), seg, clf, packed, options, for_backward=True)
    if not options.training:  # an output may not alias the running statistics
        rest[3:5] = [rest[5].new_empty(0), rest[5].new_empty(0)]
    return in_format_of(seg, out), *rest


def _weights_and_options(arguments: Sequence[Any]) -> tuple[Sequence[Tensor | None], LevelOptions]:
    split = len(arguments) - len(LevelOptions._fields)
    return arguments[:split], LevelOptions(*arguments[split:])


@level.register_fake
def _(seg, clf, *weights_and_options):  # type: ignore[no-untyped-def]
    packed, options = _weights_and_options(weights_and_options)
    weights, _ = unpack(packed)
    batch, channels = seg.shape[:2]
    vectors = seg.new_empty(0, dtype=accumulation_dtype(seg))
    proxies = _PROXIES[options.signals]
    norm = vectors.new_empty(clf.shape[1] if options.training else 0)
    hidden, softmax = weights.context_weight.shape[0], weights.pool_weight is not None
    return (
        torch.empty_like(seg),
        torch.empty_like(clf, memory_format=torch.contiguous_format),
        vectors.new_empty((batch, 2) if proxies else 0),
        vectors.new_empty((batch, proxies) if proxies else 0),
        norm,
        torch.empty_like(norm),
        vectors.new_empty(batch, channels),
        vectors.new_empty(batch, channels),
        vectors.new_empty((batch, channels) if options.signals == "variance" else 0),
        vectors.new_empty(batch if options.signals == "proxies" else 0),
        vectors.new_empty(batch, hidden),
        vectors.new_empty(batch if softmax else 0),
        seg.new_empty(0 if softmax else active_shape(seg, hidden), dtype=torch.uint8),
    )


def _level_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    seg, clf, *weights_and_options = inputs
    packed, ctx.options = _weights_and_options(weights_and_options)
    ctx.save_for_backward(seg, clf, *output[6:], *packed)
    ctx.mark_non_differentiable(*output[4:])
    ctx.set_materialize_grads(False)  # there would be zeros for all thirteen outputs


@custom_op(
    "btinet_kernels::task_interaction_backward",
    mutates_args=(),
    schema=(
        "(Tensor d_seg, Tensor d_clf, Tensor d_gates, Tensor d_proxies, "
        f"Tensor seg, Tensor clf, Tensor scale, {_STATISTICS}, {_WEIGHTS}, {_OPTIONS}) -> Tensor[]"
    ),
)
def level_gradient(d_seg: Tensor, d_clf: Tensor, d_gates: Tensor, d_proxies: Tensor, *rest: Any) -> list[Tensor]:
    """Gradients of seg, of clf and of the weights there are, without the running statistics.

    Takes the gradients of the first four results of ``level``, its inputs, and the scale and statistics it returned.
    """
    (seg, clf, scale, stats), packed, options = _saved(rest)
    passes, dtype = passes_for(seg, d_seg), scale.dtype
    dense, grad_dense = as_taken(passes, seg), as_taken(passes, d_seg)
    with torch.autocast(seg.device.type, enabled=False):
        weights, gate = unpack(packed, dtype)
        gradient = getattr(passes, "level_backward", level_backward)(
            stats,
            clf.to(dtype),
            weights,
            gate,
            options,
            d_scale=passes.channel_dot(grad_dense, dense),
            d_clf_out=d_clf.to(dtype),
            d_gates=d_gates,
            d_proxies=d_proxies,
        )
        none = scale.new_empty(0)
        if options.signals == "proxies" and not reference.has_edge_energy(seg):
            gradient.stats[2] = none
        d_mean, d_variance, d_edges, d_pooled = gradient.stats
        of_stats = Statistics(d_mean, d_variance, d_edges, d_pooled, none, none)
        d_dense, d_context = statistics_backward_of(passes)(
            dense, grad_dense, scale, Context(*weights[:3]), stats, of_stats
        )
    d_weights = [*d_context, *gradient.weights, *gradient.gate]
    return [
        in_format_of(seg, d_dense.to(seg.dtype)),
        gradient.clf.to(clf.dtype),
        *(d.to(packed[n].dtype) for n, d in zip(_learned(packed), d_weights, strict=True)),
    ]


def _saved(rest: Sequence[Any]) -> tuple[tuple[Tensor, Tensor, Tensor, Statistics], Sequence[Any], LevelOptions]:
    split = 3 + len(Statistics._fields)
    seg, clf, scale, *stats = rest[:split]
    return (seg, clf, scale, Statistics(*stats)), *_weights_and_options(rest[split:])


def _learned(packed: Sequence[Tensor | None]) -> list[int]:
    """Which of the packed weights have a gradient."""
    running = [InteractionWeights._fields.index(name) for name in ("running_mean", "running_var")]
    return [n for n, weight in enumerate(packed) if weight is not None and n not in running]


@level_gradient.register_fake
def _(d_seg, d_clf, d_gates, d_proxies, *rest):  # type: ignore[no-untyped-def]
    (seg, clf, *_), packed, _ = _saved(rest)
    like = [clf, *(packed[n] for n in _learned(packed))]
    return [torch.empty_like(seg), *(torch.empty_like(x, memory_format=torch.contiguous_format) for x in like)]


level_gradient.register_autograd(no_double_backward)


def _upstream(given: Sequence[Tensor | None], saved: Sequence[Tensor], options: LevelOptions) -> list[Tensor]:
    """The gradients that arrive, and zeros for results that nothing depends on."""
    seg, clf, scale = saved[:3]
    d_seg, d_clf, d_gates, d_proxies = given
    batch, proxies = seg.shape[0], _PROXIES[options.signals]
    return [
        torch.zeros_like(seg) if d_seg is None else d_seg,
        torch.zeros_like(clf) if d_clf is None else d_clf,
        scale.new_zeros((batch, 2) if proxies else 0) if d_gates is None else d_gates,
        scale.new_zeros((batch, proxies) if proxies else 0) if d_proxies is None else d_proxies,
    ]


def _level_backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
    saved, options = ctx.saved_tensors, ctx.options
    d_seg, d_clf, *d_weights = level_gradient(*_upstream(upstream[:4], saved, options), *saved, *options)
    packed = saved[3 + len(Statistics._fields) :]
    of_packed: list[Tensor | None] = [None] * len(packed)
    for n, gradient in zip(_learned(packed), d_weights, strict=True):
        of_packed[n] = gradient
    return d_seg, d_clf, *of_packed, *[None] * len(options)


level.register_autograd(_level_backward, setup_context=_level_setup)


class _Level(torch.autograd.Function):
    """``level`` as autograd sees it outside a compiler: what PyTorch generates for a custom operator goes through the
    schema twice for every argument, 0.2 ms a call."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return level(*inputs)

    setup_context = staticmethod(_level_setup)
    backward = staticmethod(_level_backward)


def differentiable_level(*inputs: Any) -> tuple[Tensor, ...]:
    """``level``, by the cheaper way there is."""
    return level(*inputs) if torch.compiler.is_compiling() else _Level.apply(*inputs)
