"""``btinet train``: data, split, network, two stages, run folder."""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric import Fabric, seed_everything
from rich.console import Console
from torch.utils.data import DataLoader

from btinet.data import (
    SPLITS,
    Augmentation,
    Collection,
    DataSource,
    EpochBatches,
    Sample,
    SegmentationDataset,
    check_files,
    check_trainable,
    default_preprocessing,
    near_duplicate_groups,
    read_groups,
    read_split,
    split_collection,
    straddling_groups,
    without_prescribed,
    write_groups,
    write_split,
)
from btinet.errors import UserError
from btinet.models import BTINet, create_model, save_checkpoint
from btinet.training import run_folder
from btinet.training.losses import LossOptions
from btinet.training.options import Recipe, TrainOptions, recipe_of
from btinet.training.stages import Row, Session, train_gates, train_network

SECONDS_BETWEEN_DRAWINGS = 30.0  # of the curves: a drawing takes as long as an epoch of a small set

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]


def train(options: TrainOptions, console: Console | None = None) -> Path:
    """Train a network in two stages and return the folder of the run.

    Everything that can be wrong with the input is checked before the first step; see docs/run_folder.md for what the
    folder holds.

    Raises:
        UserError: unusable options, data or weights, a diverging loss, or a folder that cannot be written.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    _check(options)
    recipe = _recipe(options)
    folder = Path(options.out)
    run_folder.claim(folder)

    collection = DataSource.from_options(asdict(options)).read()
    check_trainable(collection)
    split, groups, found_groups = _split(options, collection)
    parts = {part: [s for s in collection.samples if split[s.id] == part] for part in SPLITS}
    _announce(console, collection, parts, groups)
    leaks = straddling_groups(split, found_groups)
    if leaks:
        console.print(
            f"  [bold]{len(leaks)} group(s) of near-duplicates lie on both sides of the prescribed split[/bold], "
            f"such as {' and '.join(next(iter(leaks.values()))[:2])}; btinet data check lists them, "
            "--drop-train-duplicates-of-test leaves out those of test"
        )
    if len(parts["train"]) < 2 or not parts["val"]:
        raise UserError(
            f"{options.data}: the split leaves {len(parts['train'])} images for training and {len(parts['val'])} for "
            "validation; at least 2 and 1 are needed."
        )

    seed_everything(options.seed, verbose=False)
    size = (options.image_size, options.image_size)
    preprocessing = default_preprocessing(size, options.channels, recipe.double_scaling)
    augmentation = Augmentation(copies=recipe.offline_copies, elastic=recipe.elastic)
    train_set = SegmentationDataset(
        parts["train"],
        preprocessing,
        augmentation=augmentation,
        seed=options.seed,
        mask_threshold=options.mask_threshold,
    )
    check_files(parts["test"], options.channels, options.mask_threshold)  # what would spoil the evaluation shows now
    val_set = SegmentationDataset(parts["val"], preprocessing, mask_threshold=options.mask_threshold)
    if not any(val_set[i]["mask"].any() for i in range(len(val_set))):
        raise UserError(
            f"{options.data}: no validation image shows a lesion at {size[0]}×{size[1]}, so no model can be selected "
            "by IoU; use another --seed or --split."
        )
    network = _network(options, recipe, len(collection.classes))

    precision = _precision(options)
    fabric = Fabric(accelerator=_device(options), devices=1, precision=precision)
    fabric.launch()
    device = fabric.device.type
    console.print(f"{options.model}, {_millions(network)} M parameters, on {device} in {precision}")
    if options.weights == "none":
        console.print("  the encoder starts from random weights; --weights imagenet or FILE usually does much better")
    module = fabric.setup_module(network.to(memory_format=torch.channels_last))
    train_batches = EpochBatches(len(train_set), options.batch_size, shuffle=True, seed=options.seed)
    val_batches = EpochBatches(len(val_set), options.batch_size, shuffle=False)

    def loader(data: SegmentationDataset, batches: EpochBatches) -> Any:
        plain: DataLoader[Any] = DataLoader(
            data, batch_sampler=batches, num_workers=options.workers, pin_memory=device == "cuda"
        )
        return fabric.setup_dataloaders(plain, use_distributed_sampler=False)

    rows: list[Row] = []
    drawn = -math.inf

    def record(row: Row) -> None:
        nonlocal drawn
        rows.append(row)
        run_folder.write_metrics(folder, rows)
        if time.monotonic() - drawn > SECONDS_BETWEEN_DRAWINGS:
            run_folder.draw_curves(folder, rows)
            drawn = time.monotonic()

    run_folder.write_config(folder, options, recipe)
    run_folder.write_environment(folder, device, precision)
    write_split(folder / run_folder.SPLIT_NAME, collection, split, groups)
    if found_groups:
        write_groups(folder / run_folder.GROUPS_NAME, groups)

    session = Session(
        options=options,
        recipe=recipe,
        losses=_losses(recipe),
        fabric=fabric,
        network=network,
        module=module,
        train_loader=loader(train_set, train_batches),
        train_batches=train_batches,
        val_loader=loader(val_set, val_batches),
        console=console,
        record=record,
        save=lambda: save_checkpoint(folder, network, collection.classes, preprocessing),
    )
    try:
        train_network(session)
        if options.stage2_epochs and not network.gate_parameters():
            console.print("stage 2 is skipped: this interaction has no gates to train.")
        elif options.stage2_epochs:
            train_gates(session)
    finally:  # also of a run that was interrupted or diverged
        if rows:
            run_folder.draw_curves(folder, rows)
    session.save()
    console.print(f"run saved in {folder}")
    return folder


def _check(options: TrainOptions) -> None:
    smallest = {
        "epochs": 1,
        "stage2_epochs": 0,
        "image_size": 32,
        "batch_size": 2,
        "workers": 0,
        "patience": 1,
        "stage2_patience": 1,
    }
    for name, least in smallest.items():
        if getattr(options, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least {least}.")
    for name in ("lr", "stage2_lr"):
        if not getattr(options, name) > 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be positive.")
    if options.fold is not None and options.split is None:
        raise UserError(f"--fold {options.fold}: needs the folds to choose from; give them with --split FILE.")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device here; use --device cpu.")


def _recipe(options: TrainOptions) -> Recipe:
    try:
        return recipe_of(options)
    except TypeError as error:
        raise UserError(f"recipe: {error}; docs/presets.md lists the settings.") from error


def _losses(recipe: Recipe) -> LossOptions:
    return LossOptions(
        recipe.false_positive_weight,
        recipe.false_negative_weight,
        recipe.hard_boundary,
        recipe.empty_masks,
        recipe.loss_ceiling,
    )


def _split(options: TrainOptions, collection: Collection) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """The split, the groups it respects, and the near-duplicates where they were searched for."""
    groups: dict[str, str] = {}
    found: dict[str, str] = {}
    if options.groups is not None:
        groups = read_groups(Path(options.groups))
    elif options.split is None and options.manifest is None:  # both say which images belong together
        found = near_duplicate_groups(collection.samples)
        groups = without_prescribed(collection.samples, found)
    if options.split is not None:
        return read_split(Path(options.split), collection, options.fold), groups, found
    return split_collection(collection, groups, seed=options.seed), groups, found


def _network(options: TrainOptions, recipe: Recipe, num_classes: int) -> BTINet:
    choices = options.interaction.split(",")
    network = create_model(
        options.model,
        num_classes,
        weights=None if options.weights == "none" else options.weights,
        in_chans=options.channels,
        decoder_channels=options.decoder_channels,
        interaction=choices[0] if len(choices) == 1 else choices,
        signals=options.signals,
        pool=options.pool,
    )
    for layer in network.modules():
        if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm):
            layer.momentum = recipe.norm_momentum
    freeze = options.weights != "none" if options.freeze_early is None else options.freeze_early
    if freeze:
        for parameter in network.encoder.early_parameters():
            parameter.requires_grad_(False)
    return network


def _device(options: TrainOptions) -> Literal["cuda", "cpu"]:
    return "cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu"


def _precision(options: TrainOptions) -> Precision:
    cuda = _device(options) == "cuda"
    if options.precision == "16-mixed" and not cuda:
        raise UserError("--precision 16-mixed: needs a GPU; use bf16-mixed or 32-true on the CPU.")
    if options.precision == "auto":
        return "bf16-mixed" if cuda and torch.cuda.is_bf16_supported() else "32-true"
    return options.precision


def _millions(network: BTINet) -> str:
    return f"{sum(p.numel() for p in network.parameters()) / 1e6:.1f}"


def _announce(console: Console, collection: Collection, parts: dict[str, list[Sample]], groups: dict[str, str]) -> None:
    console.print(f"{collection.name}: {len(collection.samples)} images in {collection.root}", highlight=False)
    for part, samples in parts.items():
        counts = Counter(s.label for s in samples)
        per_class = ", ".join(f"{name} {counts[i]}" for i, name in enumerate(collection.classes))
        console.print(f"  {part:<5} {len(samples):>5}  ({per_class})")
    if groups:
        console.print(f"  {len(groups)} images lie in {len(set(groups.values()))} groups that no split divides")
