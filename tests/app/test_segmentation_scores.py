from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from sklearn.metrics import f1_score, jaccard_score, precision_score, recall_score

from btinet.evaluation.segmentation import hausdorff95, segmentation_scores, summarise_segmentation


def rectangle(top: int, left: int, height: int, width: int, shape: tuple[int, int] = (30, 40)) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    mask[top : top + height, left : left + width] = True
    return mask


def blob(seed: int, shape: tuple[int, int] = (24, 33)) -> np.ndarray:
    noise = gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 3)
    return noise > np.quantile(noise, 0.8)


def brute_force_hd95(a: np.ndarray, b: np.ndarray) -> float:
    def boundary(mask: np.ndarray) -> list[tuple[int, int]]:
        height, width = mask.shape
        inside = {(r, c) for r in range(height) for c in range(width) if mask[r, c]}
        return [(r, c) for r, c in inside if not {(r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)} <= inside]

    def directed(points: list[tuple[int, int]], others: list[tuple[int, int]]) -> float:
        nearest = sorted(min(math.dist(point, other) for other in others) for point in points)
        position = 0.95 * (len(nearest) - 1)
        low = math.floor(position)
        high = min(low + 1, len(nearest) - 1)
        return nearest[low] + (position - low) * (nearest[high] - nearest[low])

    edge_a, edge_b = boundary(a), boundary(b)
    return max(directed(edge_a, edge_b), directed(edge_b, edge_a))


def test_two_overlapping_squares() -> None:
    scores = segmentation_scores(rectangle(5, 10, 10, 10), rectangle(5, 5, 10, 10))
    # 100 pixels each, 50 shared.
    assert scores.iou == pytest.approx(50 / 150)
    assert scores.dice == pytest.approx(0.5)
    assert scores.sensitivity == pytest.approx(0.5)
    assert scores.precision == pytest.approx(0.5)
    assert (scores.target_pixels, scores.predicted_pixels, scores.overlap_pixels) == (100, 100, 50)


def test_sensitivity_and_precision_are_not_exchanged() -> None:
    scores = segmentation_scores(rectangle(0, 0, 4, 10), rectangle(0, 0, 2, 10))
    assert (scores.sensitivity, scores.precision) == (1.0, 0.5)


def test_hd95_of_two_pixels_is_their_distance() -> None:
    assert hausdorff95(rectangle(0, 0, 1, 1), rectangle(3, 4, 1, 1)) == 5.0


def test_hd95_is_the_larger_directed_percentile() -> None:
    # From the line to the pixel: 0, 1, ..., 20, whose 95th percentile is 19; from the pixel to the line: 0.
    # The plain Hausdorff distance would be 20, the percentile of both directions pooled 18.95.
    line, pixel = rectangle(0, 0, 1, 21), rectangle(0, 0, 1, 1)
    assert hausdorff95(line, pixel) == 19.0
    assert hausdorff95(pixel, line) == 19.0


@pytest.mark.parametrize("seed", range(8))
def test_hd95_equals_brute_force(seed: int) -> None:
    prediction, target = blob(seed), blob(seed + 100)
    assert hausdorff95(prediction, target) == pytest.approx(brute_force_hd95(prediction, target), abs=1e-9)


