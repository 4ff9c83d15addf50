"""Learning rate and stopping rules of the official training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class CosinePlateau:
    """A cosine from ``initial`` to ``floor``·``initial``, times a factor that shrinks when the score stops rising."""

    initial: float
    epochs: int
    floor: float = 0.03
    factor: float = 0.55
    patience: int = 7
    cooldown: int = 2
    minimum: float = 1.5e-6
    _reduction: float = field(default=1.0, init=False)
    _best: float = field(default=-math.inf, init=False)
    _waited: int = field(default=0, init=False)
    _cooling: int = field(default=0, init=False)

    def rate(self, epoch: int) -> float:
        """Learning rate of an epoch, counted from 0; from epoch ``epochs`` on the cosine stays where it ends."""
        cosine = 0.5 * (1 + math.cos(math.pi * min(epoch, self.epochs) / self.epochs))
        return max(self.initial * (self.floor + (1 - self.floor) * cosine) * self._reduction, self.minimum)

    def observe(self, score: float) -> None:
        """Tell the score of the epoch that ended (higher is better)."""
        if self._cooling > 0:
            self._cooling -= 1
        elif score > self._best:
            self._best, self._waited = score, 0
        else:
            self._waited += 1
            if self._waited >= self.patience:
                self._reduction = max(self._reduction * self.factor, self.minimum / self.initial)
                self._cooling, self._waited = self.cooldown, 0

    def state_dict(self) -> dict[str, Any]:
        """What ``load_state_dict`` takes."""
        return {name: getattr(self, name) for name in ("_reduction", "_best", "_waited", "_cooling")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a ``state_dict``."""
        vars(self).update(state)


@dataclass(frozen=True)
class ConstantRate:
    """The same learning rate in every epoch."""

    initial: float

    def rate(self, epoch: int) -> float:
        """As ``CosinePlateau.rate``."""
        return self.initial

    def observe(self, score: float) -> None:
        """As ``CosinePlateau.observe``."""

    def state_dict(self) -> dict[str, Any]:
        """As ``CosinePlateau.state_dict``."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As ``CosinePlateau.load_state_dict``."""


@dataclass
class EarlyStopping:
    """Stop after ``patience`` epochs without a rise of more than ``min_delta``."""

    patience: int
    min_delta: float = 0.0
    best: float = field(default=-math.inf, init=False)
    _waited: int = field(default=0, init=False)

    def observe(self, score: float) -> bool:
        """Tell the score of the epoch that ended; True when it is a new best."""
        if score - self.min_delta > self.best:
            self.best, self._waited = score, 0
            return True
        self._waited += 1
        return False

    @property
    def exhausted(self) -> bool:
        """Whether to stop."""
        return self._waited >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """What ``load_state_dict`` takes."""
        return {"best": self.best, "_waited": self._waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a ``state_dict``."""
        vars(self).update(state)
