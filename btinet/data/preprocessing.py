"""From pixels to what the network sees."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from btinet.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SMALLEST_SIDE = 32


@dataclass(frozen=True)
class Preprocessing:
    """Size and normalisation of the input of a network; stored with its weights.

    Attributes:
        image_size: height and width the network sees, in pixels, each at least 32.
        channels: 1 (grey) or 3 (RGB).
        scale: factor that maps uint8 pixels to the scale of mean and std, normally 1/255.
        mean: per channel, subtracted after scaling.
        std: per channel, positive, divided by after that.

    Raises:
        UserError: a value outside these limits.
    """

    image_size: tuple[int, int]
    channels: int
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        size = self.image_size
        _require(len(size) == 2 and all(_is_int(side) for side in size), "image_size", size, "height and width")
        _require(min(size) >= SMALLEST_SIDE, "image_size", size, f"sides of at least {SMALLEST_SIDE} pixels")
        _require(_is_int(self.channels) and self.channels in (1, 3), "channels", self.channels, "1 or 3")
        _require(_is_number(self.scale) and self.scale > 0, "scale", self.scale, "a positive number")
        for name, values in (("mean", self.mean), ("std", self.std)):
            right = len(values) == self.channels and all(_is_number(value) for value in values)
            _require(right, name, values, f"{self.channels} number(s), one per channel")
        _require(min(self.std) > 0, "std", self.std, "positive numbers")

    def normalise(self, image: Tensor) -> Tensor:
        """Map uint8 [..., C, H, W] to float32 (image · scale − mean) / std of the same shape and device.

        Raises:
            UserError: the number of channels differs.
        """
        if image.ndim < 3 or image.shape[-3] != self.channels:
            raise UserError(
                f"image: found a tensor of shape {tuple(image.shape)}, "
                f"expected [..., {self.channels}, H, W] as the preprocessing says."
            )
        mean = torch.tensor(self.mean, dtype=torch.float32, device=image.device).view(-1, 1, 1)
        std = torch.tensor(self.std, dtype=torch.float32, device=image.device).view(-1, 1, 1)
        return (image.to(torch.float32) * self.scale - mean) / std

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as lists and numbers, ready for JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """Rebuild from ``to_dict``'s result; ``UserError`` names what is missing, unknown or out of range."""
        if not isinstance(values, Mapping):
            raise UserError(f"preprocessing: found {values!r}, expected an object with named fields.")
        names = {field.name for field in fields(cls)}
        for wrong, what in ((names - set(values), "is missing"), (set(values) - names, "is not known")):
            if wrong:
                raise UserError(
                    f"preprocessing: the field {min(wrong, key=str)!r} {what}; expected {', '.join(sorted(names))}."
                )
        for name in ("image_size", "mean", "std"):
            _require(isinstance(values[name], list | tuple), name, values[name], "a list of numbers")
        return cls(
            image_size=tuple(values["image_size"]),
            channels=values["channels"],
            scale=values["scale"],
            mean=tuple(values["mean"]),
            std=tuple(values["std"]),
        )


def default_preprocessing(image_size: tuple[int, int], channels: int, double_scaled: bool = False) -> Preprocessing:
    """Return the ImageNet normalisation that timm's encoders expect; for grey images its mean over RGB.

    Args:
        image_size: height and width the network sees.
        channels: 1 or 3.
        double_scaled: divide by 255 twice, as the official code does: its loaders scale to [0, 1] and its
            Keras encoder scales once more.
    """
    if channels == 1:
        mean: tuple[float, ...] = (sum(IMAGENET_MEAN) / 3,)
        std: tuple[float, ...] = (sum(IMAGENET_STD) / 3,)
    else:
        mean, std = IMAGENET_MEAN, IMAGENET_STD
    scale = 1 / 255**2 if double_scaled else 1 / 255
    return Preprocessing(image_size, channels, scale, mean, std)


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize uint8 [H, W, C] to (height, width), bilinear with antialiasing; the aspect ratio is not kept."""
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    resized = picture.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return np.array(resized).reshape(*size, image.shape[-1])


def resize_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize bool or uint8 [H, W] to (height, width), nearest neighbour."""
    resized = Image.fromarray(mask.astype(np.uint8)).resize((size[1], size[0]), Image.Resampling.NEAREST)
    return np.array(resized, dtype=mask.dtype)


def _require(condition: bool, name: str, found: object, expected: str) -> None:
    if not condition:
        raise UserError(f"preprocessing: {name} is {found!r}, expected {expected}.")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
