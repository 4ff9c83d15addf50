"""Which images a command looks at that takes a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from btinet.data.layout_options import LayoutOptions
from btinet.data.samples import Collection, Sample
from btinet.data.source import DataSource
from btinet.data.splits import read_split
from btinet.errors import UserError


@dataclass(frozen=True)
class RunOptions:
    """A run, the images it is applied to, and how.

    Attributes:
        run: run folder, or its ``model.safetensors``.
        data: data set; default: the one the run was trained on. Give it when the data has moved, or, with
            split "all", to use other data with the same class names.
        dataset: layout of the data; default: the run's own, or "auto" when ``data`` is given.
        split: "train", "val" or "test" of the run's ``split.csv``, or "all" images without looking at the
            split.
        out: folder for the results; default: a folder named after command and split in the run folder.
        device: "auto", "cpu", "cuda" or "cuda:N".
        batch_size: images per forward pass.
        layout_options, manifest: with ``data``, see ``DataSource``; otherwise the run's own.

    Raises:
        UserError: ``batch_size`` below 1.
    """

    run: Path
    data: Path | None = None
    dataset: str | None = None
    split: Literal["train", "val", "test", "all"] = "test"
    out: Path | None = None
    device: str = "auto"
    batch_size: int = 8
    layout_options: LayoutOptions = field(default_factory=LayoutOptions)
    manifest: Path | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"batch size {self.batch_size}: expected at least 1.")

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.run if self.run.is_dir() else self.run.parent


@dataclass(frozen=True)
class RunData:
    """The images of a run.

    Attributes:
        path: the data set's folder or CSV file.
        classes: class names; a label is an index into them.
        samples: the chosen ones, at least one.
        mask_threshold: as in the training, see ``read_mask``.
    """

    path: Path
    classes: tuple[str, ...]
    samples: list[Sample]
    mask_threshold: int | None


def read_run_data(options: RunOptions, classes: Sequence[str]) -> RunData:
    """Find the data of a run and choose the images of ``options.split``.

    Args:
        options: which run, data and split.
        classes: of the run's network; the data set must have the same.

    Raises:
        UserError: the data or the split cannot be read or do not belong to the run, or the split is empty.
    """
    config = _read_config(options.folder / "config.yaml")
    source = _data_source(options, config)
    collection = source.read(classes)
    samples = _chosen_samples(options, collection)
    return RunData(source.path, collection.classes, samples, config.get("mask_threshold"))


def _data_source(options: RunOptions, config: dict[str, Any]) -> DataSource:
    if options.data is not None:
        return DataSource(options.data, options.dataset or "auto", options.layout_options, options.manifest)
    if options.manifest is not None or options.layout_options != LayoutOptions():
        raise UserError("--manifest, --curated, --labels, --lesion-groups: belong to --data; give it too.")
    if not config.get("data"):
        raise UserError(f"{options.folder / 'config.yaml'}: names no data; say with --data where the data set lies.")
    data = Path(config["data"])
    if not data.exists():
        raise UserError(f"{data}: the data of this run is no longer there; say with --data where it lies now.")
    source = DataSource.from_options(config)
    return replace(source, dataset=options.dataset or source.dataset)


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: is not a readable YAML file; restore the one the training wrote.") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected options as 'name: value' lines; restore the one the training wrote.")
    return config


def _chosen_samples(options: RunOptions, collection: Collection) -> list[Sample]:
    if options.split == "all":
        chosen = list(collection.samples)
    else:
        assigned = read_split(options.folder / "split.csv", collection)
        chosen = [sample for sample in collection.samples if assigned.get(sample.id) == options.split]
    if not chosen:
        raise UserError(
            f"{options.folder / 'split.csv'}: split {options.split!r} holds no image of {collection.root}; "
            "choose another."
        )
    return chosen
