"""``create_model`` and ``list_models``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError, safe_open

from btinet.errors import UserError
from btinet.models.checkpoint import load_weights
from btinet.models.encoder import create_encoder
from btinet.models.network import BTINet, BTINetConfig

PREFIX = "btinet_"


def create_model(
    name: str,
    num_classes: int,
    *,
    weights: str | os.PathLike[str] | None = None,
    in_chans: int = 3,
    decoder_channels: Sequence[int] | None = None,
    interaction: str | Sequence[str] = "gated",
    **options: Any,
) -> BTINet:
    """Build a BTI-Net.

    Args:
        name: ``btinet_`` followed by the name of a hierarchical timm backbone, e.g. ``btinet_efficientnet_b4``.
        num_classes: classes of the image classification, at least 2; of no account to a network that only segments.
        weights: None: random; ``"imagenet"``: timm's weights for the encoder; a file: timm weights for the encoder, or
            the ``model.safetensors`` of a whole network.
        in_chans: 1 or 3.
        decoder_channels: widths of the decoder levels, coarse to fine.
        interaction: ``"none"``, ``"fixed"`` or ``"gated"``, for all levels or one per level.
        options: ``signals``, ``pool``, ``strength``, ``clf_channels``, ``dropout``, ``mask_classes``; see
            ``BTINetConfig``.

    Raises:
        UserError: an argument that does not fit, or weights that cannot be had.
    """
    if not name.startswith(PREFIX):
        raise UserError(f"model {name!r}: names are '{PREFIX}' and a timm backbone, e.g. '{PREFIX}efficientnet_b4'.")
    if num_classes < 2 and options.get("tasks") != "segmentation":
        raise UserError(f"num_classes is {num_classes}, but classification needs at least 2.")
    if options.get("mask_classes", 1) < 1:
        raise UserError(f"mask_classes is {options['mask_classes']}, but segmentation needs at least 1.")
    if in_chans not in (1, 3):
        raise UserError(f"in_chans is {in_chans}, but images are grey (1) or colour (3).")
    config = BTINetConfig(
        backbone=name.removeprefix(PREFIX),
        num_classes=num_classes,
        in_chans=in_chans,
        decoder_channels=None if decoder_channels is None else tuple(decoder_channels),
        interaction=interaction if isinstance(interaction, str) else tuple(interaction),  # type: ignore[arg-type]
        **options,
    )
    if weights is None or weights == "imagenet":
        return build_model(config, weights)
    file = Path(weights)
    if not file.is_file():
        raise UserError(f"weights {str(weights)!r}: no such file; give none, imagenet or a file.")
    if not _holds_whole_network(file):
        return build_model(config, file)
    model = build_model(config)
    load_weights(model, file)
    return model


def build_model(config: BTINetConfig, encoder_weights: str | os.PathLike[str] | None = None) -> BTINet:
    """Build the network of a configuration, its encoder with the given weights."""
    return BTINet(config, create_encoder(config.backbone, config.in_chans, encoder_weights))


def list_models(pattern: str = "*") -> list[str]:
    """Names ``create_model`` takes: ``btinet_`` and every timm model that offers a feature pyramid, by shell pattern.

    A few of them turn out not to be hierarchical when they are built; ``create_model`` then says so.
    """
    pattern = pattern.removeprefix(PREFIX)
    flat = (
        "vit_",
        "deit",
        "beit",
        "eva",
        "mixer_",
        "flexivit",
        "naflexvit",
        "xcit",
        "cait",
        "volo",
        "samvit",
        "hiera_",
    )
    return [PREFIX + name for name in timm.list_models(pattern) if not name.startswith(flat)]


def _holds_whole_network(file: Path) -> bool:
    if file.suffix != ".safetensors":
        return False
    try:
        with safe_open(file, framework="pt") as content:
            return any(key.startswith("encoder.") for key in content.keys())  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"weights {str(file)!r}: not a readable safetensors file ({error}).") from error
