"""Depthwise convolution on the CPU: thin callers of ``csrc/cpu/depthwise.h``.

Strides are honoured: contiguous, channels_last and anything else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from btinet_kernels.depthwise.reference import Geometry
from btinet_kernels.interaction.passes_op import accumulation_dtype
from btinet_kernels.native_calls import call, dense


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """The convolution; weight and bias dense, in the dtype that is computed in."""
    out = geometry.new_result(x, weight)
    call("depthwise", x, dense(x), _numbers(weight, geometry), _address(x, weight), _address(x, bias), dense(out))
    return out


def depthwise_backward(x: Tensor, d_out: Tensor, weight: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight, the latter in the dtype that is computed in."""
    d_x, d_weight = torch.empty_like(x), torch.empty_like(weight)
    numbers, taps = _numbers(weight, geometry), _address(x, weight)
    call("depthwise_backward", x, dense(x), dense(d_out), numbers, taps, dense(d_x), d_weight.data_ptr())
    return d_x, d_weight


def _numbers(weight: Tensor, geometry: Geometry) -> list[Any]:
    return [list(weight.shape[2:]), *geometry]


def _address(x: Tensor, vector: Tensor | None) -> int:
    assert vector is None or (vector.is_contiguous() and vector.dtype == accumulation_dtype(x))
    return 0 if vector is None else vector.data_ptr()
