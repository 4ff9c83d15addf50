"""One folder per class, masks beside their images: BUSI and everything arranged like it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from btinet.data.layout_options import LayoutOptions
from btinet.data.listing import IMAGE_SUFFIXES, label_of
from btinet.data.samples import Collection, Sample
from btinet.data.tables import read_table
from btinet.errors import UserError

BUSI_FOLDER = "Dataset_BUSI_with_GT"
BUSI_CLASSES = ("benign", "malignant", "normal")
BUSI_WITHOUT_LESION = "normal"
FOLDERS_TREE = "one folder per class with NAME.png and NAME_mask.png"
_MASK_NAME = re.compile(r"^(?P<id>.+?)_mask(_\d+)?\.png$", re.IGNORECASE)
BUSI_TREE = (
    f"{BUSI_FOLDER}/{{{','.join(BUSI_CLASSES)}}}/ with 'benign (1).png', 'benign (1)_mask.png', "
    "'benign (4)_mask_1.png' and so on"
)


def find_busi(path: Path) -> Path | None:
    """Return the folder of the BUSI classes: ``path`` or its Dataset_BUSI_with_GT; None if neither is one."""
    for root in (path, path / BUSI_FOLDER):
        if root.name == BUSI_FOLDER and root.is_dir():
            return root
        if all((root / name).is_dir() for name in BUSI_CLASSES):
            return root
    return None


def has_class_folders(path: Path) -> bool:
    """Say whether a folder in ``path`` holds an image with its mask beside it."""
    for folder in _folders(path):
        images, masks = _listing(folder)
        if set(images) & set(masks):
            return True
    return False


def read_busi(root: Path, classes: Sequence[str] | None, options: LayoutOptions) -> Collection:
    """Read BUSI; see ``read_collection``."""
    for name in BUSI_CLASSES:
        if not (root / name).is_dir():
            raise UserError(f"{root}: the class folder {name} is missing; expected {BUSI_TREE}.")
    found = [folder.name for folder in _folders(root) if folder.name in BUSI_CLASSES or any(_listing(folder))]
    _check_known(root, found, BUSI_CLASSES)
    collection = _collect("busi", root, classes if classes is not None else BUSI_CLASSES, found)
    return collection if options.curated is None else _curated(collection, options.curated)


def read_folders(path: Path, classes: Sequence[str] | None, options: LayoutOptions) -> Collection:
    """Read one folder per class; see ``read_collection``."""
    found = [folder.name for folder in _folders(path)]
    if not found:
        raise UserError(
            f"{path}: expected one folder per class with NAME.png and NAME_mask.png in it, found no folder."
        )
    return _collect("folders", path, classes if classes is not None else found, found)


def _curated(collection: Collection, table: Path) -> Collection:
    """Keep the images of a list ``class;id``, the id of ``benign (7).png`` being 7."""
    numbered = {(s.image.parent.name, s.image.stem.removeprefix(s.image.parent.name)): s for s in collection.samples}
    kept: dict[str, Sample] = {}
    for line, row in read_table(table, ("class", "id"), delimiter=";"):
        where = f"{table}: line {line}"
        label_of(row["class"], BUSI_CLASSES, where)
        sample = numbered.get((row["class"], f" ({row['id']})"))
        if sample is None:
            raise UserError(f"{where} names {row['class']} ({row['id']}), which is not in {collection.root}.")
        if sample.id in kept:
            raise UserError(f"{where} lists {row['class']} ({row['id']}) a second time; one line each.")
        kept[sample.id] = sample
    if not kept:
        raise UserError(f"{table}: lists no image below its first line; expected one line class;id per image to keep.")
    return replace(collection, samples=tuple(sample for sample in collection.samples if sample.id in kept))


def _collect(layout: str, root: Path, classes: Sequence[str], found: Sequence[str]) -> Collection:
    _check_known(root, found, classes)
    samples = [
        Sample(image.relative_to(root).as_posix(), image, masks, classes.index(name))
        for name in found
        for image, masks in _paired(root / name, layout)
    ]
    return Collection(layout, root, tuple(classes), tuple(sorted(samples, key=lambda sample: sample.id)))


def _check_known(root: Path, found: Sequence[str], classes: Sequence[str]) -> None:
    for name in found:
        if name not in classes:
            raise UserError(
                f"{root / name}: the folder is none of the classes {', '.join(classes)}; rename or move it away."
            )


def _paired(folder: Path, layout: str) -> list[tuple[Path, tuple[Path, ...]]]:
    """Return the images of one class with their masks."""
    images, masks = _listing(folder)
    if not images:
        raise UserError(f"{folder}: holds no images ({', '.join(IMAGE_SUFFIXES)}); add images or remove the folder.")
    for stem, files in masks.items():
        if stem not in images:
            raise UserError(f"{files[0]}: the mask has no image; expected {stem}.png beside it.")
    for files in images.values():
        if len(files) > 1:
            raise UserError(
                f"{files[1]}: there is also {files[0].name}, and a mask could belong to either; rename one."
            )
    # In BUSI the class says whether a mask is due; elsewhere the other images of the class do.
    lesions = folder.name != BUSI_WITHOUT_LESION if layout == "busi" else bool(masks)
    bare = [files[0] for stem, files in images.items() if stem not in masks]
    if lesions and bare:
        raise UserError(
            f"{bare[0]}: has no mask; expected "
            f"{bare[0].stem}_mask.png beside it (an all-black one if it has no lesion)."
        )
    return [(files[0], tuple(masks.get(stem, ()))) for stem, files in images.items()]


def _folders(path: Path) -> list[Path]:
    if not path.is_dir():
        raise UserError(f"{path}: is not a folder; this layout is a folder that holds one folder per class.")
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith((".", "__")))


def _listing(folder: Path) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    """Return the images and the masks in ``folder``: name of the image without suffix → files, sorted."""
    images: dict[str, list[Path]] = {}
    masks: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.is_file():
            continue
        match = _MASK_NAME.match(path.name)
        if match:
            masks.setdefault(match["id"], []).append(path)
        elif path.suffix.lower() in IMAGE_SUFFIXES:
            images.setdefault(path.stem, []).append(path)
    return images, masks
