"""What the callers of compiled kernels share: how tensors become addresses, and the tensors that statistics go into."""

from __future__ import annotations

import torch
from torch import Tensor

from btinet_kernels.interaction.passes_op import accumulation_dtype, active_shape
from btinet_kernels.interaction.reference import Context, Statistics


class Rows:
    """Keeps the dense copies of small vectors alive while a kernel reads them."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []

    def address(self, vector: Tensor | None) -> int:
        """Where the vector's values lie one after the other; 0 if there are none."""
        if vector is None or vector.numel() == 0:
            return 0
        if not vector.is_contiguous():
            vector = vector.contiguous()
            self._kept.append(vector)
        return vector.data_ptr()

    def context(self, context: Context | None) -> list[int]:
        """The addresses of the three weights."""
        return [self.address(weight) for weight in context or (None, None, None)]


def address(tensor: Tensor) -> int:
    """Where a dense tensor lies; 0 if it is empty."""
    return tensor.data_ptr() if tensor.numel() else 0


def sizes_and_strides(tensor: Tensor) -> tuple[list[int], list[int]]:
    """``[B, C, *spatial]`` as five sizes and strides; missing spatial axes come first, with size 1."""
    missing = 5 - tensor.ndim
    size, stride = list(tensor.shape), list(tensor.stride())
    return size[:2] + [1] * missing + size[2:], stride[:2] + [0] * missing + stride[2:]


def new_statistics(seg: Tensor, context: Context | None, *, variance: bool, edges: bool, active: bool) -> Statistics:
    """Uninitialised tensors for the statistics that are wanted, empty ones for the others."""
    batch, channels = seg.shape[:2]
    hidden = 0 if context is None else context.weight.shape[0]
    softmax = context is not None and context.pool_weight is not None
    bits = active and context is not None and not softmax
    dtype = accumulation_dtype(seg)
    return Statistics(
        seg.new_empty(batch, channels, dtype=dtype),
        seg.new_empty((batch, channels) if variance else 0, dtype=dtype),
        seg.new_empty(batch if edges else 0, dtype=dtype),
        seg.new_empty((batch, hidden) if context is not None else 0, dtype=dtype),
        seg.new_empty(batch if softmax else 0, dtype=dtype),
        seg.new_empty(active_shape(seg, hidden) if bits else 0, dtype=torch.uint8),
    )


def new_context_gradients(context: Context | None) -> list[Tensor]:
    """Uninitialised tensors for the gradients of the weights there are."""
    weights = [] if context is None else [w for w in context if w is not None]
    return [torch.empty_like(w, memory_format=torch.contiguous_format) for w in weights]


def padded_addresses(tensors: list[Tensor], count: int) -> list[int]:
    """The addresses of the tensors, and zeros up to ``count``."""
    return [address(t) for t in tensors] + [0] * (count - len(tensors))
