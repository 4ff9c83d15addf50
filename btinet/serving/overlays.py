"""What was predicted, drawn onto its image."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import binary_erosion

# Of the first mask class, the second, …, and again from the start.
OUTLINES = ((255, 212, 0), (0, 213, 255), (255, 92, 138), (124, 255, 107), (196, 134, 255), (255, 150, 60))


def draw_overlay(image: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Draw the outlines of masks onto an image, inside the masks, in a width that suits the image's size.

    Args:
        image: uint8 [H, W, 1] or [H, W, 3].
        numbers: bool or uint8 [H, W], 0 or the number of a mask class, from 1, which has a colour of its own.

    Returns:
        uint8 [H, W, 3]; equal to the image where there is no mask.
    """
    picture = np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image.copy()
    width = max(1, round(min(numbers.shape) / 150))
    for number in np.unique(numbers[numbers > 0]).astype(int):
        mask = numbers == number
        # The image's own edge is part of the outline: everything outside it counts as background.
        picture[mask & ~binary_erosion(mask, iterations=width)] = OUTLINES[(number - 1) % len(OUTLINES)]
    return picture
