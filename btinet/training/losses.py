"""The losses of BTI-Net, from logits.

Source: arXiv 2603.01295, equations (11), (12), and the official code, whose numbers the tests repeat. ``LossOptions``
holds what its presets disagree about.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from btinet_kernels import SegmentationLossOptions as LossOptions
from btinet_kernels import fused_segmentation_loss

EPSILON = 1e-7
FOCUSING = 2.0


def segmentation_loss(logits: Tensor, target: Tensor, options: LossOptions) -> Tensor:
    """Focal Tversky, boundary and texture terms of ``[B, 1, H, W]``: see ``btinet_kernels.fused_segmentation_loss``."""
    return fused_segmentation_loss(logits, target, options)


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
