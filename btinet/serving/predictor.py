"""From images to masks and classes, in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch.nn.functional import interpolate

from btinet.data.preprocessing import resize_image
from btinet.errors import UserError
from btinet.models.checkpoint import Checkpoint
from btinet.models.network import BTINet

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Prediction:
    """What the model says about one image.

    Attributes:
        numbers: uint8 [H, W] at the image's own size: the most probable mask class, from 1, where its probability
            exceeds the threshold, else 0. None for a model that only classifies.
        lesion_probability: float32 [H, W], of the most probable mask class; or None likewise.
        class_probabilities: float64 [K], sums to 1, in the order of the checkpoint's classes.
            Empty for a model that only segments.
        gates: per decoder level, the segmentation gate and the classification gate; empty for a model without
            gates.
        proxies: per decoder level, the signals that feed the gates, in the order of
            ``Checkpoint.proxy_names``.
    """

    numbers: np.ndarray | None
    lesion_probability: np.ndarray | None
    class_probabilities: np.ndarray
    gates: dict[str, tuple[float, float]]
    proxies: dict[str, tuple[float, ...]]

    @property
    def mask(self) -> np.ndarray | None:
        """Bool [H, W]: the pixels of any mask class; None for a model that only classifies."""
        return None if self.numbers is None else self.numbers > 0


class Predictor:
    """Applies a checkpoint to images of any size.

    Every image is resized to the size of the network (squashed, as in training); the segmentation logits are
    upsampled bilinearly to the image's own size before the sigmoid and the threshold.

    Args:
        checkpoint: a loaded checkpoint; its model is moved to the device, and a copy with its BatchNorms folded
            computes the predictions.
        device: "auto" (the GPU where torch finds one, else the CPU) or a torch device such as "cpu" or
            "cuda:1".
        threshold: lesion probability above which a pixel is lesion, strictly between 0 and 1.
        precision: what the network computes in. "bfloat16" is faster on a CPU with AVX512_BF16
            (docs/network_benchmarks.md); probabilities are rounded, so that single pixels may change.

    Raises:
        UserError: the device cannot be used or the threshold is outside (0, 1).
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: str = "auto",
        threshold: float = 0.5,
        precision: Precision = "float32",
    ) -> None:
        if not 0 < threshold < 1:
            raise UserError(f"threshold {threshold}: expected a number between 0 and 1, for example 0.5.")
        self.classes = checkpoint.classes
        self.mask_classes = checkpoint.mask_classes
        self.proxy_names = checkpoint.proxy_names
        self.preprocessing = checkpoint.preprocessing
        self.threshold = threshold
        self.device = usable_device(device)
        model = checkpoint.model.to(self.device).eval()
        fused = model.fuse(self.preprocessing.image_size) if isinstance(model, BTINet) else model
        self.dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        self.model = fused.to(self.dtype).to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def __call__(self, images: Sequence[np.ndarray]) -> list[Prediction]:
        """Predict one batch.

        Args:
            images: uint8 [H, W, C] each, of any sizes, with the channel count of the checkpoint's
                preprocessing.

        Raises:
            UserError: an image has another dtype, rank or channel count, or the model's output is not finite.
        """
        if not images:
            return []
        size = self.preprocessing.image_size
        for position, image in enumerate(images):
            self._check(image, position)
        resized = np.stack([resize_image(image, size) for image in images])
        pixels = torch.from_numpy(resized).permute(0, 3, 1, 2).to(self.device)
        output = self.model(self.preprocessing.normalise(pixels).to(self.dtype))
        if not (torch.isfinite(output.seg_logits).all() and torch.isfinite(output.cls_logits).all()):
            raise UserError(
                "The model's output holds nan or infinite values; train it again or use another checkpoint."
            )
        class_probabilities = output.cls_logits.double().softmax(dim=1).cpu().numpy()
        gates = {level: value.float().cpu() for level, value in output.gates.items()}
        proxies = {level: value.float().cpu() for level, value in output.proxies.items()}
        predictions = []
        for index, image in enumerate(images):
            numbers = probability = None
            if output.seg_logits.shape[1]:
                logits = output.seg_logits[index : index + 1].float()
                native = interpolate(logits, size=image.shape[:2], mode="bilinear", align_corners=False)[0]
                highest, channel = native.sigmoid().max(0)
                numbers = torch.where(highest > self.threshold, channel + 1, 0).to(torch.uint8).cpu().numpy()
                probability = highest.cpu().numpy()
            predictions.append(
                Prediction(
                    numbers=numbers,
                    lesion_probability=probability,
                    class_probabilities=class_probabilities[index],
                    gates={level: (float(v[index, 0]), float(v[index, 1])) for level, v in gates.items()},
                    proxies={level: tuple(v[index].tolist()) for level, v in proxies.items()},
                )
            )
        return predictions

    def _check(self, image: np.ndarray, position: int) -> None:
        channels = self.preprocessing.channels
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != channels or 0 in image.shape:
            raise UserError(
                f"Image {position} of the batch is {image.dtype} {list(image.shape)}, but the model takes "
                f"uint8 [height, width, {channels}]; read it with btinet.data.images.read_image(path, "
                f"{channels})."
            )


def usable_device(name: str) -> torch.device:
    """Return the device called ``name``; "auto" is the GPU where torch finds one, else the CPU.

    Raises:
        UserError: no such device, or a GPU that torch does not see here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device {name!r}: not a torch device; use auto, cpu, cuda or cuda:N.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device {name!r}: torch finds {torch.cuda.device_count()} CUDA device(s) here; use auto or cpu."
        )
    return device


def signal_columns(prediction: Prediction, proxy_names: Sequence[str]) -> dict[str, float]:
    """Return the gates and proxies of one prediction as named table columns, for example ``gate_seg_d1``."""
    columns: dict[str, float] = {}
    for level, (seg, clf) in prediction.gates.items():
        columns[f"gate_seg_{level}"] = seg
        columns[f"gate_clf_{level}"] = clf
    for level, values in prediction.proxies.items():
        columns |= {f"proxy_{name}_{level}": value for name, value in zip(proxy_names, values, strict=True)}
    return columns
