"""The upsampling convolution on the CPU: thin callers of ``csrc/cpu/upsampling.h``.

Strides are honoured: contiguous, channels_last and anything else.
"""

from __future__ import annotations

import torch
from torch import Tensor

from btinet_kernels.native_calls import call, dense


def upsample_twice(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> Tensor:
    """``reference.upsample_twice``, written into ``out``; weight and bias in the dtype that is computed in."""
    weight, bias = _taken(weight), bias.contiguous()
    call("upsample_twice", x, dense(x), _weight(weight), bias.data_ptr(), dense(out))
    return out


def upsample_twice_backward(d_out: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    weight = _taken(weight)
    d_x, d_weight = torch.empty_like(x), torch.empty_like(weight)
    d_bias = weight.new_empty(weight.shape[1])
    call(
        "upsample_twice_backward",
        x,
        dense(d_out),
        dense(x),
        _weight(weight),
        dense(d_x),
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
