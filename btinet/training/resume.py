"""The state of an interrupted training: written after every epoch, read by ``btinet train --resume``.

Each stage has a file of its own, so that stage 1 can be extended after stage 2.
"""

from __future__ import annotations

import fcntl
import math
import os
import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor

from btinet.errors import UserError
from btinet.files import atomic_path
from btinet.models.checkpoint import WEIGHTS_NAME

STATE_NAMES = {1: "stage1.pt", 2: "stage2.pt"}


@dataclass
class RunState:
    """Everything that the epochs to come depend on."""

    processes: int
    stage: int
    epoch: int  # of the stage, how many are done
    ended: int | None  # the epochs after which the stage ended by its length or by early stopping
    epochs_seen: int  # of both stages
    rows: list[dict[str, Any]]  # of metrics.jsonl
    network: dict[str, Tensor]
    best: dict[str, Tensor] | None  # weights of the stage's best epoch
    average: dict[str, Any] | None
    optimizer: dict[str, Any]
    weighting: dict[str, Tensor]
    scaler: dict[str, Any]  # of 16-mixed
    schedule: dict[str, Any]
    stopping: dict[str, Any]
    random: dict[str, Tensor]  # generators of each process

    def is_over(self, extra_epochs: int) -> bool:
        """Whether the stage is done, with so many epochs after its end."""
        return self.ended is not None and self.epoch >= self.ended + extra_epochs


def write_state(folder: Path, state: RunState) -> None:
    """Write the state of a stage, on the disk and whole or not at all; raises ``UserError`` when it cannot."""
    content = {field.name: getattr(state, field.name) for field in fields(state)}
    with atomic_path(folder / STATE_NAMES[state.stage], durable=True) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:  # torch's form of an OSError, which does not say why
            raise OSError("is the disk full?") from error


def read_state(folder: Path, extending: bool) -> RunState | None:
    """Read the newest state of a run, or that of stage 1 in order to extend it; None when no epoch was finished.

    Raises:
        UserError: the file cannot be read, or was removed.
    """
    first, second = (folder / STATE_NAMES[stage] for stage in (1, 2))
    file = first if extending or not second.exists() else second
    if not file.exists():
        if second.exists() or (folder / WEIGHTS_NAME).exists():
            raise UserError(f"{file}: no such file; the run cannot be continued without it.")
        return None
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
        return RunState(**content)
    except (OSError, RuntimeError, EOFError, TypeError, pickle.UnpicklingError) as error:
        raise UserError(f"{file}: not the state of a training ({str(error).splitlines()[0]}).") from error


@contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """Keep other trainings out of a run folder, which is created; raises ``UserError`` when there is one."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: could not be created ({error.strerror or error}).") from error
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems have no locks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"{folder}: another process is training in it; wait for its end.") from error
        yield
    finally:
        os.close(descriptor)


def random_states(fabric: Fabric) -> dict[str, Tensor]:
    """The states of Python's, numpy's and torch's generators in all processes, ``[processes, …]`` each."""
    _, numbers, gauss = random.getstate()
    of_numpy: Any = np.random.get_state(legacy=False)  # noqa: NPY002 - other libraries use the global generator
    keys, position = of_numpy["state"]["key"].tolist(), of_numpy["state"]["pos"]
    own = {  # float64 holds their integers of 32 bits
        "python": torch.tensor([*numbers, math.nan if gauss is None else gauss], dtype=torch.float64),
        "numpy": torch.tensor([*keys, position, of_numpy["has_gauss"], of_numpy["gauss"]], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if fabric.device.type == "cuda":
        own["cuda"] = torch.cuda.get_rng_state(fabric.device)
    gathered = cast("dict[str, Tensor]", fabric.all_gather(own))
    return {name: tensor.cpu().reshape(fabric.world_size, -1) for name, tensor in gathered.items()}


def restore_random_states(states: dict[str, Tensor], fabric: Fabric) -> None:
    """Put this process's generators back."""
    # Copies: torch.set_rng_state reads a view from the start of its storage.
    own = {name: tensor[fabric.global_rank].clone() for name, tensor in states.items()}
    *numbers, gauss = own["python"].tolist()
    random.setstate((3, tuple(map(int, numbers)), None if math.isnan(gauss) else gauss))
    *keys, position, has_gauss, gauss = own["numpy"].tolist()
    of_numpy = ("MT19937", np.array(keys, dtype=np.uint32), int(position), int(has_gauss), gauss)
    np.random.set_state(of_numpy)  # noqa: NPY002
    torch.set_rng_state(own["torch"])
    if "cuda" in own and fabric.device.type == "cuda":
        torch.cuda.set_rng_state(own["cuda"], fabric.device)
