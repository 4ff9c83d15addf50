"""``btinet ablate``: variants of the network, trained over seeds and folds and compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from rich.console import Console

from btinet.data import (
    Collection,
    DataSource,
    check_trainable,
    fold_collection,
    number_of_folds,
    read_split,
    split_collection,
    write_folds,
    write_split,
)
from btinet.errors import UserError
from btinet.experiments.process import train_in_own_process
from btinet.experiments.report import NAMES, markdown, write_report
from btinet.experiments.results import Run, RunScores, read_groups_of_split, read_run, summarise
from btinet.experiments.variants import FULL, Variant, choose_variants
from btinet.files import remove_leftovers, write_text
from btinet.models import create_model
from btinet.training import run_folder
from btinet.training.options import CHOSEN_BY_ABLATE, TrainOptions
from btinet.training.resume import STATE_NAMES, only_process
from btinet.training.train import check_options, find_groups

SETTINGS_NAME = "ablation.yaml"
SPLIT_NAME = "split.csv"
FIRST_SEED = 42


@dataclass(frozen=True)
class AblateOptions:
    """What to compare.

    Attributes:
        out: folder, new or of the same ablation, which is then continued.
        train: options of all runs; those in ``CHOSEN_BY_ABLATE`` are set for each run. Its ``split`` may hold folds.
        variants: names from ``all_variants``, separated by commas; default: those of ``table``.
        table: ``"paper"``, the default, or ``"all"``.
        seeds: how many, from 42 on, or a list such as ``"0,1,2"``; every variant is trained with each.
        folds: cross-validation with so many folds; default: one split.
        reference: the variant that the others are compared with; default: ``"gated"`` if it is among them, else the
            first.
    """

    out: Path
    train: TrainOptions
    variants: str | None = None
    table: Literal["paper", "all"] | None = None
    seeds: int | str = 1
    folds: int | None = None
    reference: str | None = None


def ablate(options: AblateOptions, console: Console | None = None) -> dict[str, str]:
    """Train every variant with every seed on every fold, evaluate on the test parts, and write tables and a figure.

    All runs share one split or one set of folds. Each runs in a process of its own, one after the other. Finished runs
    are recognised, an interrupted one is continued; a failed one is reported, tried again next time, and the others go
    on. After each run the tables are written anew, of the runs that are finished.

    Returns:
        Run → why it failed; empty when all are finished.

    Raises:
        UserError: options, data or folder that cannot be used; nothing was trained then.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    if torch.distributed.is_torchelastic_launched():
        raise UserError("btinet ablate starts a process for each run itself; start it without torchrun.")
    base = run_folder.with_absolute_paths(options.train)
    check_options(base)
    seeds = _seeds(options.seeds)
    if options.folds is not None and base.split is not None:
        raise UserError(f"--folds {options.folds}: --split {base.split} says already how to divide; leave one out.")
    collection = DataSource.from_options(asdict(base)).read()
    check_trainable(collection)
    variants = choose_variants(options.variants, options.table, _levels(base, len(collection.classes)))
    reference = options.reference or (FULL if FULL in variants else next(iter(variants)))
    if reference not in variants:
        raise UserError(f"--reference {reference!r}: is not among the variants {', '.join(variants)}.")

    settings = _settings(base, options.folds)
    _claim(options.out, settings)
    with only_process(options.out):
        for name in (SETTINGS_NAME, SPLIT_NAME, *NAMES):
            remove_leftovers(options.out / name)
        split = options.out / SPLIT_NAME
        if not split.exists():
            _write_split(split, base, collection, options.folds, seeds[0])
        write_text(options.out / SETTINGS_NAME, yaml.safe_dump(settings, sort_keys=False))  # last: the rest was usable
        runs = [
            Run(variant, seed, fold) for seed in seeds for fold in _folds(split, collection) for variant in variants
        ]
        return _Ablation(options.out, base, variants, reference, console).carry_out(runs)


