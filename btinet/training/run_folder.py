"""What a run leaves behind besides its checkpoint and states: options, split, metrics, curves, environment."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml

from btinet import allocator
from btinet.errors import UserError
from btinet.files import atomic_path, remove_leftovers, write_text
from btinet.models.checkpoint import CONFIG_NAME as MODEL_CONFIG_NAME
from btinet.models.checkpoint import WEIGHTS_NAME
from btinet.training.curves import curves_figure
from btinet.training.options import Recipe, TrainOptions
from btinet.training.resume import STATE_NAMES

CONFIG_NAME = "config.yaml"
SPLIT_NAME = "split.csv"
GROUPS_NAME = "groups.csv"
METRICS_NAME = "metrics.jsonl"
CURVES_NAME = "curves.png"
ENVIRONMENT_NAME = "environment.json"

_DATA_PATHS = ("data", "manifest", "curated", "labels", "lesion_groups")
_PACKAGES = ("btinet-kernels", "torch", "torchvision", "timm", "lightning", "numpy", "scikit-learn", "pillow")


def claim(folder: Path) -> None:
    """Make sure ``folder`` is new or empty; raises ``UserError`` otherwise, so that no run overwrites another."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder}: is a file; give a folder.")
    if (folder / CONFIG_NAME).is_file():
        raise UserError(f"--out {folder}: is not empty but holds a run; choose a new folder, or --resume this one.")
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"--out {folder}: is not empty; choose a new folder or empty this one.")


def read_options(folder: Path) -> TrainOptions:
    """Read the options of a run, which may have been moved; raises ``UserError`` when they cannot be read."""
    file = folder / CONFIG_NAME
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        return TrainOptions(**{**content, "out": str(folder)})
    except FileNotFoundError as error:
        raise UserError(f"--resume {folder}: holds no {CONFIG_NAME}; give the folder of a run.") from error
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{file}: not the options of a training by this version of btinet ({reason}).") from error


def remove_temporaries(folder: Path) -> None:
    """Remove the temporary files of a run that was killed; nobody may be training in the folder."""
    ours = (CONFIG_NAME, SPLIT_NAME, GROUPS_NAME, METRICS_NAME, CURVES_NAME, ENVIRONMENT_NAME)
    for name in (*ours, WEIGHTS_NAME, MODEL_CONFIG_NAME, *STATE_NAMES.values()):
        remove_leftovers(folder / name)


def with_absolute_paths(options: TrainOptions) -> TrainOptions:
    """The same options with absolute paths of the data."""
    given = {name: getattr(options, name) for name in _DATA_PATHS}
    absolute: dict[str, Any] = {name: path and str(Path(path).resolve()) for name, path in given.items()}
    return replace(options, **absolute)


def write_config(folder: Path, options: TrainOptions, recipe: Recipe) -> None:
    """Write the options, with absolute paths of the data and the whole recipe, as YAML that ``--config`` reads back."""
    content = asdict(with_absolute_paths(options)) | {"recipe": asdict(recipe)}
    write_text(folder / CONFIG_NAME, yaml.safe_dump(content, sort_keys=False))


def write_environment(folder: Path, device: str, precision: str, processes: int) -> None:
    """Write versions, machine, threads and processes: what a reader needs to judge or repeat the numbers.

    Of a run that is resumed they are added to the list "resumed" of the first.
    """
    file = folder / ENVIRONMENT_NAME
    content: dict[str, Any] = {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "precision": precision,
        "processes": processes,
        "threads": torch.get_num_threads(),
        "allocator": allocator.description(),
    }
    if file.is_file():
        first = json.loads(file.read_text(encoding="utf-8"))
        content = first | {"resumed": [*first.get("resumed", []), content]}
    write_text(file, json.dumps(content, indent=2) + "\n")


def write_metrics(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write one JSON object per epoch."""
    write_text(folder / METRICS_NAME, "".join(json.dumps(row) + "\n" for row in rows))


def count_metrics(folder: Path) -> int:
    """The epochs in the metrics of a run; 0 when there are none."""
    file = folder / METRICS_NAME
    return len(file.read_text(encoding="utf-8").splitlines()) if file.is_file() else 0


def draw_curves(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draw losses and validation scores over the epochs of both stages."""
    figure = curves_figure(rows)
    with atomic_path(folder / CURVES_NAME) as temporary:
        figure.savefig(temporary, dpi=130)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.lower().startswith("model name")]
    return f"{names[0]} × {len(names)}" if names else platform.processor()
