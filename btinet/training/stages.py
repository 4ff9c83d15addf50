"""One epoch of training and of validation, and the two stages built from them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.data import DataLoader

from btinet.data import EpochBatches
from btinet.errors import UserError
from btinet.models import BTINet, BTINetOutput
from btinet.training.losses import LossOptions, classification_loss, gate_losses, segmentation_loss
from btinet.training.options import Recipe, TrainOptions
from btinet.training.schedule import CosinePlateau, EarlyStopping

IOU_SHARE = 0.7  # of the score that selects the model; the rest is accuracy
CLIP_NORM = 1.0
GATE_WEIGHT = 1.0
MIN_DELTA = 0.004
RAMP_EPOCHS, RAMP_STEP, RAMP_SEG_END, RAMP_CLF_END = 15, 0.007, 0.92, 0.08

Row = dict[str, Any]


@dataclass
class Session:
    """What both stages share."""

    options: TrainOptions
    recipe: Recipe
    losses: LossOptions
    fabric: Fabric
    network: BTINet
    module: nn.Module  # the network as Fabric wrapped it
    train_loader: DataLoader[Any]
    train_batches: EpochBatches
    val_loader: DataLoader[Any]
    console: Console
    record: Callable[[Row], None]
    save: Callable[[], None]
    epochs_seen: int = 0  # of both stages: each draws its own order and augmentation


def train_network(session: Session) -> None:
    """Stage 1: the whole network on both tasks; leaves the best weights in the network."""
    options, recipe = session.options, session.recipe
    trained = [p for p in session.network.parameters() if p.requires_grad]
    optimizer = _adam(session.fabric, trained, options.lr, beta1=0.91)
    schedule = CosinePlateau(options.lr, options.epochs)
    stopping = EarlyStopping(options.patience, MIN_DELTA)

    def judge(row: Row) -> float:
        schedule.observe(row["val_score"])
        return row["val_score"]

    def loss_of(epoch: int) -> Callable[[BTINetOutput, dict[str, Tensor]], Tensor]:
        seg_weight, clf_weight = _weights(recipe, epoch)

        def loss(output: BTINetOutput, batch: dict[str, Tensor]) -> Tensor:
            seg = segmentation_loss(output.seg_logits, batch["mask"], session.losses)
            return seg_weight * seg + clf_weight * classification_loss(
                output.cls_logits, batch["label"], session.losses
            )

        return loss

    _run(session, 1, options.epochs, optimizer, schedule.rate, loss_of, stopping, judge)


def train_gates(session: Session) -> None:
    """Stage 2: the gates alone, towards each image's difficulty; the rest is frozen, BatchNorm in inference mode."""
    options, network = session.options, session.network
    gates = network.gate_parameters()
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    for parameter in gates:
        parameter.requires_grad_(True)
    optimizer = _adam(session.fabric, gates, options.stage2_lr)

    def loss(output: BTINetOutput, batch: dict[str, Tensor]) -> Tensor:
        task = segmentation_loss(output.seg_logits, batch["mask"], session.losses)
        task = task + classification_loss(output.cls_logits, batch["label"], session.losses)
        seg_gates, clf_gates = gate_losses(output.seg_logits, output.cls_logits, batch["mask"], output.gates)
        return task + GATE_WEIGHT * (seg_gates + clf_gates)

    stopping = EarlyStopping(options.stage2_patience)
    _run(
        session,
        2,
        options.stage2_epochs,
        optimizer,
        lambda epoch: options.stage2_lr,
        lambda epoch: loss,
        stopping,
        lambda row: -row["val_loss"],
    )


def _adam(fabric: Fabric, parameters: list[nn.Parameter], lr: float, beta1: float = 0.9) -> torch.optim.Adam:
    """Adam, fused where Fabric can clip its gradients: not where a scaler has scaled them.

    The fused one takes for granted what autograd sees to, that a gradient has the strides of its parameter.
    """
    fused = getattr(fabric.strategy.precision, "scaler", None) is None
    return torch.optim.Adam(parameters, lr, betas=(beta1, 0.999), eps=1e-7, fused=fused)


