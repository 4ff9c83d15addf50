"""The passes on the CPU: thin callers of ``csrc/cpu/interaction.h``.

Strides are honoured: contiguous, channels_last and anything else with one to three spatial dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from btinet_kernels.backends import native_module
from btinet_kernels.interaction.passes_op import accumulation_dtype, active_shape
from btinet_kernels.interaction.reference import Context, Statistics


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
