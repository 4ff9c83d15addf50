"""What the pixels of a mask say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from btinet.data.images import decode, mask_values, read_mask, require_size
from btinet.errors import UserError

LESION = ("lesion",)


@dataclass(frozen=True)
class MaskFormat:
    """How the masks of a data set are read.

    Attributes:
        threshold: see ``read_mask``; only for one class.
        classes: names of what is segmented, beside the background. With one, masks are black and white; with several,
            pixels hold 0 for the background and 1, 2, … for the classes in this order.

    Raises:
        UserError: names that are empty, repeated or more than 255; a threshold for several classes.
    """

    threshold: int | None = None
    classes: tuple[str, ...] = LESION

    def __post_init__(self) -> None:
        names = self.classes
        if not names or not all(names) or len(set(names)) != len(names) or len(names) > 255:
            raise UserError(f"--mask-classes {','.join(names)!r}: expected 1 to 255 different names.")
        if len(names) > 1 and self.threshold is not None:
            raise UserError(
                f"--mask-threshold {self.threshold}: makes masks black and white, which cannot show the "
                f"{len(names)} classes of --mask-classes; leave one of the two out."
            )

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> MaskFormat:
        """Build from the options mask_threshold and mask_classes of a command or a run's config.yaml."""
        names = options.get("mask_classes")
        classes = LESION if names is None else tuple(name.strip() for name in names.split(","))
        return cls(options.get("mask_threshold"), classes)

    def read(self, paths: Sequence[Path], height: int, width: int) -> np.ndarray:
        """Read the mask files of one image into uint8 [height, width]: 0 or the number of a class, from 1.

        Raises:
            UserError: as ``read_mask``; with several classes also a colour or a number that stands for none of them,
                and a pixel to which two files give different classes.
        """
        if len(self.classes) == 1:
            return read_mask(paths, height, width, self.threshold).astype(np.uint8)
        union = np.zeros((height, width), dtype=np.uint8)
        for path in paths:
            numbers = self._numbers(path, height, width)
            if ((union > 0) & (numbers > 0) & (union != numbers)).any():
                raise UserError(f"{path}: gives pixels another class than the other masks of its image do.")
            union = np.maximum(union, numbers)
        return union

    def planes(self, numbers: np.ndarray) -> np.ndarray:
        """Divide what ``read`` returns into bool [classes, H, W]."""
        return numbers == np.arange(1, len(self.classes) + 1, dtype=numbers.dtype)[:, None, None]

    def _numbers(self, path: Path, height: int, width: int) -> np.ndarray:
        picture = decode(path)
        require_size(path, picture, height, width)
        values = np.asarray(picture) if picture.mode == "P" else mask_values(path, picture)
        if values.ndim == 3:
            if (values != values[..., :1]).any():
                raise UserError(f"{path}: is in colour; with --mask-classes pixels must hold the numbers of classes.")
            values = values[..., 0]
        highest = int(values.max())
        if highest > len(self.classes) or int(values.min()) < 0:
            raise UserError(
                f"{path}: holds the value {highest}, but --mask-classes names {len(self.classes)} classes, 1 to "
                f"{len(self.classes)}; correct the mask or name its classes."
            )
        return values.astype(np.uint8)
