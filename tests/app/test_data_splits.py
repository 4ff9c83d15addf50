from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from btinet.data import SPLITS, Collection, Sample, read_split, split_collection, write_split
from btinet.errors import UserError


def collection(
    labels: Sequence[int],
    groups: Sequence[str | None] | None = None,
    splits: Sequence[str | None] | None = None,
) -> Collection:
    none: list[str | None] = [None] * len(labels)
    samples = tuple(
        Sample(f"{index:04d}", Path(f"{index:04d}"), (), label, group, split)
        for index, (label, group, split) in enumerate(zip(labels, groups or none, splits or none, strict=True))
    )
    return Collection("csv", Path("data"), ("x", "y", "z"), samples)


def counts(data: Collection, split: dict[str, str]) -> dict[str, dict[int, int]]:
    assert set(split) == {sample.id for sample in data.samples}
    return {
        part: dict(sorted(Counter(s.label for s in data.samples if split[s.id] == part).items())) for part in SPLITS
    }


def test_stratified_to_the_fractions() -> None:
    data = collection([0] * 200 + [1] * 100 + [2] * 60)
    assert counts(data, split_collection(data, {})) == {
        "train": {0: 140, 1: 70, 2: 42},
        "val": {0: 30, 1: 15, 2: 9},
        "test": {0: 30, 1: 15, 2: 9},
    }
    half = split_collection(data, {}, fractions=(0.5, 0.3, 0.2))
    assert counts(data, half)["train"] == {0: 100, 1: 50, 2: 30}
    assert counts(data, half)["test"] == {0: 40, 1: 20, 2: 12}


