"""Rebuild the sample of ISIC 2017 that is shipped in btinet/data/isic2017_sample.

    python examples/make_isic2017_sample.py PATH/TO/ISIC2017 [OUT]

The first folder holds ISIC-2017_Training_Data, ISIC-2017_Training_Part1_GroundTruth,
ISIC-2017_Training_Part3_GroundTruth.csv and the same of Validation, with 256×256 images.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from btinet.data import Sample, near_duplicate_groups, read_mask, sample_csv
from btinet.data.tables import write_table
from btinet.files import atomic_path

CLASSES = ("nevus", "melanoma", "seborrheic_keratosis")
COUNTS = (44, 28, 28)
SEED = 2017
SIDE = 256
LESION_FRACTION = (0.03, 0.50)


def read_isic2017(folder: Path) -> list[Sample]:
    """Return the training and validation images of ISIC 2017 with mask and class."""
    samples = []
    for part in ("Training", "Validation"):
        with (folder / f"ISIC-2017_{part}_Part3_GroundTruth.csv").open(newline="") as handle:
            for row in csv.DictReader(handle):
                name = row["image_id"]
                image = folder / f"ISIC-2017_{part}_Data" / f"{name}.jpg"
                mask = folder / f"ISIC-2017_{part}_Part1_GroundTruth" / f"{name}_segmentation.png"
                label = 1 if float(row["melanoma"]) else 2 if float(row["seborrheic_keratosis"]) else 0
                samples.append(Sample(name, image, (mask,), label))
    return samples


def is_clear(mask: np.ndarray) -> bool:
    """Say whether a lesion [H, W] is neither tiny nor huge and lies within the image."""
    border = mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any()
    return bool(LESION_FRACTION[0] <= mask.mean() <= LESION_FRACTION[1] and not border)


def select(samples: list[Sample]) -> list[Sample]:
    """Take the first clear ones of each class, one per group, in the order of a hash of seed and name."""
    groups = near_duplicate_groups(samples)
    chosen, taken, left = [], set(), list(COUNTS)
    for sample in sorted(samples, key=lambda s: hashlib.sha256(f"{SEED}:{s.id}".encode()).hexdigest()):
        group = groups.get(sample.id, sample.id)
        if left[sample.label] and group not in taken and is_clear(read_mask(sample.masks, SIDE, SIDE)):
            chosen.append(sample)
            taken.add(group)
            left[sample.label] -= 1
    return sorted(chosen, key=lambda s: s.id)


def main() -> None:
    """Write images, masks and samples.csv; the README.md beside them is written by hand."""
    parser = argparse.ArgumentParser(description="Rebuild the shipped sample of ISIC 2017.")
    parser.add_argument("isic2017", type=Path, help="folder with the ISIC-2017_* folders and tables")
    parser.add_argument("out", type=Path, nargs="?", default=sample_csv().parent, help="folder to write to")
    arguments = parser.parse_args()
    rows = []
    for sample in select(read_isic2017(arguments.isic2017)):
        image, mask = f"images/{sample.id}.jpg", f"masks/{sample.id}.png"
        with atomic_path(arguments.out / image) as temporary:
            shutil.copyfile(sample.image, temporary)
        with atomic_path(arguments.out / mask) as temporary:
            Image.fromarray(read_mask(sample.masks, SIDE, SIDE)).save(temporary, optimize=True)
        rows.append((image, mask, CLASSES[sample.label], "", ""))
    write_table(arguments.out / "samples.csv", ("image", "mask", "label", "group", "split"), rows)
    print(f"{len(rows)} samples in {arguments.out}")


if __name__ == "__main__":
    main()
