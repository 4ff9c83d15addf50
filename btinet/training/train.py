"""``btinet train``: data, split, network, two stages, run folder."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import seed_everything
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader

from btinet.data import (
    SPLITS,
    Augmentation,
    Collection,
    DataSource,
    EpochBatches,
    MaskFormat,
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
from btinet.models.encoder import number_of_stages
from btinet.training import engine, run_folder
from btinet.training.balancing import AGGREGATORS
from btinet.training.epochs import Loaders
from btinet.training.losses import LossOptions
from btinet.training.objective import KnownShares, TaskLosses, balanced_class_weights
from btinet.training.options import Recipe, TrainOptions, recipe_of
from btinet.training.records import RunWriter, require_tensorboard
from btinet.training.resume import STATE_NAMES, RunState, only_process, read_state
from btinet.training.stages import Session, train_gates, train_network


def train(options: TrainOptions, console: Console | None = None) -> Path:
    """Train a network in two stages and return the folder of the run.

    Everything that can be wrong with the input is checked before the first step; see docs/run_folder.md for what the
    folder holds. Under torchrun every process calls this with the same options.

    Raises:
        UserError: unusable options, data or weights, a diverging loss, or a folder that cannot be written.
    """
    check_options(options)
    run_folder.claim(Path(options.out))
    return _run(options, _console(console))


def resume(folder: Path, extend_epochs: int = 0, console: Console | None = None) -> Path:
    """Continue a run from its last whole state, with the options of its config.yaml, and return its folder.

    Args:
        folder: of a run that was interrupted, or of a finished one to extend.
        extend_epochs: so many epochs of stage 1 follow its end, in addition to those that config.yaml asks for; a stage
            2 that has begun is trained anew after them.

    Raises:
        UserError: not such a folder, a state that cannot be read or belongs to another number of processes, and
            whatever ``train`` raises.
    """
    options = run_folder.read_options(folder)
    if extend_epochs < 0:
        raise UserError(f"--extend-epochs {extend_epochs}: must be at least 0.")
    options = replace(options, extend_epochs=options.extend_epochs + extend_epochs)
    check_options(options)
    state = read_state(folder, extending=extend_epochs > 0)
    console = _console(console)
    if state is not None and _is_finished(folder, state, options):
        console.print(f"nothing to do: the run in {folder} is finished; --extend-epochs N trains it longer.")
        return folder
    return _run(options, console, resuming=True, state=state)


def _run(options: TrainOptions, console: Console, resuming: bool = False, state: RunState | None = None) -> Path:
    """A run that is resumed without a state had not finished an epoch."""
    recipe = _recipe(options)
    folder = Path(options.out)
    fabric = engine.launch(options)
    if state is not None and state.processes != fabric.world_size:
        raise UserError(
            f"--resume {folder}: was trained by {state.processes} process(es), which is not the {fabric.world_size} of "
            "now; start as many."
        )

    collection = DataSource.from_options(asdict(options)).read()
    check_trainable(
        collection,
        segmentation=options.tasks != "classification",
        classification=options.tasks != "segmentation",
    )
    of_run = replace(options, split=str(folder / run_folder.SPLIT_NAME), groups=None, fold=None)
    split, groups, found_groups = _split(of_run if resuming else options, collection)
    parts = {part: [s for s in collection.samples if split[s.id] == part] for part in SPLITS}
    _announce(console, collection, parts, groups)
    leaks = straddling_groups(split, found_groups)
    if leaks:
        console.print(
            f"  [bold]{len(leaks)} group(s) of near-duplicates lie on both sides of the prescribed split[/bold], "
            f"such as {' and '.join(next(iter(leaks.values()))[:2])}; btinet data check lists them, "
            "--drop-train-duplicates-of-test leaves out those of test"
        )
    least = 2 * fabric.world_size
    if len(parts["train"]) < least or not parts["val"]:
        raise UserError(
            f"{options.data}: the split leaves {len(parts['train'])} images for training and {len(parts['val'])} for "
            f"validation; at least {least} and 1 are needed."
        )

    mask_format = MaskFormat.from_options(asdict(options))
    if options.weighting == "uncertainty" and not min(recipe.seg_weight, recipe.clf_weight) > 0:
        raise UserError(
            "--weighting uncertainty: begins at the recipe's seg_weight and clf_weight, which must be positive."
        )
    if recipe.monitor == "keras_truncated" and len(mask_format.classes) > 1:
        raise UserError("recipe: monitor keras_truncated knows one mask class; use thresholded with --mask-classes.")
    class_weights = _class_weights(options, collection.classes, parts["train"], fabric.device)

    seed_everything(options.seed, verbose=False)
    size = (options.image_size, options.image_size)
    preprocessing = default_preprocessing(size, options.channels, recipe.double_scaling)
    augmentation = Augmentation(copies=recipe.offline_copies, elastic=recipe.elastic)
    memory_share = 0.5 / fabric.world_size
    train_set = SegmentationDataset(
        parts["train"],
        preprocessing,
        augmentation=augmentation,
        seed=options.seed,
        mask_format=mask_format,
        memory_share=memory_share,
    )
    check_files(parts["test"], options.channels, mask_format)  # what would spoil the evaluation shows now
    val_set = SegmentationDataset(parts["val"], preprocessing, mask_format=mask_format, memory_share=memory_share)
    if options.tasks != "classification" and not any(val_set[i]["mask"].any() for i in range(len(val_set))):
        raise UserError(
            f"{options.data}: no validation image shows a lesion at {size[0]}×{size[1]}, so no model can be selected "
            "by IoU; use another --seed or --split."
        )
    network = _network(options, recipe, len(collection.classes), len(mask_format.classes), load_weights=state is None)
    network.to(memory_format=engine.memory_format_of(options)).to(fabric.device)
    if fabric.global_rank:
        torch.manual_seed(options.seed + fabric.global_rank)  # dropout of its own, from equal weights

    device = fabric.device.type
    processes = f", {fabric.world_size} processes" if fabric.world_size > 1 else ""
    console.print(
        f"{options.model}, {_millions(network)} M parameters, on {device} in {engine.precision_of(options)}{processes}"
    )
    if options.weights == "none":
        console.print("  the encoder starts from random weights; --weights imagenet or FILE usually does much better")
    share = {"rank": fabric.global_rank, "processes": fabric.world_size}
    train_batches = EpochBatches(len(train_set), options.batch_size, shuffle=True, seed=options.seed, **share)
    val_batches = EpochBatches(len(val_set), options.batch_size, shuffle=False, **share)

    def loader(data: SegmentationDataset, batches: EpochBatches) -> Any:
        plain: DataLoader[Any] = DataLoader(
            data, batch_sampler=batches, num_workers=options.workers, pin_memory=device == "cuda"
        )
        return fabric.setup_dataloaders(plain, use_distributed_sampler=False)

    with only_process(folder) if fabric.is_global_zero else nullcontext():
        if fabric.is_global_zero:
            run_folder.remove_temporaries(folder)
            if not resuming:
                write_split(folder / run_folder.SPLIT_NAME, collection, split, groups)
                if found_groups:
                    write_groups(folder / run_folder.GROUPS_NAME, groups)
            elif state is None or state.stage == 1:
                (folder / STATE_NAMES[2]).unlink(missing_ok=True)
            run_folder.write_environment(folder, device, engine.precision_of(options), fabric.world_size)
            run_folder.write_config(folder, options, recipe)  # last: where it is, the run can be resumed
        writer = RunWriter(
            folder,
            lambda weights: save_checkpoint(
                folder, network, collection.classes, preprocessing, weights, mask_format.classes
            ),
            active=fabric.is_global_zero,
            tensorboard=options.tensorboard,
            epochs_done=0 if state is None else len(state.rows),
        )
        session = Session(
            options=options,
            recipe=recipe,
            losses=TaskLosses(_losses(recipe), class_weights),
            fabric=fabric,
            network=network,
            loaders=Loaders(
                loader(train_set, train_batches),
                train_batches,
                loader(val_set, val_batches),
                engine.memory_format_of(options),
                KnownShares.of(parts["train"]),
                KnownShares.of(parts["val"]),
            ),
            console=console,
            writer=writer,
            rows=[],
            resumed=state,
        )
        try:
            with engine.determinism(options.deterministic):
                if state is None or state.stage == 1:
                    train_network(session)
                if options.stage2_epochs and not network.gate_parameters():
                    console.print("stage 2 is skipped: this interaction has no gates to train.")
                elif options.stage2_epochs:
                    train_gates(session)
        finally:  # also of a run that was interrupted or diverged
            writer.close(session.rows)
        writer.model(network.state_dict())
    console.print(f"run saved in {folder}")
    return folder


def _console(console: Console | None) -> Console:
    if not engine.is_first_process():
        return Console(quiet=True)
    return console or Console(highlight=False, soft_wrap=True)


def _is_finished(folder: Path, state: RunState, options: TrainOptions) -> bool:
    last_stage = 2 if options.stage2_epochs and "gated" in options.interaction else 1
    over = state.is_over(options.extend_epochs if state.stage == 1 else 0)
    # The metrics of an epoch are written after its state and its model.
    return state.stage == last_stage and over and run_folder.count_metrics(folder) == len(state.rows)


def check_options(options: TrainOptions) -> None:
    """Raise ``UserError`` for options that are unusable whatever the data."""
    smallest = {
        "epochs": 1,
        "stage2_epochs": 0,
        "image_size": 32,
        "batch_size": 2,
        "workers": 0,
        "patience": 1,
        "stage2_patience": 1,
        "accumulate": 1,
        "extend_epochs": 0,
    }
    for name, least in smallest.items():
        if getattr(options, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least {least}.")
    for name in ("lr", "stage2_lr"):
        if not getattr(options, name) > 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be positive.")
    if options.fold is not None and options.split is None:
        raise UserError(f"--fold {options.fold}: needs the folds to choose from; give them with --split FILE.")
    if options.ema is not None and not 0 < options.ema < 1:
        raise UserError(f"--ema {options.ema}: must lie between 0 and 1, e.g. 0.999.")
    if options.tensorboard:
        require_tensorboard()
    precision = engine.precision_of(options)
    _recipe(options)
    if options.tasks != "both" and options.weighting != "fixed":
        raise UserError(f"--weighting {options.weighting}: balances two tasks, not with --tasks {options.tasks}.")
    if options.weighting in AGGREGATORS:
        for what, found in (
            ("--precision 16-mixed", precision == "16-mixed"),
            ("--compile", options.compile),
            ("torchrun", torch.distributed.is_torchelastic_launched()),
        ):
            if found:
                raise UserError(f"--weighting {options.weighting}: takes two backward passes, not with {what}.")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device here; use --device cpu.")


def _recipe(options: TrainOptions) -> Recipe:
    try:
        return recipe_of(options)
    except TypeError as error:
        raise UserError(f"recipe: {error}; docs/presets.md lists the settings.") from error


def _class_weights(
    options: TrainOptions, classes: tuple[str, ...], samples: list[Sample], device: torch.device
) -> Tensor | None:
    weights = options.class_weights
    if weights == "balanced":
        labels = [sample.label for sample in samples if sample.label >= 0]
        missing = [name for index, name in enumerate(classes) if index not in labels]
        if missing:
            raise UserError(f"--class-weights balanced: no training image is of the class {missing[0]!r}.")
        weights = balanced_class_weights(labels, len(classes))
    if weights is None:
        return None
    if len(weights) != len(classes) or not min(weights) > 0:
        raise UserError(
            f"--class-weights {weights}: give a positive number for each of the {len(classes)} classes, in the order "
            f"{', '.join(classes)}."
        )
    return torch.tensor(weights, device=device)


def _losses(recipe: Recipe) -> LossOptions:
    return LossOptions(
        recipe.false_positive_weight,
        recipe.false_negative_weight,
        recipe.hard_boundary,
        recipe.empty_masks,
        recipe.loss_ceiling,
    )


def find_groups(options: TrainOptions, collection: Collection) -> tuple[dict[str, str], dict[str, str]]:
    """The groups that a split respects, and the near-duplicates where they were searched for: sample id → group."""
    if options.groups is not None:
        return read_groups(Path(options.groups)), {}
    if options.split is not None or options.manifest is not None:  # both say which images belong together
        return {}, {}
    found = near_duplicate_groups(collection.samples)
    return without_prescribed(collection.samples, found), found


def _split(options: TrainOptions, collection: Collection) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """The split, the groups it respects, and the near-duplicates where they were searched for."""
    groups, found = find_groups(options, collection)
    if options.split is not None:
        return read_split(Path(options.split), collection, options.fold), groups, found
    return split_collection(collection, groups, seed=options.seed), groups, found


def _network(options: TrainOptions, recipe: Recipe, num_classes: int, mask_classes: int, load_weights: bool) -> BTINet:
    choices = options.interaction.split(",")
    network = create_model(
        options.model,
        num_classes,
        weights=options.weights if load_weights and options.weights != "none" else None,
        in_chans=options.channels,
        decoder_channels=options.decoder_channels,
        interaction=choices[0] if len(choices) == 1 else choices,
        signals=options.signals,
        pool=options.pool,
        mask_classes=mask_classes,
        multi_scale=options.multi_scale,
        directions=options.directions,
        tasks=options.tasks,
    )
    for layer in network.modules():
        if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm):
            layer.momentum = recipe.norm_momentum
    _freeze(network, options)
    return network


def _freeze(network: BTINet, options: TrainOptions) -> None:
    stages, most = options.freeze_stages, number_of_stages(network.encoder)
    if stages is None:
        stages = 0 if options.weights == "none" else 1
    if not 0 <= stages <= most:
        raise UserError(f"--freeze-stages {stages}: {options.model} has {most} stages; give 0 to {most}.")
    frozen = network.encoder.early_parameters(stages) if stages else []
    if stages and not frozen:
        raise UserError(
            f"--freeze-stages {stages}: which parameters of {options.model} these are is not known; give 0 or "
            "another number."
        )
    for parameter in frozen:
        parameter.requires_grad_(False)


def _millions(network: BTINet) -> str:
    return f"{sum(p.numel() for p in network.parameters()) / 1e6:.1f}"


def _announce(console: Console, collection: Collection, parts: dict[str, list[Sample]], groups: dict[str, str]) -> None:
    console.print(f"{collection.name}: {len(collection.samples)} images in {collection.root}", highlight=False)
    for part, samples in parts.items():
        counts = Counter(s.label for s in samples)
        found = {name: counts[i] for i, name in enumerate(collection.classes)}
        rest = {"not labelled": counts[-1], "without a mask": sum(s.masks is None for s in samples)}
        listed = ", ".join(f"{name} {n}" for name, n in (found | {k: n for k, n in rest.items() if n}).items())
        console.print(f"  {part:<5} {len(samples):>5}  ({listed})")
    if groups:
        console.print(f"  {len(groups)} images lie in {len(set(groups.values()))} groups that no split divides")