class _Ablation:
    """The runs of an ablation and the tables about them."""

    def __init__(
        self, out: Path, base: TrainOptions, variants: dict[str, Variant], reference: str, console: Console
    ) -> None:
        self.out, self.base, self.variants, self.reference, self.console = out, base, variants, reference, console
        self.groups = read_groups_of_split(out / SPLIT_NAME)
        self.results: list[RunScores] = []
        self.failures: dict[str, str] = {}

    def carry_out(self, runs: Sequence[Run]) -> dict[str, str]:
        """Do what is left to do of the runs; returns why runs failed."""
        done = [run for run in runs if run.is_finished(self.out)]
        for run in done:
            self._take_in(run)
        self.console.print(f"{len(runs)} runs, {len(done)} of them finished")
        for number, run in enumerate(runs, start=1):
            if run in done:
                continue
            folder = run.folder(self.out)
            name = folder.relative_to(self.out).as_posix()
            self.console.print(f"\n[bold]run {number} of {len(runs)}: {name}[/bold]")
            reason = train_in_own_process(self._options(run))
            if reason is None:
                self._take_in(run)
            else:
                self.failures[name] = reason
                self.console.print(f"{name} failed: {reason}", markup=False)
            self._report(runs)
        if len(done) == len(runs):
            self._report(runs)
        return self.failures

    def _take_in(self, run: Run) -> None:
        self.results.append(read_run(run, self.out))
        for name in STATE_NAMES.values():  # many times the size of the model, and nobody will resume the run
            (run.folder(self.out) / name).unlink(missing_ok=True)

    def _options(self, run: Run) -> TrainOptions:
        variant = self.variants[run.variant]
        return replace(
            self.base,
            **asdict(variant),
            weighting=self.base.weighting if variant.tasks == "both" else "fixed",
            out=str(run.folder(self.out)),
            seed=run.seed,
            split=str(self.out / SPLIT_NAME),
            fold=run.fold,
            groups=None,  # they are in the split
        )

    def _report(self, runs: Sequence[Run]) -> None:
        if not self.results:
            return
        results = sorted(self.results, key=lambda result: runs.index(result.run))
        summary = summarise(results, self.variants, self.reference, self.groups)
        write_report(self.out, results, summary, self.reference, self.failures)
        if len(self.results) + len(self.failures) == len(runs):
            self.console.print("\n" + markdown(summary, self.reference, self.failures), markup=False)
            self.console.print(f"written to {self.out}", markup=False)


def _seeds(given: int | str) -> list[int]:
    if isinstance(given, int):
        if given < 1:
            raise UserError(f"--seeds {given}: must be at least 1, or a list such as 0,1,2.")
        return list(range(FIRST_SEED, FIRST_SEED + given))
    try:
        seeds = [int(seed) for seed in given.split(",") if seed.strip()]
    except ValueError:
        seeds = []
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {given}: expected a number of seeds, or different ones of 0 and more such as 0,1,2.")
    return seeds


def _levels(base: TrainOptions, classes: int) -> int:
    """The decoder levels of the network; building it shows also whether model and weights can be had."""
    network = create_model(
        base.model,
        classes,
        weights=None if base.weights == "none" else base.weights,
        in_chans=base.channels,
        decoder_channels=base.decoder_channels,
    )
    return len(network.levels)


def _settings(base: TrainOptions, folds: int | None) -> dict[str, Any]:
    """What all runs of an ablation have in common."""
    return {"folds": folds} | {name: value for name, value in asdict(base).items() if name not in CHOSEN_BY_ABLATE}


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Make sure that ``out`` is new or holds the same ablation, perhaps with other variants and seeds."""
    file = out / SETTINGS_NAME
    if not file.is_file():
        run_folder.claim(out)
        return
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
        different = [name for name in settings if found.get(name) != settings[name]]
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"{file}: not the settings of an ablation; choose another folder ({error}).") from error
    if different:
        name = different[0]
        raise UserError(
            f"--out {out}: holds an ablation with other options than these ({name.replace('_', '-')} was "
            f"{found.get(name)!r}, is {settings[name]!r}); choose a new folder, or the options in its {SETTINGS_NAME}."
        )


def _write_split(file: Path, base: TrainOptions, collection: Collection, folds: int | None, seed: int) -> None:
    if base.split is not None:
        count = number_of_folds(Path(base.split))
        read_split(Path(base.split), collection, None if count is None else 0)
        write_text(file, Path(base.split).read_text(encoding="utf-8-sig"))
        return
    groups, _ = find_groups(base, collection)
    if folds is None:
        write_split(file, collection, split_collection(collection, groups, seed=seed), groups)
    else:
        write_folds(file, collection, fold_collection(collection, groups, folds, seed=seed), groups)


def _folds(split: Path, collection: Collection) -> Sequence[int | None]:
    count = number_of_folds(split)
    if count is None:
        read_split(split, collection)  # whether it still fits the data
        return [None]
    read_split(split, collection, 0)
    return range(count)
