"""One epoch of training and of validation, in one process or in several that share the images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from lightning.fabric.wrappers import _FabricModule
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.data import DataLoader

from btinet.data import EpochBatches
from btinet.errors import UserError
from btinet.models import BTINetOutput
from btinet.models.network import Tasks, class_numbers
from btinet.training.averaging import WeightAverage
from btinet.training.balancing import GradientBalancer
from btinet.training.engine import reduced
from btinet.training.objective import Batch, KnownShares, LossesOf
from btinet.training.options import Recipe
from btinet.training.weighting import Weighting

IOU_SHARE = 0.7  # of the score that selects a model of both tasks; the rest is accuracy
CLIP_NORM = 1.0


@dataclass
class Loaders:
    """The images of a training."""

    train: DataLoader[Any]
    train_batches: EpochBatches
    val: DataLoader[Any]
    memory_format: torch.memory_format
    train_known: KnownShares
    val_known: KnownShares


@dataclass
class Objective:
    """What a stage minimises; ``balancer``: combine the tasks' gradients instead of their weighted losses."""

    losses: LossesOf
    weighting: Weighting
    balancer: GradientBalancer | None = None


def train_epoch(
    fabric: Fabric,
    module: _FabricModule,
    optimizer: torch.optim.Optimizer,
    loaders: Loaders,
    objective: Objective,
    *,
    accumulate: int,
    average: WeightAverage | None,
    advance: Callable[[], None],
) -> dict[str, float]:
    """Take a step for every ``accumulate`` batches; returns mean losses over the images of all processes.

    A step follows the mean over its images, whatever batches and processes they were in.

    Returns:
        ``train_loss``, which is minimised, and ``train_TASK_loss``.

    Raises:
        UserError: the loss is not finite.
    """
    module.train()
    weighting, balancer = objective.weighting, objective.balancer
    totals: dict[str, float] = {}
    count = 0.0
    for batches in _groups(loaders.train, accumulate):
        sizes = [len(batch["label"]) for batch in batches]
        images = reduced(fabric, torch.tensor(float(sum(sizes)), dtype=torch.float64), "sum").item()
        for number, (batch, size) in enumerate(zip(batches, sizes, strict=True), start=1):
            with fabric.no_backward_sync(module, enabled=number < len(batches)):
                losses = objective.losses(BTINetOutput(*module(_image(batch, loaders))), batch, loaders.train_known)
                loss = weighting(losses)
                values = torch.stack([loss, *losses.values()]).detach().double() * size
                sums = dict(zip(("", *losses), reduced(fabric, values, "sum").tolist(), strict=True))
                if not np.isfinite(sums[""]):
                    raise UserError(
                        f"training diverged (the loss is {loss.item()}); lower --lr or use --precision 32-true."
                    )
                scale = size * fabric.world_size / images  # processes average their gradients
                if balancer is None:
                    fabric.backward(loss * scale)
                else:
                    balancer.add([weighting.weights[task] * loss for task, loss in losses.items()], scale)
            totals = {task: totals.get(task, 0.0) + value for task, value in sums.items()}
            advance()
        count += images
        if balancer is not None:
            balancer.finish()
        for parameter in weighting.parameters():  # not among those that processes average by themselves
            if parameter.grad is not None:
                parameter.grad = reduced(fabric, parameter.grad, "mean")
        fabric.clip_gradients(module, optimizer, max_norm=CLIP_NORM, error_if_nonfinite=False)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if average is not None:
            average.update()
    return {_named("train", task): total / count for task, total in totals.items()}


