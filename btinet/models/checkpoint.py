"""Checkpoints: ``model.safetensors`` (weights) beside ``config.json`` (architecture, classes, preprocessing)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from btinet.data.masks import LESION
from btinet.data.preprocessing import Preprocessing
from btinet.errors import UserError
from btinet.files import atomic_path, write_text
from btinet.models.network import PROXY_NAMES, BTINet, BTINetConfig

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
FORMAT = "btinet-checkpoint-1"


@dataclass(frozen=True)
class Checkpoint:
    """A trained network and what is needed to use it."""

    model: BTINet  # in eval mode, on the CPU
    classes: tuple[str, ...]  # names, in the order of the logits
    preprocessing: Preprocessing
    proxy_names: tuple[str, ...]
    config: dict[str, Any]  # the whole of config.json
    mask_classes: tuple[str, ...] = LESION  # what masks tell apart, in the order of the segmentation's channels


def save_checkpoint(
    folder: str | os.PathLike[str],
    model: BTINet,
    classes: tuple[str, ...],
    preprocessing: Preprocessing,
    weights: Mapping[str, Tensor] | None = None,
    mask_classes: tuple[str, ...] = LESION,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write both files into ``folder``, each whole or not at all; raises ``UserError`` when it cannot.

    Args:
        folder: of the run.
        model: what is saved.
        classes: names, in the order of the outputs.
        preprocessing: of the images.
        weights: a ``state_dict`` of the model to save in place of its present one.
        mask_classes: names of what is segmented, in the order of the channels.
        extra: further entries of ``config.json``, which ``load_checkpoint`` hands on in ``Checkpoint.config``.
    """
    if model.batchnorms_left is not None:
        raise UserError("a fused network is no checkpoint; save the one that fuse() was called on.")
    folder = Path(folder)
    content = {
        "format": FORMAT,
        "model": model.config.to_dict(),
        "classes": list(classes),
        "mask_classes": list(mask_classes),
        "preprocessing": preprocessing.to_dict(),
        **(extra or {}),
    }
    weights = model.state_dict() if weights is None else weights
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    with atomic_path(folder / WEIGHTS_NAME, durable=True) as temporary:
        try:
            save_file(state, temporary)
        except SafetensorError as error:  # its form of an OSError
            raise OSError(str(error)) from error
    write_text(folder / CONFIG_NAME, json.dumps(content, indent=2) + "\n")


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Load from a run folder, or from its ``model.safetensors``.

    Raises:
        UserError: a file is missing or damaged, or the weights belong to another model.
    """
    from btinet.models.factory import build_model

    path = Path(path)
    folder = path.parent if path.name == WEIGHTS_NAME else path
    content = _read_config(folder / CONFIG_NAME)
    try:
        config = BTINetConfig.from_dict(content["model"])
        classes = tuple(str(name) for name in content["classes"])
        mask_classes = tuple(str(name) for name in content.get("mask_classes", LESION))
        preprocessing = Preprocessing.from_dict(content["preprocessing"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / CONFIG_NAME}: not a configuration of a btinet checkpoint ({error}).") from error
    if len(classes) != config.num_classes:
        raise UserError(
            f"{folder / CONFIG_NAME}: {len(classes)} class names for a model of {config.num_classes} classes."
        )
    if len(mask_classes) != config.mask_classes:
        raise UserError(
            f"{folder / CONFIG_NAME}: {len(mask_classes)} names of mask classes for a model of {config.mask_classes}."
        )
    model = build_model(config)
    load_weights(model, folder / WEIGHTS_NAME)
    return Checkpoint(model.eval(), classes, preprocessing, PROXY_NAMES[config.signals], content, mask_classes)


def load_weights(model: BTINet, file: Path) -> None:
    """Load a whole network's weights; raises ``UserError`` when the file is damaged or of another model."""
    if not file.is_file():
        raise UserError(f"{file}: no such file; expected a checkpoint with {WEIGHTS_NAME} and {CONFIG_NAME}.")
    try:
        state = load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a readable safetensors file ({error}).") from error
    own = model.state_dict()
    wrong = sorted(own.keys() ^ state.keys()) or sorted(k for k in own if own[k].shape != state[k].shape)
    if wrong:
        raise UserError(
            f"{file}: holds the weights of another model than btinet_{model.config.backbone} as configured: "
            f"{len(wrong)} tensors differ, first {wrong[0]!r}."
        )
    model.load_state_dict(state)


def _read_config(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"{file}: no such file; expected a run folder with {WEIGHTS_NAME} and {CONFIG_NAME}."
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not readable as JSON ({error}).") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{file}: not the configuration of a btinet checkpoint (expected format {FORMAT!r}).")
    return content
