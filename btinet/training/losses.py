"""The losses of BTI-Net, from logits.

Source: arXiv 2603.01295, equations (11), (12), and the official code, whose numbers the tests repeat. ``LossOptions``
holds what its presets disagree about.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

EPSILON = 1e-7
TVERSKY_POWER = 0.75
BOUNDARY_WEIGHT = 0.25
TEXTURE_WEIGHT = 0.15
BOUNDARY_KERNEL = 5
FOCUSING = 2.0


@dataclass(frozen=True)
class LossOptions:
    """What the presets disagree about.

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
    empty_masks: str = "cross_entropy"
    ceiling: float = math.inf


def segmentation_loss(logits: Tensor, target: Tensor, options: LossOptions) -> Tensor:
    """Focal Tversky with a boost for small lesions, plus boundary and texture terms.

    Args:
        logits: ``[B, 1, H, W]``.
        target: the mask, 0 or 1, of the same shape.
        options: see ``LossOptions``.

    Returns:
        A scalar, float32.
    """
    logits, target = logits.float(), target.float()
    prediction = torch.sigmoid(logits).clamp(EPSILON, 1 - EPSILON)
    overlap = focal_tversky(prediction, target, options)
    if options.empty_masks == "cross_entropy":
        empty = target.flatten(1).sum(1) == 0
        background = F.binary_cross_entropy_with_logits(logits, target, reduction="none").flatten(1).mean(1)
        overlap = torch.where(empty, background, overlap)
    boost = 1 + torch.exp(-10 * target.flatten(1).mean(1))
    shape_terms = BOUNDARY_WEIGHT * boundary(prediction, target, options) + TEXTURE_WEIGHT * texture(prediction, target)
    return (overlap * boost + shape_terms).clamp(0, options.ceiling).mean()


def focal_tversky(prediction: Tensor, target: Tensor, options: LossOptions) -> Tensor:
    """``(1 − Tversky index)^0.75`` per image, of probabilities: ``[B, 1, H, W]`` → ``[B]``."""
    prediction, target = prediction.flatten(1), target.flatten(1)
    hit = (target * prediction).sum(1)
    false_positive = ((1 - target) * prediction).sum(1)
    false_negative = (target * (1 - prediction)).sum(1)
    missed = options.false_positive_weight * false_positive + options.false_negative_weight * false_negative
    index = (hit + EPSILON) / (hit + missed + EPSILON)
    return (1 - index).clamp_min(EPSILON) ** TVERSKY_POWER


def boundary(prediction: Tensor, target: Tensor, options: LossOptions) -> Tensor:
    """Mean difference of the curvature filter's response, averaged over the batch; a scalar."""
    if options.hard_boundary:
        prediction = (prediction > 0.5).to(prediction.dtype)
    kernel = _curvature_kernel(prediction)
    difference = F.conv2d(target - prediction, kernel, padding=BOUNDARY_KERNEL // 2)
    return difference.abs().flatten(1).mean(1).clamp(0, 1).mean()


def texture(prediction: Tensor, target: Tensor) -> Tensor:
    """Difference of the standard deviations of the horizontal Sobel response, averaged over the batch; a scalar."""
    sobel = prediction.new_tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])[None, None]

    def spread(mask: Tensor) -> Tensor:
        return torch.sqrt(F.conv2d(mask, sobel, padding=1).flatten(1).var(1, unbiased=False) + 1e-8)

    return (spread(target) - spread(prediction)).abs().mean()


def classification_loss(logits: Tensor, labels: Tensor, options: LossOptions) -> Tensor:
    """Focal cross-entropy, γ = 2: logits ``[B, K]``, labels ``[B]`` with −1 for unlabelled images → scalar."""
    known = labels >= 0
    if not known.any():
        return logits.sum() * 0.0
    cross_entropy = F.cross_entropy(logits[known].float(), labels[known], reduction="none")
    missed = (1 - torch.exp(-cross_entropy)).clamp_min(EPSILON)
    return (missed**FOCUSING * cross_entropy).clamp(0, options.ceiling).mean()


def soft_iou(prediction: Tensor, target: Tensor) -> Tensor:
    """IoU of probabilities without a threshold: ``[B, 1, H, W]`` → ``[B]``."""
    prediction, target = prediction.flatten(1), target.flatten(1)
    both = (target * prediction).sum(1)
    return both / ((target + prediction).sum(1) - both + EPSILON)


def gate_losses(
    seg_logits: Tensor, cls_logits: Tensor, target: Tensor, gates: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Stage 2: how far the gates are from the difficulty of each image; (seg gates, clf gates), each a scalar.

    The target of the seg gates is 1 − soft IoU, that of the clf gates 1 − confidence, both stretched to [0, 1] within
    the batch: the hardest image of the batch should let the most interaction through. Binary cross-entropy, averaged
    over the images and the levels.
    """
    prediction = torch.sigmoid(seg_logits.detach().float())
    confidence = torch.softmax(cls_logits.detach().float(), 1).amax(1)
    stacked = torch.stack([gate.float() for gate in gates.values()]).clamp(1e-6, 1 - 1e-6)  # [levels, B, 2]
    losses = []
    for stream, ease in enumerate((soft_iou(prediction, target.float()), confidence)):
        hardness = 1 - (ease - ease.min()) / (ease.max() - ease.min() + EPSILON)
        wanted = hardness.clamp(1e-6, 1 - 1e-6).expand(len(stacked), -1)
        losses.append(F.binary_cross_entropy(stacked[..., stream], wanted))
    return losses[0], losses[1]


def _curvature_kernel(like: Tensor) -> Tensor:
    """(x² − y²)·exp(−r²/2σ²), 5×5, σ = 5/4, divided by its absolute sum."""
    axis = torch.arange(BOUNDARY_KERNEL, dtype=like.dtype, device=like.device) - BOUNDARY_KERNEL // 2
    x, y = axis[None, :], axis[:, None]
    sigma = BOUNDARY_KERNEL / 4
    kernel = (x**2 - y**2) * torch.exp(-(x**2 + y**2) / (2 * (sigma**2 + 1e-8)))
    return (kernel / kernel.abs().sum())[None, None]
