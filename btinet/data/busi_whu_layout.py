"""BUSI-WHU: as on Mendeley (no classes), and as released again on Hugging Face (class in the file name)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from btinet.data.layout_options import LayoutOptions
from btinet.data.listing import images_by_stem, label_of, refuse_left_over, take_mask
from btinet.data.samples import Collection, Sample
from btinet.data.tables import read_table
from btinet.errors import UserError

CLASSES = ("benign", "malignant")
BUSI_WHU_TREE = (
    "{train,val,test}/img/00001.bmp with {train,val,test}/gt/00001_anno.bmp (or mask/), or "
    "{train,validation,test}/images/benign_0001.png with {train,validation,test}/masks/ and "
    "{train,validation,test}/metadata.csv"
)
_NAMED = re.compile(rf"^(?P<label>{'|'.join(CLASSES)})_\d+$")
_MASK_FOLDERS = ("gt", "mask")


def find_busi_whu(path: Path) -> Path | None:
    """Return ``path`` if it is one of the two releases."""
    if (path / "train" / "metadata.csv").is_file() and (path / "train" / "images").is_dir():
        return path
    if (path / "train" / "img").is_dir() and any((path / "train" / name).is_dir() for name in _MASK_FOLDERS):
        return path
    return None


def read_busi_whu(root: Path, classes: Sequence[str] | None, options: LayoutOptions) -> Collection:
    """Read either release; the published parts are kept. See ``read_collection``."""
    known = CLASSES if classes is None else tuple(classes)
    if (root / "train" / "metadata.csv").is_file():
        if options.labels is not None:
            raise UserError(f"--labels {options.labels}: not needed, the file names in {root} hold the classes.")
        samples = [sample for part in ("train", "validation", "test") for sample in _named_part(root, part, known)]
    else:
        samples = [sample for part in ("train", "val", "test") for sample in _bare_part(root, part)]
        if options.labels is not None:
            samples = _labelled(samples, options.labels, known)
    return Collection("busi_whu", root, known, tuple(sorted(samples, key=lambda sample: sample.id)))


def _bare_part(root: Path, part: str) -> list[Sample]:
    """Read a part of the Mendeley release. Guessing classes from the leading digit contradicts its paper."""
    folder = next((root / part / name for name in _MASK_FOLDERS if (root / part / name).is_dir()), None)
    if folder is None:
        raise UserError(f"{root / part}: holds no folder gt (or mask); expected {BUSI_WHU_TREE}.")
    masks = {stem.removesuffix("_anno"): path for stem, path in images_by_stem(folder).items()}
    samples = []
    for stem, image in images_by_stem(root / part / "img").items():
        mask = take_mask(masks, stem, image, folder / f"{stem}_anno.bmp")
        samples.append(Sample(image.relative_to(root).as_posix(), image, mask, -1, None, part))
    refuse_left_over(masks)
    return samples


def _named_part(root: Path, part: str, known: tuple[str, ...]) -> list[Sample]:
    table = root / part / "metadata.csv"
    images = images_by_stem(root / part / "images")
    samples = []
    for line, row in read_table(table, ("image_file_name", "mask_file_name")):
        where = f"{table}: line {line}"
        paths = []
        for column, folder in (("image_file_name", "images"), ("mask_file_name", "masks")):
            path = root / part / folder / Path(row[column]).name
            if not row[column] or not path.is_file():
                raise UserError(f"{where} names {row[column]!r} in {column}, which is no file in {path.parent}.")
            paths.append(path)
        image, mask = paths
        match = _NAMED.match(image.stem)
        if match is None:
            raise UserError(f"{where}: expected a name such as benign_0001.png, found {image.name!r}.")
        if images.pop(image.stem, None) is None:
            raise UserError(f"{where} lists the image {image.name!r} a second time; one line each.")
        label = label_of(match["label"], known, where)
        split = "val" if part == "validation" else part
        samples.append(Sample(image.relative_to(root).as_posix(), image, (mask,), label, None, split))
    if images:
        raise UserError(f"{min(images.values())}: is not in {table}; remove the image or complete the table.")
    return samples


def _labelled(samples: list[Sample], table: Path, known: tuple[str, ...]) -> list[Sample]:
    """Give the samples the labels of a table whose column file holds file names, or paths from the root."""
    ids: dict[str, list[str]] = {}
    for sample in samples:
        for name in {sample.id, sample.image.name}:
            ids.setdefault(name, []).append(sample.id)
    labels: dict[str, int] = {}
    for line, row in read_table(table, ("file", "label")):
        where = f"{table}: line {line}"
        matching = ids.get(row["file"], [])
        if len(matching) != 1:
            what = "is not an image of the data" if not matching else f"is in {' and '.join(matching)}; give its path"
            raise UserError(f"{where} names {row['file']!r}, which {what}.")
        if matching[0] in labels:
            raise UserError(f"{where} lists {row['file']!r} a second time; one line each.")
        labels[matching[0]] = label_of(row["label"], known, where) if row["label"] else -1
    return [Sample(s.id, s.image, s.masks, labels.get(s.id, -1), s.group, s.split) for s in samples]
