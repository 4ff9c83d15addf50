"""A moving average of the weights during training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class WeightAverage:
    """Exponential moving average of a network's weights and BatchNorm statistics.

    The decay after n updates is min(``decay``, (1 + n) / (10 + n)), as in TensorFlow's ExponentialMovingAverage, so
    that the random start is soon forgotten.

    Args:
        network: already on its device; its tensors are updated in place by the training.
        decay: between 0 and 1.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self._current = {n: t for n, t in network.state_dict().items() if t.is_floating_point()}
        self._average = {name: tensor.clone() for name, tensor in self._current.items()}
        self._statistics = [name for name, _ in network.named_buffers() if name in self._average]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after a step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        torch._foreach_lerp_(list(self._average.values()), list(self._current.values()), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the network has the averaged weights."""
        own = {name: tensor.clone() for name, tensor in self._current.items()}
        self._assign(self._average)
        try:
            yield
        finally:
            self._assign(own)

    def statistics(self) -> list[Tensor]:
        """The averaged BatchNorm statistics themselves."""
        return [self._average[name] for name in self._statistics]

    def state_dict(self) -> dict[str, Any]:
        """What ``load_state_dict`` takes."""
        return {"updates": self.updates, "average": self._average}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a ``state_dict``."""
        self.updates = state["updates"]
        for name, tensor in state["average"].items():
            self._average[name].copy_(tensor)

    @torch.no_grad()
    def _assign(self, values: Mapping[str, Tensor]) -> None:
        for name, tensor in self._current.items():
            tensor.copy_(values[name])
