"""The two stages of a training."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.wrappers import _FabricModule
from rich.console import Console
from torch import Tensor, nn

from btinet.errors import UserError
from btinet.models import BTINet
from btinet.training import engine
from btinet.training.averaging import WeightAverage
from btinet.training.balancing import AGGREGATORS, GradientBalancer
from btinet.training.epochs import Loaders, Objective, average_statistics, progress, train_epoch, validate
from btinet.training.objective import CLF, SEG, GateLosses, TaskLosses
from btinet.training.options import Recipe, TrainOptions
from btinet.training.records import RunWriter
from btinet.training.resume import RunState, random_states, restore_random_states
from btinet.training.schedule import ConstantRate, CosinePlateau, EarlyStopping
from btinet.training.weighting import WEIGHTINGS, Weighting

GATE_WEIGHT = 1.0
MIN_DELTA = 0.004

Row = dict[str, Any]


@dataclass
class Session:
    """What both stages share."""

    options: TrainOptions
    recipe: Recipe
    losses: TaskLosses
    fabric: Fabric
    network: BTINet
    loaders: Loaders
    console: Console
    writer: RunWriter
    rows: list[Row]  # of metrics.jsonl
    resumed: RunState | None = None  # where to continue
    epochs_seen: int = 0  # of both stages: each draws its own order and augmentation


@dataclass
class Stage:
    """What the stages differ in."""

    number: int
    epochs: int
    extra_epochs: int  # after its end by ``epochs`` or by early stopping
    optimizer: torch.optim.Optimizer
    schedule: CosinePlateau | ConstantRate
    stopping: EarlyStopping
    objective: Objective
    judge: Callable[[Row], float]  # what early stopping and the choice of the best epoch go by


def train_network(session: Session) -> None:
    """Stage 1: the whole network on its tasks; leaves the best weights in the network."""
    options, recipe = session.options, session.recipe
    trained = [p for p in session.network.parameters() if p.requires_grad]
    method = options.weighting
    weights = {SEG: recipe.seg_weight, CLF: recipe.clf_weight}
    if options.tasks != "both":
        weights = {SEG: 1.0} if options.tasks == "segmentation" else {CLF: 1.0}
    weighting = WEIGHTINGS.get(method, Weighting)(weights)
    weighting.to(session.fabric.device)
    balancer = GradientBalancer(method, trained) if method in AGGREGATORS else None
    stage = Stage(
        number=1,
        epochs=options.epochs,
        extra_epochs=options.extend_epochs,
        optimizer=_adam(session.fabric, [*trained, *weighting.parameters()], options.lr, beta1=0.91),
        schedule=CosinePlateau(options.lr, options.epochs),
        stopping=EarlyStopping(options.patience, MIN_DELTA),
        objective=Objective(session.losses, weighting, balancer),
        judge=lambda row: row["val_score"],
    )
    _run(session, stage)


def train_gates(session: Session) -> None:
    """Stage 2: the gates alone, towards each image's difficulty; the rest is frozen, BatchNorm in inference mode."""
    options, network = session.options, session.network
    gates = network.gate_parameters()
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    for parameter in gates:
        parameter.requires_grad_(True)
    weights = {SEG: 1.0, CLF: 1.0, "seg_gates": GATE_WEIGHT, "clf_gates": GATE_WEIGHT}
    stage = Stage(
        number=2,
        epochs=options.stage2_epochs,
        extra_epochs=0,
        optimizer=_adam(session.fabric, gates, options.stage2_lr),
        schedule=ConstantRate(options.stage2_lr),
        stopping=EarlyStopping(options.stage2_patience),
        objective=Objective(GateLosses(session.losses), Weighting(weights)),
        judge=lambda row: -row["val_loss"],
    )
    _run(session, stage)


def _adam(fabric: Fabric, parameters: list[nn.Parameter], lr: float, beta1: float = 0.9) -> torch.optim.Adam:
    """Adam, fused where Fabric can clip its gradients: not where a scaler has scaled them.

    The fused one takes for granted what autograd sees to, that a gradient has the strides of its parameter.
    """
    fused = getattr(fabric.strategy.precision, "scaler", None) is None
    return torch.optim.Adam(parameters, lr, betas=(beta1, 0.999), eps=1e-7, fused=fused)


def _run(session: Session, stage: Stage) -> None:
    """Train what is left of a stage; leaves its best weights in the network."""
    run = _StageRun(session, stage)
    if session.resumed is not None and session.resumed.stage == stage.number:
        run.restore(session.resumed)
    module = engine.wrap(session.fabric, session.network, session.options.compile)
    optimizer = session.fabric.setup_optimizers(stage.optimizer)
    while not run.is_over():
        run.next_epoch(module, optimizer)  # type: ignore[arg-type]
    if run.best is not None:
        session.network.load_state_dict(run.best)


