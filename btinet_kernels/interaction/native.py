"""The passes on the CPU: thin callers of ``csrc/cpu/interaction.h``.

Strides are honoured: contiguous, channels_last and anything else with one to three spatial dimensions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from btinet_kernels.backends import native_module
from btinet_kernels.interaction.passes_op import LevelOptions, accumulation_dtype, active_shape
from btinet_kernels.interaction.reference import Context, GateWeights, InteractionWeights, Statistics
from btinet_kernels.interaction.vectors_backward import LevelGradient


def statistics(
    seg: Tensor, context: Context | None, *, variance: bool, edges: bool, active: bool = False
) -> Statistics:
    """See ``reference.statistics``."""
    batch, channels = seg.shape[:2]
    hidden = 0 if context is None else context.weight.shape[0]
    softmax = context is not None and context.pool_weight is not None
    bits = active and context is not None and not softmax
    dtype = accumulation_dtype(seg)
    result = Statistics(
        seg.new_empty(batch, channels, dtype=dtype),
        seg.new_empty((batch, channels) if variance else 0, dtype=dtype),
        seg.new_empty(batch if edges else 0, dtype=dtype),
        seg.new_empty((batch, hidden) if context is not None else 0, dtype=dtype),
        seg.new_empty(batch if softmax else 0, dtype=dtype),
        seg.new_empty(active_shape(seg, hidden) if bits else 0, dtype=torch.uint8),
    )
    owner = _Rows()
    _call("statistics", seg, _dense(seg), hidden, _context(owner, context), [_address(t) for t in result])
    return result


def scale_channels(seg: Tensor, scale: Tensor) -> Tensor:
    """See ``reference.scale_channels``."""
    out = torch.empty_like(seg)
    owner = _Rows()
    _call("scale_channels", seg, _dense(seg), owner.address(scale), _dense(out))
    return out


def interpolate(base: Tensor, enhanced: Tensor, weight: Tensor) -> Tensor:
    """See ``reference.interpolate``."""
    out = torch.empty_like(base)
    owner = _Rows()
    _call("interpolate", base, _dense(base), _dense(enhanced), owner.address(weight), _dense(out))
    return out


def channel_dot(grad: Tensor, seg: Tensor) -> Tensor:
    """See ``reference.channel_dot``."""
    out = seg.new_empty(seg.shape[:2], dtype=accumulation_dtype(seg))
    _call("channel_dot", seg, _dense(grad), _dense(seg), out.data_ptr())
    return out


def statistics_backward(
    seg: Tensor, grad: Tensor, scale: Tensor, context: Context | None, saved: Statistics, gradient: Statistics
) -> tuple[Tensor, list[Tensor]]:
    """``grad · scale`` plus the gradient through ``statistics``: gradient of seg, gradients of the context."""
    out = torch.empty_like(seg)
    weights = [] if context is None else [w for w in context if w is not None]
    gradients = [torch.empty_like(w, memory_format=torch.contiguous_format) for w in weights]
    owner = _Rows()
    _call(
        "statistics_backward",
        seg,
        _dense(seg),
        _dense(grad),
        owner.address(scale),
        0 if context is None else context.weight.shape[0],
        _context(owner, context),
        [owner.address(t) for t in saved],
        [owner.address(t) for t in gradient[:4]],
        _dense(out),
        [_address(g) for g in gradients] + [0] * (3 - len(gradients)),
    )
    return out, gradients


def level_vectors(
    stats: Statistics, clf: Tensor, weights: InteractionWeights, gate: GateWeights | None, options: LevelOptions
) -> tuple[Tensor, ...]:
    """See ``level_op.level_vectors``."""
    owner = _Rows()
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
    _call(
        "level_vectors",
        clf,
        _level_options(clf, weights, gate, options),
        _level_inputs(owner, stats, clf),
        _level_weights(owner, weights, gate),
        [_address(t) for t in result],
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
    owner = _Rows()
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
    addresses = [_address(t) for t in d_weights], [*missing, *(_address(t) for t in d_gate)]
    _call(
        "level_backward",
        clf,
        _level_options(clf, weights, gate, options),
        _level_inputs(owner, stats, clf),
        _level_weights(owner, weights, gate),
        [owner.address(t) for t in (d_scale, d_clf_out, d_gates, d_proxies)],
        [_address(t) for t in (*d_stats, d_clf)],
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


def _level_inputs(owner: _Rows, stats: Statistics, clf: Tensor) -> list[int]:
    return [owner.address(t) for t in (*stats[:4], clf)]


def _level_weights(owner: _Rows, weights: InteractionWeights, gate: GateWeights | None) -> list[int]:
    return [0 if w is None else owner.address(w) for w in (*weights[3:], *(gate or [None] * 6))]


class _Rows:
    """Keeps the dense copies of small vectors alive while a kernel reads them."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []

    def address(self, vector: Tensor) -> int:
        if vector.numel() == 0:
            return 0
        self._kept.append(vector.contiguous())
        return self._kept[-1].data_ptr()


def _context(owner: _Rows, context: Context | None) -> list[int]:
    if context is None:
        return [0, 0, 0]
    return [0 if w is None else owner.address(w) for w in context]


def _address(tensor: Tensor) -> int:
    return tensor.data_ptr() if tensor.numel() else 0


def _dense(tensor: Tensor) -> Any:
    """``[B, C, *spatial]`` as five sizes and strides; missing spatial axes come first, with size 1."""
    missing = 5 - tensor.ndim
    size, stride = list(tensor.shape), list(tensor.stride())
    return native_module.Dense(
        tensor.data_ptr(),
        size[:2] + [1] * missing + size[2:],
        stride[:2] + [0] * missing + stride[2:],
    )


def _call(name: str, seg: Tensor, *arguments: Any) -> None:
    kernel = getattr(native_module, f"{name}_{str(seg.dtype).removeprefix('torch.')}")
    kernel(*arguments, torch.get_num_threads())
