"""How autograd sees the segmentation loss, and its public function.

The passes over logits and target are one operator forward and one backward; what follows is a function of eight numbers
an image, ``reference.loss_of``, which PyTorch differentiates.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, get_args

import torch
from torch import Tensor
from torch.library import custom_op

from btinet_kernels.backends import choose, kernels_for
from btinet_kernels.interaction.passes_op import accumulation_dtype, no_double_backward
from btinet_kernels.losses import reference
from btinet_kernels.losses.reference import EmptyMasks, MaskStatistics, SegmentationLossOptions

OPERATOR = "fused_segmentation_loss"


def fused_segmentation_loss(logits: Tensor, target: Tensor, options: SegmentationLossOptions | None = None) -> Tensor:
    """Focal Tversky with a boost for small lesions, plus boundary and texture terms, averaged over the batch.

    Args:
        logits: ``[B, 1, H, W]``, one class against the background, any strides. Half precision is computed in float32.
        target: the mask, of the same shape: floating point between 0 and 1, or zeros and ones of any other dtype. It
            gets no gradient.
        options: see ``SegmentationLossOptions``; None: its defaults.

    Returns:
        A scalar, float32, or float64 for float64 logits.

    Raises:
        ValueError: shapes, devices or options that do not fit.

    Source: arXiv 2603.01295, equations (11), (12).
    """
    options = options or SegmentationLossOptions()
    _check(logits, target, options)
    dtype, target = accumulation_dtype(logits), target.detach()
    with torch.autocast(logits.device.type, enabled=False):
        if choose(OPERATOR, logits) == "reference":
            return reference.segmentation_loss(logits.to(dtype), target.to(dtype), options)
        stored = target if target.dtype in (torch.uint8, torch.bool) else target.to(dtype)
        chosen = options.hard_boundary, options.empty_masks == "cross_entropy"
        numbers = _differentiable(logits, stored, *chosen)[0]
        return reference.loss_of(MaskStatistics(*numbers.unbind(1)), options).to(dtype)


def _check(logits: Tensor, target: Tensor, options: SegmentationLossOptions) -> None:
    if logits.ndim != 4 or logits.shape[1] != 1 or 0 in logits.shape[2:] or not logits.is_floating_point():
        raise ValueError(
            f"{OPERATOR}: logits must be [B, 1, H, W] in floating point with at least one position, got "
            f"{list(logits.shape)} in {logits.dtype}."
        )
    if target.shape != logits.shape or target.device != logits.device:
        raise ValueError(
            f"{OPERATOR}: target is {list(target.shape)} on {target.device}, but logits are {list(logits.shape)} on "
            f"{logits.device}; they must agree."
        )
    if options.empty_masks not in get_args(EmptyMasks):
        raise ValueError(f"{OPERATOR}: empty_masks is {options.empty_masks!r}; choose one of {get_args(EmptyMasks)}.")


@custom_op("btinet_kernels::mask_statistics", mutates_args=())
def mask_statistics(logits: Tensor, target: Tensor, hard_boundary: bool, cross_entropy: bool) -> tuple[Tensor, Tensor]:
    """``MaskStatistics`` as ``[B, 8]``; for the backward, the mean Sobel response to the prediction ``[B]``."""
    return _passes_for(logits).statistics(logits, target, hard_boundary=hard_boundary, cross_entropy=cross_entropy)


@mask_statistics.register_fake
def _(logits, target, hard_boundary, cross_entropy):  # type: ignore[no-untyped-def]
    batch = logits.shape[0]
    return (
        logits.new_empty(batch, len(MaskStatistics._fields), dtype=torch.float64),
        logits.new_empty(batch, dtype=torch.float64),
    )


@custom_op("btinet_kernels::mask_statistics_backward", mutates_args=())
def mask_statistics_gradient(
    d_statistics: Tensor, logits: Tensor, target: Tensor, sobel_mean: Tensor, hard_boundary: bool
) -> Tensor:
    """The gradient of the logits."""
    passes = _passes_for(logits)
    return passes.statistics_backward(d_statistics, logits, target, sobel_mean, hard_boundary=hard_boundary)


@mask_statistics_gradient.register_fake
def _(d_statistics, logits, target, sobel_mean, hard_boundary):  # type: ignore[no-untyped-def]
    return torch.empty_like(logits)


mask_statistics_gradient.register_autograd(no_double_backward)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, ctx.hard_boundary, _ = inputs
    ctx.save_for_backward(logits, target, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_statistics: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    d_logits = None
    if d_statistics is not None:
        d_logits = mask_statistics_gradient(d_statistics, *ctx.saved_tensors, ctx.hard_boundary)
    return d_logits, None, None, None


mask_statistics.register_autograd(_backward, setup_context=_setup)


class _MaskStatistics(torch.autograd.Function):
    """The operator as autograd sees it outside a compiler, cheaper than what PyTorch generates for it."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return mask_statistics(*inputs)

    setup_context = staticmethod(_setup)
    backward = staticmethod(_backward)


def _differentiable(*inputs: Any) -> tuple[Tensor, ...]:
    return mask_statistics(*inputs) if torch.compiler.is_compiling() else _MaskStatistics.apply(*inputs)


def _passes_for(logits: Tensor) -> Any:
    """The module whose kernels take the logits."""
    return import_module(f"btinet_kernels.losses.{kernels_for(logits, OPERATOR)}")
