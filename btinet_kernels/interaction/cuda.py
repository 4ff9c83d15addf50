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
from btinet_kernels.interaction.pointers import (
    Rows,
    address,
    new_context_gradients,
    new_statistics,
    padded_addresses,
    sizes_and_strides,
)
from btinet_kernels.interaction.reference import Context, Statistics

try:  # the vectors between the passes; where there is no Triton, PyTorch computes them
    from btinet_kernels.interaction.triton_vectors import level_backward as level_backward
    from btinet_kernels.interaction.triton_vectors import level_vectors as level_vectors
except ImportError:
    pass


def statistics(
    seg: Tensor, context: Context | None, *, variance: bool, edges: bool, active: bool = False
) -> Statistics:
    """See ``reference.statistics``."""
    result = new_statistics(seg, context, variance=variance, edges=edges, active=active)
    hidden = 0 if context is None else context.weight.shape[0]
    dense, rows = _dense(seg), Rows()
    workspace = result.mean.new_empty(cuda_module.statistics_workspace(dense, hidden))
    with _device(seg):
        cuda_module.statistics(
            dense,
            hidden,
            rows.context(context),
            [address(t) for t in result],
            address(workspace),
            _stream(seg),
        )
    return result


def scale_channels(seg: Tensor, scale: Tensor) -> Tensor:
    """See ``reference.scale_channels``."""
    out, rows = torch.empty_like(seg), Rows()
    with _device(seg):
        cuda_module.scale_channels(_dense(seg), rows.address(scale), _dense(out), _stream(seg))
    return out


def interpolate(base: Tensor, enhanced: Tensor, weight: Tensor) -> Tensor:
    """See ``reference.interpolate``."""
    out, rows = torch.empty_like(base), Rows()
    with _device(base):
        cuda_module.interpolate(_dense(base), _dense(enhanced), rows.address(weight), _dense(out), _stream(base))
    return out


def channel_dot(grad: Tensor, seg: Tensor) -> Tensor:
    """See ``reference.channel_dot``."""
    out = seg.new_empty(seg.shape[:2], dtype=torch.float32)
    dense = _dense(seg)
    workspace = out.new_empty(cuda_module.channel_dot_workspace(dense))
    with _device(seg):
        cuda_module.channel_dot(_dense(grad), dense, address(out), address(workspace), _stream(seg))
    return out


def statistics_backward(
    seg: Tensor, grad: Tensor, scale: Tensor, context: Context | None, saved: Statistics, gradient: Statistics
) -> tuple[Tensor, list[Tensor]]:
    """``grad · scale`` plus the gradient through ``statistics``: gradient of seg, gradients of the context."""
    out = torch.empty_like(seg)
    gradients = new_context_gradients(context)
    hidden = 0 if context is None else context.weight.shape[0]
    softmax = context is not None and context.pool_weight is not None
    if context is not None and not softmax and saved.active.numel() == 0:
        saved = saved._replace(active=statistics(seg, context, variance=False, edges=False, active=True).active)
    dense, rows = _dense(seg), Rows()
    workspace = scale.new_empty(cuda_module.statistics_backward_workspace(dense, hidden, softmax), dtype=torch.float32)
    with _device(seg):
        cuda_module.statistics_backward(
            dense,
            _dense(grad),
            rows.address(scale),
            hidden,
            rows.context(context),
            [rows.address(t) for t in saved],
            [rows.address(t) for t in gradient[:4]],
            _dense(out),
            padded_addresses(gradients, 3),
            address(workspace),
            _stream(seg),
        )
    return out, gradients


def _dense(tensor: Tensor) -> Any:
    return cuda_module.Dense(tensor.data_ptr(), _name(tensor.dtype), *sizes_and_strides(tensor))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _device(tensor: Tensor) -> AbstractContextManager[None]:
    return torch.cuda.device(tensor.device)


def _stream(tensor: Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream
