"""Writes what an epoch leaves in the run folder."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from btinet.errors import UserError
from btinet.training import run_folder
from btinet.training.resume import RunState, write_state

SECONDS_BETWEEN_DRAWINGS = 30.0  # of the curves: a drawing takes as long as an epoch of a small set
WRITING_INTERVAL = 20.0  # between states, in times that the last one took
TENSORBOARD_NAME = "tensorboard"

_NOT_PLOTTED = {"stage", "epoch"}


class RunWriter:
    """The writer of a run; of several processes only the first one writes.

    Args:
        folder: of the run.
        save_model: writes the checkpoint with these weights.
        active: False: writes nothing.
        tensorboard: also write event files; ``require_tensorboard`` says whether that is possible.
        epochs_done: of a run that is resumed; events of later ones are void.
    """

    def __init__(
        self,
        folder: Path,
        save_model: Callable[[Mapping[str, Tensor]], None],
        *,
        active: bool,
        tensorboard: bool,
        epochs_done: int,
    ) -> None:
        self.folder, self.active = folder, active
        self._save_model = save_model
        self._drawn = self._state_due = -math.inf
        self._events = _event_file(folder / TENSORBOARD_NAME, epochs_done) if active and tensorboard else None

    def epoch(self, state: RunState, better: bool, last: bool) -> None:
        """Write what is known after an epoch, the state first: from it the rest can be repeated.

        Args:
            state: after the epoch.
            better: whether it is the best so far, whose weights are the model.
            last: whether the stage is over. Before that the state is not written when the writing would take more than
                a twentieth of the time: an epoch of a small set takes less time than its state.
        """
        if not self.active:
            return
        if last or time.monotonic() > self._state_due:
            started = time.monotonic()
            write_state(self.folder, state)
            self._state_due = time.monotonic() + WRITING_INTERVAL * (time.monotonic() - started)
        if better and state.best is not None:
            self.model(state.best)
        run_folder.write_metrics(self.folder, state.rows)
        if time.monotonic() - self._drawn > SECONDS_BETWEEN_DRAWINGS:
            self.curves(state.rows)
            self._drawn = time.monotonic()
        if self._events is not None:
            row = state.rows[-1]
            for name in row.keys() - _NOT_PLOTTED:
                self._events.add_scalar(f"stage{row['stage']}/{name}", row[name], len(state.rows))
            self._events.flush()

    def repeat(self, state: RunState) -> None:
        """Put the folder into the condition of a state that was read from it."""
        if not self.active:
            return
        if state.best is not None:
            self.model(state.best)
        run_folder.write_metrics(self.folder, state.rows)

    def model(self, weights: Mapping[str, Tensor]) -> None:
        """Write the checkpoint."""
        if self.active:
            self._save_model(weights)

    def curves(self, rows: Sequence[dict[str, Any]]) -> None:
        """Draw the curves of the epochs so far."""
        if self.active and rows:
            run_folder.draw_curves(self.folder, rows)

    def close(self, rows: Sequence[dict[str, Any]]) -> None:
        """Draw the last curves and close the event file."""
        self.curves(rows)
        if self._events is not None:
            self._events.close()


def require_tensorboard() -> None:
    """Raise ``UserError`` when TensorBoard is not installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise UserError(
            "--tensorboard: the package tensorboard is not installed; pip install 'btinet-kernels[tensorboard]'."
        ) from error


def _event_file(folder: Path, epochs_done: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder, purge_step=epochs_done + 1)
