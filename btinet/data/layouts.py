"""The data layouts that can be read: BUSI, class folders, and a CSV table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from btinet.data.csv_layout import find_csv, read_csv
from btinet.data.folder_layout import find_busi, has_class_folders, read_busi, read_folders
from btinet.data.samples import Collection
from btinet.errors import UserError

DATASETS = ("auto", "busi", "folders", "csv")


def read_collection(path: Path, dataset: str = "auto", classes: Sequence[str] | None = None) -> Collection:
    """List the samples of a data set; no image is opened.

    * ``busi``: ``Dataset_BUSI_with_GT`` or the folder that holds it, classes benign, malignant, normal; masks
      are ``NAME_mask.png``, ``NAME_mask_1.png`` beside ``NAME.png``, united.
    * ``folders``: the same with one folder per class of any name. A class of which no image has a mask is one
      without lesions.
    * ``csv``: a table (or the folder that holds exactly one such ``*.csv``) with the columns image and label,
      and optionally mask (several separated by ``;``, empty: no lesion), group and split (train, val, test).
      Paths are relative to the table's folder or absolute; an empty label means: not labelled.
    * ``auto``: whichever of these is there.

    Args:
        path: the folder or CSV file.
        dataset: one of ``DATASETS``.
        classes: the order of classes to use (that of a trained model). Classes without samples are allowed,
            samples of another class are not.

    Raises:
        UserError: no such layout, or a defect in it (an image without its mask, a mask without its image, an
            unknown class, an empty folder, a faulty line).
    """
    path = Path(path)
    if dataset not in DATASETS:
        raise UserError(f"dataset: found {dataset!r}, expected one of {', '.join(DATASETS)}.")
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; give the folder or CSV file that holds the data.")
    if classes is not None:
        classes = tuple(classes)
        repeated = [name for name, count in Counter(classes).items() if count > 1]
        if repeated:
            raise UserError(f"classes: {repeated[0]!r} is listed more than once; list each class once.")
    if dataset == "auto":
        dataset = _recognise(path)
    reader = {"busi": read_busi, "folders": read_folders, "csv": read_csv}[dataset]
    return reader(path, classes)


def check_trainable(collection: Collection) -> None:
    """Check that a network can be trained on ``collection``.

    Raises:
        UserError: fewer than two classes with samples, a class without samples, or no sample with a lesion
            mask.
    """
    counts = Counter(sample.label for sample in collection.samples)
    present = [name for index, name in enumerate(collection.classes) if counts[index]]
    absent = [name for index, name in enumerate(collection.classes) if not counts[index]]
    if len(present) < 2:
        raise UserError(
            f"{collection.root}: found samples of {len(present)} class(es) ({', '.join(present) or 'none'}), "
            "expected at least two to train a classifier; add labelled images of another class."
        )
    if absent:
        raise UserError(
            f"{collection.root}: the class {absent[0]!r} has no sample; add images of it or leave it out of classes."
        )
    if not any(sample.masks for sample in collection.samples):
        raise UserError(
            f"{collection.root}: no sample has a lesion mask, expected some to train the segmentation; "
            "add masks (NAME_mask.png beside NAME.png, or the mask column of the CSV file)."
        )


def _recognise(path: Path) -> str:
    if not path.is_dir():
        return "csv"
    if find_busi(path) is not None:
        return "busi"
    table, folders = find_csv(path), has_class_folders(path)
    if table and folders:
        raise UserError(
            f"{path}: holds both {table[0].name} and class folders with masks; "
            "set dataset to csv or folders to say which of the two to read."
        )
    if table:
        return "csv"
    if folders:
        return "folders"
    raise UserError(
        f"{path}: no known layout found; expected Dataset_BUSI_with_GT, "
        "one folder per class with NAME.png and NAME_mask.png, "
        "or one CSV file with the columns image,mask,label."
    )