class _StageRun:
    """A stage, and how far it has come."""

    def __init__(self, session: Session, stage: Stage) -> None:
        self.session, self.stage = session, stage
        self.epoch = 0  # how many are done
        self.ended: int | None = None  # the epochs after which it ended by its length or by early stopping
        self.best: dict[str, Tensor] | None = None
        decay = session.options.ema
        self.average = None if decay is None else WeightAverage(session.network, decay)

    def is_over(self) -> bool:
        return self.ended is not None and self.epoch >= self.ended + self.stage.extra_epochs

    def next_epoch(self, module: _FabricModule, optimizer: torch.optim.Optimizer) -> None:
        session, stage = self.session, self.stage
        started, rate, weighting = time.perf_counter(), stage.schedule.rate(self.epoch), stage.objective.weighting
        weighting.begin(self.epoch, [row for row in session.rows if row["stage"] == stage.number])
        weights = {f"{task}_weight": weight for task, weight in weighting.weights.items()}
        epochs = stage.epochs if self.ended is None else self.ended + stage.extra_epochs
        title = f"stage {stage.number} epoch {self.epoch + 1:>2}/{epochs}"
        for group in optimizer.param_groups:
            group["lr"] = rate
        trained = self._train(module, optimizer, title)
        self.epoch += 1
        with nullcontext() if self.average is None else self.average.applied():
            measured = validate(
                session.fabric, module, session.loaders, stage.objective, session.recipe, session.options.tasks
            )
            row = {"stage": stage.number, "epoch": self.epoch, **trained, **measured, **weights}
            row |= {"learning_rate": rate, "seconds": round(time.perf_counter() - started, 2)}
            stage.schedule.observe(row["val_score"])
            better = stage.stopping.observe(stage.judge(row))
            if better:
                self.best = {name: tensor.detach().clone() for name, tensor in session.network.state_dict().items()}
        session.rows.append(row)
        if self.ended is None and (self.epoch >= stage.epochs or stage.stopping.exhausted):
            self.ended = self.epoch
        session.writer.epoch(self._state(), better, last=self.is_over())
        scores = (("IoU", "val_iou"), ("accuracy", "val_accuracy"))
        known = "".join(f"{name} {row[key]:.4f}  " for name, key in scores if key in row)
        session.console.print(
            f"{title}  loss {row['train_loss']:.4f}  val loss {row['val_loss']:.4f}  {known}{row['seconds']:.0f} s"
            + ("  [bold]best[/bold]" if better else "")
        )
        if self.ended == self.epoch < stage.epochs:
            session.console.print(
                f"stage {stage.number} stops: {stage.stopping.patience} epochs without improvement.", highlight=False
            )

    def _train(self, module: _FabricModule, optimizer: torch.optim.Optimizer, title: str) -> dict[str, float]:
        session = self.session
        batches = session.loaders.train_batches
        batches.set_epoch(session.epochs_seen)
        with progress(session.console, title, len(batches)) as advance:
            losses = train_epoch(
                session.fabric,
                module,
                optimizer,
                session.loaders,
                self.stage.objective,
                accumulate=session.options.accumulate,
                average=self.average,
                advance=advance,
            )
        average_statistics(session.fabric, session.network, self.average)
        session.epochs_seen += 1
        return losses

    def _state(self) -> RunState:
        session, stage = self.session, self.stage
        return RunState(
            processes=session.fabric.world_size,
            stage=stage.number,
            epoch=self.epoch,
            ended=self.ended,
            epochs_seen=session.epochs_seen,
            rows=session.rows,
            network=session.network.state_dict(),
            best=self.best,
            average=None if self.average is None else self.average.state_dict(),
            optimizer=stage.optimizer.state_dict(),
            weighting=stage.objective.weighting.state_dict(),
            scaler=session.fabric.strategy.precision.state_dict(),
            schedule=stage.schedule.state_dict(),
            stopping=stage.stopping.state_dict(),
            random=random_states(session.fabric),
        )

    def restore(self, state: RunState) -> None:
        session, stage = self.session, self.stage
        self.epoch, self.ended, session.epochs_seen = state.epoch, state.ended, state.epochs_seen
        session.rows[:] = state.rows
        try:
            session.network.load_state_dict(state.network)
            stage.optimizer.load_state_dict(state.optimizer)
            stage.objective.weighting.load_state_dict(state.weighting)
            if self.average is not None and state.average is not None:
                self.average.load_state_dict(state.average)
        except (RuntimeError, ValueError, KeyError) as error:
            raise UserError(
                f"{session.options.out}: its state belongs to another network than its config.yaml describes "
                f"({str(error).splitlines()[0]})."
            ) from error
        device = session.fabric.device
        self.best = None if state.best is None else {name: tensor.to(device) for name, tensor in state.best.items()}
        session.fabric.strategy.precision.load_state_dict(state.scaler)
        stage.schedule.load_state_dict(state.schedule)
        stage.stopping.load_state_dict(state.stopping)
        restore_random_states(state.random, session.fabric)
        session.writer.repeat(state)
