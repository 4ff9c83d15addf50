"""The gate between two given pairs of tensors, as autograd sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from btinet_kernels.interaction import reference
from btinet_kernels.interaction.passes_op import (
    accumulation_dtype,
    as_taken,
    channel_dot,
    in_format_of,
    passes_for,
    statistics_backward,
    unpack_gate,
)
from btinet_kernels.interaction.reference import Statistics
from btinet_kernels.interaction.vectors_backward import gate_backward


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
    gate = unpack_gate([tensor.to(dtype) for tensor in packed], signals)
    assert gate is not None
    base, enhanced = clf_base.to(dtype), clf_enhanced.to(dtype)
    if signals == "proxies":
        residual = enhanced_stats.mean - base_stats.mean
        result = reference.proxy_gates(residual, base_stats.edges, base, enhanced, gate)
    else:
        result = reference.variance_gates(enhanced_stats.variance, enhanced, gate)
    return (base + result.gates[:, 1:] * (enhanced - base)).to(clf_base.dtype), *result


def interpolate_forward(
    passes: Any,
    seg_base: Tensor,
    seg_enhanced: Tensor,
    clf_base: Tensor,
    clf_enhanced: Tensor,
    packed: Sequence[Tensor],
    signals: str,
) -> tuple[Tensor, ...]:
    """Two reads, the vectors, one write; returns what ``interpolation`` returns. Differentiable where ``passes`` is."""
    with torch.autocast(seg_base.device.type, enabled=False):
        base, enhanced = as_taken(passes, seg_base), as_taken(passes, seg_enhanced)
        proxies = signals == "proxies"
        edges = proxies and reference.has_edge_energy(base)
        none = Statistics(*(base.new_empty(0, dtype=accumulation_dtype(base)) for _ in range(6)))
        base_stats = passes.statistics(base, None, variance=False, edges=edges) if proxies else none
        if proxies and not edges:
            base_stats = base_stats._replace(edges=base_stats.mean.new_zeros(base.shape[0]))
        enhanced_stats = passes.statistics(enhanced, None, variance=not proxies, edges=False)
        clf, gates, signals_out = _interpolate_vectors(
            base_stats, enhanced_stats, clf_base, clf_enhanced, packed, signals
        )
        out = passes.interpolate(base, enhanced, gates[:, 0]).to(seg_base.dtype)
    saved = (base_stats.mean, base_stats.edges, enhanced_stats.mean, enhanced_stats.variance)
    return out, clf, gates, signals_out, *saved


@custom_op("btinet_kernels::gated_interpolation", mutates_args=())
def interpolation(
    seg_base: Tensor,
    seg_enhanced: Tensor,
    clf_base: Tensor,
    clf_enhanced: Tensor,
    weights: list[Tensor],
    signals: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gate between base and enhanced.

    Returns seg, clf, gates, proxies, mean and edges of the base, mean and variance of the enhanced seg.
    """
    passes = passes_for(seg_base, seg_enhanced)
    out, *rest = interpolate_forward(passes, seg_base, seg_enhanced, clf_base, clf_enhanced, weights, signals)
    return in_format_of(seg_base, out), *rest  # type: ignore[return-value]


@interpolation.register_fake
def _(seg_base, seg_enhanced, clf_base, clf_enhanced, weights, signals):  # type: ignore[no-untyped-def]
    batch, channels = seg_base.shape[:2]
    vectors = seg_base.new_empty(0, dtype=accumulation_dtype(seg_base))
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
    base, enhanced, clf_base, clf_enhanced, gates, base_mean, base_edges, mean, variance, *packed = ctx.saved_tensors
    grad_seg, grad_clf, grad_gates, grad_proxies = upstream[:4]
    dtype, none = gates.dtype, gates.new_empty(0)
    proxies = ctx.signals == "proxies"
    with torch.autocast(base.device.type, enabled=False):
        gate = unpack_gate([tensor.to(dtype) for tensor in packed], ctx.signals)
        assert gate is not None
        clf_from, clf_to, grad_clf_out = clf_base.to(dtype), clf_enhanced.to(dtype), grad_clf.to(dtype)
        grad_seg_share = (channel_dot(grad_seg, enhanced) - channel_dot(grad_seg, base)).sum(1)
        grad_clf_share = (grad_clf_out * (clf_to - clf_from)).sum(1)
        gradient = gate_backward(
            mean - base_mean if proxies else variance,
            base_edges,
            clf_from,
            clf_to,
            gate,
            grad_gates + torch.stack((grad_seg_share, grad_clf_share), 1),
            grad_proxies,
        )
        share = gates[:, :1].expand(base.shape[:2])
        edges = gradient.edges if proxies and reference.has_edge_energy(base) else none
        zero = torch.zeros_like(mean)
        of_base = [-gradient.seg, none, edges, none] if proxies else [zero, none, none, none]
        of_enhanced = [gradient.seg, none, none, none] if proxies else [zero, gradient.seg, none, none]
        grad_base, *_ = statistics_backward(base, grad_seg, 1 - share, [], [base_mean, *[none] * 5], of_base)
        grad_enhanced, *_ = statistics_backward(
            enhanced, grad_seg, share.clone(), [], [mean, *[none] * 5], of_enhanced
        )
        clf_share = gates[:, 1:]
        grad_clf_base = gradient.clf + grad_clf_out * (1 - clf_share)
        grad_clf_enhanced = gradient.clf_enhanced + grad_clf_out * clf_share
    grad_packed = [g.to(w.dtype) for g, w in zip(gradient.weights, packed, strict=True)]
    return (
        grad_base,
        grad_enhanced,
        grad_clf_base.to(clf_base.dtype),
        grad_clf_enhanced.to(clf_enhanced.dtype),
        grad_packed,
        None,
    )


interpolation.register_autograd(_interpolation_gradient, setup_context=_interpolation_setup)
