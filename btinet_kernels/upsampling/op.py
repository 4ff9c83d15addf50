"""The upsampling convolution as autograd sees it: schemas, fake kernels, backward formula, and the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from btinet_kernels.backends import choose, requested_backend
from btinet_kernels.interaction.passes_op import (
    accumulation_dtype,
    converted,
    in_format_of,
    new_in_format_of,
    no_double_backward,
)
from btinet_kernels.upsampling import native, reference

OPERATOR = "fused_upsample_twice"
FEWEST_OUTPUTS = 32  # with which `auto` takes the native kernel for a forward without a gradient


def fused_upsample_twice(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Transposed 3×3 convolution of stride 2 that doubles the size, aligned as TensorFlow's padding ``same``.

    Args:
        x: ``[B, C, H, W]``, any strides.
        weight: ``[C, O, 3, 3]``, as ``nn.ConvTranspose2d`` has it.
        bias: ``[O]``. Both may stay float32 under half-precision activations.

    Returns:
        ``[B, O, 2H, 2W]`` of the dtype and memory format of ``x``.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check(x, weight, bias)
    if choose(OPERATOR, x) == "reference" or _reference_is_faster(x, weight, bias):
        return reference.upsample_twice(x, weight.to(x.dtype), bias.to(x.dtype))
    if torch.compiler.is_compiling():
        return upsample_twice(x, weight, bias)
    return _UpsampleTwice.apply(x, weight, bias)


def _reference_is_faster(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """ATen multiplies bfloat16 on the CPU with instructions of its own, where the kernel multiplies float32, and its
    forward is faster where there are few outputs."""
    if x.device.type != "cpu" or requested_backend() != "auto":
        return False
    differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bias))
    return x.dtype == torch.bfloat16 or (not differentiated and weight.shape[1] < FEWEST_OUTPUTS)


def _check(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    if x.ndim != 4:
        raise ValueError(f"{OPERATOR}: x must be [B, C, H, W], got {list(x.shape)}.")
    if weight.ndim != 4 or weight.shape[0] != x.shape[1] or weight.shape[2:] != (3, 3):
        raise ValueError(
            f"{OPERATOR}: weight is {list(weight.shape)}, but for x {list(x.shape)} it must be [{x.shape[1]}, O, 3, 3]."
        )
    if bias.shape != weight.shape[1:2]:
        raise ValueError(f"{OPERATOR}: bias is {list(bias.shape)}, but weight {list(weight.shape)} needs [O].")


@custom_op("btinet_kernels::upsample_twice", mutates_args=(), schema="(Tensor x, Tensor weight, Tensor bias) -> Tensor")
def upsample_twice(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See ``fused_upsample_twice``."""
    weight, bias = _converted(x, weight, bias)
    return native.upsample_twice(x, weight, bias, _new_output(x, weight))


def _converted(x: Tensor, *weights: Tensor) -> list[Tensor]:
    return converted(weights, accumulation_dtype(x))  # type: ignore[return-value]


def _new_output(x: Tensor, weight: Tensor) -> Tensor:
    return new_in_format_of(x, weight.shape[1], [2 * size for size in x.shape[2:]])


@upsample_twice.register_fake
def _(x, weight, bias):  # type: ignore[no-untyped-def]
    return _new_output(x, weight)


@custom_op(
    "btinet_kernels::upsample_twice_backward",
    mutates_args=(),
    schema="(Tensor d_out, Tensor x, Tensor weight) -> (Tensor, Tensor, Tensor)",
)
def upsample_twice_gradient(d_out: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    d_x, *of_weights = native.upsample_twice_backward(d_out, x, *_converted(x, weight))
    d_weight, d_bias = converted(of_weights, weight.dtype)
    assert d_weight is not None
    assert d_bias is not None
    return d_x, in_format_of(weight, d_weight), d_bias


@upsample_twice_gradient.register_fake
def _(d_out, x, weight):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), torch.empty_like(weight), weight.new_empty(weight.shape[1])


upsample_twice_gradient.register_autograd(no_double_backward)


def _setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, ...]:
    return upsample_twice_gradient(d_out, *ctx.saved_tensors)


upsample_twice.register_autograd(_backward, setup_context=_setup)


class _UpsampleTwice(torch.autograd.Function):
    """``upsample_twice`` as autograd sees it outside a compiler, cheaper than what PyTorch generates."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        return upsample_twice(*inputs)

    setup_context = staticmethod(_setup)
    backward = staticmethod(_backward)
