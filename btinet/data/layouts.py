"""The data layouts that can be read, and what they need."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from btinet.data.brisc_layout import BRISC_TREE, find_brisc, read_brisc
from btinet.data.busi_whu_layout import BUSI_WHU_TREE, find_busi_whu, read_busi_whu
from btinet.data.cheng_layout import CHENG_TREE, find_cheng, read_cheng
from btinet.data.csv_layout import CSV_TREE, find_csv, read_csv
from btinet.data.folder_layout import BUSI_TREE, FOLDERS_TREE, find_busi, has_class_folders, read_busi, read_folders
from btinet.data.groups import near_duplicate_groups
from btinet.data.ham10000_layout import (
    HAM10000_TREE,
    ISIC2018_TREE,
    find_ham10000,
    find_isic2018,
    read_ham10000,
    read_isic2018,
)
from btinet.data.isic2017_layout import ISIC2017_TREE, find_isic2017, read_isic2017
from btinet.data.layout_options import LayoutOptions
from btinet.data.samples import Collection
from btinet.errors import UserError


@dataclass(frozen=True)
class Layout:
    """How one data set lies on disk.

    Attributes:
        tree: the files that are expected, in words.
        find: the folder that the layout begins at, given the one the user named; None if it is not this layout.
        read: see ``read_collection``; it gets the folder ``find`` returned, or else the one the user named.
        options: names of the ``LayoutOptions`` it takes.
    """

    tree: str
    find: Callable[[Path], Path | None]
    read: Callable[[Path, Sequence[str] | None, LayoutOptions], Collection]
    options: tuple[str, ...] = ()


LAYOUTS = {
    "busi": Layout(BUSI_TREE, find_busi, read_busi, ("curated",)),
    "busi_whu": Layout(BUSI_WHU_TREE, find_busi_whu, read_busi_whu, ("labels",)),
    "ham10000": Layout(HAM10000_TREE, find_ham10000, read_ham10000),
    "isic2018": Layout(ISIC2018_TREE, find_isic2018, read_isic2018, ("lesion_groups",)),
    "isic2017": Layout(ISIC2017_TREE, find_isic2017, read_isic2017),
    "brisc": Layout(BRISC_TREE, find_brisc, read_brisc),
    "cheng": Layout(CHENG_TREE, find_cheng, read_cheng),
    "folders": Layout(FOLDERS_TREE, lambda path: path if has_class_folders(path) else None, read_folders),
    "csv": Layout(CSV_TREE, lambda path: path if find_csv(path) else None, read_csv),
}
DATASETS = ("auto", *LAYOUTS)
_OWN_LAYOUTS = ("folders", "csv")  # for any data; their readers say what is missing


def read_collection(
    path: Path,
    dataset: str = "auto",
    classes: Sequence[str] | None = None,
    options: LayoutOptions = LayoutOptions(),  # noqa: B008
) -> Collection:
    """List the samples of a data set; no image is opened, except to drop duplicates of test images.

    docs/data.md shows the tree of each layout. In short:

    * ``busi``: one folder per class; masks are ``NAME_mask.png``, ``NAME_mask_1.png`` beside ``NAME.png``, united.
    * ``busi_whu``: both releases; without class names in the files and without ``options.labels`` the samples
      are unlabelled.
    * ``ham10000``, ``isic2018``: lesions are the groups.
    * ``isic2017``, ``brisc``: the official validation and test parts are prescribed.
    * ``cheng``: blocks of neighbouring slices are the groups.
    * ``folders``: like busi, with one folder per class of any name. A class of which no image has a mask is one
      without lesions.
    * ``csv``: a table (or the folder that holds exactly one such ``*.csv``) with the columns image and label,
      and optionally mask (several separated by ``;``; empty: no lesion; ``?`` or no such column: not known), group
      and split (train, val, test). Paths are relative to the table's folder or absolute; an empty label means: not
      labelled.
    * ``auto``: whichever of these is there.

    Args:
        path: the folder or CSV file.
        dataset: one of ``DATASETS``.
        classes: the order of classes to use (that of a trained model). Classes without samples are allowed,
            samples of another class are not.
        options: what single layouts need beside their folder.

    Raises:
        UserError: no such layout, or a defect in it (an image without its mask, a mask without its image, an
            unknown class, an empty folder, a faulty line), or an option of another layout.
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
    try:
        if dataset == "auto":
            dataset = _recognise(path)
        layout = LAYOUTS[dataset]
        for name in ("curated", "labels", "lesion_groups"):
            if getattr(options, name) is not None and name not in layout.options:
                raise UserError(f"--{name.replace('_', '-')}: the data at {path} is of layout {dataset}: not for it.")
        root = path if dataset in _OWN_LAYOUTS else layout.find(path)
        if root is None:
            raise UserError(f"{path}: is not of the layout {dataset}; expected {layout.tree}.")
        collection = layout.read(root, classes, options)
    except OSError as error:
        raise UserError(f"{error.filename or path}: could not be read ({error.strerror or error}).") from error
    _check_names(collection)
    if not collection.samples:
        raise UserError(f"{path}: holds no image of the layout {dataset}; expected {layout.tree}.")
    return _without_test_duplicates(collection) if options.drop_train_duplicates_of_test else collection


