"""The CSV layout: one row per image."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from btinet.data.layout_options import LayoutOptions
from btinet.data.samples import Collection, Sample
from btinet.data.splits import SPLITS
from btinet.data.tables import read_table
from btinet.errors import UserError

CSV_TREE = "one CSV file with the columns image,mask,label and, if wanted, group,split"
UNKNOWN = "?"  # in the column mask: nobody drew one
_REQUIRED = ("image", "label")


def find_csv(folder: Path) -> list[Path]:
    """Return the ``*.csv`` files directly in ``folder`` whose header names the columns image and label."""
    found = []
    for path in sorted(folder.glob("*.csv")):
        try:
            read_table(path, _REQUIRED)
        except UserError:
            continue
        found.append(path)
    return found


def read_csv(path: Path, classes: Sequence[str] | None, options: LayoutOptions) -> Collection:
    """Read a CSV file, or the only suitable one in a folder; see ``read_collection``."""
    table = _only_csv(path) if path.is_dir() else path
    rows = read_table(table, _REQUIRED)
    if not rows:
        raise UserError(f"{table}: holds no images below its first line; add one line per image.")
    names = tuple(classes) if classes is not None else tuple(sorted({r["label"] for _, r in rows if r["label"]}))
    samples: dict[str, Sample] = {}
    for line, row in rows:
        sample = _sample(table, line, row, names)
        if sample.id in samples:
            raise UserError(f"{table}: line {line} lists the image {row['image']!r} a second time; one line each.")
        samples[sample.id] = sample
    return Collection("csv", table.parent, names, tuple(samples[key] for key in sorted(samples)))


def _only_csv(folder: Path) -> Path:
    found = find_csv(folder)
    if len(found) != 1:
        what = ", ".join(path.name for path in found) or "none"
        raise UserError(
            f"{folder}: expected exactly one CSV file with the columns image and label, found {what}; "
            "give the path of the CSV file itself."
        )
    return found[0]


def _sample(table: Path, line: int, row: dict[str, str], classes: tuple[str, ...]) -> Sample:
    image = _existing(table, line, "image", row["image"])
    named = [name.strip() for name in row.get("mask", UNKNOWN).split(";") if name.strip()]
    masks = None if named == [UNKNOWN] else tuple(_existing(table, line, "mask", name) for name in named)
    label, split = row["label"], row.get("split", "")
    if label and label not in classes:
        raise UserError(
            f"{table}: line {line} has the label {label!r}, expected one of {', '.join(classes)}; correct the label."
        )
    if split and split not in SPLITS:
        raise UserError(f"{table}: line {line} has the split {split!r}, expected {', '.join(SPLITS)} or an empty cell.")
    return Sample(
        id=Path(os.path.relpath(image, table.parent)).as_posix(),
        image=image,
        masks=masks,
        label=classes.index(label) if label else -1,
        group=row.get("group") or None,
        split=split or None,
    )


def _existing(table: Path, line: int, column: str, name: str) -> Path:
    if not name:
        raise UserError(f"{table}: line {line} names no {column}; give its path, relative to {table.parent}.")
    path = Path(os.path.normpath(table.parent / name))
    if not path.is_file():
        raise UserError(
            f"{table}: line {line} names the {column} {name!r}, which is no file; paths are relative to {table.parent}."
        )
    return path