def _run(
    session: Session,
    stage: int,
    epochs: int,
    optimizer: torch.optim.Optimizer,
    rate: Callable[[int], float],
    loss_of: Callable[[int], Callable[[BTINetOutput, dict[str, Tensor]], Tensor]],
    stopping: EarlyStopping,
    judge: Callable[[Row], float],
) -> None:
    optimizer = session.fabric.setup_optimizers(optimizer)  # type: ignore[assignment]
    best: dict[str, Tensor] | None = None
    for epoch in range(epochs):
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = rate(epoch)
        loss = loss_of(epoch)
        train_loss = _train_epoch(session, optimizer, loss, f"stage {stage} epoch {epoch + 1}/{epochs}")
        measured = _validate(session, loss)
        row = {"stage": stage, "epoch": epoch + 1, "train_loss": train_loss, **measured}
        row |= {"learning_rate": rate(epoch), "seconds": round(time.perf_counter() - started, 2)}
        better = stopping.observe(judge(row))
        if better:
            best = {name: tensor.detach().clone() for name, tensor in session.network.state_dict().items()}
            session.save()
        session.record(row)
        session.console.print(
            f"stage {stage} epoch {epoch + 1:>2}/{epochs}  loss {train_loss:.4f}  val loss {row['val_loss']:.4f}  "
            f"IoU {row['val_iou']:.4f}  accuracy {row['val_accuracy']:.4f}  {row['seconds']:.0f} s"
            + ("  [bold]best[/bold]" if better else "")
        )
        if stopping.exhausted:
            session.console.print(
                f"stage {stage} stops: {stopping.patience} epochs without improvement.", highlight=False
            )
            break
    if best is not None:
        session.network.load_state_dict(best)


def _train_epoch(
    session: Session,
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[BTINetOutput, dict[str, Tensor]], Tensor],
    title: str,
) -> float:
    session.module.train()
    session.train_batches.set_epoch(session.epochs_seen)
    total = count = 0.0
    with _progress(session.console, title, len(session.train_batches)) as advance:
        for batch in session.train_loader:
            output = session.module(_image(batch))
            loss = loss_of(BTINetOutput(*output), batch)
            if not torch.isfinite(loss):
                raise UserError(
                    f"training diverged ({title}: the loss is {loss.item()}); lower --lr or use --precision 32-true."
                )
            optimizer.zero_grad(set_to_none=True)
            session.fabric.backward(loss)
            session.fabric.clip_gradients(session.module, optimizer, max_norm=CLIP_NORM, error_if_nonfinite=False)
            optimizer.step()
            total += loss.item() * len(batch["label"])
            count += len(batch["label"])
            advance()
    session.epochs_seen += 1
    return total / count


@torch.inference_mode()
def _validate(session: Session, loss_of: Callable[[BTINetOutput, dict[str, Tensor]], Tensor]) -> Row:
    session.module.eval()
    ious: list[float] = []
    hits = labelled = total = count = 0.0
    overlap = np.zeros((2, 2))  # Keras's MeanIoU: rows background, foreground; columns intersection, union
    for batch in session.val_loader:
        output = BTINetOutput(*session.module(_image(batch)))
        size = len(batch["label"])
        total += loss_of(output, batch).item() * size
        count += size
        mask = batch["mask"] > 0.5
        ious += _foreground_ious(output.seg_logits > 0, mask)
        known = batch["label"] >= 0
        hits += (output.cls_logits.argmax(1) == batch["label"])[known].sum().item()
        labelled += known.sum().item()
        overlap += _keras_overlap(torch.sigmoid(output.seg_logits.float()), mask)
    iou = float(np.mean(ious))
    truncated = float(np.mean(overlap[:, 0] / np.maximum(overlap[:, 1], 1)))
    monitored = truncated if session.recipe.monitor == "keras_truncated" else iou
    accuracy = hits / labelled if labelled else 0.0
    return {
        "val_loss": total / count,
        "val_iou": iou,
        "val_accuracy": accuracy,
        "val_score": IOU_SHARE * monitored + (1 - IOU_SHARE) * accuracy,
    }


def _foreground_ious(predicted: Tensor, mask: Tensor) -> list[float]:
    """IoU of each image that has a lesion."""
    predicted, mask = predicted.flatten(1), mask.flatten(1)
    both, either = (predicted & mask).sum(1), (predicted | mask).sum(1)
    return [i / u for i, u, lesion in zip(both.tolist(), either.tolist(), mask.any(1).tolist(), strict=True) if lesion]


def _keras_overlap(probability: Tensor, mask: Tensor) -> np.ndarray:
    """Intersections and unions of background and foreground when the probability is truncated to an integer."""
    predicted = probability.int().bool()
    rows = []
    for ours, theirs in ((~predicted, ~mask), (predicted, mask)):
        rows.append([(ours & theirs).sum().item(), (ours | theirs).sum().item()])
    return np.array(rows)


def _weights(recipe: Recipe, epoch: int) -> tuple[float, float]:
    if not recipe.ramp_weights or epoch >= RAMP_EPOCHS:
        return recipe.seg_weight, recipe.clf_weight
    moved = RAMP_STEP * (epoch + 1)
    return min(RAMP_SEG_END, recipe.seg_weight + moved), max(RAMP_CLF_END, recipe.clf_weight - moved)


def _image(batch: dict[str, Tensor]) -> Tensor:
    return batch["image"].contiguous(memory_format=torch.channels_last)


@contextmanager
def _progress(console: Console, title: str, steps: int) -> Iterator[Callable[[], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=steps)
        yield lambda: bar.advance(task)
