"""How far the interaction moves the features of each decoder level, measured while the network predicts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from btinet.models.network import BTINet, Interaction
from btinet_kernels.nn import TaskInteractionLevel, TaskInteractionModule

Direction = Literal["clf_to_seg", "seg_to_clf"]
DIRECTIONS: tuple[Direction, ...] = ("clf_to_seg", "seg_to_clf")  # in the order of the streams they change: seg, clf


def displacement(base: Tensor, moved: Tensor) -> Tensor:
    """Normalised displacement ‖moved − base‖₂ / ‖base‖₂ of each image: ``[B, …]`` twice → float64 ``[B]``.

    It is nan where the base is zero everywhere. Source: arXiv 2603.01295, figure 3.
    """
    axes = tuple(range(1, base.ndim))
    change, size = (torch.linalg.vector_norm(x, dim=axes, dtype=torch.float64) for x in (moved - base, base))
    return torch.where(size > 0, change / size, torch.nan)


def interactions(network: BTINet) -> dict[str, Interaction]:
    """How each decoder level interacts, coarse to fine."""
    kinds: dict[Any, Interaction] = {TaskInteractionModule: "fixed", TaskInteractionLevel: "gated"}
    return {
        name: kinds.get(type(getattr(level, "interaction", None)), "none") for name, level in network.levels.items()
    }


def directions(network: BTINet) -> tuple[Direction, ...]:
    """The directions in which the tasks interact; of a one-way network only that one."""
    return tuple(d for d in DIRECTIONS if network.config.directions in ("both", d))


def column(direction: Direction, level: str, *, gated: bool) -> str:
    """Name of a column of displacements: of the enhanced features, or of what the gate lets pass of it."""
    return f"displacement_{'gated_' if gated else ''}{direction}_{level}"


@contextmanager
def recorded_displacements(network: BTINet) -> Iterator[dict[str, list[float]]]:
    """Record the displacement of every image that passes through ``network`` inside the ``with``.

    Yields the columns (see ``column``), one value per image and in their order. What the interaction enhances is what
    the level's own TIM makes of the tensors that reach it, before the gate; what passes is what the level returns.
    Levels without an interaction have no column, levels without a gate only that of the enhanced features, and a
    direction in which the network does not interact has none.

    Args:
        network: in evaluation mode, where running TIM a second time changes nothing.
    """
    columns: dict[str, list[float]] = {}

    def record(level: str, base: Sequence[Tensor], moved: Sequence[Tensor], *, gated: bool) -> None:
        for direction, before, after in zip(DIRECTIONS, base, moved, strict=True):
            if direction in directions(network):
                name = column(direction, level, gated=gated)
                columns.setdefault(name, []).extend(displacement(before, after).tolist())

    def measure(level: str, module: nn.Module, base: tuple[Tensor, Tensor], result: Sequence[Tensor]) -> None:
        if isinstance(module, TaskInteractionLevel):
            record(level, base, module.tim(*base), gated=False)
            record(level, base, result[:2], gated=True)
        else:
            record(level, base, result, gated=False)

    handles = [
        interaction.register_forward_hook(partial(measure, name))
        for name, level in network.levels.items()
        if isinstance(interaction := getattr(level, "interaction", None), nn.Module)
    ]
    try:
        yield columns
    finally:
        for handle in handles:
            handle.remove()
