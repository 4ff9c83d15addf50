"""Statistics of signals against scipy and numpy, ties and gaps included."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from scipy.stats import spearmanr

from btinet.evaluation.analysis import signals
from btinet.evaluation.analysis.signals import Images, by_group, spearman, summarise_signal, terciles

E, M, H = "easy", "medium", "hard"
NAN = math.nan


@pytest.mark.parametrize(
    ("difficulty", "expected"),
    [
        ([0.1, 0.5, 0.9], [E, M, H]),
        ([0.9, 0.1, 0.5, 0.7, 0.2, 0.3], [H, E, M, H, E, M]),
        ([0.1, 0.2, 0.3, 0.4], [E, M, M, H]),
        ([0.5, 0.5, 0.5, 0.5], [M, M, M, M]),
        ([0.0, 0.0, 0.0, 0.0, 0.7, 1.0], [M, M, M, M, H, H]),  # the four zeros are in the middle of 0 and 4/6
        ([0.0, 0.0, 0.0, 0.7, 0.8, 1.0], [E, E, E, M, H, H]),
        ([0.0, 0.5, 0.5, 0.6, 0.7, 0.8], [E, M, M, M, H, H]),  # 1/3 of the images, exactly, are easier than 0.5
        ([0.3, NAN, 0.1, 0.2, NAN], [H, None, E, M, None]),
        ([NAN, NAN], [None, None]),
        ([0.4], [M]),
        ([], []),
    ],
)
def test_terciles_by_hand(difficulty: list[float], expected: list[str | None]) -> None:
    assert terciles(np.array(difficulty)) == expected


def test_terciles_are_equally_large_and_in_order() -> None:
    random = np.random.default_rng(0)
    for n in (3, 9, 10, 11, 117):
        groups = np.array(terciles(difficulty := random.permutation(n) / n))
        sizes = [int((groups == name).sum()) for name in signals.TERCILES]
        assert max(sizes) - min(sizes) <= 1
        assert sum(sizes) == n
        bounds = [difficulty[groups == name] for name in signals.TERCILES]
        assert all(easier.max() < harder.min() for easier, harder in pairwise(bounds))
    for _ in range(20):
        tied = random.integers(0, 5, 30).astype(float)
        of = dict(zip(tied.tolist(), terciles(tied), strict=True))
        assert terciles(tied) == [of[value] for value in tied.tolist()]


@pytest.mark.parametrize("values", [100, 4])  # 4: many ties
def test_correlation_and_interval_are_scipys(values: int) -> None:
    random = np.random.default_rng(3)
    x = random.integers(0, values, 40).astype(float)
    y = x + random.integers(0, 2 * values, 40)
    found = spearman(x, y, resamples=200, seed=5)
    assert found.rho == pytest.approx(spearmanr(x, y).statistic, rel=1e-12)
    drawn = np.random.default_rng(5).integers(40, size=(200, 40))
    low, high = np.quantile([spearmanr(x[i], y[i]).statistic for i in drawn], (0.025, 0.975))
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-12)
    assert found.n == 40
    assert low < found.rho < high


def test_interval_does_not_depend_on_how_many_are_ranked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    x, y = random.normal(size=(2, 50))
    whole = spearman(x, y, resamples=1001)
    monkeypatch.setattr(signals, "_BLOCK", 50 * 100)
    blocks = spearman(x, y, resamples=1001)
    assert blocks.rho == whole.rho
    assert (blocks.low, blocks.high) == pytest.approx((whole.low, whole.high), abs=0.05)


def test_images_without_a_value_are_left_out_of_the_correlation() -> None:
    x, y = np.array([1.0, NAN, 2.0, 3.0, 4.0, 9.0]), np.array([1.0, 7.0, 3.0, 2.0, 4.0, NAN])
    found = spearman(x, y)
    assert found.n == 4
    assert found.rho == pytest.approx(spearmanr([1, 2, 3, 4], [1, 3, 2, 4]).statistic)
    assert spearman(x, y) == found


@pytest.mark.parametrize(
    ("x", "y"), [([1, 1, 1, 1], [1, 2, 3, 4]), ([1, 2], [1, 2]), ([], []), ([1, NAN, 2, NAN], [1, 2, 3, 4])]
)
def test_undefined_correlations_are_nan(x: list[float], y: list[float]) -> None:
    found = spearman(np.array(x, dtype=float), np.array(y, dtype=float))
    assert all(math.isnan(value) for value in (found.rho, found.low, found.high))


def test_summary_of_a_signal() -> None:
    random = np.random.default_rng(1)
    values = random.uniform(size=30)
    labels = ["a", "b", None] * 10
    hard = {"seg": random.uniform(size=30), "clf": random.uniform(size=30)}
    hard["seg"][:6] = NAN
    with_gap = values.copy()
    with_gap[7] = NAN
    found = summarise_signal(with_gap.tolist(), Images(labels, ("a", "b", "c"), hard), limits=(0, 1), resamples=100)
    kept = np.delete(values, 7)
    assert (found.overall.n, found.undefined) == (29, 1)
    assert found.overall.mean == pytest.approx(kept.mean())
    assert found.overall.sd == pytest.approx(kept.std(ddof=1))
    assert found.quantiles["0.25"] == pytest.approx(np.quantile(kept, 0.25))
    assert list(found.quantiles) == ["0", "0.05", "0.25", "0.5", "0.75", "0.95", "1"]
    assert found.histogram.edges == pytest.approx(np.linspace(0, 1, 21).tolist())
    assert list(found.histogram.counts) == np.histogram(kept, 20, (0, 1))[0].tolist()
    assert found.by_class["a"].mean == pytest.approx(values[0::3].mean())
    assert found.by_class["b"].n == 9  # image 7 has no value
    assert found.by_class["c"].n == 0
    order = np.argsort(hard["clf"])
    assert found.by_difficulty["clf"]["easy"].mean == pytest.approx(np.nanmean(with_gap[order[:10]]))
    assert sum(group.n for group in found.by_difficulty["seg"].values()) == 23
    both = ~np.isnan(with_gap) & ~np.isnan(hard["seg"])
    assert found.correlation["seg"].rho == pytest.approx(spearmanr(values[both], hard["seg"][both]).statistic)
    assert found.correlation["clf"].n == 29


def test_a_signal_without_any_value() -> None:
    images = Images([None, None], ("a",), {"seg": np.array([0.1, 0.2]), "clf": np.array([0.1, 0.2])})
    found = summarise_signal([NAN, NAN], images)
    assert (found.overall.n, found.undefined) == (0, 2)
    assert math.isnan(found.quantiles["0.5"])
    assert sum(found.histogram.counts) == 0


def test_groups_that_nobody_is_in_are_empty() -> None:
    found = by_group(np.array([1.0, 3.0]), ["a", None], ("a", "b"))
    assert (found["a"].n, found["a"].mean) == (1, 1.0)
    assert found["b"].n == 0