def check_trainable(collection: Collection, *, segmentation: bool = True, classification: bool = True) -> None:
    """Check that a network can be trained on ``collection``, for these tasks.

    Raises:
        UserError: fewer than two classes with samples, a class without samples, or no sample with a lesion
            mask.
    """
    if classification:
        _check_classes(collection)
    if segmentation and not any(sample.masks for sample in collection.samples):
        raise UserError(
            f"{collection.root}: no sample has a lesion mask, expected some to train the segmentation; "
            "add masks (NAME_mask.png beside NAME.png, or the mask column of the CSV file), or train "
            f"{_alone('classification')}."
        )


def _check_classes(collection: Collection) -> None:
    counts = Counter(sample.label for sample in collection.samples)
    present = [name for index, name in enumerate(collection.classes) if counts[index]]
    absent = [name for index, name in enumerate(collection.classes) if not counts[index]]
    if not present:
        raise UserError(
            f"{collection.root}: none of the {len(collection.samples)} images is labelled, expected at least two "
            f"classes to train a classifier; {_how_to_label(collection)}, or train {_alone('segmentation')}."
        )
    if len(present) < 2:
        raise UserError(
            f"{collection.root}: found samples of 1 class ({present[0]}), "
            "expected at least two to train a classifier; add labelled images of another class."
        )
    if absent:
        raise UserError(
            f"{collection.root}: the class {absent[0]!r} has no sample; add images of it or leave it out of classes."
        )


def _alone(task: str) -> str:
    return f"the {task} alone (--tasks {task} --interaction none)"


def _check_names(collection: Collection) -> None:
    """Refuse file names that no table and no terminal can show."""
    for sample in collection.samples:
        if any(ord(letter) < 32 or 0xD800 <= ord(letter) < 0xE000 for letter in sample.id):
            raise UserError(f"{collection.root}: the file name {sample.id!a} is not plain UTF-8 text; rename the file.")


def _how_to_label(collection: Collection) -> str:
    if collection.name == "busi_whu":
        return "give --labels FILE, a table with the columns file,label"
    return "fill in the label column"


def _recognise(path: Path) -> str:
    if not path.is_dir():
        return "csv"
    found = [name for name, layout in LAYOUTS.items() if layout.find(path) is not None]
    if not found:
        trees = "; ".join(f"{name}: {layout.tree}" for name, layout in LAYOUTS.items())
        raise UserError(f"{path}: no known layout found, expected one of these: {trees}.")
    if found[0] not in _OWN_LAYOUTS:  # a published set may come with tables, and in folders
        return found[0]
    if len(found) > 1:
        raise UserError(
            f"{path}: holds both {find_csv(path)[0].name} and class folders with masks; "
            "set dataset to csv or folders to say which of the two to read."
        )
    return found[0]


def _without_test_duplicates(collection: Collection) -> Collection:
    test = {sample.id for sample in collection.samples if sample.split == "test"}
    if not test:
        raise UserError(
            f"--drop-train-duplicates-of-test: the data at {collection.root} prescribes no test images; "
            "without them, near-duplicates are kept on one side of the split anyway."
        )
    groups = near_duplicate_groups(collection.samples)
    tested = {group for identifier, group in groups.items() if identifier in test}
    kept = [sample for sample in collection.samples if sample.id in test or groups.get(sample.id) not in tested]
    return replace(collection, samples=tuple(kept))
