"""What a run leaves behind: config.yaml, split.csv, metrics.jsonl, curves.png, environment.json, and the checkpoint."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml

from btinet import allocator
from btinet.errors import UserError
from btinet.files import atomic_path, write_text
from btinet.training.curves import curves_figure
from btinet.training.options import Recipe, TrainOptions

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
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"--out {folder}: is not empty; choose a new folder or empty this one.")


def write_config(folder: Path, options: TrainOptions, recipe: Recipe) -> None:
    """Write the options, with absolute paths of the data and the whole recipe, as YAML that ``--config`` reads back."""
    content = asdict(options) | {"recipe": asdict(recipe)}
    for name in _DATA_PATHS:
        if content[name] is not None:
            content[name] = str(Path(content[name]).resolve())
    write_text(folder / CONFIG_NAME, yaml.safe_dump(content, sort_keys=False))


def write_environment(folder: Path, device: str, precision: str) -> None:
    """Write versions, machine and thread count: what a reader needs to judge or repeat the numbers."""
    content = {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "precision": precision,
        "threads": torch.get_num_threads(),
        "allocator": allocator.description(),
    }
    write_text(folder / ENVIRONMENT_NAME, json.dumps(content, indent=2) + "\n")


def write_metrics(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write one JSON object per epoch."""
    write_text(folder / METRICS_NAME, "".join(json.dumps(row) + "\n" for row in rows))


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
