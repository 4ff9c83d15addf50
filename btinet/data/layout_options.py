"""What a layout may need beside its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class LayoutOptions:
    """Files and choices that belong to single layouts; giving one to another layout is refused.

    Attributes:
        curated: BUSI: table with the columns ``class;id`` of the images to keep, ``id`` being the number in
            ``benign (N).png``.
        labels: BUSI-WHU as on Mendeley, which names no classes: table ``file,label``.
        lesion_groups: ISIC 2018: table ``image,lesion_id``.
        drop_train_duplicates_of_test: any layout with a test part: leave out the other images that nearly
            equal one of its test images.
    """

    curated: Path | None = None
    labels: Path | None = None
    lesion_groups: Path | None = None
    drop_train_duplicates_of_test: bool = False
