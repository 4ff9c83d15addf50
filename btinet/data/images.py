"""Images and lesion masks from files, checked."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from btinet.errors import UserError

MAX_PIXELS = 100_000_000  # of one picture; what decodes to more is refused before it is decoded
# No others: Pillow runs Ghostscript on PostScript, whatever the file is called.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

# What PIL's decoders raise on damaged or hostile files.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


def read_image(path: Path, channels: int) -> np.ndarray:
    """Read an image as uint8 [H, W, channels], ``channels`` 1 (grey) or 3 (RGB).

    The EXIF orientation is applied, palettes are resolved, alpha is dropped, and of several frames the first
    is taken. Of 16-bit pixels the high byte is kept, as PIL itself does for 16-bit colour.

    Raises:
        UserError: missing, truncated or not an image; more than ``MAX_PIXELS``; floating-point pixels; 16-bit
            pixels so small (below 4096) that 8 bits of them would be almost black.
    """
    if channels not in (1, 3):
        raise UserError(f"channels: found {channels}, expected 1 (grey) or 3 (RGB).")
    picture = decode(path)
    if picture.mode == "F":
        raise UserError(f"{path}: holds floating-point pixels; save it as an 8-bit image first.")
    if picture.mode.startswith("I"):
        picture = Image.fromarray(_high_byte(path, np.asarray(picture)))
    try:
        pixels = np.array(picture.convert("L" if channels == 1 else "RGB"))
    except ValueError as error:
        raise UserError(f"{path}: pixels of mode {picture.mode} are not supported; save it as RGB.") from error
    return pixels.reshape(*pixels.shape[:2], channels)


def read_mask(paths: Sequence[Path], height: int, width: int, threshold: int | None = None) -> np.ndarray:
    """Read the union of mask files as bool [height, width]; no file gives an all-zero mask.

    1-bit, grey, palette, colour and 16-bit files are accepted; alpha is ignored. Each must hold at most two
    values (colours), one of them 0 (black); an all-white mask is lesion everywhere. Palettes are read by their
    colours, or by index if all are black.

    Args:
        paths: the mask files of one image.
        height: rows of the image that the masks belong to.
        width: columns of that image.
        threshold: if given, any values are accepted and a pixel is lesion when its value (the largest of its
            colour channels) is greater than ``threshold``.

    Raises:
        UserError: missing, truncated or not an image; another size; not binary.
    """
    union = np.zeros((height, width), dtype=bool)
    for path in paths:
        picture = decode(path)
        require_size(path, picture, height, width)
        union |= _binarise(path, mask_values(path, picture), threshold)
    return union


def image_mode(path: Path) -> str:
    """Return Pillow's mode of an image that can be read, such as "RGB"."""
    with Image.open(path, formats=_FORMATS) as handle:
        return handle.mode


def describe_mask(path: Path) -> str:
    """Return Pillow's mode of a mask and the values in it, such as "L, values 0 and 255"; see ``read_mask``."""
    picture = decode(path)
    values = np.unique(mask_values(path, picture)).tolist()
    what = " and ".join(map(str, values)) if len(values) <= 2 else f"{len(values)} of {values[0]} to {values[-1]}"
    return f"{picture.mode}, value{'s' * (len(values) > 1)} {what}"


def map_in_threads(function: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
    """Apply ``function`` to ``items`` in threads; yield the results in order."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        yield from pool.map(function, items)


def require_size(path: Path, mask: Image.Image, height: int, width: int) -> None:
    """Refuse a mask that has not the size of its image."""
    if mask.size != (width, height):
        raise UserError(
            f"{path}: the mask is {mask.width}×{mask.height} pixels but its image is "
            f"{width}×{height} (width×height); they must have the same size."
        )


def decode(path: Path) -> Image.Image:
    """Decode a picture and turn it upright, in whatever mode it is stored; raises ``UserError`` as ``read_image``."""
    try:
        with Image.open(path, formats=_FORMATS) as handle:
            if handle.width * handle.height > MAX_PIXELS:
                raise UserError(
                    f"{path}: the picture is {handle.width}×{handle.height} pixels, more than the {MAX_PIXELS:,} "
                    "that are accepted; make it smaller."
                )
            handle.load()
            return ImageOps.exif_transpose(handle)
    except UnidentifiedImageError as error:
        raise UserError(f"{path}: is not an image in a format that can be read.") from error
    except _DECODE_ERRORS as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        raise UserError(f"{path}: the image could not be read ({reason}).") from error


def _high_byte(path: Path, pixels: np.ndarray) -> np.ndarray:
    lowest, highest = int(pixels.min()), int(pixels.max())
    if lowest < 0 or highest > 65535:
        raise UserError(f"{path}: pixel values {lowest}..{highest} exceed 16 bits; save it as an 8-bit image first.")
    if 0 < highest < 4096:
        raise UserError(
            f"{path}: a 16-bit image whose largest value is {highest} would be almost black in 8 bits; "
            "rescale it to 0..255 and save it as an 8-bit image first."
        )
    return (pixels >> 8).astype(np.uint8)


def mask_values(path: Path, picture: Image.Image) -> np.ndarray:
    """Return the values of a mask as integers [H, W] or [H, W, 3]; ``UserError`` for a mode without such values."""
    if picture.mode == "P":
        colours = np.asarray(picture.convert("RGB"))
        return colours if colours.any() else np.asarray(picture)
    if picture.mode in ("RGBA", "LA"):
        return np.asarray(picture.convert(picture.mode[:-1]))
    if picture.mode in ("1", "L", "RGB") or picture.mode.startswith("I"):
        values = np.asarray(picture)
        return values.astype(np.uint8) if values.dtype == bool else values
    raise UserError(f"{path}: a mask with pixels of mode {picture.mode} is not supported; save it as 8-bit grey.")


def _binarise(path: Path, values: np.ndarray, threshold: int | None) -> np.ndarray:
    if threshold is not None:
        return (values.max(axis=-1) if values.ndim == 3 else values) > threshold
    if values.ndim == 3:
        values = values.astype(np.uint32) @ np.array([65536, 256, 1], dtype=np.uint32)
    found = np.unique(values)
    whole_image = len(found) == 1 and found[0] in (1, 255, 0xFFFFFF)  # a lesion that fills the picture
    if (len(found) > 2 or found[0] != 0) and not whole_image:
        what = f"{len(found)} different values" if len(found) > 2 else "no black (0) pixel"
        raise UserError(
            f"{path}: a mask must hold 0 and at most one other value, found {what}; "
            "save it as a black and white PNG or set mask_threshold (for example 127)."
        )
    return values > 0
