"""The gates on the CPU: thin callers of ``csrc/cpu/gates.h``.

Strides are honoured: contiguous, channels_last and anything else with one to three spatial dimensions.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from btinet_kernels.gates.reference import DualPathSaved, DualPathWeights
from btinet_kernels.interaction.passes_op import accumulation_dtype
from btinet_kernels.interaction.pointers import Rows
from btinet_kernels.native_calls import call, dense, nowhere


def dual_path(x: Tensor, residual: Tensor | None, weights: DualPathWeights) -> tuple[Tensor, DualPathSaved]:
    """See ``reference.dual_path``."""
    out = torch.empty_like(x)
    saved = new_saved(x, weights)
    owner = Rows()
    call(
        "dual_path",
        x,
        _dense(x, x),
        _dense(residual, x),
        _sizes(weights),
        _addresses(owner, weights),
        _addresses(owner, saved),
        _dense(out, x),
    )
    return out, saved


def dual_path_backward(
    d_out: Tensor, x: Tensor, out: Tensor | None, saved: DualPathSaved, weights: DualPathWeights
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """See ``reference.dual_path_backward``."""
    d_x = torch.empty_like(x)
    d_residual = None if out is None else torch.empty_like(out)
    d_weights = [torch.empty_like(w, memory_format=torch.contiguous_format) for w in weights]
    owner = Rows()
    call(
        "dual_path_backward",
        x,
        _dense(d_out, x),
        _dense(x, x),
        _dense(out, x),
        _sizes(weights),
        _addresses(owner, weights),
        _addresses(owner, saved),
        _dense(d_x, x),
        _dense(d_residual, x),
        _addresses(owner, d_weights),
    )
    return d_x, d_residual, d_weights


def new_saved(x: Tensor, weights: DualPathWeights) -> DualPathSaved:
    """Uninitialised tensors for what the forward pass leaves."""
    dtype, (batch, channels) = accumulation_dtype(x), x.shape[:2]
    positions = x.shape[2:].numel()
    return DualPathSaved(
        x.new_empty(batch, channels, dtype=dtype),
        x.new_empty(batch, weights.hidden_bias.shape[0], dtype=dtype),
        x.new_empty(batch, channels, dtype=dtype),
        x.new_empty(batch, 2, positions, dtype=dtype),
        x.new_empty(batch, positions, dtype=dtype),
    )


def _sizes(weights: DualPathWeights) -> list[int]:
    """Width of the channel path; widths of the convolution along z and y."""
    *_, z, y, _x = [1, 1, *weights.spatial_weight.shape[2:]]
    return [weights.hidden_bias.shape[0], z, y]


def _addresses(owner: Rows, tensors: Iterable[Tensor]) -> list[int]:
    return [owner.address(t) for t in tensors]


def _dense(tensor: Tensor | None, x: Tensor) -> Any:
    """``tensor``, or, where it is missing, nothing in the layout of ``x``."""
    if tensor is None:
        return nowhere(x)
    return dense(tensor)
