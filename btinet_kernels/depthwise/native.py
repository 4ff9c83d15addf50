"""Depthwise convolution on the CPU: thin callers of ``csrc/cpu/depthwise.h``.

Strides are honoured: contiguous, channels_last and anything else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from btinet_kernels.backends import native_module
from btinet_kernels.depthwise.reference import Geometry
from btinet_kernels.interaction.passes_op import accumulation_dtype
from btinet_kernels.interaction.pointers import sizes_and_strides


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """The convolution; weight and bias dense, in the dtype that is computed in."""
    out = geometry.new_result(x, weight)
    _call("depthwise", x, _dense(x), _numbers(weight, geometry), _address(x, weight), _address(x, bias), _dense(out))
    return out


def depthwise_backward(x: Tensor, d_out: Tensor, weight: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight, the latter in the dtype that is computed in."""
    d_x, d_weight = torch.empty_like(x), torch.empty_like(weight)
    numbers, taps = _numbers(weight, geometry), _address(x, weight)
    _call("depthwise_backward", x, _dense(x), _dense(d_out), numbers, taps, _dense(d_x), d_weight.data_ptr())
    return d_x, d_weight


def _numbers(weight: Tensor, geometry: Geometry) -> list[Any]:
    return [list(weight.shape[2:]), *geometry]


def _address(x: Tensor, vector: Tensor | None) -> int:
    assert vector is None or (vector.is_contiguous() and vector.dtype == accumulation_dtype(x))
    return 0 if vector is None else vector.data_ptr()


def _dense(tensor: Tensor) -> Any:
    return native_module.Dense(tensor.data_ptr(), *sizes_and_strides(tensor))


def _call(name: str, x: Tensor, *arguments: Any) -> None:
    kernel = getattr(native_module, f"{name}_{str(x.dtype).removeprefix('torch.')}")
    kernel(*arguments, torch.get_num_threads())
