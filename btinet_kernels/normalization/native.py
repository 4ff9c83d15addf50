"""Batch normalisation on the CPU: thin callers of ``csrc/cpu/batch_norm.h``.

Strides are honoured: contiguous, channels_last and anything else with up to three spatial dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from btinet_kernels.backends import native_module
from btinet_kernels.interaction.passes_op import accumulation_dtype
from btinet_kernels.interaction.pointers import sizes_and_strides
from btinet_kernels.normalization.reference import ACTIVATIONS

Vectors = Sequence[Tensor | None]  # two, of one value per channel each, dense, in the dtype that is computed in


def batch_norm(x: Tensor, weights: Vectors, moments: Vectors | None, eps: float, act: str) -> list[Tensor]:
    """The result; where ``moments`` are not given, also the mean and variance of each channel, found in x."""
    out, found = torch.empty_like(x), []
    if moments is None:
        found = [x.new_empty(x.shape[1], dtype=accumulation_dtype(x)) for _ in range(2)]
    options = _options(weights, eps, act, moments is None)
    _call("batch_norm", x, _dense(x), *options, _addresses(moments or found), _dense(out))
    return [out, *found]


def batch_norm_backward(
    x: Tensor, d_out: Tensor, weights: Vectors, moments: Vectors, *, training: bool, eps: float, act: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of the weight and of the bias; through the moments too where ``training``."""
    d_x = torch.empty_like(x)
    dtype, channels = accumulation_dtype(x), x.shape[1]
    d_weight, d_bias = x.new_empty(channels, dtype=dtype), x.new_empty(channels, dtype=dtype)
    options = _options(weights, eps, act, training)
    gradients = _addresses((d_weight, d_bias))
    _call("batch_norm_backward", x, _dense(x), _dense(d_out), *options, _addresses(moments), _dense(d_x), gradients)
    return d_x, d_weight, d_bias


def _options(weights: Vectors, eps: float, act: str, training: bool) -> tuple[Any, ...]:
    return _addresses(weights), eps, ACTIVATIONS.index(act), training


def _addresses(tensors: Vectors) -> list[int]:
    assert all(t is None or t.is_contiguous() for t in tensors)
    return [0 if t is None else t.data_ptr() for t in tensors]


def _dense(tensor: Tensor) -> Any:
    return native_module.Dense(tensor.data_ptr(), *sizes_and_strides(tensor))


def _call(name: str, x: Tensor, *arguments: Any) -> None:
    kernel = getattr(native_module, f"{name}_{str(x.dtype).removeprefix('torch.')}")
    kernel(*arguments, torch.get_num_threads())
