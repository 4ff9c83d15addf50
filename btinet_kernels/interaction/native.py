"""The passes on the CPU: thin callers of ``csrc/cpu/interaction.h``.

Strides are honoured: contiguous, channels_last and anything else with one to three spatial dimensions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from btinet_kernels.backends import native_module
from btinet_kernels.interaction.passes_op import LevelOptions, accumulation_dtype
from btinet_kernels.interaction.pointers import (
    Rows,
    address,
    new_context_gradients,
    new_statistics,
    padded_addresses,
)
from btinet_kernels.interaction.reference import Context, GateWeights, InteractionWeights, Statistics
from btinet_kernels.interaction.vectors_backward import LevelGradient
from btinet_kernels.native_calls import call, dense


def statistics(
    seg: Tensor, context: Context | None, *, variance: bool, edges: bool, active: bool = False
) -> Statistics:
    """See ``reference.statistics``."""
    result = new_statistics(seg, context, variance=variance, edges=edges, active=active)
    rows, hidden = Rows(), 0 if context is None else context.weight.shape[0]
    call("statistics", seg, dense(seg), hidden, rows.context(context), [address(t) for t in result])
    return result


def scale_channels(seg: Tensor, scale: Tensor) -> Tensor:
    """See ``reference.scale_channels``."""
    out = torch.empty_like(seg)
    owner = Rows()
    call("scale_channels", seg, dense(seg), owner.address(scale), dense(out))
    return out


def interpolate(base: Tensor, enhanced: Tensor, weight: Tensor) -> Tensor:
    """See ``reference.interpolate``."""
    out = torch.empty_like(base)
    owner = Rows()
    call("interpolate", base, dense(base), dense(enhanced), owner.address(weight), dense(out))
    return out


def channel_dot(grad: Tensor, seg: Tensor) -> Tensor:
    """See ``reference.channel_dot``."""
    out = seg.new_empty(seg.shape[:2], dtype=accumulation_dtype(seg))
    call("channel_dot", seg, dense(grad), dense(seg), out.data_ptr())
    return out


def statistics_backward(
    seg: Tensor, grad: Tensor, scale: Tensor, context: Context | None, saved: Statistics, gradient: Statistics
) -> tuple[Tensor, list[Tensor]]:
    """``grad · scale`` plus the gradient through ``statistics``: gradient of seg, gradients of the context."""
    out = torch.empty_like(seg)
    gradients = new_context_gradients(context)
    owner = Rows()
    call(
        "statistics_backward",
        seg,
        dense(seg),
        dense(grad),
        owner.address(scale),
        0 if context is None else context.weight.shape[0],
        owner.context(context),
        [owner.address(t) for t in saved],
        [owner.address(t) for t in gradient[:4]],
        dense(out),
        padded_addresses(gradients, 3),
    )
    return out, gradients


def level_vectors(
    stats: Statistics, clf: Tensor, weights: InteractionWeights, gate: GateWeights | None, options: LevelOptions
) -> tuple[Tensor, ...]:
    """See ``level_op.level_vectors``."""
    owner = Rows()
    rows, features = clf.shape
    proxies = _SIGNALS[options.signals].width
    new = stats.mean.new_empty
    result = [
        torch.empty_like(stats.mean),
        new(rows, features),
        new((rows, 2) if proxies else 0),
        new((rows, proxies) if proxies else 0),
        new(features if options.training else 0),
        new(features if options.training else 0),
    ]
    call(
        "level_vectors",
        clf,
        _level_options(clf, weights, gate, options),
        _level_inputs(owner, stats, clf),
        _level_weights(owner, weights, gate),
        [address(t) for t in result],
    )
    return tuple(result)


def level_backward(
    stats: Statistics,
    clf: Tensor,
    weights: InteractionWeights,
    gate: GateWeights | None,
    options: LevelOptions,
    *,
    d_scale: Tensor,
    d_clf_out: Tensor,
    d_gates: Tensor,
    d_proxies: Tensor,
) -> LevelGradient:
    """See ``vectors_backward.level_backward``."""
    owner = Rows()
    new = stats.mean.new_empty
    signals = options.signals
    d_stats = [
        torch.empty_like(stats.mean),
        new(stats.mean.shape if signals == "variance" else 0),
        new(stats.mean.shape[0] if signals == "proxies" else 0),
        new(stats.pooled.shape),
    ]
    d_clf = new(clf.shape)
    d_weights = [new(w.shape) for w in (*weights[3:7], *weights[9:])]
    d_gate = [new(w.shape) for w in gate or () if w is not None]
    missing = [0, 0] if signals == "variance" else []
    addresses = [address(t) for t in d_weights], [*missing, *(address(t) for t in d_gate)]
    call(
        "level_backward",
        clf,
        _level_options(clf, weights, gate, options),
        _level_inputs(owner, stats, clf),
        _level_weights(owner, weights, gate),
        [owner.address(t) for t in (d_scale, d_clf_out, d_gates, d_proxies)],
        [address(t) for t in (*d_stats, d_clf)],
        [*addresses[0][:4], 0, 0, *addresses[0][4:], *(addresses[1] or [0] * 6)],
    )
    return LevelGradient(d_stats, d_clf, d_weights, d_gate)


class _Signal(NamedTuple):
    code: int  # Signals in csrc/cpu/level.h
    width: int  # of the proxies


_SIGNALS = {"none": _Signal(0, 0), "proxies": _Signal(1, 3), "variance": _Signal(2, 2)}


def _level_options(clf: Tensor, weights: InteractionWeights, gate: GateWeights | None, options: LevelOptions) -> Any:
    projection = 0 if gate is None or gate.seg_projection is None else gate.seg_projection.shape[0]
    gate_hidden = 0 if gate is None else gate.hidden_bias.shape[0]
    hidden, channels = weights.context_weight.shape
    sizes = [clf.shape[0], channels, clf.shape[1], hidden, projection, gate_hidden]
    return native_module.LevelOptions(
        sizes, _SIGNALS[options.signals].code, options.strength, options.training, options.eps
    )


def _level_inputs(owner: Rows, stats: Statistics, clf: Tensor) -> list[int]:
    return [owner.address(t) for t in (*stats[:4], clf)]


def _level_weights(owner: Rows, weights: InteractionWeights, gate: GateWeights | None) -> list[int]:
    return [owner.address(w) for w in (*weights[3:], *(gate or [None] * 6))]
