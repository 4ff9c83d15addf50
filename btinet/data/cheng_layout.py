"""Brain tumours of Cheng et al. (figshare 1512427), converted from .mat files to pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from btinet.data.layout_options import LayoutOptions
from btinet.data.listing import images_by_stem, label_of, refuse_left_over, take_mask
from btinet.data.samples import Collection, Sample
from btinet.data.tables import read_table
from btinet.errors import UserError

CLASSES = ("meningioma", "glioma", "pituitary")  # order of the original numbers 1, 2, 3
BLOCK = 20
CHENG_TREE = "images/1.jpg, masks/1_mask.png, labels.csv with the columns id,label,tumor_type (label 1, 2, 3)"
_COLUMNS = ("id", "label", "tumor_type")


def find_cheng(path: Path) -> Path | None:
    """Return ``path`` if it holds the two folders and a table with these columns."""
    if not (path / "images").is_dir() or not (path / "masks").is_dir() or not (path / "labels.csv").is_file():
        return None
    try:
        read_table(path / "labels.csv", _COLUMNS)
    except UserError:
        return None
    return path


def read_cheng(root: Path, classes: Sequence[str] | None, options: LayoutOptions) -> Collection:
    """Read the converted slices; blocks of neighbouring numbers are the groups. See ``read_collection``.

    The pictures carry no patient numbers, but neighbouring slices are often of one patient: ``BLOCK``
    consecutive numbers of one class are a group. A patient may still lie in two neighbouring blocks.
    """
    known = CLASSES if classes is None else tuple(classes)
    table = root / "labels.csv"
    images, masks = images_by_stem(root / "images"), images_by_stem(root / "masks", "_mask")
    samples = []
    for line, row in read_table(table, _COLUMNS):
        where, number = f"{table}: line {line}", row["id"]
        if not (number.isascii() and number.isdigit()):
            raise UserError(f"{where} has the id {number!r}, expected the number of a slice.")
        if number not in images:
            raise UserError(f"{where} names the slice {number}, which is not in {root / 'images'} or listed twice.")
        if row["label"] not in ("1", "2", "3") or CLASSES[int(row["label"]) - 1] != row["tumor_type"]:
            raise UserError(
                f"{where} has the label {row['label']!r} and the tumor_type {row['tumor_type']!r}, "
                "expected 1 meningioma, 2 glioma or 3 pituitary."
            )
        image = images.pop(number)
        mask = take_mask(masks, number, image, root / "masks" / f"{number}_mask.png")
        group = f"{row['tumor_type']}-{(int(number) - 1) // BLOCK}"
        label = label_of(row["tumor_type"], known, where)
        samples.append(Sample(image.relative_to(root).as_posix(), image, mask, label, group))
    if images:
        raise UserError(f"{min(images.values())}: is not in {table}; remove the image or complete the table.")
    refuse_left_over(masks)
    return Collection("cheng", root, known, tuple(sorted(samples, key=lambda sample: sample.id)))
