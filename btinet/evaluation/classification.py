"""Scores of predicted classes, by scikit-learn, with absent classes named instead of scored as zero."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn import metrics


@dataclass(frozen=True)
class ClassificationScores:
    """Scores over the labelled images of a data set.

    Means over classes run over the classes that occur in the labels; the others are named in
    ``absent_classes`` and have nan where their score is undefined.

    Attributes:
        images: number of labelled images, the ones that are scored.
        ignored: number of images whose label is -1.
        accuracy: share of images whose most probable class is the label.
        balanced_accuracy: mean sensitivity over classes.
        macro_f1: mean F1 over classes.
        weighted_f1: mean F1 weighted by the number of images of each class.
        macro_auroc: mean one-versus-rest AUROC over classes; nan when only one class occurs.
        majority_class, majority_accuracy: the most frequent label and the accuracy of always answering it.
        support, sensitivity, specificity, auroc: per class name; AUROC is one-versus-rest.
        confusion: number of images, rows = label, columns = predicted class, in the order of the classes.
        absent_classes: classes without a single labelled image.
    """

    images: int
    ignored: int
    accuracy: float
    balanced_accuracy: float
    macro_f1: float
    weighted_f1: float
    macro_auroc: float
    majority_class: str
    majority_accuracy: float
    support: dict[str, int]
    sensitivity: dict[str, float]
    specificity: dict[str, float]
    auroc: dict[str, float]
    confusion: tuple[tuple[int, ...], ...]
    absent_classes: tuple[str, ...]


def classification_scores(
    labels: Sequence[int] | np.ndarray, probabilities: np.ndarray, classes: Sequence[str]
) -> ClassificationScores:
    """Score predicted class probabilities.

    Args:
        labels: int [N], index into ``classes``; -1 = not labelled, ignored and counted.
        probabilities: float [N, K], finite; the predicted class is the most probable one (the first of
            equals).
        classes: K names.

    Raises:
        ValueError: shapes do not fit, a label is outside -1..K-1, a probability is not finite, or no image is
            labelled.
    """
    every_label = np.asarray(labels)
    if probabilities.shape != (len(every_label), len(classes)):
        raise ValueError(
            f"probabilities must be [{len(every_label)} images, {len(classes)} classes], got {probabilities.shape}."
        )
    if not np.isfinite(probabilities).all():
        raise ValueError("probabilities must be finite.")
    if len(every_label) and not (every_label.min() >= -1 and every_label.max() < len(classes)):
        raise ValueError(f"labels must lie in -1..{len(classes) - 1}, got {sorted(set(every_label.tolist()))}.")
    labelled = every_label >= 0
    if not labelled.any():
        raise ValueError("classification scores need at least one labelled image.")
    truth, scores = every_label[labelled], probabilities[labelled]
    predicted = scores.argmax(axis=1)
    indices = range(len(classes))
    confusion = metrics.confusion_matrix(truth, predicted, labels=list(indices))
    support = confusion.sum(axis=1)
    present = [index for index in indices if support[index]]
    auroc = [_auroc(truth == index, scores[:, index]) for index in indices]
    return ClassificationScores(
        images=len(truth),
        ignored=int((~labelled).sum()),
        accuracy=float(metrics.accuracy_score(truth, predicted)),
        balanced_accuracy=float(metrics.recall_score(truth, predicted, labels=present, average="macro")),
        macro_f1=_f1(truth, predicted, present, "macro"),
        weighted_f1=_f1(truth, predicted, present, "weighted"),
        macro_auroc=float(np.mean([auroc[index] for index in present])),
        majority_class=classes[int(support.argmax())],
        majority_accuracy=float(support.max() / support.sum()),
        support={name: int(support[index]) for index, name in enumerate(classes)},
        sensitivity={name: _sensitivity(confusion, index) for index, name in enumerate(classes)},
        specificity={name: _specificity(confusion, index) for index, name in enumerate(classes)},
        auroc=dict(zip(classes, auroc, strict=True)),
        confusion=tuple(tuple(int(count) for count in row) for row in confusion),
        absent_classes=tuple(name for index, name in enumerate(classes) if not support[index]),
    )


def _f1(truth: np.ndarray, predicted: np.ndarray, present: list[int], average: str) -> float:
    return float(metrics.f1_score(truth, predicted, labels=present, average=average, zero_division=0.0))


def _auroc(positive: np.ndarray, score: np.ndarray) -> float:
    if positive.all() or not positive.any():
        return math.nan
    return float(metrics.roc_auc_score(positive, score))


def _sensitivity(confusion: np.ndarray, index: int) -> float:
    total = confusion[index].sum()
    return float(confusion[index, index] / total) if total else math.nan


def _specificity(confusion: np.ndarray, index: int) -> float:
    others = np.delete(confusion, index, axis=0)
    total = others.sum()
    return float(np.delete(others, index, axis=1).sum() / total) if total else math.nan