def test_the_seed_and_nothing_else_decides() -> None:
    data = collection([0] * 40 + [1] * 40)
    groups = {f"{index:04d}": str(index // 2) for index in range(80)}
    split = split_collection(data, groups, seed=3)
    torch.manual_seed(0)
    assert split_collection(data, dict(reversed(groups.items())), seed=3) == split
    assert split_collection(data, groups, seed=4) != split


def test_groups_of_both_kinds_stay_together() -> None:
    random = np.random.default_rng(0)
    labels = random.choice([0, 1, 2], 300, p=[0.6, 0.3, 0.1]).tolist()
    own = [f"p{number}" if number < 60 else None for number in random.integers(0, 120, 300).tolist()]
    data = collection(labels, own)
    groups = {f"{index:04d}": f"g{index % 50}" for index in range(0, 300, 7)}
    split = split_collection(data, groups)
    for members in (
        [(sample.group, split[sample.id]) for sample in data.samples if sample.group],
        [(group, split[image]) for image, group in groups.items()],
    ):
        assert len(set(members)) == len({group for group, _ in members})
    sizes = Counter(split.values())
    assert abs(sizes["train"] - 210) <= 15
    assert abs(sizes["val"] - 45) <= 15


def test_groups_of_very_unequal_size_come_near_the_fractions() -> None:
    """Folds cannot be equal here; which of them make up a part must be chosen well (at random: 0.13)."""
    random = np.random.default_rng(1)
    deviations = []
    for _ in range(12):
        labels = random.choice(3, 200, p=[0.6, 0.25, 0.15]).tolist()
        weights = random.pareto(1.2, 40)
        groups = [f"g{group}" for group in random.choice(40, 200, p=weights / weights.sum()).tolist()]
        data = collection(labels, groups)
        found = counts(data, split_collection(data, {}))
        deviations.append(
            max(
                abs(found[part][label] / labels.count(label) - fraction)
                for part, fraction in zip(SPLITS, (0.70, 0.15, 0.15), strict=True)
                for label in range(3)
            )
        )
    assert np.mean(deviations) < 0.105


@pytest.mark.parametrize("numbers", [(6, 6), (3, 3), (4, 5), (3, 100), (3, 3, 60), (10, 2 * 81, 7)])
def test_small_classes_are_in_every_part(numbers: tuple[int, ...]) -> None:
    data = collection([label for label, number in enumerate(numbers) for _ in range(number)])
    for seed in range(5):
        found = counts(data, split_collection(data, {}, seed=seed))
        for part in SPLITS:
            assert set(found[part]) == set(range(len(numbers)))
        largest = int(np.argmax(numbers))
        assert 0.5 <= found["train"].get(largest, 0) / numbers[largest] <= 0.8 or numbers[largest] < 5


def test_six_and_six_become_four_one_one() -> None:
    data = collection([0] * 6 + [1] * 6)
    found = counts(data, split_collection(data, {}))
    assert found == {"train": {0: 4, 1: 4}, "val": {0: 1, 1: 1}, "test": {0: 1, 1: 1}}


def test_too_few_groups_of_a_class() -> None:
    with pytest.raises(UserError, match=r"class 'x' has 2 independent group\(s\)"):
        split_collection(collection([0] * 2 + [1] * 20), {})
    data = collection([0] * 20 + [1] * 20)
    same = {f"{index:04d}": "a" if index < 19 else "b" for index in range(20)}
    with pytest.raises(UserError, match=r"class 'x' has 2 independent group\(s\)"):
        split_collection(data, same)


def test_groups_that_cannot_be_divided() -> None:
    data = collection([0, 1, 0, 1, 0, 1], ["a", "a", "b", "b", None, None])
    found = counts(data, split_collection(data, {}))
    assert all(found[part] == {0: 1, 1: 1} for part in SPLITS), "the two single ones must share a part"
    tied = collection([0, 1, 0, 2, 1, 2], ["a", "a", "b", "b", "c", "c"])
    with pytest.raises(UserError, match="has 2 independent"):
        split_collection(tied, {})
    # Groups xy, xz, yz, xyz: three of each class, but beside xyz no two disjoint parts hold all classes.
    tied = collection([0, 1, 0, 2, 1, 2, 0, 1, 2], ["a", "a", "b", "b", "c", "c", "d", "d", "d"])
    with pytest.raises(UserError, match="hold other classes too and could not be divided"):
        split_collection(tied, {})


def test_unlabelled_samples_are_divided_too() -> None:
    data = collection([-1] * 40 + [0] * 40 + [1] * 40)
    assert counts(data, split_collection(data, {}))["test"] == {-1: 6, 0: 6, 1: 6}
    only = collection([-1] * 20)
    assert counts(only, split_collection(only, {})) == {"train": {-1: 14}, "val": {-1: 3}, "test": {-1: 3}}


def test_prescribed_parts_are_kept_and_not_added_to() -> None:
    splits = (["test"] * 10 + [None] * 40) * 2
    data = collection([0] * 50 + [1] * 50, splits=splits)
    split = split_collection(data, {"0000": "a", "0030": "a"})
    assert {image for image, part in split.items() if part == "test"} == {
        *(f"{index:04d}" for index in range(10)),
        *(f"{index:04d}" for index in range(50, 60)),
        "0030",
    }, "only the rest of a group joins"
    sizes = Counter(split.values())
    assert abs(sizes["val"] - 79 * 15 / 85) <= 2
    everything = collection([0, 1, 0, 1, 0, 1], splits=["train", "train", "val", "val", "test", "test"])
    assert list(split_collection(everything, {}).values()) == ["train", "train", "val", "val", "test", "test"]
    rest = collection([0, 1, 0, 1, 0, 1], splits=[None, None, "val", "val", "test", "test"])
    assert split_collection(rest, {}) == split_collection(everything, {})


def test_contradicting_prescriptions_and_empty_parts() -> None:
    data = collection([0, 1, 0], splits=["train", "val", "test"])
    with pytest.raises(UserError, match="'0000' is prescribed for train but '0002' of the same group for test"):
        split_collection(data, {"0000": "a", "0002": "a"})
    with pytest.raises(UserError, match="no sample is left for val"):
        split_collection(collection([0, 1, 0], splits=["train", "train", "test"]), {})


@pytest.mark.parametrize("fractions", [(0.7, 0.3, 0.0), (0.7, 0.2, 0.2), (0.5, 0.5), (1.2, -0.1, -0.1)])
def test_faulty_fractions(fractions: tuple[float, float, float]) -> None:
    with pytest.raises(UserError, match="three positive numbers whose sum is 1"):
        split_collection(collection([0] * 9 + [1] * 9), {}, fractions=fractions)


def test_split_file_round_trip_and_defects(tmp_path: Path) -> None:
    data = collection([0, 1, -1, 0], [None, "p", "p", None])
    split = {"0000": "train", "0001": "val", "0002": "val", "0003": "test"}
    path = tmp_path / "split.csv"
    write_split(path, data, split, {})
    lines = ["image,label,group,split", "0000,x,,train", "0001,y,0001,val", "0002,,0001,val", "0003,x,,test"]
    assert path.read_text().splitlines() == lines
    assert read_split(path, data) == split
    for change, pattern in (
        (lambda text: text.replace("0003,x,,test\n", ""), r"1 image\(s\) of the data .* first is '0003'"),
        (lambda text: text + "0009,x,,test\n", "line 6 names '0009', which is not in the data"),
        (lambda text: text + "0003,x,,test\n", "line 6 lists '0003' a second time"),
        (lambda text: text.replace("0003,x,,test", "0003,x,,Test"), "line 5 has the split 'Test'"),
        (
            lambda text: text.replace("0000,x,,", "0000,x,0001,"),
            "'0000' is in train but '0001' of the same group is",
        ),
        (
            lambda text: text.replace("0002,,0001,val", "0002,,,test"),
            "'0001' is in val but '0002' of the same",
        ),
    ):
        path.write_text(change("\n".join(lines) + "\n"))
        with pytest.raises(UserError, match=pattern):
            read_split(path, data)
