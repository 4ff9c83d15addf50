"""The upsampling convolution on the CPU: thin callers of ``csrc/cpu/upsampling.h``.

Strides are honoured: contiguous, channels_last and anything else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from btinet_kernels.backends import native_module
from btinet_kernels.interaction.pointers import sizes_and_strides


def upsample_twice(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> Tensor:
    """``reference.upsample_twice``, written into ``out``; weight and bias in the dtype that is computed in."""
    weight, bias = _taken(weight), bias.contiguous()
    _call("upsample_twice", x, _dense(x), _weight(weight), bias.data_ptr(), _dense(out))
    return out


def upsample_twice_backward(d_out: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    weight = _taken(weight)
    d_x, d_weight = torch.empty_like(x), torch.empty_like(weight)
    d_bias = weight.new_empty(weight.shape[1])
    _call(
        "upsample_twice_backward",
        x,
        _dense(d_out),
        _dense(x),
        _weight(weight),
        _dense(d_x),
        _weight(d_weight),
        d_bias.data_ptr(),
    )
    return d_x, d_weight, d_bias


def _taken(weight: Tensor) -> Tensor:
    """``[C, O, 3, 3]`` with taps or outputs side by side, itself where it is so."""
    return weight if weight.is_contiguous(memory_format=torch.channels_last) else weight.contiguous()


def _weight(weight: Tensor) -> list[int]:
    strides = [9, 1] if weight.is_contiguous() else [1, weight.shape[1]]
    return [weight.data_ptr(), *strides]


def _dense(tensor: Tensor) -> Any:
    return native_module.Dense(tensor.data_ptr(), *sizes_and_strides(tensor))


def _call(name: str, x: Tensor, *arguments: Any) -> None:
    kernel = getattr(native_module, f"{name}_{str(x.dtype).removeprefix('torch.')}")
    kernel(*arguments, torch.get_num_threads())
