"""BRISC 2025: brain MRI with an official test part."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from btinet.data.layout_options import LayoutOptions
from btinet.data.listing import images_by_stem, label_of, refuse_left_over, take_mask
from btinet.data.samples import Collection, Sample
from btinet.errors import UserError

CLASSES = ("glioma", "meningioma", "pituitary", "no_tumor")
_FOLDER = "brisc2025"
BRISC_TREE = (
    f"{_FOLDER}/classification_task/{{train,test}}/{{{','.join(CLASSES)}}}/brisc2025_train_00001_gl_ax_t1.jpg, "
    f"{_FOLDER}/segmentation_task/{{train,test}}/masks/brisc2025_train_00001_gl_ax_t1.png"
)
# The documentation says nt, the files say no.
_CLASS_OF_CODE = {"gl": "glioma", "me": "meningioma", "pi": "pituitary", "no": "no_tumor", "nt": "no_tumor"}
_NAME = re.compile(r"^brisc2025_(?P<split>train|test)_(?P<index>\d+)_(?P<code>gl|me|pi|no|nt)_(?P<plane>ax|co|sa)_t1$")


def find_brisc(path: Path) -> Path | None:
    """Return the folder that holds BRISC's two tasks: ``path`` or its ``brisc2025``."""
    for root in (path, path / _FOLDER):
        if (root / "classification_task").is_dir() or (root / "segmentation_task").is_dir():
            return root
    return None


def read_brisc(root: Path, classes: Sequence[str] | None, options: LayoutOptions) -> Collection:
    """Read BRISC 2025; the test part is kept, planes are strata. See ``read_collection``."""
    known = CLASSES if classes is None else tuple(classes)
    samples = []
    for split in ("train", "test"):
        masks = images_by_stem(root / "segmentation_task" / split / "masks")
        for name in CLASSES:
            folder = root / "classification_task" / split / name
            label = label_of(name, known, str(folder))
            for stem, image in images_by_stem(folder).items():
                plane = _plane(image, stem, split, name)
                mask: tuple[Path, ...] = ()
                if name != "no_tumor":
                    expected = root / "segmentation_task" / split / "masks" / f"{stem}.png"
                    mask = take_mask(masks, stem, image, expected)
                identifier = image.relative_to(root).as_posix()
                prescribed = "test" if split == "test" else None
                samples.append(Sample(identifier, image, mask, label, None, prescribed, plane))
        refuse_left_over(masks)
    return Collection("brisc", root, known, tuple(sorted(samples, key=lambda sample: sample.id)))


def _plane(image: Path, stem: str, split: str, name: str) -> str:
    match = _NAME.match(stem)
    if match is None:
        raise UserError(f"{image}: expected a name such as brisc2025_{split}_00001_gl_ax_t1.jpg; rename the file.")
    if match["split"] != split or _CLASS_OF_CODE[match["code"]] != name:
        raise UserError(f"{image}: the name says {match['split']} and {match['code']}, the folder {split} and {name}.")
    return match["plane"]
