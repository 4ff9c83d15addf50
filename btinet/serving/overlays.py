"""The predicted lesion drawn onto its image."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import binary_erosion

OUTLINE = (255, 212, 0)


def draw_overlay(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Draw the outline of a mask onto an image, inside the mask, in a width that suits the image's size.

    Args:
        image: uint8 [H, W, 1] or [H, W, 3].
        mask: bool [H, W].

    Returns:
        uint8 [H, W, 3]; equal to the image where the mask is empty.
    """
    picture = np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image.copy()
    if mask.any():
        width = max(1, round(min(mask.shape) / 150))
        # The image's own edge is part of the outline: everything outside it counts as background.
        picture[mask & ~binary_erosion(mask, iterations=width)] = OUTLINE
    return picture
