"""Files of a layout's folders, and the classes they are said to belong to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from btinet.errors import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")


def images_by_stem(folder: Path, ending: str = "") -> dict[str, Path]:
    """Return the images in ``folder`` whose stem ends with ``ending``: stem without it → file, sorted.

    Hidden files are left out.

    Raises:
        UserError: not a folder; two images that differ in their suffix only.
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder, but the layout has it; complete the data, docs/data.md shows the tree."
        )
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.suffix.lower() not in IMAGE_SUFFIXES or not path.is_file():
            continue
        if not path.stem.endswith(ending):
            continue
        stem = path.stem.removesuffix(ending)
        if stem in found:
            raise UserError(f"{path}: there is also {found[stem].name}; keep one of the two.")
        found[stem] = path
    return found


def take_mask(masks: dict[str, Path], stem: str, image: Path, expected: Path) -> tuple[Path, ...]:
    """Take the mask of ``image`` out of ``masks``; raises ``UserError`` when there is none."""
    if stem not in masks:
        raise UserError(f"{image}: has no mask; expected {expected} (an all-black one if it has no lesion).")
    return (masks.pop(stem),)


def refuse_left_over(masks: dict[str, Path]) -> None:
    """Refuse masks that belong to no image."""
    if masks:
        raise UserError(f"{min(masks.values())}: the mask has no image; remove it or restore the image.")


def label_of(name: str, classes: Sequence[str], where: str) -> int:
    """Return the index of the class ``name``; ``where`` (file, line) begins the sentence if it is unknown."""
    if name not in classes:
        raise UserError(f"{where}: the class {name!r} is none of {', '.join(classes)}; correct it or leave it out.")
    return list(classes).index(name)


def one_hot(cells: dict[str, str], columns: Sequence[str], where: str) -> str:
    """Return the column that holds 1 while the others hold 0, "" if all are 0; anything else is refused."""
    values = {}
    for column in columns:
        if cells[column] not in ("0", "1", "0.0", "1.0"):
            raise UserError(f"{where} has {cells[column]!r} in the column {column}, expected 0 or 1.")
        values[column] = cells[column].startswith("1")
    named = [column for column in columns if values[column]]
    if len(named) > 1:
        raise UserError(f"{where} says {' and '.join(named)}; an image has one class, correct the table.")
    return named[0] if named else ""
