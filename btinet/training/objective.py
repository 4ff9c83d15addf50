"""What a batch is trained towards: the losses of the tasks, where images may lack a mask or a class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from btinet.data import Sample
from btinet.models import BTINetOutput
from btinet.training.losses import LossOptions, classification_loss, gate_loss, segmentation_loss, soft_iou

SEG, CLF = "seg", "clf"

Batch = dict[str, Tensor]
Losses = dict[str, Tensor]  # task → scalar


@dataclass(frozen=True)
class KnownShares:
    """Which parts of a set of images have a mask, and a class.

    A task's loss in a batch of B images is the sum over those with an answer, divided by B and by their share in the
    set. Its mean over the set is then the mean over the images with an answer, however batches, their accumulation and
    processes divide them; without missing answers it is the batch's mean.
    """

    masks: float
    labels: float

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> KnownShares:
        """Those of ``samples``, of which there is at least one."""
        masks = sum(sample.masks is not None for sample in samples)
        return cls(masks / len(samples), sum(sample.label >= 0 for sample in samples) / len(samples))


class LossesOf(Protocol):
    """From the network's answer to the losses of the tasks."""

    def __call__(self, output: BTINetOutput, batch: Batch, known: KnownShares) -> Losses:
        """``known`` belongs to the set that the batch is from."""


@dataclass(frozen=True)
class TaskLosses:
    """Stage 1: segmentation and classification, or the one of them that the network is for.

    Attributes:
        options: of both losses.
        class_weights: ``[K]``, or None: all equal.
    """

    options: LossOptions
    class_weights: Tensor | None = None

    def __call__(self, output: BTINetOutput, batch: Batch, known: KnownShares) -> Losses:
        """See ``LossesOf``."""

        def seg(chosen: Tensor | slice) -> Tensor:
            return segmentation_loss(output.seg_logits[chosen], batch["mask"][chosen], self.options)

        def clf(chosen: Tensor | slice) -> Tensor:
            logits, labels = output.cls_logits[chosen], batch["label"][chosen]
            return classification_loss(logits, labels, self.options, self.class_weights)

        losses = {}
        if output.seg_logits.shape[1]:
            losses[SEG] = _over_known(seg, batch["has_mask"], known.masks, output.seg_logits)
        if output.cls_logits.shape[1]:
            losses[CLF] = _over_known(clf, batch["label"] >= 0, known.labels, output.cls_logits)
        return losses


@dataclass(frozen=True)
class GateLosses:
    """Stage 2: both tasks, and how far the gates are from the difficulty of each image; see ``gate_loss``."""

    tasks: TaskLosses

    def __call__(self, output: BTINetOutput, batch: Batch, known: KnownShares) -> Losses:
        """See ``LossesOf``. How sure the network is needs no label; how well it segments needs a mask."""
        gates = torch.stack(list(output.gates.values()))  # [levels, B, 2]
        overlap = soft_iou(torch.sigmoid(output.seg_logits.detach().float()), batch["mask"])
        confidence = torch.softmax(output.cls_logits.detach().float(), 1).amax(1)

        def seg_gates(chosen: Tensor | slice) -> Tensor:
            return gate_loss(gates[:, chosen, 0], overlap[chosen])

        losses = self.tasks(output, batch, known)
        losses["seg_gates"] = _over_known(seg_gates, batch["has_mask"], known.masks, gates)
        losses["clf_gates"] = gate_loss(gates[..., 1], confidence)
        return losses


def balanced_class_weights(labels: Sequence[int], classes: int) -> list[float]:
    """``N / (classes · n)`` for a class with n of the N labelled images: the mean weight of an image is 1."""
    counts = [sum(label == index for label in labels) for index in range(classes)]
    return [sum(counts) / (classes * count) for count in counts]


def _over_known(mean: Callable[[Tensor | slice], Tensor], known: Tensor, share: float, answer: Tensor) -> Tensor:
    """See ``KnownShares``; ``mean``: over the chosen images; ``answer`` ties a loss of 0 to the network."""
    count = int(known.sum())
    if count == 0:
        return answer.sum() * 0.0
    chosen: Tensor | slice = known if count < len(known) else slice(None)
    # Exactly the plain mean where nothing is missing.
    return mean(chosen) if count == len(known) and share == 1 else mean(chosen) * (count / (len(known) * share))
