"""The mathematics of BTI-Net's segmentation loss in plain PyTorch: the oracle every backend is compared with.

What is summed over the positions of an image is ``statistics``; the loss is a function of these few numbers.
Source: arXiv 2603.01295, equations (11), (12), and the official code. N is the number of positions of an image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

EPSILON = 1e-7
TVERSKY_POWER = 0.75
BOUNDARY_WEIGHT = 0.25
TEXTURE_WEIGHT = 0.15
BOUNDARY_KERNEL = 5

EmptyMasks = Literal["cross_entropy", "tversky"]


@dataclass(frozen=True)
class SegmentationLossOptions:
    """What the papers, their README files and their code disagree about.

    Args:
        false_positive_weight: α of the Tversky index.
        false_negative_weight: β of the Tversky index; α = β = 0.5 is Dice.
        hard_boundary: threshold the prediction in the boundary term, as the official code does: the term then has no
            gradient and only shows in the value.
        empty_masks: ``"tversky"``: images without a lesion get the Tversky term as well, which is then constant and
            gives practically no gradient (official); ``"cross_entropy"``: the mean binary cross-entropy in its place.
        ceiling: each image's loss is cut off here; the official code does so at 10, where the gradient vanishes.
    """

    false_positive_weight: float = 0.5
    false_negative_weight: float = 0.5
    hard_boundary: bool = False
    empty_masks: EmptyMasks = "cross_entropy"
    ceiling: float = math.inf


class MaskStatistics(NamedTuple):
    """What the loss has to know of each image, ``[B]`` each; p is the predicted probability."""

    hit: Tensor  # sum of target · p
    false_positive: Tensor  # sum of (1 − target) · p
    false_negative: Tensor  # sum of target · (1 − p)
    area: Tensor  # mean of the target
    cross_entropy: Tensor  # mean, of the logits; 0 where no image needs it
    curvature: Tensor  # mean of |curvature filter of (target − p)|
    target_variance: Tensor  # of the horizontal Sobel filter's response
    prediction_variance: Tensor


def curvature_kernel() -> list[list[float]]:
    """(x² − y²)·exp(−r²/2σ²), 5×5, σ = 5/4, divided by its absolute sum; rows are y."""
    axis, sigma = [i - BOUNDARY_KERNEL // 2 for i in range(BOUNDARY_KERNEL)], BOUNDARY_KERNEL / 4
    kernel = [[(x**2 - y**2) * math.exp(-(x**2 + y**2) / (2 * (sigma**2 + 1e-8))) for x in axis] for y in axis]
    total = sum(abs(weight) for row in kernel for weight in row)
    return [[weight / total for weight in row] for row in kernel]


def segmentation_loss(logits: Tensor, target: Tensor, options: SegmentationLossOptions) -> Tensor:
    """The loss of ``[B, 1, H, W]``; a scalar in the dtype of the logits, which is that of the target."""
    return loss_of(statistics(logits, target, options), options)


def statistics(logits: Tensor, target: Tensor, options: SegmentationLossOptions) -> MaskStatistics:
    """One pass over logits and target, ``[B, 1, H, W]``."""
    prediction = torch.sigmoid(logits).clamp(EPSILON, 1 - EPSILON)
    seen = (prediction > 0.5).to(prediction.dtype) if options.hard_boundary else prediction
    difference = _filtered(target - seen, curvature_kernel())
    cross_entropy = target.new_zeros(len(target))
    if options.empty_masks == "cross_entropy":
        cross_entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none").flatten(1).mean(1)
    return MaskStatistics(
        (target * prediction).flatten(1).sum(1),
        ((1 - target) * prediction).flatten(1).sum(1),
        (target * (1 - prediction)).flatten(1).sum(1),
        target.flatten(1).mean(1),
        cross_entropy,
        difference.abs().mean(1),
        _sobel(target).var(1, unbiased=False),
        _sobel(prediction).var(1, unbiased=False),
    )


def loss_of(of: MaskStatistics, options: SegmentationLossOptions) -> Tensor:
    """Focal Tversky with a boost for small lesions, plus boundary and texture terms; a scalar."""
    overlap = focal_tversky(of, options)
    if options.empty_masks == "cross_entropy":
        overlap = torch.where(of.area == 0, of.cross_entropy, overlap)
    boost = 1 + torch.exp(-10 * of.area)
    shape_terms = BOUNDARY_WEIGHT * boundary(of) + TEXTURE_WEIGHT * texture(of)
    return (overlap * boost + shape_terms).clamp(0, options.ceiling).mean()


def focal_tversky(of: MaskStatistics, options: SegmentationLossOptions) -> Tensor:
    """``(1 − Tversky index)^0.75`` of each image, ``[B]``."""
    missed = options.false_positive_weight * of.false_positive + options.false_negative_weight * of.false_negative
    index = (of.hit + EPSILON) / (of.hit + missed + EPSILON)
    return (1 - index).clamp_min(EPSILON) ** TVERSKY_POWER


def boundary(of: MaskStatistics) -> Tensor:
    """Mean difference of the curvature filter's response, averaged over the batch; a scalar."""
    return of.curvature.clamp(0, 1).mean()


def texture(of: MaskStatistics) -> Tensor:
    """Difference of the standard deviations of the horizontal Sobel response, averaged over the batch; a scalar."""
    return (torch.sqrt(of.target_variance + 1e-8) - torch.sqrt(of.prediction_variance + 1e-8)).abs().mean()


def _sobel(mask: Tensor) -> Tensor:
    return _filtered(mask, [[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])


def _filtered(mask: Tensor, kernel: list[list[float]] | list[list[int]]) -> Tensor:
    """``[B, 1, H, W]`` → ``[B, H·W]``, zeros outside."""
    return F.conv2d(mask, mask.new_tensor(kernel)[None, None], padding=len(kernel) // 2).flatten(1)
