"""The fusion on the CPU: thin callers of ``csrc/cpu/multi_scale.h``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from btinet_kernels.backends import native_module
from btinet_kernels.interaction.passes_op import accumulation_dtype
from btinet_kernels.interaction.pointers import sizes_and_strides


class Merged(NamedTuple):
    """What the kernels read: contiguous, in the dtype that is computed in."""

    taps: Sequence[Tensor]  # three of [C, 1, 3, ...]
    share: Tensor  # [B, 3]
    weight: Tensor  # [C, 3, C]: fusion times pointwise, by scale
    bias: Tensor  # [B, C]


def multi_scale(x: Tensor, merged: Merged) -> Tensor:
    """``Σ_i weight_i (share_i · depthwise_i(x)) + bias``."""
    out = torch.empty_like(x)
    _call("multi_scale", x, _dense(x), *_weights(x, merged), _dense(out))
    return out


def multi_scale_backward(x: Tensor, grad: Tensor, merged: Merged) -> tuple[Tensor, Merged]:
    """Gradients of ``x`` and of ``merged``."""
    out = torch.empty_like(x)
    gradient = Merged(
        [torch.empty_like(t) for t in merged.taps],
        torch.empty_like(merged.share),
        torch.empty_like(merged.weight),
        merged.share.new_empty(len(merged.share), len(merged.weight)),
    )
    addresses = _addresses(gradient)
    _call("multi_scale_backward", x, _dense(x), _dense(grad), *_weights(x, merged), _dense(out), addresses)
    return out, gradient


def _weights(x: Tensor, merged: Merged) -> tuple[int, int, list[int]]:
    dtype = accumulation_dtype(x)
    assert all(t.is_contiguous() and t.dtype == dtype for t in (*merged.taps, *merged[1:]))
    return x.ndim - 2, merged.weight.shape[0], _addresses(merged)


def _addresses(merged: Merged) -> list[int]:
    return [t.data_ptr() for t in (*merged.taps, *merged[1:])]


def _dense(tensor: Tensor) -> Any:
    return native_module.Dense(tensor.data_ptr(), *sizes_and_strides(tensor))


def _call(name: str, x: Tensor, *arguments: Any) -> None:
    kernel = getattr(native_module, f"{name}_{str(x.dtype).removeprefix('torch.')}")
    kernel(*arguments, torch.get_num_threads())
