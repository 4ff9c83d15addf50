"""Statistics of a signal over images: its distribution, by class and by difficulty, and its rank correlation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from btinet.evaluation.segmentation import Distribution, distribution

TERCILES = ("easy", "medium", "hard")
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
HISTOGRAM_BINS = 20
LEAST_IMAGES = 3  # of a correlation; two images always correlate by ±1
_BLOCK = 1_000_000  # images that are ranked at once, those of several draws together


@dataclass(frozen=True)
class Correlation:
    """Spearman's ρ of two signals, with its 95 % percentile bootstrap interval over images.

    Attributes:
        rho, low, high: nan where a signal is constant or fewer than ``LEAST_IMAGES`` images have both.
        n: images that have both signals.
    """

    rho: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Histogram:
    """Images per bin; ``edges`` has one entry more than ``counts``, and the last bin includes its upper edge."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Images:
    """What a signal is split by; every list has one entry per image.

    Attributes:
        labels: class name, None where it is not known.
        classes: the names, in the order in which they are reported.
        difficulty: per task, nan where it is undefined.
    """

    labels: Sequence[str | None]
    classes: Sequence[str]
    difficulty: Mapping[str, np.ndarray]

    @cached_property
    def terciles(self) -> dict[str, list[str | None]]:
        """Per task, the group of each image."""
        return {task: terciles(values) for task, values in self.difficulty.items()}


@dataclass(frozen=True)
class SignalSummary:
    """One signal over images.

    Attributes:
        overall: over the images where the signal is defined.
        undefined: number of the others.
        quantiles: by their probability, such as "0.25"; interpolated linearly.
        histogram: ``HISTOGRAM_BINS`` bins of equal width.
        by_class: per class name, over the images of that label.
        by_difficulty: per task and tercile.
        correlation: per task, with its difficulty.
    """

    overall: Distribution
    undefined: int
    quantiles: dict[str, float]
    histogram: Histogram
    by_class: dict[str, Distribution]
    by_difficulty: dict[str, dict[str, Distribution]]
    correlation: dict[str, Correlation]


def summarise_signal(
    values: Sequence[float], images: Images, *, limits: tuple[float, float] | None = None, resamples: int = 2000
) -> SignalSummary:
    """Summarise one signal.

    Args:
        values: one per image; nan where undefined.
        images: what to split it by.
        limits: of the histogram; default: smallest and largest value.
        resamples: of the bootstrap.
    """
    signal = np.asarray(values, dtype=float)
    defined = signal[~np.isnan(signal)]
    counts, edges = np.histogram(defined, HISTOGRAM_BINS, range=limits)
    levels = np.quantile(defined, QUANTILES).tolist() if len(defined) else [math.nan] * len(QUANTILES)
    return SignalSummary(
        overall=distribution(signal.tolist()),
        undefined=len(signal) - len(defined),
        quantiles={f"{probability:g}": value for probability, value in zip(QUANTILES, levels, strict=True)},
        histogram=Histogram(tuple(edges.tolist()), tuple(counts.tolist())),
        by_class=by_group(signal, images.labels, images.classes),
        by_difficulty={task: by_group(signal, groups, TERCILES) for task, groups in images.terciles.items()},
        correlation={task: spearman(signal, hard, resamples) for task, hard in images.difficulty.items()},
    )


def by_group(values: np.ndarray, groups: Sequence[str | None], names: Sequence[str]) -> dict[str, Distribution]:
    """Summarise ``values`` over the images of each group in ``names``."""
    members = {name: [value for value, group in zip(values, groups, strict=True) if group == name] for name in names}
    return {name: distribution(chosen) for name, chosen in members.items()}


def terciles(difficulty: np.ndarray) -> list[str | None]:
    """Divide images into equally large groups of difficulty; equal difficulties are never divided.

    The group of an image depends on the share of images that are easier than it, equal ones counted half: below 1/3
    easy, below 2/3 medium, else hard. Ties can therefore leave a group small or empty.

    Args:
        difficulty: float [N]; nan: belongs to no group (None).
    """
    ordered = np.sort(difficulty[~np.isnan(difficulty)])
    below, up_to = (np.searchsorted(ordered, difficulty, side) for side in ("left", "right"))
    thirds = 3 * (below + up_to) // (2 * max(1, len(ordered)))  # in integers, so that 1/3 is exact
    return [
        None if math.isnan(value) else TERCILES[third] for value, third in zip(difficulty, thirds.tolist(), strict=True)
    ]


def spearman(x: np.ndarray, y: np.ndarray, resamples: int = 2000, seed: int = 0) -> Correlation:
    """Spearman's rank correlation of two signals, float [N] each; ties share their mean rank.

    Images without one of the two (nan) are left out. The interval holds 95 % of the ρ of ``resamples`` draws of N
    images with replacement, from a generator of that ``seed``; draws in which a signal is constant have no ρ and are
    left out.
    """
    both = ~(np.isnan(x) | np.isnan(y))
    x, y, n = x[both], y[both], int(both.sum())
    rho = float(_rank_correlation(x, y, np.ones((1, n)))[0]) if n >= LEAST_IMAGES else math.nan
    if math.isnan(rho):
        return Correlation(math.nan, math.nan, math.nan, n)
    generator = np.random.default_rng(seed)
    rows = max(1, _BLOCK // n)
    rhos = []
    for start in range(0, resamples, rows):
        drawn = generator.integers(n, size=(min(rows, resamples - start), n))
        drawn += n * np.arange(len(drawn))[:, None]  # a bin for each draw and image
        times = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape)
        rhos.append(_rank_correlation(x, y, times))
    low, high = np.nanquantile(np.concatenate(rhos), (0.025, 0.975))
    return Correlation(rho, float(low), float(high), n)


def _rank_correlation(x: np.ndarray, y: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Of images of which each is there so many ``times``, [R, N] → [R]; nan where one of the two is constant."""
    middle = (len(x) + 1) / 2
    of_x, of_y = (_ranks(values, times) - middle for values in (x, y))
    spread = np.sqrt((times * of_x**2).sum(axis=1) * (times * of_y**2).sum(axis=1))
    with np.errstate(invalid="ignore"):
        return (times * of_x * of_y).sum(axis=1) / spread


def _ranks(values: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Mean rank of each image among all that are there, [R, N]; sorted once, however many R there are."""
    distinct, group = np.unique(values, return_inverse=True)
    order = np.argsort(group, kind="stable")
    first = np.searchsorted(group[order], np.arange(len(distinct)))
    tied = np.add.reduceat(times[:, order], first, axis=1)
    return (np.cumsum(tied, axis=1) - (tied - 1) / 2)[:, group]
