"""How autograd sees task interaction: schemas, fake kernels, backward formulas, and the public functions.

Each operator is one custom op: passes over the dense tensor around a function of vectors. The passes come from a
backend; the vector function is written once (``reference.py``) and differentiated by ``torch.func.vjp``. Double
backward is served by the reference (``use_backend("reference")``); through a fused operator it raises.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from btinet_kernels.backends import choose, native_missing, native_unsuitable, requested_backend
from btinet_kernels.interaction import native, reference
from btinet_kernels.interaction.reference import Context, GateWeights, InteractionWeights, Signals, Statistics


class InteractionResult(NamedTuple):
    """What a gated interaction returns."""

    seg: Tensor  # [B, C, *spatial]
    clf: Tensor  # [B, K]
    gates: Tensor  # [B, 2]: how much of the interaction reached seg, clf
    proxies: Tensor  # [B, 3] or [B, 2]: the signals that fed the gate


def fused_tim(
    seg: Tensor,
    clf: Tensor,
    weights: InteractionWeights,
    *,
    strength: float = 0.7,
    training: bool = False,
    momentum: float = 0.01,
    eps: float = 1e-3,
) -> tuple[Tensor, Tensor]:
    """Task interaction (TIM): seg features are amplified per channel, clf features get pooled seg context.

    Args:
        seg: dense stream, ``[B, C, *spatial]``, one to three spatial dimensions, any strides.
        clf: vector stream, ``[B, K]``.
        weights: see ``InteractionWeights``; they may stay float32 under half-precision activations.
        strength: τ, the largest possible amplification minus one.
        training: normalise the context by batch statistics, and update ``weights.running_mean`` and ``running_var`` in
            place, as ``torch.nn.functional.batch_norm`` does (the variance uncorrected, as Keras does).
        momentum: share of the new batch in the running statistics.
        eps: BatchNorm's ε.

    Returns:
        The enhanced ``seg`` and ``clf``, of the shapes, dtypes and memory formats of the inputs.

    Source: arXiv 2603.01295, equations (1)-(5); arXiv 2606.29102.
    """
    result = _interact("fused_tim", seg, clf, weights, None, "none", strength, training, momentum, eps)
    return result.seg, result.clf


def fused_task_interaction(
    seg: Tensor,
    clf: Tensor,
    weights: InteractionWeights,
    gate: GateWeights,
    *,
    signals: Signals = "proxies",
    strength: float = 0.7,
    training: bool = False,
    momentum: float = 0.01,
    eps: float = 1e-3,
) -> InteractionResult:
    """TIM followed by its per-image gate (UPA), in two passes over ``seg``.

    Equal to ``fused_upa(seg, seg', clf, clf', gate)`` of ``seg', clf' = fused_tim(seg, clf, weights)``, without ever
    forming the enhanced dense tensor. Arguments as in ``fused_tim`` and ``fused_upa``.

    Source: arXiv 2606.29102 (``signals="proxies"``); arXiv 2603.01295, equations (6)-(8) (``"variance"``).
    """
    return _interact(
        "fused_task_interaction", seg, clf, weights, gate, signals, strength, training, momentum, eps
    )


def fused_upa(
    seg_base: Tensor,
    seg_enhanced: Tensor,
    clf_base: Tensor,
    clf_enhanced: Tensor,
    gate: GateWeights,
    *,
    signals: Signals = "proxies",
) -> InteractionResult:
    """Gate between base and enhanced features, wherever they come from: ``base + w[b] · (enhanced − base)``.

    Args:
        seg_base: ``[B, C, *spatial]``; the edge energy is measured on it.
        seg_enhanced: of the same shape and dtype.
        clf_base: ``[B, K]``.
        clf_enhanced: ``[B, K]``.
        gate: see ``GateWeights``.
        signals: ``"proxies"``: two sigmoids of alignment, seg and clf energy (BTI-Net); ``"variance"``: a softmax of
            two variances relative to their batch means (its predecessor).
    """
    _check_streams(seg_base, clf_base)
    if seg_enhanced.shape != seg_base.shape or seg_enhanced.dtype != seg_base.dtype:
        raise ValueError(
            f"fused_upa: seg_enhanced is {_describe(seg_enhanced)}, but seg_base is {_describe(seg_base)}; "
            "they must agree in shape and dtype."
        )
    _check_signals(signals, gate)
    packed = _pack(None, gate)
    if choose("fused_upa", seg_base, seg_enhanced) == "reference":
        outputs = _interpolate_forward(reference, seg_base, seg_enhanced, clf_base, clf_enhanced, packed, signals)
    else:
        outputs = _interpolation(seg_base, seg_enhanced, clf_base, clf_enhanced, packed, signals)
    return InteractionResult(*outputs[:4])


def _interact(
    operator: str,
    seg: Tensor,
    clf: Tensor,
    weights: InteractionWeights,
    gate: GateWeights | None,
    signals: str,
    strength: float,
    training: bool,
    momentum: float,
    eps: float,
) -> InteractionResult:
    _check_streams(seg, clf)
    if gate is not None:
        _check_signals(signals, gate)
    # In training the running statistics are not read, and they change before the backward runs: they stay outside.
    read = weights._replace(running_mean=seg.new_empty(0), running_var=seg.new_empty(0)) if training else weights
    arguments = (seg, clf, _pack(read, gate), weights.pool_weight is not None, signals, strength, training, eps)
    if choose(operator, seg) == "reference":
        outputs = _level_forward(reference, *arguments)
    else:
        outputs = _level(*arguments)
    if training:
        with torch.no_grad():
            weights.running_mean.lerp_(outputs[4].to(weights.running_mean.dtype), momentum)
            weights.running_var.lerp_(outputs[5].to(weights.running_var.dtype), momentum)
    return InteractionResult(*outputs[:4])


# Weights travel through the schema as one list, in the order of their NamedTuples, without those that are None.


def _pack(weights: InteractionWeights | None, gate: GateWeights | None) -> list[Tensor]:
    return [tensor for tensor in (*(weights or ()), *(gate or ())) if tensor is not None]


def _unpack(packed: Sequence[Tensor], softmax: bool, signals: str) -> tuple[InteractionWeights, GateWeights | None]:
    rest: list[Tensor | None] = list(packed)
    if not softmax:
        rest.insert(2, None)
    split = len(InteractionWeights._fields)
    return InteractionWeights(*rest[:split]), _unpack_gate(rest[split:], signals)  # type: ignore[arg-type]


def _unpack_gate(packed: Sequence[Tensor | None], signals: str) -> GateWeights | None:
    if signals == "none":
        return None
    return GateWeights(*packed) if signals == "proxies" else GateWeights(None, None, *packed)  # type: ignore[arg-type]


def _accumulation_dtype(seg: Tensor) -> torch.dtype:
    return torch.promote_types(seg.dtype, torch.float32)


# The level: TIM, alone (signals "none") or gated.


def _level_vectors(
    stats: Statistics,
    clf: Tensor,
    packed: Sequence[Tensor],
    softmax: bool,
    signals: str,
    strength: float,
    training: bool,
    eps: float,
) -> tuple[Tensor, ...]:
    """Scale of the dense stream, new clf, gates, proxies, batch mean, batch variance."""
    dtype = stats.mean.dtype
    weights, gate = _unpack([tensor.to(dtype) for tensor in packed], softmax, signals)
    base = clf.to(dtype)
    enhanced = reference.enhance(stats, base, weights, strength=strength, training=training, eps=eps)
    if gate is None:
        gates, proxies = base.new_empty(0), base.new_empty(0)
        return enhanced.modulation, enhanced.clf.to(clf.dtype), gates, proxies, enhanced.batch_mean, enhanced.batch_var
    result = reference.gate_of_level(stats, enhanced, base, gate, signals)  # type: ignore[arg-type]
    scale = 1 + result.gates[:, :1] * (enhanced.modulation - 1)
    clf_out = base + result.gates[:, 1:] * (enhanced.clf - base)
    return scale, clf_out.to(clf.dtype), *result, enhanced.batch_mean, enhanced.batch_var


def _level_forward(
    passes: Any,
    seg: Tensor,
    clf: Tensor,
    packed: Sequence[Tensor],
    softmax: bool,
    signals: str,
    strength: float,
    training: bool,
    eps: float,
) -> tuple[Tensor, ...]:
    with torch.autocast(seg.device.type, enabled=False):
        dense = seg.to(_accumulation_dtype(seg))
        context = Context(*(None if w is None else w.to(dense.dtype) for w in _unpack(packed, softmax, signals)[0][:3]))  # type: ignore[arg-type]
        edges = signals == "proxies" and reference.has_edge_energy(seg)
        stats = passes.statistics(dense, context, variance=signals == "variance", edges=edges)
        if signals == "proxies" and not edges:
            stats = stats._replace(edges=dense.new_zeros(seg.shape[0]))
        scale, *vectors = _level_vectors(stats, clf, packed, softmax, signals, strength, training, eps)
        return passes.scale_channels(dense, scale).to(seg.dtype), *vectors, scale, *stats


@custom_op("btinet_kernels::task_interaction", mutates_args=())
def _level(
    seg: Tensor,
    clf: Tensor,
    weights: list[Tensor],
    softmax: bool,
    signals: str,
    strength: float,
    training: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    passes = _passes_for(seg)
    out, *rest = _level_forward(passes, seg, clf, weights, softmax, signals, strength, training, eps)
    if not training:
        rest[3:5] = [rest[5].new_empty(0), rest[5].new_empty(0)]  # an output may not alias the running statistics
    return _in_format_of(seg, out), *rest  # type: ignore[return-value]


@_level.register_fake
def _(seg, clf, weights, softmax, signals, strength, training, eps):  # type: ignore[no-untyped-def]
    batch, channels = seg.shape[:2]
    vectors = seg.new_empty(0, dtype=_accumulation_dtype(seg))
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
    )


def _level_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    seg, clf, weights, *ctx.options = inputs
    scale, stats = output[6], output[7:]
    ctx.save_for_backward(seg, clf, scale, *stats, *weights)
    ctx.mark_non_differentiable(*output[4:])


def _level_gradient(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
    seg, clf, scale, *rest = ctx.saved_tensors
    stats, packed = Statistics(*rest[:5]), rest[5:]
    grad_seg, *grad_vectors = upstream[:4]
    softmax, signals, strength, training, eps = ctx.options

    def vectors(mean, variance, edges, pooled, clf, *packed):  # type: ignore[no-untyped-def]
        of = Statistics(mean, variance, edges, pooled, stats.log_sum_exp)
        return _level_vectors(of, clf, packed, softmax, signals, strength, training, eps)[:4]

    with torch.autocast(seg.device.type, enabled=False):
        grad_scale = _channel_dot(grad_seg, seg)
        _, pull = torch.func.vjp(vectors, *stats[:4], clf, *packed)
        *grad_stats, grad_clf, grad_packed = _split(pull((grad_scale, *grad_vectors)), 5)
        context = packed[: 3 if softmax else 2]
        if signals == "proxies" and not reference.has_edge_energy(seg):
            grad_stats[2] = grad_stats[2].new_empty(0)
        grad_dense, *grad_context = _statistics_backward(seg, grad_seg, scale, context, list(stats), grad_stats)
    grad_packed[: len(context)] = [g.to(w.dtype) for g, w in zip(grad_context, context, strict=False)]
    return grad_dense, grad_clf, grad_packed, None, None, None, None, None


_level.register_autograd(_level_gradient, setup_context=_level_setup)


# The gate between two given tensors.


def _interpolate_vectors(
    base_stats: Statistics,
    enhanced_stats: Statistics,
    clf_base: Tensor,
    clf_enhanced: Tensor,
    packed: Sequence[Tensor],
    signals: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """New clf, gates, proxies."""
    dtype = enhanced_stats.mean.dtype
    gate = _unpack_gate([tensor.to(dtype) for tensor in packed], signals)
    assert gate is not None
    base, enhanced = clf_base.to(dtype), clf_enhanced.to(dtype)
    if signals == "proxies":
        residual = enhanced_stats.mean - base_stats.mean
        result = reference.proxy_gates(residual, base_stats.edges, base, enhanced, gate)
    else:
        result = reference.variance_gates(enhanced_stats.variance, enhanced, gate)
    return (base + result.gates[:, 1:] * (enhanced - base)).to(clf_base.dtype), *result


def _interpolate_forward(
    passes: Any,
    seg_base: Tensor,
    seg_enhanced: Tensor,
    clf_base: Tensor,
    clf_enhanced: Tensor,
    packed: Sequence[Tensor],
    signals: str,
) -> tuple[Tensor, ...]:
    with torch.autocast(seg_base.device.type, enabled=False):
        dtype = _accumulation_dtype(seg_base)
        base, enhanced = seg_base.to(dtype), seg_enhanced.to(dtype)
        proxies = signals == "proxies"
        edges = proxies and reference.has_edge_energy(base)
        none = Statistics(*(base.new_empty(0) for _ in range(5)))
        base_stats = passes.statistics(base, None, variance=False, edges=edges) if proxies else none
        if proxies and not edges:
            base_stats = base_stats._replace(edges=base.new_zeros(base.shape[0]))
        enhanced_stats = passes.statistics(enhanced, None, variance=not proxies, edges=False)
        clf, gates, signals_out = _interpolate_vectors(
            base_stats, enhanced_stats, clf_base, clf_enhanced, packed, signals
        )
        out = passes.interpolate(base, enhanced, gates[:, 0]).to(seg_base.dtype)
    saved = (base_stats.mean, base_stats.edges, enhanced_stats.mean, enhanced_stats.variance)
    return out, clf, gates, signals_out, *saved


@custom_op("btinet_kernels::gated_interpolation", mutates_args=())
def _interpolation(
    seg_base: Tensor,
    seg_enhanced: Tensor,
    clf_base: Tensor,
    clf_enhanced: Tensor,
    weights: list[Tensor],
    signals: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    passes = _passes_for(seg_base, seg_enhanced)
    out, *rest = _interpolate_forward(passes, seg_base, seg_enhanced, clf_base, clf_enhanced, weights, signals)
    return _in_format_of(seg_base, out), *rest  # type: ignore[return-value]


@_interpolation.register_fake
def _(seg_base, seg_enhanced, clf_base, clf_enhanced, weights, signals):  # type: ignore[no-untyped-def]
    batch, channels = seg_base.shape[:2]
    vectors = seg_base.new_empty(0, dtype=_accumulation_dtype(seg_base))
    proxies = signals == "proxies"
    return (
        torch.empty_like(seg_base),
        torch.empty_like(clf_base, memory_format=torch.contiguous_format),
        vectors.new_empty(batch, 2),
        vectors.new_empty(batch, 3 if proxies else 2),
        vectors.new_empty(batch, channels) if proxies else vectors.new_empty(0),
        vectors.new_empty(batch) if proxies else vectors.new_empty(0),
        vectors.new_empty(batch, channels),
        vectors.new_empty(0) if proxies else vectors.new_empty(batch, channels),
    )


def _interpolation_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    seg_base, seg_enhanced, clf_base, clf_enhanced, weights, ctx.signals = inputs
    ctx.save_for_backward(seg_base, seg_enhanced, clf_base, clf_enhanced, output[2], *output[4:], *weights)
    ctx.mark_non_differentiable(*output[4:])


def _interpolation_gradient(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
    base, enhanced, clf_base, clf_enhanced, gates, *rest = ctx.saved_tensors
    saved, packed = rest[:4], rest[4:]
    grad_seg, grad_clf, grad_gates, grad_proxies = upstream[:4]
    none = gates.new_empty(0)

    def vectors(base_mean, base_edges, mean, variance, clf_base, clf_enhanced, *packed):  # type: ignore[no-untyped-def]
        of_base = Statistics(base_mean, none, base_edges, none, none)
        of_enhanced = Statistics(mean, variance, none, none, none)
        return _interpolate_vectors(of_base, of_enhanced, clf_base, clf_enhanced, packed, ctx.signals)

    with torch.autocast(base.device.type, enabled=False):
        share = gates[:, :1].expand(base.shape[:2])
        grad_share = (_channel_dot(grad_seg, enhanced) - _channel_dot(grad_seg, base)).sum(1)
        grad_gates = grad_gates + torch.stack((grad_share, torch.zeros_like(grad_share)), 1)
        _, pull = torch.func.vjp(vectors, *saved, clf_base, clf_enhanced, *packed)
        *grad_stats, grad_clf_base, grad_clf_enhanced, grad_packed = _split(
            pull((grad_clf, grad_gates, grad_proxies)), 6
        )
        base_mean, base_edges, mean, variance = grad_stats
        if ctx.signals == "variance":
            base_mean = torch.zeros_like(mean)
        elif not reference.has_edge_energy(base):
            base_edges = none
        grad_base, *_ = _statistics_backward(
            base, grad_seg, 1 - share, [], [saved[0], none, none, none, none], [base_mean, none, base_edges, none]
        )
        grad_enhanced, *_ = _statistics_backward(
            enhanced, grad_seg, share.clone(), [], [saved[2], none, none, none, none], [mean, variance, none, none]
        )
    return grad_base, grad_enhanced, grad_clf_base, grad_clf_enhanced, grad_packed, None


_interpolation.register_autograd(_interpolation_gradient, setup_context=_interpolation_setup)


# The passes of the backward, custom ops of their own so that a compiler need not look inside.


@custom_op("btinet_kernels::channel_dot", mutates_args=())
def _channel_dot(grad: Tensor, seg: Tensor) -> Tensor:
    dtype = _accumulation_dtype(seg)
    return _passes_for(grad, seg).channel_dot(grad.to(dtype), seg.to(dtype))


@_channel_dot.register_fake
def _(grad, seg):  # type: ignore[no-untyped-def]
    return seg.new_empty(seg.shape[:2], dtype=_accumulation_dtype(seg))


@custom_op("btinet_kernels::statistics_backward", mutates_args=())
def _statistics_backward(
    seg: Tensor, grad: Tensor, scale: Tensor, context: list[Tensor], saved: list[Tensor], gradient: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = _accumulation_dtype(seg)
    dense, upstream = seg.to(dtype), grad.to(dtype)
    weights = [w.to(dtype) for w in context]
    of = Context(*weights, *[None] * (3 - len(weights))) if weights else None
    stats, grad_stats = Statistics(*saved), Statistics(*gradient, seg.new_empty(0))
    if _passes_for(seg, grad) is native:
        out, grads = native.statistics_backward(dense, upstream, scale, of, stats, grad_stats)
    else:
        out, grads = _statistics_backward_reference(dense, upstream, scale, of, grad_stats)
    grads += [dense.new_empty(0) for _ in range(3 - len(grads))]
    return _in_format_of(seg, out.to(seg.dtype)), *grads  # type: ignore[return-value]


@_statistics_backward.register_fake
def _(seg, grad, scale, context, saved, gradient):  # type: ignore[no-untyped-def]
    vectors = seg.new_empty(0, dtype=_accumulation_dtype(seg))
    grads = [vectors.new_empty(w.shape) for w in context]
    grads += [vectors.new_empty(0) for _ in range(3 - len(grads))]
    return torch.empty_like(seg), *grads


def _statistics_backward_reference(
    seg: Tensor, grad: Tensor, scale: Tensor, context: Context | None, gradient: Statistics
) -> tuple[Tensor, list[Tensor]]:
    variance, edges = gradient.variance.numel() > 0, gradient.edges.numel() > 0

    def passes(seg: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        of = Context(*weights, *[None] * (3 - len(weights))) if weights else None  # type: ignore[arg-type]
        return tuple(reference.statistics(seg, of, variance=variance, edges=edges)[:4])

    weights = [] if context is None else [w for w in context if w is not None]
    outputs, pull = torch.func.vjp(passes, seg, *weights)
    cotangents = tuple(torch.zeros_like(o) if g.numel() == 0 else g for o, g in zip(outputs, gradient, strict=False))
    grad_seg, *grad_weights = pull(cotangents)
    return grad_seg + reference.scale_channels(grad, scale), list(grad_weights)


def _passes_for(*dense: Tensor) -> Any:
    suitable = requested_backend() != "reference" and native_unsuitable(*dense) is None
    return native if suitable and not native_missing() else reference


def _in_format_of(seg: Tensor, out: Tensor) -> Tensor:
    like = torch.empty_like(seg)
    return out if out.stride() == like.stride() else like.copy_(out)


def _split(gradients: Sequence[Tensor], count: int) -> list[Any]:
    return [*gradients[:count], list(gradients[count:])]


def _check_streams(seg: Tensor, clf: Tensor) -> None:
    if not 3 <= seg.ndim <= 5 or clf.ndim != 2 or seg.shape[0] != clf.shape[0]:
        raise ValueError(
            f"seg must be [B, C, *spatial] with one to three spatial dimensions and clf [B, K] with the same B; "
            f"got {_describe(seg)} and {_describe(clf)}."
        )


def _check_signals(signals: str, gate: GateWeights) -> None:
    if signals not in ("proxies", "variance"):
        raise ValueError(f"signals must be 'proxies' or 'variance', got {signals!r}.")
    if (gate.seg_projection is None) != (signals == "variance"):
        raise ValueError(
            f"signals={signals!r} does not fit the gate's weights: projections are "
            f"{'missing' if gate.seg_projection is None else 'given'}."
        )


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
