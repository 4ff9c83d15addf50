"""What is said about a variant of an ablation: spread over runs, differences over images, gain over single tasks."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
LEVEL = 95  # per cent, of the intervals

Scores = Mapping[str, float]


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (divisor n-1) of the n defined values; nan for too few."""

    mean: float
    sd: float
    n: int


@dataclass(frozen=True)
class Difference:
    """Mean over the images of variant − reference, with its bootstrap interval; nan for too few.

    Attributes:
        mean, low, high: of the difference; the interval holds ``LEVEL`` per cent of the resamples.
        images, groups, runs: how many were compared; images of a group are drawn together.
    """

    mean: float
    low: float
    high: float
    images: int
    groups: int
    runs: int


def spread(values: Sequence[float]) -> Spread:
    """Summarise one score of several runs; nan values are left out."""
    defined = [value for value in values if not math.isnan(value)]
    return Spread(
        float(np.mean(defined)) if defined else math.nan,
        float(np.std(defined, ddof=1)) if len(defined) > 1 else math.nan,
        len(defined),
    )


def paired_difference(pairs: Sequence[tuple[Scores, Scores]], group_of: Mapping[str, str]) -> Difference:
    """Compare two variants image by image.

    An image's difference is averaged over the runs in which both variants were tested on it. The images are resampled
    with replacement ``RESAMPLES`` times; those of one group together, because their scores are not independent. The
    interval is of percentiles.

    Args:
        pairs: for each run (same seed, same fold), image → score of the variant, and of the reference.
        group_of: image → group; an image without one is a group of its own.
    """
    differences: dict[str, list[float]] = defaultdict(list)
    for ours, reference in pairs:
        for image in ours.keys() & reference.keys():
            differences[image].append(ours[image] - reference[image])
    members: dict[tuple[str, str], list[float]] = defaultdict(list)
    for image in sorted(differences):
        group = group_of.get(image)
        # Pairs, so that no image is taken for the group of that name.
        members[("group", group) if group else ("image", image)].append(float(np.mean(differences[image])))
    sums = np.array([sum(values) for values in members.values()])
    sizes = np.array([len(values) for values in members.values()])
    low = high = math.nan
    if len(members) > 1:
        random = np.random.default_rng(0)
        means = []
        for _ in range(RESAMPLES):
            drawn = random.integers(len(sums), size=len(sums))
            means.append(sums[drawn].sum() / sizes[drawn].sum())
        tail = (100 - LEVEL) / 2
        low, high = (float(limit) for limit in np.percentile(means, [tail, 100 - tail]))
    return Difference(
        mean=float(sums.sum() / sizes.sum()) if len(members) else math.nan,
        low=low,
        high=high,
        images=int(sizes.sum()),
        groups=len(members),
        runs=len(pairs),
    )


def multi_task_gain(multi: Scores, single: Scores) -> float:
    """Δm in per cent: the mean over the tasks of (multi − single) / single, of scores where higher is better.

    nan where there is no task, or a single-task score of 0 or nan.

    Args:
        multi: task → score of the network for all tasks.
        single: task → score of the network for that task alone.

    Source: Vandenhende et al., Multi-Task Learning for Dense Prediction Tasks: A Survey, arXiv 2004.13379.
    """
    if not single or not all(single.values()):
        return math.nan
    return 100 * float(np.mean([(multi[task] - score) / score for task, score in single.items()]))
