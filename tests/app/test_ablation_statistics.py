"""The statistics of an ablation, by hand and against scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from btinet.experiments.statistics import multi_task_gain, paired_difference, spread


def test_spread() -> None:
    values = [0.5, 0.7, 0.9, math.nan]
    assert spread(values).mean == pytest.approx(0.7)
    assert spread(values).sd == pytest.approx(stats.tstd(values[:3])) == pytest.approx(0.2)
    assert spread(values).n == 3
    assert spread([0.5]).mean == 0.5
    assert math.isnan(spread([0.5]).sd)
    assert math.isnan(spread([math.nan]).mean)


def test_a_difference_by_hand() -> None:
    """a was tested in two runs, c by one of the variants only; the runs need not hold the same images."""
    pairs = [({"a": 0.9, "b": 0.4, "c": 1.0}, {"a": 0.5, "b": 0.5}), ({"a": 0.7, "d": 0.1}, {"a": 0.5, "d": 0.4})]
    result = paired_difference(pairs, {})
    assert result.mean == pytest.approx((0.3 - 0.1 - 0.3) / 3)
    assert (result.images, result.groups, result.runs) == (3, 3, 2)
    assert result.low == pytest.approx(-0.3)
    assert result.high == pytest.approx(0.3)
    assert paired_difference([], {}).images == 0
    assert math.isnan(paired_difference([], {}).mean)
    one = paired_difference([({"a": 1.0}, {"a": 0.0})], {})
    assert one.mean == 1
    assert math.isnan(one.low)


def test_the_interval_is_that_of_scipy() -> None:
    random = np.random.default_rng(3)
    reference = random.uniform(0.2, 0.9, 80)
    ours = reference + random.exponential(0.05, 80) - 0.02  # skewed
    names = [f"{number}.png" for number in range(80)]
    result = paired_difference([(dict(zip(names, ours, strict=True)), dict(zip(names, reference, strict=True)))], {})
    expected = stats.bootstrap(
        (ours, reference),
        lambda a, b, axis: (a - b).mean(axis),
        paired=True,
        method="percentile",
        n_resamples=20_000,
        random_state=0,
    ).confidence_interval
    width = expected.high - expected.low
    assert result.mean == pytest.approx((ours - reference).mean())
    assert result.low == pytest.approx(expected.low, abs=0.06 * width)
    assert result.high == pytest.approx(expected.high, abs=0.06 * width)


def test_images_of_a_group_are_drawn_together() -> None:
    """Ten copies of each of 20 images say no more than the 20 do: the interval stays as wide."""
    random = np.random.default_rng(5)
    values = random.normal(0.1, 1, 20)
    alone = paired_difference(
        [({str(i): v for i, v in enumerate(values)}, dict.fromkeys(map(str, range(20)), 0.0))], {}
    )
    names = {f"{i}-{copy}": float(values[i]) for i in range(20) for copy in range(10)}
    pairs = [(names, dict.fromkeys(names, 0.0))]
    grouped = paired_difference(pairs, {name: name.split("-")[0] for name in names})
    apart = paired_difference(pairs, {})
    assert (grouped.images, grouped.groups, apart.groups) == (200, 20, 200)
    assert grouped.mean == pytest.approx(alone.mean)
    assert grouped.high - grouped.low == pytest.approx(alone.high - alone.low, rel=0.15)
    assert apart.high - apart.low == pytest.approx((alone.high - alone.low) / math.sqrt(10), rel=0.15)


def test_groups_of_unequal_size_weigh_by_their_images() -> None:
    result = paired_difference([({"a": 1.0, "b": 1.0, "c": 0.0}, dict.fromkeys("abc", 0.0))], {"a": "g", "b": "g"})
    assert result.mean == pytest.approx(2 / 3)
    assert (result.low, result.high) == (0.0, 1.0)
    assert result.groups == 2
    named_like_a_group = paired_difference([({"a": 1.0, "g": 0.0}, {"a": 0.0, "g": 0.0})], {"a": "g"})
    assert named_like_a_group.groups == 2


def test_multi_task_gain_by_hand() -> None:
    gain = multi_task_gain({"iou": 0.66, "accuracy": 0.72}, {"iou": 0.60, "accuracy": 0.80})
    assert gain == pytest.approx(100 * (0.1 - 0.1) / 2)
    assert multi_task_gain({"iou": 0.9}, {"iou": 0.6}) == pytest.approx(50)
    assert math.isnan(multi_task_gain({"iou": 0.9}, {"iou": 0.0}))
    assert math.isnan(multi_task_gain({"iou": 0.9}, {"iou": math.nan}))
    assert math.isnan(multi_task_gain({}, {}))
