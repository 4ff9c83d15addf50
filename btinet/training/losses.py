"""The losses of BTI-Net, from logits.

Source: arXiv 2603.01295, equations (11), (12), and the official code, whose numbers the tests repeat. ``LossOptions``
holds what its presets disagree about.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from btinet_kernels import SegmentationLossOptions as LossOptions
from btinet_kernels import fused_segmentation_loss

EPSILON = 1e-7
FOCUSING = 2.0


def segmentation_loss(logits: Tensor, target: Tensor, options: LossOptions) -> Tensor:
    """Focal Tversky, boundary and texture terms: see ``btinet_kernels.fused_segmentation_loss``.

    Args:
        logits: ``[B, K, H, W]``. Each of the K classes is set against everything else, and their losses are averaged.
        target: of the same shape.
        options: of the loss.
    """
    if logits.shape[1] > 1:
        logits, target = logits.flatten(0, 1).unsqueeze(1), target.flatten(0, 1).unsqueeze(1)
    return fused_segmentation_loss(logits, target, options)


def classification_loss(
    logits: Tensor, labels: Tensor, options: LossOptions, class_weights: Tensor | None = None
) -> Tensor:
    """Focal cross-entropy, γ = 2: logits ``[B, K]``, labels ``[B]`` → scalar, a mean over the images.

    ``class_weights``, ``[K]``, multiply the loss of each image by that of its class.
    """
    cross_entropy = F.cross_entropy(logits.float(), labels, reduction="none")
    missed = (1 - torch.exp(-cross_entropy)).clamp_min(EPSILON)
    loss = (missed**FOCUSING * cross_entropy).clamp(0, options.ceiling)
    return (loss if class_weights is None else loss * class_weights[labels]).mean()


def soft_iou(prediction: Tensor, target: Tensor) -> Tensor:
    """IoU of probabilities without a threshold, all classes together: ``[B, K, H, W]`` → ``[B]``."""
    prediction, target = prediction.flatten(1), target.flatten(1)
    both = (target * prediction).sum(1)
    return both / ((target + prediction).sum(1) - both + EPSILON)


def gate_loss(gates: Tensor, ease: Tensor) -> Tensor:
    """Stage 2: how far the gates of one task are from the difficulty of each image, a scalar.

    The target is the image's difficulty, 1 − ease, stretched to [0, 1] within the batch: the hardest image of the batch
    should let the most interaction through. Binary cross-entropy, averaged over the images and the levels.

    Args:
        gates: ``[levels, B]``, between 0 and 1.
        ease: ``[B]``, no gradient: the soft IoU for the gates of the segmentation, the confidence for the others.
    """
    hardness = 1 - (ease - ease.min()) / (ease.max() - ease.min() + EPSILON)
    wanted = hardness.clamp(1e-6, 1 - 1e-6).expand(len(gates), -1)
    return F.binary_cross_entropy(gates.float().clamp(1e-6, 1 - 1e-6), wanted)
