"""How autograd sees multi-scale context fusion, and its public function.

The convolutions of the three scales, their shares and the two 1×1 convolutions are one operator forward and one
backward. What lies between x and the kernels are vectors and weights: PyTorch, differentiated by hand below.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.nn import functional as F

from btinet_kernels.backends import choose, requested_backend
from btinet_kernels.interaction import native as interaction_passes
from btinet_kernels.interaction.passes_op import accumulation_dtype, converted, no_double_backward, schema_of
from btinet_kernels.interaction.reference import over_space
from btinet_kernels.multi_scale import native, reference
from btinet_kernels.multi_scale.native import Merged
from btinet_kernels.multi_scale.reference import DILATIONS, ScaleWeights, shares

_WEIGHTS = schema_of(ScaleWeights).replace("?", "")
_SCALES = len(DILATIONS)


def fused_multi_scale(x: Tensor, weights: ScaleWeights) -> Tensor:
    """Three separable convolutions of dilation 1, 2 and 4, weighted per image, summed and fused by a 1×1 convolution.

    Args:
        x: ``[B, C, *spatial]``, one to three spatial dimensions. Contiguous and channels_last memory is read as it
            lies; other strides are honoured, more slowly.
        weights: see ``ScaleWeights``; they may stay float32 under half-precision activations.

    Returns:
        The fused tensor, of the shape, dtype and memory format of ``x``.

    Source: arXiv 2603.01295, equations (9), (10).
    """
    _check(x, weights)
    served = choose("fused_multi_scale", x) != "reference"
    if not served or (requested_backend() == "auto" and not _worth_merging(x)):
        return reference.multi_scale(x, weights)
    if torch.compiler.is_compiling():
        return multi_scale(x, *weights)[0]
    return _MultiScale.apply(x, *weights)[0]


def _worth_merging(x: Tensor) -> bool:
    """Merging the 1×1 convolutions costs 3 C³ multiplications a call and saves C² at every position."""
    return x.numel() >= _SCALES * x.shape[1] ** 2


def _check(x: Tensor, weights: ScaleWeights) -> None:
    if not 3 <= x.ndim <= 5:
        raise ValueError(f"x must be [B, C, *spatial] with one to three spatial dimensions; got {list(x.shape)}.")
    channels, taps = x.shape[1], (x.shape[1], 1, *[3] * (x.ndim - 2))
    for name, weight in zip(ScaleWeights._fields, weights, strict=True):
        wanted: tuple[int, ...] | None = None
        if name.startswith("depthwise"):
            wanted = taps
        elif name.startswith(("pointwise_bias", "fusion_bias")):
            wanted = (channels,)
        elif name.startswith(("pointwise", "fusion")):
            wanted = (channels, channels, *[1] * (x.ndim - 2))
        if wanted is not None and weight.shape != wanted:
            raise ValueError(f"{name} is {list(weight.shape)}, but x {list(x.shape)} needs {list(wanted)}.")


@custom_op(
    "btinet_kernels::multi_scale",
    mutates_args=(),
    schema=f"(Tensor x, {_WEIGHTS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def multi_scale(x: Tensor, *packed: Tensor) -> tuple[Tensor, ...]:
    """The fused tensor; for the backward: mean of x [B, C], shares [B, 3], merged weight [C, 3, C]."""
    weights = _weights_of(x, packed)
    mean = interaction_passes.statistics(x, None, variance=False, edges=False).mean
    with torch.autocast(x.device.type, enabled=False):
        merged = _merge(shares(mean, weights), weights)
    return native.multi_scale(x, merged), mean, merged.share, merged.weight


@multi_scale.register_fake
def _(x, *packed):  # type: ignore[no-untyped-def]
    batch, channels = x.shape[:2]
    vectors = x.new_empty(0, dtype=accumulation_dtype(x))
    return (
        torch.empty_like(x),
        vectors.new_empty(batch, channels),
        vectors.new_empty(batch, _SCALES),
        vectors.new_empty(channels, _SCALES, channels),
    )


@custom_op(
    "btinet_kernels::multi_scale_backward",
    mutates_args=(),
    schema=f"(Tensor d_out, Tensor x, Tensor mean, Tensor share, Tensor merged, {_WEIGHTS}) -> Tensor[]",
)
def multi_scale_gradient(
    d_out: Tensor, x: Tensor, mean: Tensor, share: Tensor, merged: Tensor, *packed: Tensor
) -> list[Tensor]:
    """Gradients of x and of every weight."""
    weights = _weights_of(x, packed)
    # The kernel reads no bias in its backward.
    d_x, d = native.multi_scale_backward(x, d_out, Merged(weights[:3], share, merged, share.new_empty(0)))
    with torch.autocast(x.device.type, enabled=False):
        d_mean, gradients = _vectors_backward(mean, share, weights, d)
    d_x += over_space(d_mean / max(1, math.prod(x.shape[2:])), x)
    return [d_x, *(g.reshape(w.shape).to(w.dtype) for g, w in zip(gradients, packed, strict=True))]


def _vectors_backward(mean: Tensor, share: Tensor, weights: ScaleWeights, d: Merged) -> tuple[Tensor, list[Tensor]]:
    """Gradients of the means and of every weight; ``d``: of what the kernels read. A name d_x is the gradient of x."""
    fusion, pointwise, biases = _matrices(weights)
    d_merged_bias = d.bias.t() @ share  # [C, 3], of fusion @ bias of each scale
    d_share = d.share + d.bias @ (fusion @ biases.t())
    d_logits = share * (d_share - (share * d_share).sum(1, keepdim=True))
    hidden = F.linear(mean, weights.hidden_weight, weights.hidden_bias)
    d_hidden = (d_logits @ weights.share_weight) * (hidden > 0)
    d_fusion = d_merged_bias @ biases
    d_pointwise = []
    for i in range(_SCALES):
        d_fusion = d_fusion + d.weight[:, i] @ pointwise[i].t()
        d_pointwise.append(fusion.t() @ d.weight[:, i])
    return d_hidden @ weights.hidden_weight, [
        *d.taps,
        *d_pointwise,
        *(each.clone() for each in d_merged_bias.t() @ fusion),  # outputs of an operator share no memory
        d_hidden.t() @ mean,
        d_hidden.sum(0),
        d_logits.t() @ F.relu(hidden),
        d_logits.sum(0),
        d_fusion,
        d.bias.sum(0),
    ]


@multi_scale_gradient.register_fake
def _(d_out, x, mean, share, merged, *packed):  # type: ignore[no-untyped-def]
    return [torch.empty_like(x), *(torch.empty_like(w, memory_format=torch.contiguous_format) for w in packed)]


multi_scale_gradient.register_autograd(no_double_backward)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, *packed = inputs
    ctx.save_for_backward(x, *output[1:], *packed)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_out: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if d_out is None:
        return (None,) * (1 + len(ScaleWeights._fields))
    return tuple(multi_scale_gradient(d_out, *ctx.saved_tensors))


multi_scale.register_autograd(_backward, setup_context=_setup)


class _MultiScale(torch.autograd.Function):
    """The operator as autograd sees it outside a compiler: what PyTorch generates costs more, see level_op."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return multi_scale(*inputs)

    setup_context = staticmethod(_setup)
    backward = staticmethod(_backward)


def _weights_of(x: Tensor, packed: Sequence[Tensor]) -> ScaleWeights:
    """The weights, dense and in the dtype that is computed in."""
    return ScaleWeights(*(w.contiguous() for w in converted(packed, accumulation_dtype(x))))  # type: ignore[union-attr]


def _matrices(weights: ScaleWeights) -> tuple[Tensor, list[Tensor], Tensor]:
    """Fusion ``[C, C]``, the three pointwise ``[C, C]``, their biases ``[3, C]``."""
    return weights.fusion_weight.flatten(1), [w.flatten(1) for w in weights[3:6]], torch.stack(weights[6:9])


def _merge(share: Tensor, weights: ScaleWeights) -> Merged:
    fusion, pointwise, biases = _matrices(weights)
    merged = fusion.new_empty(len(fusion), _SCALES, len(fusion))
    for i, weight in enumerate(pointwise):
        torch.matmul(fusion, weight, out=merged[:, i])
    return Merged(weights[:3], share, merged, weights.fusion_bias + share @ biases @ fusion.t())
