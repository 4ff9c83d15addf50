"""ISIC 2017: lesion masks (part 1) and classes (part 3)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from btinet.data.layout_options import LayoutOptions
from btinet.data.listing import images_by_stem, label_of, one_hot, refuse_left_over, take_mask
from btinet.data.samples import Collection, Sample
from btinet.data.tables import read_table
from btinet.errors import UserError

CLASSES = ("melanoma", "nevus", "seborrheic_keratosis")
_PARTS = {"Training": None, "Validation": "val", "Test_v2": "test"}
ISIC2017_TREE = (
    "ISIC-2017_Training_Data/ISIC_0000000.jpg, "
    "ISIC-2017_Training_Part1_GroundTruth/ISIC_0000000_segmentation.png, ISIC-2017_Training_Part3_GroundTruth.csv, "
    "and, if there, the same with Validation and Test_v2"
)


def find_isic2017(path: Path) -> Path | None:
    """Return ``path`` if it holds the training images of ISIC 2017."""
    return path if (path / "ISIC-2017_Training_Data").is_dir() else None


def read_isic2017(root: Path, classes: Sequence[str] | None, options: LayoutOptions) -> Collection:
    """Read ISIC 2017; its validation and test parts are kept. See ``read_collection``."""
    known = CLASSES if classes is None else tuple(classes)
    samples = []
    for part, split in _PARTS.items():
        if (root / f"ISIC-2017_{part}_Data").is_dir():
            samples += _part(root, f"ISIC-2017_{part}", split, known)
    return Collection("isic2017", root, known, tuple(sorted(samples, key=lambda sample: sample.id)))


def _part(root: Path, part: str, split: str | None, known: tuple[str, ...]) -> list[Sample]:
    folder, table = root / f"{part}_Part1_GroundTruth", root / f"{part}_Part3_GroundTruth.csv"
    images = {
        stem: path for stem, path in images_by_stem(root / f"{part}_Data").items() if not stem.endswith("_superpixels")
    }
    masks = images_by_stem(folder, "_segmentation")
    samples = []
    for line, row in read_table(table, ("image_id", "melanoma", "seborrheic_keratosis")):
        where, stem = f"{table}: line {line}", row["image_id"]
        if stem not in images:
            raise UserError(
                f"{where} names the image {stem!r}, which is not in {root / f'{part}_Data'} or listed twice."
            )
        name = one_hot(row, ("melanoma", "seborrheic_keratosis"), where) or "nevus"
        image = images.pop(stem)
        mask = take_mask(masks, stem, image, folder / f"{stem}_segmentation.png")
        identifier = image.relative_to(root).as_posix()
        samples.append(Sample(identifier, image, mask, label_of(name, known, where), None, split))
    if images:
        raise UserError(f"{min(images.values())}: is not in {table}; remove the image or complete the table.")
    refuse_left_over(masks)
    return samples
