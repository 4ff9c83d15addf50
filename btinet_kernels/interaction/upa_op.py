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
    channel_dot,
    in_format_of,
    passes_for,
    pull_back,
    split,
    statistics_backward,
    unpack_gate,
)
from btinet_kernels.interaction.reference import Statistics


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
        dtype = accumulation_dtype(seg_base)
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
        grad_share = (channel_dot(grad_seg, enhanced) - channel_dot(grad_seg, base)).sum(1)
        grad_gates = grad_gates + torch.stack((grad_share, torch.zeros_like(grad_share)), 1)
        pull = pull_back(vectors, *saved, clf_base, clf_enhanced, *packed)
        *grad_stats, grad_clf_base, grad_clf_enhanced, grad_packed = split(
            pull((grad_clf, grad_gates, grad_proxies)), 6
        )
        base_mean, base_edges, mean, variance = grad_stats
        if ctx.signals == "variance":
            base_mean = torch.zeros_like(mean)
        elif not reference.has_edge_energy(base):
            base_edges = none
        grad_base, *_ = statistics_backward(
            base,
            grad_seg,
            1 - share,
            [],
            [saved[0], none, none, none, none],
            [base_mean, none, base_edges, none],
        )
        grad_enhanced, *_ = statistics_backward(
            enhanced,
            grad_seg,
            share.clone(),
            [],
            [saved[2], none, none, none, none],
            [mean, variance, none, none],
        )
    return grad_base, grad_enhanced, grad_clf_base, grad_clf_enhanced, grad_packed, None


interpolation.register_autograd(_interpolation_gradient, setup_context=_interpolation_setup)