def test_hd95_of_lesions_at_the_image_edge_equals_brute_force() -> None:
    prediction, target = rectangle(0, 0, 30, 12), rectangle(10, 20, 20, 20)
    assert hausdorff95(prediction, target) == pytest.approx(brute_force_hd95(prediction, target), abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_pixel_scores_equal_scikit_learn(seed: int) -> None:
    prediction, target = blob(seed), blob(seed + 50)
    scores = segmentation_scores(prediction, target)
    truth, answer = target.ravel(), prediction.ravel()
    assert scores.iou == pytest.approx(jaccard_score(truth, answer))
    assert scores.dice == pytest.approx(f1_score(truth, answer))
    assert scores.sensitivity == pytest.approx(recall_score(truth, answer))
    assert scores.precision == pytest.approx(precision_score(truth, answer))


def test_losing_one_pixel_lowers_the_scores() -> None:
    target = rectangle(5, 5, 10, 10)
    prediction = target.copy()
    prediction[5, 5] = False
    scores = segmentation_scores(prediction, target)
    assert (scores.iou, scores.dice, scores.precision) == (0.99, pytest.approx(198 / 199), 1.0)


@pytest.mark.parametrize(("policy", "expected"), [("diagonal", 50.0), ("inf", math.inf), ("exclude", math.nan)])
def test_hd95_of_one_empty_mask_follows_the_policy(policy: str, expected: float) -> None:
    empty, lesion = rectangle(0, 0, 0, 0), rectangle(5, 5, 10, 10)
    for prediction, target in ((empty, lesion), (lesion, empty)):
        scores = segmentation_scores(prediction, target, hd95_empty=policy)  # type: ignore[arg-type]
        assert scores.hd95 == pytest.approx(expected, nan_ok=True)
        assert (scores.iou, scores.dice) == (0.0, 0.0)
    missed = segmentation_scores(empty, lesion)
    assert missed.missed
    assert missed.sensitivity == 0.0
    assert math.isnan(missed.precision)
    alarm = segmentation_scores(lesion, empty)
    assert not alarm.missed
    assert math.isnan(alarm.sensitivity)
    assert alarm.precision == 0.0


@pytest.mark.parametrize("policy", ["diagonal", "inf", "exclude"])
def test_two_empty_masks_agree(policy: str) -> None:
    empty = rectangle(0, 0, 0, 0)
    scores = segmentation_scores(empty, empty, hd95_empty=policy)  # type: ignore[arg-type]
    assert (scores.iou, scores.dice, scores.hd95) == (1.0, 1.0, 0.0)
    assert math.isnan(scores.sensitivity)
    assert math.isnan(scores.precision)
    assert not scores.missed


def test_masks_that_do_not_fit_are_refused() -> None:
    mask = rectangle(0, 0, 3, 3)
    with pytest.raises(ValueError, match="bool"):
        segmentation_scores(mask.astype(np.uint8), mask)
    with pytest.raises(ValueError, match="one size"):
        segmentation_scores(mask[:-1], mask)
    with pytest.raises(ValueError, match="hd95_empty"):
        segmentation_scores(mask, mask, hd95_empty="zero")  # type: ignore[arg-type]


def test_summary_separates_images_with_and_without_lesion() -> None:
    empty, lesion = rectangle(0, 0, 0, 0), rectangle(5, 5, 10, 10)
    pairs = [
        (lesion, lesion),  # Dice 1
        (rectangle(5, 10, 10, 10), lesion),  # Dice 0.5
        (empty, lesion),  # missed
        (empty, empty),  # Dice 1, only in all images
        (rectangle(0, 0, 2, 5), empty),  # false alarm of 10 pixels
    ]
    summary = summarise_segmentation([segmentation_scores(p, t) for p, t in pairs])
    lesion_images, every = summary.lesion_images, summary.all_images
    assert (lesion_images.images, every.images) == (3, 5)
    assert (lesion_images.n_missed, every.n_missed) == (1, 1)
    dice = lesion_images.measures["dice"]
    assert (dice.mean, dice.sd, dice.median, dice.n) == (pytest.approx(0.5), pytest.approx(0.5), 0.5, 3)
    assert every.measures["dice"].mean == pytest.approx((1 + 0.5 + 0 + 1 + 0) / 5)
    assert lesion_images.measures["precision"].n == 2
    assert every.measures["sensitivity"].n == 3
    assert lesion_images.pooled_dice == pytest.approx(2 * 150 / (200 + 300))
    assert lesion_images.pooled_iou == pytest.approx(150 / 350)
    assert every.pooled_iou == pytest.approx(150 / 360)
    assert (summary.images_without_lesion, summary.false_positives) == (2, 1)
    assert summary.false_positive_rate == 0.5
    assert lesion_images.measures["hd95"].mean == pytest.approx((0 + 5 + 50) / 3)


def test_excluded_and_infinite_distances_stay_visible() -> None:
    empty, lesion = rectangle(0, 0, 0, 0), rectangle(5, 5, 10, 10)
    excluded = summarise_segmentation(
        [segmentation_scores(p, lesion, hd95_empty="exclude") for p in (lesion, empty)]
    ).lesion_images
    assert (excluded.measures["hd95"].mean, excluded.measures["hd95"].n, excluded.n_missed) == (0.0, 1, 1)
    infinite = summarise_segmentation(
        [segmentation_scores(p, lesion, hd95_empty="inf") for p in (lesion, empty)]
    ).lesion_images
    assert infinite.measures["hd95"].mean == math.inf
    assert math.isnan(infinite.measures["hd95"].sd)


def test_summary_of_no_image_is_undefined() -> None:
    summary = summarise_segmentation([])
    assert math.isnan(summary.all_images.measures["dice"].mean)
    assert math.isnan(summary.all_images.pooled_dice)
    assert math.isnan(summary.false_positive_rate)
