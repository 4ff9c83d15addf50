"""What a data set is once it has been read: a list of samples with one order of classes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Sample:
    """One image with its lesion masks and its class.

    Attributes:
        id: path of the image relative to the collection's root, POSIX form; unique within the collection.
        image: the image file.
        masks: mask files whose union is the lesion; empty: no lesion, an all-zero mask; None: nobody drew one, the
            image takes no part in the segmentation.
        label: index into ``Collection.classes``; -1: not labelled.
        group: samples with the same group (one patient, one lesion) never straddle a split.
        split: "train", "val" or "test" when the data set prescribes it.
        stratum: what parts of a split should hold in equal shares beside the class (BRISC: the plane); "": nothing.
    """

    id: str
    image: Path
    masks: tuple[Path, ...] | None
    label: int
    group: str | None = None
    split: str | None = None
    stratum: str = ""


@dataclass(frozen=True)
class Collection:
    """A data set: its samples, sorted by id, and the class names their labels point into.

    Attributes:
        name: the layout it was read from, one of ``DATASETS`` but "auto".
        root: the folder that the sample ids are relative to.
        classes: class names; a label is an index into them.
        samples: all samples, sorted by id.
    """

    name: str
    root: Path
    classes: tuple[str, ...]
    samples: tuple[Sample, ...]
