"""How autograd sees depthwise convolution, and its public function.

On the CPU the library's kernels are good at some of it: which of the two computes is chosen for the forward and for the
backward apart, by shape and memory format.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.nn import functional as F

from btinet_kernels.backends import choose, kernels_for, requested_backend
from btinet_kernels.depthwise import reference
from btinet_kernels.depthwise.reference import Geometry
from btinet_kernels.interaction.passes_op import accumulation_dtype, in_format_of, no_double_backward, unwatched

OPERATOR = "fused_depthwise_conv"
# Where `auto` leaves 3×3 kernels without dilation to the library on the CPU: maps of fewer positions, forward and
# backward, by memory format. Measured on one thread.
FEWEST_POSITIONS = 28 * 28
FEWEST_POSITIONS_CHANNELS_LAST = 56 * 56  # of a backward; forward the library is faster at any size


def fused_depthwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
) -> Tensor:
    """A convolution of images with one kernel for each channel, zeros around the image.

    Args:
        x: ``[B, C, H, W]``. Contiguous and channels_last memory is read as it lies; other strides are honoured.
        weight: ``[C, 1, kernel height, kernel width]``; may stay float32 under a half-precision ``x``, as the bias may.
        bias: ``[C]`` or None.
        stride: a number, or one along y and one along x; likewise padding and dilation.
        padding: zeros on each side.
        dilation: distance of neighbouring taps.

    Returns:
        ``[B, C, H', W']`` of the dtype of ``x``, channels_last where x is, else contiguous.

    Raises:
        ValueError: shapes that do not fit, a stride or dilation below 1, a negative padding.

    Source: arXiv 1610.02357.
    """
    geometry = Geometry(_pair(stride), _pair(padding), _pair(dilation))
    _check(x, weight, bias, geometry)
    if not depthwise_is_served(x, weight, geometry):
        return reference.depthwise_conv(x, weight, bias, geometry)
    inputs = (x, weight, bias, *geometry)
    # What PyTorch generates for a custom operator goes through the schema twice for every argument.
    return depthwise(*inputs) if torch.compiler.is_compiling() else _Depthwise.apply(*inputs)


def depthwise_is_served(x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether kernels take a part of this call; autocast converts what plain operations are given, so it keeps them."""
    if choose(OPERATOR, x) == "reference" or torch.is_autocast_enabled(x.device.type) or len(x) == 0:
        return False
    differentiated = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return _forward_by_kernels(x, weight, geometry) or (differentiated and _backward_by_kernels(x, weight, geometry))


def _forward_by_kernels(x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    if not x.is_cpu or requested_backend() != "auto":
        return True
    rows = geometry.format_of(x) == torch.channels_last
    return not rows and x.shape[2] * x.shape[3] >= FEWEST_POSITIONS


def _backward_by_kernels(x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    if not x.is_cpu or requested_backend() != "auto" or weight[0, 0].numel() > 9 or max(geometry.dilation) > 1:
        return True
    rows = geometry.format_of(x) == torch.channels_last
    return x.shape[2] * x.shape[3] >= (FEWEST_POSITIONS_CHANNELS_LAST if rows else FEWEST_POSITIONS)


_GEOMETRY = "SymInt[] stride, SymInt[] padding, SymInt[] dilation"


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    """The convolution."""
    geometry = Geometry(stride, padding, dilation)
    if _forward_by_kernels(x, weight, geometry):
        return _passes_for(x).depthwise(x, _dense(x, weight), None if bias is None else _dense(x, bias), geometry)
    of_x = [None if w is None else w.to(x.dtype) for w in (weight, bias)]
    out = F.conv2d(x, of_x[0], of_x[1], *geometry, groups=x.shape[1])  # type: ignore[arg-type]
    return out.contiguous(memory_format=geometry.format_of(x))


depthwise = custom_op(
    "btinet_kernels::depthwise",
    _forward,
    mutates_args=(),
    schema=f"(Tensor x, Tensor weight, Tensor? bias, {_GEOMETRY}) -> Tensor",
)


@depthwise.register_fake
def _(x, weight, bias, *geometry):  # type: ignore[no-untyped-def]
    return Geometry(*geometry).new_result(x, weight)


def _gradient(
    d_out: Tensor, x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight."""
    geometry = Geometry(stride, padding, dilation)
    if _backward_by_kernels(x, weight, geometry):
        d_x, d_weight = _passes_for(x).depthwise_backward(x, d_out, _dense(x, weight), geometry)
    else:
        d_x, d_weight, _ = torch.ops.aten.convolution_backward(
            d_out, x, weight.to(x.dtype), None, *geometry, False, [0, 0], x.shape[1], [True, True, False]
        )
    return in_format_of(x, d_x), d_weight.to(weight.dtype).contiguous()


depthwise_gradient = custom_op(
    "btinet_kernels::depthwise_backward",
    _gradient,
    mutates_args=(),
    schema=f"(Tensor d_out, Tensor x, Tensor weight, {_GEOMETRY}) -> (Tensor, Tensor)",
)


@depthwise_gradient.register_fake
def _(d_out, x, weight, *geometry):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), torch.empty_like(weight, memory_format=torch.contiguous_format)


depthwise_gradient.register_autograd(no_double_backward)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, *ctx.geometry = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    gradient = _gradient if unwatched(d_out) else depthwise_gradient
    d_x, d_weight = gradient(d_out, *ctx.saved_tensors, *ctx.geometry)
    d_bias = None
    if ctx.bias_dtype is not None:
        d_bias = d_out.sum((0, 2, 3), dtype=accumulation_dtype(d_out)).to(ctx.bias_dtype)
    return d_x, d_weight, d_bias, None, None, None


depthwise.register_autograd(_backward, setup_context=_setup)


class _Depthwise(torch.autograd.Function):
    """``depthwise`` as autograd sees it outside a compiler."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:  # with setup_context every call inspects the signature
        out = (_forward if unwatched(inputs[0]) else depthwise)(*inputs)
        _setup(ctx, inputs, out)
        return out

    backward = staticmethod(_backward)


def _passes_for(x: Tensor) -> Any:
    """The module whose kernels take x."""
    return import_module(f"btinet_kernels.depthwise.{kernels_for(x, OPERATOR)}")


def _dense(x: Tensor, weight: Tensor) -> Tensor:
    return weight.to(accumulation_dtype(x)).contiguous()


def _pair(value: int | tuple[int, int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> None:
    if x.ndim != 4:
        raise ValueError(f"x must be [B, C, H, W], got {list(x.shape)}.")
    channels = x.shape[1]
    if weight.ndim != 4 or weight.shape[:2] != (channels, 1):
        raise ValueError(
            f"weight must be [{channels}, 1, height, width] for x {list(x.shape)}, got {list(weight.shape)}."
        )
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias must be [{channels}], got {list(bias.shape)}.")
    if min(*geometry.stride, *geometry.dilation) < 1 or min(geometry.padding) < 0:
        raise ValueError(f"stride and dilation must be at least 1 and padding at least 0, got {geometry}.")
    if min(geometry.output_size(x.shape[2:], weight.shape[2:])) < 1:
        raise ValueError(f"the kernel {list(weight.shape[2:])} does not fit into x {list(x.shape)} ({geometry}).")