@torch.inference_mode()
def validate(
    fabric: Fabric,
    module: nn.Module,
    loaders: Loaders,
    objective: Objective,
    recipe: Recipe,
    tasks: Tasks = "both",
) -> dict[str, Any]:
    """Losses and the scores of the network's tasks over the images of all processes."""
    module.eval()
    images = ious = lesions = hits = labelled = 0.0
    totals = dict.fromkeys(("", *objective.weighting.weights), 0.0)
    overlap = np.zeros((2, 2))  # Keras's MeanIoU: rows background, foreground; columns intersection, union
    for batch in loaders.val:
        output = BTINetOutput(*module(_image(batch, loaders)))
        size = len(batch["label"])
        losses = objective.losses(output, batch, loaders.val_known)
        for task, loss in {"": objective.weighting(losses), **losses}.items():
            totals[task] += loss.item() * size
        images += size
        if tasks != "classification":
            drawn = batch["has_mask"]
            logits, mask = output.seg_logits[drawn], batch["mask"][drawn] > 0.5
            of_lesions = _foreground_ious(logits, mask)
            ious += sum(of_lesions)
            lesions += len(of_lesions)
            overlap += _keras_overlap(torch.sigmoid(logits.float()), mask)
        if tasks != "segmentation":
            known = batch["label"] >= 0
            hits += (output.cls_logits.argmax(1) == batch["label"])[known].sum().item()
            labelled += known.sum().item()
    counts = torch.tensor([images, ious, lesions, hits, labelled, *overlap.flatten()], dtype=torch.float64)
    images, ious, lesions, hits, labelled, *rest = reduced(fabric, counts, "sum").tolist()
    sums = reduced(fabric, torch.tensor(list(totals.values()), dtype=torch.float64), "sum").tolist()
    overlap = np.array(rest).reshape(2, 2)
    measured = {_named("val", task): total / images for task, total in zip(totals, sums, strict=True)}
    monitored = accuracy = 0.0
    if tasks != "classification":
        measured["val_iou"] = iou = ious / lesions
        truncated = float(np.mean(overlap[:, 0] / np.maximum(overlap[:, 1], 1)))
        monitored = truncated if recipe.monitor == "keras_truncated" else iou
    if tasks != "segmentation":
        measured["val_accuracy"] = accuracy = hits / labelled if labelled else 0.0
    share = {"both": IOU_SHARE, "segmentation": 1.0, "classification": 0.0}[tasks]
    measured["val_score"] = share * monitored + (1 - share) * accuracy
    return measured


def average_statistics(fabric: Fabric, network: nn.Module, average: WeightAverage | None) -> None:
    """Give every process the mean of the BatchNorm statistics, which each gathered from its own images."""
    if fabric.world_size == 1:
        return
    statistics = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
    for tensor in statistics + (average.statistics() if average is not None else []):
        tensor.copy_(reduced(fabric, tensor.clone(), "mean"))


def _groups(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    iterator = iter(batches)
    while group := list(islice(iterator, size)):
        yield group


def _image(batch: Batch, loaders: Loaders) -> Tensor:
    return batch["image"].contiguous(memory_format=loaders.memory_format)


def _named(part: str, task: str) -> str:
    return f"{part}_{task}_loss" if task else f"{part}_loss"


def _foreground_ious(seg_logits: Tensor, mask: Tensor) -> list[float]:
    """IoU of each class of ``[B, K, H, W]`` that an image shows."""
    numbers = torch.arange(1, mask.shape[1] + 1, device=mask.device).view(1, -1, 1, 1)
    predicted = class_numbers(seg_logits).unsqueeze(1) == numbers
    predicted, mask = predicted.flatten(2).flatten(0, 1), mask.flatten(2).flatten(0, 1)
    both, either = (predicted & mask).sum(1), (predicted | mask).sum(1)
    return [i / u for i, u, lesion in zip(both.tolist(), either.tolist(), mask.any(1).tolist(), strict=True) if lesion]


def _keras_overlap(probability: Tensor, mask: Tensor) -> np.ndarray:
    """Intersections and unions of background and foreground when the probability is truncated to an integer."""
    predicted = probability.int().bool()
    rows = []
    for ours, theirs in ((~predicted, ~mask), (predicted, mask)):
        rows.append([(ours & theirs).sum().item(), (ours | theirs).sum().item()])
    return np.array(rows)


@contextmanager
def progress(console: Console, title: str, steps: int) -> Iterator[Callable[[], None]]:
    """A bar on the terminal, and what moves it by a step."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=steps)
        yield lambda: bar.advance(task)
