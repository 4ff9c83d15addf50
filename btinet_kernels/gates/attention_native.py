"""The ends of an attention gate on the CPU: thin callers of ``csrc/cpu/gates.h``."""

from __future__ import annotations

import torch
from torch import Tensor

from btinet_kernels.interaction.passes_op import accumulation_dtype, new_in_format_of
from btinet_kernels.interaction.pointers import Rows
from btinet_kernels.native_calls import call, dense

# Weights are in the dtype that is computed in; the joint projection takes the sum of its two biases.


def joint_projection(x: Tensor, g: Tensor, x_weight: Tensor, g_weight: Tensor, bias: Tensor) -> Tensor:
    """See ``attention_reference.joint_projection``."""
    out = new_in_format_of(x, len(bias), x.shape[2:])
    owner = Rows()
    weights = [owner.address(w) for w in (x_weight, g_weight, bias)]
    call("joint_projection", x, dense(x), dense(g), weights, dense(out))
    return out


def joint_projection_backward(
    d_out: Tensor, out: Tensor, x: Tensor, g: Tensor, x_weight: Tensor, g_weight: Tensor
) -> list[Tensor]:
    """Gradients of x, g, x_weight, g_weight and of the bias."""
    d_x, d_g = torch.empty_like(x), torch.empty_like(g)
    d_weights = [torch.empty_like(w, memory_format=torch.contiguous_format) for w in (x_weight, g_weight)]
    d_bias = x_weight.new_empty(len(x_weight))
    owner = Rows()
    call(
        "joint_projection_backward",
        x,
        dense(d_out),
        dense(out),
        dense(x),
        dense(g),
        [owner.address(x_weight), owner.address(g_weight), 0],
        dense(d_x),
        dense(d_g),
        [t.data_ptr() for t in (*d_weights, d_bias)],
    )
    return [d_x, d_g, *d_weights, d_bias]


def position_gate(x: Tensor, h: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """See ``attention_reference.position_gate``; also the gates, ``[B, N]``."""
    out = torch.empty_like(x)
    gate = x.new_empty(len(x), x.shape[2:].numel(), dtype=accumulation_dtype(x))
    owner = Rows()
    weights = [owner.address(weight), owner.address(bias)]
    call("position_gate", x, dense(x), dense(h), weights, gate.data_ptr(), dense(out))
    return out, gate


def position_gate_backward(d_out: Tensor, x: Tensor, h: Tensor, gate: Tensor, weight: Tensor) -> list[Tensor]:
    """Gradients of x, h, weight and bias."""
    d_x, d_h = torch.empty_like(x), torch.empty_like(h)
    d_weight, d_bias = torch.empty_like(weight, memory_format=torch.contiguous_format), weight.new_empty(1)
    owner = Rows()
    call(
        "position_gate_backward",
        x,
        dense(d_out),
        dense(x),
        dense(h),
        gate.data_ptr(),
        [owner.address(weight), 0],
        dense(d_x),
        dense(d_h),
        [d_weight.data_ptr(), d_bias.data_ptr()],
    )
    return [d_x, d_h, d_weight, d_bias]
