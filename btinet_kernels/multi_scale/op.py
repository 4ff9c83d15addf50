"""How autograd sees multi-scale context fusion, and its public function.

The convolutions of the three scales, their shares and the two 1×1 convolutions are one operator forward and one
backward. What lies between x and the kernels are vectors and weights: PyTorch, differentiated by hand below.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.nn import functional as F

from btinet_kernels.backends import choose, kernels_for
from btinet_kernels.interaction.passes_op import accumulation_dtype, converted, no_double_backward, schema_of
from btinet_kernels.interaction.reference import over_space
from btinet_kernels.multi_scale import reference
from btinet_kernels.multi_scale.native import Kernels
from btinet_kernels.multi_scale.reference import DILATIONS, ScaleWeights, shares

OPERATOR = "fused_multi_scale"
_WEIGHTS = schema_of(ScaleWeights).replace("?", "")
_SCALES = len(DILATIONS)


class MergeCache:
    """Keeps the product of a fusion's 1×1 convolutions from one inference to the next, until a weight changes.

    Changes are seen as autograd sees them, by identity and version, and every call that may lead to a step of an
    optimizer forgets the product: fused optimizers leave the version as it is. A write through ``.data`` is invisible.

    Args:
        calls: within how many calls the multiplication has to pay.
    """

    def __init__(self, calls: float = 16) -> None:
        self._calls = calls
        self._versions: list[tuple[weakref.ref[Tensor], int, int]] = []  # a tensor, its address, its version
        self._merged = torch.empty(0)

    def merged(self, x: Tensor, weights: ScaleWeights) -> Tensor | None:
        """The merged weight ``[C, 3, C]``, or None where it would not pay within ``calls`` or cannot be watched."""
        factors = (weights.fusion_weight, *weights[3:6])
        pays = self._calls * x.numel() >= _SCALES * x.shape[1] ** 2
        if not pays or any(factor.is_inference() for factor in factors):
            return None
        current = (len(factors) == len(self._versions)) and all(
            seen() is factor and (address, version) == (factor.data_ptr(), factor._version)
            for (seen, address, version), factor in zip(self._versions, factors, strict=True)
        )
        if not current or self._merged.dtype != accumulation_dtype(x):
            with torch.autocast(x.device.type, enabled=False):
                self._merged = _merge(_weights_of(x, weights))
            self._versions = [(weakref.ref(f), f.data_ptr(), f._version) for f in factors]
        return self._merged

    def forget(self) -> None:
        """Merge anew in the next inference."""
        self._versions = []

    def __deepcopy__(self, memo: Any) -> MergeCache:
        return MergeCache(self._calls)

    def __reduce__(self) -> tuple[Any, ...]:
        return MergeCache, (self._calls,)


def fused_multi_scale(x: Tensor, weights: ScaleWeights, cache: MergeCache | None = None) -> Tensor:
    """Three separable convolutions of dilation 1, 2 and 4, weighted per image, summed and fused by a 1×1 convolution.

    Args:
        x: ``[B, C, *spatial]``, one to three spatial dimensions. Contiguous and channels_last memory is read as it
            lies; other strides are honoured, more slowly.
        weights: see ``ScaleWeights``; they may stay float32 under half-precision activations.
        cache: where calls that need no gradient keep the product of the 1×1 convolutions.

    Returns:
        The fused tensor, of the shape, dtype and memory format of ``x``.

    Source: arXiv 2603.01295, equations (9), (10).
    """
    _check(x, weights)
    if choose(OPERATOR, x) == "reference":
        return reference.multi_scale(x, weights)
    if torch.compiler.is_compiling():
        return multi_scale(x, *weights)[0]
    if cache is not None:
        if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights)):
            cache.forget()
        elif (merged := cache.merged(x, weights)) is not None:
            return multi_scale_merged(x, merged, *weights)
    return _MultiScale.apply(x, *weights)[0]


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


def merges(x: Tensor) -> bool:
    """Whether fusion and pointwise weights are multiplied first: it costs 3 C³ and saves C² at every position."""
    return x.numel() >= _SCALES * x.shape[1] ** 2


@custom_op(
    "btinet_kernels::multi_scale",
    mutates_args=(),
    schema=f"(Tensor x, {_WEIGHTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def multi_scale(x: Tensor, *packed: Tensor) -> tuple[Tensor, ...]:
    """The fused tensor; for the backward: mean of x ``[B, C]``, shares ``[B, 3]``, and either the merged weight
    ``[C, 3, C]`` or the sum of the scales, of the shape of x."""
    weights = _weights_of(x, packed)
    mean = _mean(x)
    with torch.autocast(x.device.type, enabled=False):
        share = shares(mean, weights)
        merged = _merge(weights) if merges(x) else share.new_empty(0)
        kernels = _kernels(weights, share, merged)
        out, between = _passes_for(x).multi_scale(x, kernels, keep_between=True)
    return out, mean, share, merged, between


@multi_scale.register_fake
def _(x, *packed):  # type: ignore[no-untyped-def]
    batch, channels = x.shape[:2]
    vectors = x.new_empty(0, dtype=accumulation_dtype(x))
    return (
        torch.empty_like(x),
        vectors.new_empty(batch, channels),
        vectors.new_empty(batch, _SCALES),
        vectors.new_empty((channels, _SCALES, channels) if merges(x) else 0),
        x.new_empty(0) if merges(x) else torch.empty_like(x),
    )


@custom_op(
    "btinet_kernels::multi_scale_merged",
    mutates_args=(),
    schema=f"(Tensor x, Tensor merged, {_WEIGHTS}) -> Tensor",
)
def multi_scale_merged(x: Tensor, merged: Tensor, *packed: Tensor) -> Tensor:
    """The fused tensor from a merged weight ``[C, 3, C]``, without a gradient."""
    weights = _weights_of(x, packed)
    mean = _mean(x)
    with torch.autocast(x.device.type, enabled=False):
        kernels = _kernels(weights, shares(mean, weights), merged)
        return _passes_for(x).multi_scale(x, kernels)[0]


@multi_scale_merged.register_fake
def _(x, merged, *packed):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


@custom_op(
    "btinet_kernels::multi_scale_backward",
    mutates_args=(),
    schema=(
        f"(Tensor d_out, Tensor x, Tensor mean, Tensor share, Tensor merged, Tensor between, {_WEIGHTS}) -> Tensor[]"
    ),
)
def multi_scale_gradient(
    d_out: Tensor, x: Tensor, mean: Tensor, share: Tensor, merged: Tensor, between: Tensor, *packed: Tensor
) -> list[Tensor]:
    """Gradients of x and of every weight."""
    weights = _weights_of(x, packed)
    with torch.autocast(x.device.type, enabled=False):
        d_x, d = _passes_for(x).multi_scale_backward(x, d_out, between, _kernels(weights, share, merged))
        d_mean, gradients = _vectors_backward(mean, share, weights, d)
    d_x += over_space(d_mean / max(1, math.prod(x.shape[2:])), x)
    return [d_x, *(g.reshape(w.shape).to(w.dtype) for g, w in zip(gradients, packed, strict=True))]


def _vectors_backward(mean: Tensor, share: Tensor, weights: ScaleWeights, d: Kernels) -> tuple[Tensor, list[Tensor]]:
    """Gradients of the means and of every weight; ``d``: of what the kernels read. A name d_x is the gradient of x."""
    fusion, pointwise, biases = _matrices(weights)
    d_summed_bias = share.t() @ d.bias  # [3, M], of the bias of each scale as the kernels add it up
    if d.fusion is None or d.fusion_bias is None:  # the kernels read fusion @ pointwise and fusion @ bias
        scale_biases = biases @ fusion.t()
        d_biases = d_summed_bias @ fusion
        d_fusion, d_fusion_bias = d_summed_bias.t() @ biases, d.bias.sum(0)
        d_pointwise = []
        for of_merged, weight in zip(d.pointwise, pointwise, strict=True):
            d_fusion = torch.addmm(d_fusion, of_merged, weight.t())
            d_pointwise.append(fusion.t() @ of_merged)
    else:
        scale_biases, d_biases, d_pointwise = biases, d_summed_bias, list(d.pointwise)
        d_fusion, d_fusion_bias = d.fusion, d.fusion_bias
    d_share = d.share + d.bias @ scale_biases.t()
    d_logits = share * (d_share - (share * d_share).sum(1, keepdim=True))
    hidden = F.linear(mean, weights.hidden_weight, weights.hidden_bias)
    d_hidden = (d_logits @ weights.share_weight) * (hidden > 0)
    return d_hidden @ weights.hidden_weight, [
        *d.taps,
        *d_pointwise,
        *(each.clone() for each in d_biases),  # outputs of an operator share no memory
        d_hidden.t() @ mean,
        d_hidden.sum(0),
        d_logits.t() @ F.relu(hidden),
        d_logits.sum(0),
        d_fusion,
        d_fusion_bias,
    ]


@multi_scale_gradient.register_fake
def _(d_out, x, mean, share, merged, between, *packed):  # type: ignore[no-untyped-def]
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


def _passes_for(x: Tensor) -> Any:
    """The module whose kernels take x."""
    return import_module(f"btinet_kernels.multi_scale.{kernels_for(x, OPERATOR)}")


def _mean(x: Tensor) -> Tensor:
    """``[B, C]``, over the positions, by the interaction's pass."""
    passes = import_module(f"btinet_kernels.interaction.{kernels_for(x, OPERATOR)}")
    return passes.statistics(x, None, variance=False, edges=False).mean


