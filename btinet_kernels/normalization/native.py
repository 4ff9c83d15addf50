"""Batch normalisation on the CPU: thin callers of ``csrc/cpu/batch_norm.h``.

Strides are honoured: contiguous, channels_last and anything else with up to three spatial dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from btinet_kernels.interaction.passes_op import accumulation_dtype
from btinet_kernels.native_calls import call, dense
from btinet_kernels.normalization.reference import ACTIVATIONS

Vectors = Sequence[Tensor | None]  # two, of one value per channel each, dense, in the dtype that is computed in


def batch_norm(x: Tensor, weights: Vectors, moments: Vectors | None, eps: float, act: str) -> list[Tensor]:
    """The result; where ``moments`` are not given, also the mean and variance of each channel, found in x."""
    out, found = torch.empty_like(x), []
    if moments is None:
        found = [x.new_empty(x.shape[1], dtype=accumulation_dtype(x)) for _ in range(2)]
    options = _options(weights, eps, act, moments is None)
    call("batch_norm", x, dense(x), *options, _addresses(moments or found), dense(out))
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
    call("batch_norm_backward", x, dense(x), dense(d_out), *options, _addresses(moments), dense(d_x), gradients)
    return d_x, d_weight, d_bias


def _options(weights: Vectors, eps: float, act: str, training: bool) -> tuple[Any, ...]:
    return _addresses(weights), eps, ACTIVATIONS.index(act), training


def _addresses(tensors: Vectors) -> list[int]:
    assert all(t is None or t.is_contiguous() for t in tensors)
    return [0 if t is None else t.data_ptr() for t in tensors]
