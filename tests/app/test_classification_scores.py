from __future__ import annotations

import math
import warnings

import numpy as np
import pytest

from btinet.evaluation.classification import classification_scores


def one_hot(predicted: list[int], classes: int) -> np.ndarray:
    return np.eye(classes)[predicted] * 0.7 + 0.3 / classes


def test_scores_computed_by_hand() -> None:
    # label a: 3 of 4 right, one called b; label b: 1 of 2 right, one called c; label c: 2 of 2 right.
    labels = [0, 0, 0, 0, 1, 1, 2, 2]
    predicted = [0, 0, 0, 1, 1, 2, 2, 2]
    scores = classification_scores(labels, one_hot(predicted, 3), ("a", "b", "c"))
    f1 = {"a": 2 * 3 / (2 * 3 + 0 + 1), "b": 2 * 1 / (2 * 1 + 1 + 1), "c": 2 * 2 / (2 * 2 + 1 + 0)}
    assert scores.confusion == ((3, 1, 0), (0, 1, 1), (0, 0, 2))
    assert scores.accuracy == pytest.approx(6 / 8)
    assert scores.balanced_accuracy == pytest.approx((0.75 + 0.5 + 1) / 3)
    assert scores.macro_f1 == pytest.approx(sum(f1.values()) / 3)
    assert scores.weighted_f1 == pytest.approx((4 * f1["a"] + 2 * f1["b"] + 2 * f1["c"]) / 8)
    assert scores.sensitivity == {"a": 0.75, "b": 0.5, "c": 1.0}
    assert scores.specificity == {"a": 1.0, "b": pytest.approx(5 / 6), "c": pytest.approx(5 / 6)}
    assert (scores.majority_class, scores.majority_accuracy) == ("a", 0.5)
    assert scores.support == {"a": 4, "b": 2, "c": 2}
    assert scores.absent_classes == ()


def test_auroc_counts_ordered_pairs() -> None:
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 3, 40)
    # One decimal makes ties, which count half.
    probabilities = rng.dirichlet(np.ones(3), 40).round(1)
    scores = classification_scores(labels, probabilities, ("a", "b", "c"))
    expected = []
    for index, name in enumerate("abc"):
        positive, negative = probabilities[labels == index, index], probabilities[labels != index, index]
        wins = [float(p > n) + 0.5 * float(p == n) for p in positive for n in negative]
        expected.append(sum(wins) / len(wins))
        assert scores.auroc[name] == pytest.approx(expected[-1])
    assert scores.macro_auroc == pytest.approx(sum(expected) / 3)


def test_exchanging_two_predictions_lowers_every_score() -> None:
    labels, right = [0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2]
    wrong = [1, 0, 0, 1, 2, 2]
    before = classification_scores(labels, one_hot(right, 3), ("a", "b", "c"))
    after = classification_scores(labels, one_hot(wrong, 3), ("a", "b", "c"))
    for name in ("accuracy", "balanced_accuracy", "macro_f1", "weighted_f1", "macro_auroc"):
        assert getattr(before, name) == 1.0
        assert getattr(after, name) < 1.0


def test_unlabelled_images_are_ignored_and_counted() -> None:
    scores = classification_scores([0, -1, 1, -1], one_hot([0, 1, 1, 0], 2), ("a", "b"))
    assert (scores.images, scores.ignored, scores.accuracy) == (2, 2, 1.0)


def test_absent_class_is_named_and_undefined_not_zero() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = classification_scores([0, 0, 1, 1], one_hot([0, 0, 1, 2], 3), ("a", "b", "c"))
    assert scores.absent_classes == ("c",)
    assert math.isnan(scores.sensitivity["c"])
    assert math.isnan(scores.auroc["c"])
    assert scores.specificity["c"] == 0.75
    assert scores.balanced_accuracy == 0.75
    assert scores.macro_f1 == pytest.approx((1 + 2 / 3) / 2)
    assert scores.macro_auroc == pytest.approx(np.mean([scores.auroc["a"], scores.auroc["b"]]))


def test_a_single_class_has_no_auroc() -> None:
    scores = classification_scores([1, 1], one_hot([1, 0], 2), ("a", "b"))
    assert math.isnan(scores.macro_auroc)
    assert math.isnan(scores.specificity["b"])
    assert scores.accuracy == 0.5


def test_unusable_input_is_refused() -> None:
    with pytest.raises(ValueError, match="labelled"):
        classification_scores([-1], one_hot([0], 2), ("a", "b"))
    with pytest.raises(ValueError, match="finite"):
        classification_scores([0], np.array([[math.nan, 1.0]]), ("a", "b"))
    with pytest.raises(ValueError, match="labels"):
        classification_scores([2], one_hot([0], 2), ("a", "b"))
    with pytest.raises(ValueError, match="probabilities"):
        classification_scores([0, 1], one_hot([0], 2), ("a", "b"))