def _weights_of(x: Tensor, packed: Sequence[Tensor]) -> ScaleWeights:
    """The weights, dense and in the dtype that is computed in."""
    return ScaleWeights(*(w.contiguous() for w in converted(packed, accumulation_dtype(x))))  # type: ignore[union-attr]


def _matrices(weights: ScaleWeights) -> tuple[Tensor, list[Tensor], Tensor]:
    """Fusion ``[C, C]``, the three pointwise ``[C, C]``, their biases ``[3, C]``."""
    return weights.fusion_weight.flatten(1), [w.flatten(1) for w in weights[3:6]], torch.stack(weights[6:9])


def _merge(weights: ScaleWeights) -> Tensor:
    fusion, pointwise, _ = _matrices(weights)
    merged = fusion.new_empty(len(fusion), _SCALES, len(fusion))
    for i, weight in enumerate(pointwise):
        torch.matmul(fusion, weight, out=merged[:, i])
    return merged


def _kernels(weights: ScaleWeights, share: Tensor, merged: Tensor) -> Kernels:
    """What the kernels read, with the merged weight or, where that is empty, both of its factors."""
    fusion, pointwise, biases = _matrices(weights)
    bias = share @ biases
    if merged.numel():
        bias = torch.addmm(weights.fusion_bias, bias, fusion.t())
        return Kernels(weights[:3], merged.unbind(1), share, bias, None, None)
    return Kernels(weights[:3], pointwise, share, bias, fusion, weights.fusion_bias)
