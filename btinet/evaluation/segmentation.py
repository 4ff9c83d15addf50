"""Scores of one predicted mask, and their summary over a set of images.

All scores concern the lesion (foreground) alone. Empty masks, where most libraries silently differ, are
treated like this:

==================  =======================  ===============================  ==================
target, prediction  IoU, Dice                sensitivity, precision           HD95
==================  =======================  ===============================  ==================
both empty          1                        nan (undefined)                  0
lesion missed       0                        sensitivity 0, precision nan     ``hd95_empty``
false alarm         0                        sensitivity nan, precision 0     ``hd95_empty``
==================  =======================  ===============================  ==================

Images whose target is empty count in the column "all images" only, never in "lesion images", the primary one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.ndimage import binary_erosion, distance_transform_edt

HD95Empty = Literal["diagonal", "inf", "exclude"]
MEASURES = ("iou", "dice", "sensitivity", "precision", "hd95")


@dataclass(frozen=True)
class SegmentationScores:
    """Scores of one image; nan marks an undefined score (and an HD95 that the policy excludes).

    Attributes:
        iou: intersection over union.
        dice: 2·|overlap| / (|prediction| + |target|).
        sensitivity: |overlap| / |target|.
        precision: |overlap| / |prediction|.
        hd95: 95th-percentile Hausdorff distance in pixels, see ``hausdorff95``.
        target_pixels, predicted_pixels, overlap_pixels: sizes of the two masks and of their intersection.
    """

    iou: float
    dice: float
    sensitivity: float
    precision: float
    hd95: float
    target_pixels: int
    predicted_pixels: int
    overlap_pixels: int

    @property
    def missed(self) -> bool:
        """Whether there is a lesion and the prediction is empty."""
        return self.target_pixels > 0 and self.predicted_pixels == 0


@dataclass(frozen=True)
class Distribution:
    """Mean, standard deviation (divisor n-1), median and number n of the defined values; nan for too few."""

    mean: float
    sd: float
    median: float
    n: int


@dataclass(frozen=True)
class SegmentationColumn:
    """Scores over one set of images.

    Attributes:
        images: number of images in the set.
        n_missed: images with a lesion and an empty prediction.
        measures: one ``Distribution`` per name in ``MEASURES``, over the images where it is defined.
        pooled_iou, pooled_dice: data-set-level scores, the pixels of all images counted together.
    """

    images: int
    n_missed: int
    measures: dict[str, Distribution]
    pooled_iou: float
    pooled_dice: float


@dataclass(frozen=True)
class SegmentationSummary:
    """Segmentation scores of a data set.

    Attributes:
        lesion_images: images whose target is not empty (the primary column).
        all_images: every image, with the empty-mask rules of this module.
        images_without_lesion: number of images whose target is empty.
        false_positives: how many of those have a predicted lesion of at least one pixel.
        false_positive_rate: their share; nan when every image has a lesion.
    """

    lesion_images: SegmentationColumn
    all_images: SegmentationColumn
    images_without_lesion: int
    false_positives: int
    false_positive_rate: float


def segmentation_scores(
    prediction: np.ndarray, target: np.ndarray, *, hd95_empty: HD95Empty = "diagonal"
) -> SegmentationScores:
    """Score one predicted mask.

    Args:
        prediction: bool [H, W].
        target: bool [H, W].
        hd95_empty: HD95 when exactly one mask is empty: the image diagonal ``sqrt(H² + W²)``, infinity, or
            nan.

    Raises:
        ValueError: the arrays are not two boolean images of one size, or ``hd95_empty`` is not one of the
            three.
    """
    if prediction.dtype != bool or target.dtype != bool:
        raise ValueError(f"masks must be bool arrays, got {prediction.dtype} and {target.dtype}.")
    if prediction.ndim != 2 or prediction.shape != target.shape:
        raise ValueError(f"masks must be [H, W] of one size, got {prediction.shape} and {target.shape}.")
    predicted = int(np.count_nonzero(prediction))
    actual = int(np.count_nonzero(target))
    overlap = int(np.count_nonzero(prediction & target))
    return SegmentationScores(
        iou=_iou(overlap, predicted, actual),
        dice=_dice(overlap, predicted, actual),
        sensitivity=overlap / actual if actual else math.nan,
        precision=overlap / predicted if predicted else math.nan,
        hd95=hausdorff95(prediction, target, empty=hd95_empty),
        target_pixels=actual,
        predicted_pixels=predicted,
        overlap_pixels=overlap,
    )


def hausdorff95(prediction: np.ndarray, target: np.ndarray, *, empty: HD95Empty = "diagonal") -> float:
    """Return the 95th-percentile Hausdorff distance between two masks, in pixels.

    The boundary of a mask is the mask minus its erosion by the 4-connected cross, with everything outside the
    image counted as background. For each mask, take the Euclidean distances from its boundary pixels to the
    nearest boundary pixel of the other mask, and of those the 95th percentile (linear interpolation). HD95 is
    the larger of the two percentiles, the definition of MONAI's ``HausdorffDistanceMetric(percentile=95)``.

    Args:
        prediction: bool [H, W].
        target: bool [H, W].
        empty: the value when exactly one mask is empty, see ``segmentation_scores``. Two empty masks give 0.

    Raises:
        ValueError: ``empty`` is not "diagonal", "inf" or "exclude".
    """
    if empty not in ("diagonal", "inf", "exclude"):
        raise ValueError(f"hd95_empty must be 'diagonal', 'inf' or 'exclude', got {empty!r}.")
    if not prediction.any() and not target.any():
        return 0.0
    if not prediction.any() or not target.any():
        return {"diagonal": math.hypot(*target.shape), "inf": math.inf, "exclude": math.nan}[empty]
    crop = _bounding_box(prediction | target)
    edge_a, edge_b = _boundary(prediction[crop]), _boundary(target[crop])
    a_to_b = distance_transform_edt(~edge_b)[edge_a]
    b_to_a = distance_transform_edt(~edge_a)[edge_b]
    return float(max(np.percentile(a_to_b, 95), np.percentile(b_to_a, 95)))


def summarise_segmentation(scores: Sequence[SegmentationScores]) -> SegmentationSummary:
    """Summarise the scores of a set of images; an empty set gives nan everywhere."""
    lesion = [score for score in scores if score.target_pixels > 0]
    without = [score for score in scores if score.target_pixels == 0]
    false_positives = sum(score.predicted_pixels > 0 for score in without)
    return SegmentationSummary(
        lesion_images=_column(lesion),
        all_images=_column(scores),
        images_without_lesion=len(without),
        false_positives=false_positives,
        false_positive_rate=false_positives / len(without) if without else math.nan,
    )


def _column(scores: Sequence[SegmentationScores]) -> SegmentationColumn:
    overlap = sum(score.overlap_pixels for score in scores)
    predicted = sum(score.predicted_pixels for score in scores)
    actual = sum(score.target_pixels for score in scores)
    return SegmentationColumn(
        images=len(scores),
        n_missed=sum(score.missed for score in scores),
        measures={name: distribution([getattr(score, name) for score in scores]) for name in MEASURES},
        pooled_iou=_iou(overlap, predicted, actual) if scores else math.nan,
        pooled_dice=_dice(overlap, predicted, actual) if scores else math.nan,
    )


def distribution(values: Sequence[float]) -> Distribution:
    """Summarise the values that are not nan."""
    defined = np.array([value for value in values if not math.isnan(value)])
    n = len(defined)
    if n == 0:
        return Distribution(math.nan, math.nan, math.nan, 0)
    sd = float(np.std(defined, ddof=1)) if n > 1 and np.isfinite(defined).all() else math.nan
    return Distribution(float(np.mean(defined)), sd, float(np.median(defined)), n)


def _iou(overlap: int, predicted: int, actual: int) -> float:
    union = predicted + actual - overlap
    return overlap / union if union else 1.0


def _dice(overlap: int, predicted: int, actual: int) -> float:
    return 2 * overlap / (predicted + actual) if predicted + actual else 1.0


def _boundary(mask: np.ndarray) -> np.ndarray:
    return mask & ~binary_erosion(mask)


def _bounding_box(mask: np.ndarray) -> tuple[slice, slice]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)
