"""The passes on an NVIDIA GPU: thin callers of ``csrc/cuda/interaction.h``.

Strides are honoured: contiguous, channels_last and anything else with one to three spatial dimensions. Work is put on
the current stream of the tensor's device; workspaces come from torch's allocator, so CUDA graphs capture every pass.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from btinet_kernels.backends import cuda_module
from btinet_kernels.interaction.passes_op import active_shape
from btinet_kernels.interaction.reference import Context, Statistics


def statistics(
    seg: Tensor, context: Context | None, *, variance: bool, edges: bool, active: bool = False
) -> Statistics:
    """See ``reference.statistics``."""
    batch, channels = seg.shape[:2]
    hidden = 0 if context is None else context.weight.shape[0]
    softmax = context is not None and context.pool_weight is not None
    vectors = seg.new_empty(0, dtype=torch.float32)
    bits = active and context is not None and not softmax
    result = Statistics(
        vectors.new_empty(batch, channels),
        vectors.new_empty(batch, channels) if variance else vectors,
        vectors.new_empty(batch) if edges else vectors,
        vectors.new_empty(batch, hidden) if context is not None else vectors,
        vectors.new_empty(batch) if softmax else vectors,
        seg.new_empty(active_shape(seg, hidden) if bits else 0, dtype=torch.uint8),
    )
    dense, rows = _dense(seg), _Rows()
    workspace = vectors.new_empty(cuda_module.statistics_workspace(dense, hidden))
    with _device(seg):
        cuda_module.statistics(
            dense,
            hidden,
            _context(rows, context),
            [_address(t) for t in result],
            _address(workspace),
            _stream(seg),
        )
    return result


def scale_channels(seg: Tensor, scale: Tensor) -> Tensor:
    """See ``reference.scale_channels``."""
    out, rows = torch.empty_like(seg), _Rows()
    with _device(seg):
        cuda_module.scale_channels(_dense(seg), rows.address(scale), _dense(out), _stream(seg))
    return out


def interpolate(base: Tensor, enhanced: Tensor, weight: Tensor) -> Tensor:
    """See ``reference.interpolate``."""
    out, rows = torch.empty_like(base), _Rows()
    with _device(base):
        cuda_module.interpolate(_dense(base), _dense(enhanced), rows.address(weight), _dense(out), _stream(base))
    return out


def channel_dot(grad: Tensor, seg: Tensor) -> Tensor:
    """See ``reference.channel_dot``."""
    out = seg.new_empty(seg.shape[:2], dtype=torch.float32)
    dense = _dense(seg)
    workspace = out.new_empty(cuda_module.channel_dot_workspace(dense))
    with _device(seg):
        cuda_module.channel_dot(_dense(grad), dense, _address(out), _address(workspace), _stream(seg))
    return out


def statistics_backward(
    seg: Tensor, grad: Tensor, scale: Tensor, context: Context | None, saved: Statistics, gradient: Statistics
) -> tuple[Tensor, list[Tensor]]:
    """``grad · scale`` plus the gradient through ``statistics``: gradient of seg, gradients of the context."""
    out = torch.empty_like(seg)
    weights = [] if context is None else [w for w in context if w is not None]
    gradients = [torch.empty_like(w, memory_format=torch.contiguous_format) for w in weights]
    hidden = 0 if context is None else context.weight.shape[0]
    softmax = context is not None and context.pool_weight is not None
    if context is not None and not softmax and saved.active.numel() == 0:
        saved = saved._replace(active=statistics(seg, context, variance=False, edges=False, active=True).active)
    dense, rows = _dense(seg), _Rows()
    workspace = scale.new_empty(cuda_module.statistics_backward_workspace(dense, hidden, softmax), dtype=torch.float32)
    with _device(seg):
        cuda_module.statistics_backward(
            dense,
            _dense(grad),
            rows.address(scale),
            hidden,
            _context(rows, context),
            [rows.address(t) for t in saved],
            [rows.address(t) for t in gradient[:4]],
            _dense(out),
            [_address(g) for g in gradients] + [0] * (3 - len(gradients)),
            _address(workspace),
            _stream(seg),
        )
    return out, gradients


class _Rows:
    """Keeps the dense copies of small vectors alive until a kernel that reads them is enqueued."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []

    def address(self, vector: Tensor) -> int:
        if vector.numel() == 0:
            return 0
        self._kept.append(vector.contiguous())
        return self._kept[-1].data_ptr()


def _context(rows: _Rows, context: Context | None) -> list[int]:
    if context is None:
        return [0, 0, 0]
    return [0 if w is None else rows.address(w) for w in context]


def _address(tensor: Tensor) -> int:
    return tensor.data_ptr() if tensor.numel() else 0


def _dense(tensor: Tensor) -> Any:
    """``[B, C, *spatial]`` as five sizes and strides; missing spatial axes come first, with size 1."""
    missing = 5 - tensor.ndim
    size, stride = list(tensor.shape), list(tensor.stride())
    return cuda_module.Dense(
        tensor.data_ptr(),
        str(tensor.dtype).removeprefix("torch."),
        size[:2] + [1] * missing + size[2:],
        stride[:2] + [0] * missing + stride[2:],
    )


def _device(tensor: Tensor) -> AbstractContextManager[None]:
    return torch.cuda.device(tensor.device)


def _stream(tensor: Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream
