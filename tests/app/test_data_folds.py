"""``btinet data split``, its folds, and training and evaluating on one of them."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from btinet.cli import main
from btinet.data import Collection, Sample, fold_collection, read_collection, read_split, write_folds
from btinet.data.groups import without_prescribed
from btinet.errors import UserError


def collection(labels: list[int], groups: list[str | None] | None = None, splits: list[str | None] | None = None):
    none: list[str | None] = [None] * len(labels)
    rows = zip(labels, groups or none, splits or none, strict=True)
    samples = tuple(Sample(f"{i:03d}", Path(str(i)), (), label, g, s) for i, (label, g, s) in enumerate(rows))
    return Collection("csv", Path("data"), ("x", "y", "z"), samples)


def test_every_sample_is_tested_once_and_validates_once(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    data = collection(random.integers(0, 3, 120).tolist(), [f"p{n}" for n in random.integers(0, 50, 120).tolist()])
    folds = fold_collection(data, {}, 5, seed=1)
    assert fold_collection(data, {}, 5, seed=1) == folds != fold_collection(data, {}, 5, seed=2)
    for group in {s.group for s in data.samples}:
        assert len({folds[s.id] for s in data.samples if s.group == group}) == 1
    sizes = Counter(folds.values())
    assert max(sizes.values()) - min(sizes.values()) <= 6
    path = tmp_path / "folds.csv"
    write_folds(path, data, folds, {})
    splits = [read_split(path, data, fold) for fold in range(5)]
    for sample in data.samples:
        assert Counter(split[sample.id] for split in splits) == {"test": 1, "val": 1, "train": 3}
        assert splits[folds[sample.id]][sample.id] == "test"
        assert splits[folds[sample.id] - 1][sample.id] == "val"


def test_folds_are_stratified() -> None:
    data = collection([0] * 100 + [1] * 50 + [2] * 25)
    folds = fold_collection(data, {}, 5)
    found = Counter((folds[s.id], s.label) for s in data.samples)
    assert found == {(fold, label): count for fold in range(5) for label, count in ((0, 20), (1, 10), (2, 5))}


def test_given_groups_stay_together() -> None:
    data = collection([0, 1] * 30)
    groups = {f"{i:03d}": str(i // 4) for i in range(60)}
    folds = fold_collection(data, groups, 3)
    assert len({(groups[i], fold) for i, fold in folds.items()}) == 15


@pytest.mark.parametrize(("part", "other"), [("test", "val"), ("val", "test")])
def test_a_prescribed_part_stays_and_the_fold_is_the_other(part: str, other: str, tmp_path: Path) -> None:
    data = collection([0, 1] * 20, splits=[part] * 8 + [None] * 32)
    folds = fold_collection(data, {}, 2)
    assert set(folds) == {f"{i:03d}" for i in range(8, 40)}
    path = tmp_path / "folds.csv"
    write_folds(path, data, folds, {})
    for number in range(2):
        split = read_split(path, data, number)
        assert {i for i, p in split.items() if p == part} == {f"{i:03d}" for i in range(8)}
        assert {i for i, p in split.items() if p == other} == {i for i, fold in folds.items() if fold == number}


def test_what_cannot_be_folded() -> None:
    for data, folds, pattern in (
        (collection([0, 1] * 9), 2, "--folds 2: expected at least 3, for train, test and val"),
        (collection([0, 1] * 9, splits=["test", "test", *[None] * 16]), 1, "expected at least 2, for train, val"),
        (collection([0, 1] * 9, splits=["test", "val", *[None] * 16]), 3, "val and test are prescribed"),
        (collection([0] * 9 + [1] * 4), 5, r"class 'y' has 4 independent group\(s\) of images, too few for 5 folds"),
        (collection([0, 1] * 5, splits=["test"] * 10), 3, "nothing is left to fold"),
    ):
        with pytest.raises(UserError, match=pattern):
            fold_collection(data, {}, folds)


def test_a_fold_without_a_class_is_refused() -> None:
    labels = [1, 0, 0, 1, 1, 0, 1, 0, 0, 1, 1, 1, 1, 1]
    data = collection(labels, [f"g{number}" for number in (4, 1, 1, 3, 4, 2, 0, 4, 2, 0, 0, 2, 3, 2)])
    with pytest.raises(
        UserError, match="fold 0 would hold no image of the class 'x'; use fewer folds or another --seed"
    ):
        fold_collection(data, {}, 3)


def test_fold_files_and_their_defects(tmp_path: Path) -> None:
    data = collection([0, 1] * 9)
    path = tmp_path / "folds.csv"
    write_folds(path, data, fold_collection(data, {}, 3), {})
    lines = path.read_text().splitlines()
    assert lines[0] == "image,label,group,split,fold"
    for fold in (None, 3, -1):
        with pytest.raises(UserError, match=r"--fold: .*folds\.csv holds the folds 0 to 2"):
            read_split(path, data, fold)
    path.write_text("\n".join(lines).replace(",2", ",4"))
    with pytest.raises(UserError, match="column fold holds 0, 1, 4, expected 0, 1, 2"):
        read_split(path, data, 0)
    path.write_text("\n".join([lines[0], *(f"{line[:-1]}0" for line in lines[1:])]))
    with pytest.raises(UserError, match=r"holds 1 fold\(s\), expected at least 3"):
        read_split(path, data, 0)
    path.write_text("\n".join(["image,split", *(f"{s.id},train" for s in data.samples)]))
    with pytest.raises(UserError, match=r"--fold 0: .*folds\.csv holds no folds"):
        read_split(path, data, 0)


def test_strata_are_held_in_equal_shares() -> None:
    samples = tuple(
        Sample(f"{i:03d}", Path(str(i)), (), i % 2, stratum=("ax", "co")[i // 2 % 2] if i < 80 else "sa")
        for i in range(120)
    )
    data = Collection("brisc", Path("data"), ("x", "y"), samples)
    folds = fold_collection(data, {}, 5)
    found = Counter((folds[s.id], s.label, s.stratum) for s in samples)
    assert set(found.values()) == {4}


def test_near_duplicates_do_not_change_a_prescribed_part() -> None:
    data = collection([0] * 4, splits=["test", None, None, "val"])
    assert without_prescribed(data.samples, dict.fromkeys(["000", "001", "002", "003"], "a")) == {
        "001": "a",
        "002": "a",
    }


def test_train_and_evaluate_on_a_fold(publish: Callable[[str], Any], tmp_path: Path) -> None:
    busi = publish("busi")
    table = tmp_path / "folds.csv"
    assert main(["data", "split", str(busi.root), "--folds", "3", "--out", str(table), "--seed", "5"]) == 0
    out = tmp_path / "run"
    model = ["--model", "btinet_mobilenetv3_small_050", "--image-size", "32", "--device", "cpu", "--epochs", "1"]
    flags = ["--stage2-epochs", "0", "--split", str(table), "--fold", "2"]
    assert main(["train", "--data", str(busi.root), "--out", str(out), *model, *flags]) == 0
    with table.open(newline="") as file:
        tested = {row["image"] for row in csv.DictReader(file) if row["fold"] == "2"}
    split = read_split(out / "split.csv", read_collection(busi.root))
    assert {image for image, part in split.items() if part == "test"} == tested
    assert main(["evaluate", str(out)]) == 0
    with (out / "evaluation-test" / "per_image.csv").open(newline="") as file:
        assert {row["image"] for row in csv.DictReader(file)} == tested


@pytest.mark.slow
def test_options_of_the_data_are_repeated_by_evaluate(
    publish: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A curated list and a manifest are in the run's config, with absolute paths."""
    busi = publish("busi")
    curated = tmp_path / "curated.csv"
    rows = [f"{name};{number}" for name in ("benign", "malignant", "normal") for number in range(1, 6)]
    curated.write_text("\n".join(["class;id", *rows]) + "\n")
    model = ["--model", "btinet_mobilenetv3_small_050", "--image-size", "32", "--device", "cpu", "--epochs", "1"]
    model += ["--stage2-epochs", "0"]
    manifest = tmp_path / "m.json"
    assert main(["data", "check", str(busi.root), "--curated", str(curated), "--out", str(manifest)]) == 0
    for name, flags in (("a", ["--curated", curated.name]), ("b", ["--manifest", manifest.name])):
        monkeypatch.chdir(tmp_path)
        out = tmp_path / name
        assert main(["train", "--data", str(busi.root), "--out", str(out), *model, *flags]) == 0
        assert len((out / "split.csv").read_text().splitlines()) == 16
        monkeypatch.chdir("/")
        assert main(["evaluate", str(out)]) == 0
    other = ["evaluate", str(out), "--data", str(busi.root), "--split", "all", "--out", str(tmp_path / "all")]
    for more, lines in (([], 19), (["--manifest", str(manifest)], 16)):
        assert main([*other, *more]) == 0
        assert len((tmp_path / "all" / "per_image.csv").read_text().splitlines()) == lines
    assert (tmp_path / "a" / "split.csv").read_text() == (tmp_path / "b" / "split.csv").read_text()
    assert main(["evaluate", str(tmp_path / "a"), "--curated", str(curated)]) == 2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--folds", "2"], "--folds 2: expected at least 3"),
        (["--fractions", "0.5", "0.5", "0.5"], "three positive numbers"),
        (["--groups", "nowhere.csv"], "nowhere.csv"),
        (["--dataset", "unet"], "'unet'"),
        (["--folds", "3", "--out", "{data}"], "could not be written"),
    ],
)
def test_split_refuses(
    flags: list[str], words: str, publish: Callable[[str], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    busi = publish("busi")
    out = tmp_path / "split.csv"
    arguments = ["data", "split", str(busi.root), "--out", str(out)]
    assert main([*arguments, *(flag.format(data=busi.root) for flag in flags)]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert words in error
    assert not out.exists()
    assert main(["train", "--data", str(busi.root), "--out", str(out), "--fold", "1"]) == 2
    assert "give them with --split FILE" in capsys.readouterr().err
