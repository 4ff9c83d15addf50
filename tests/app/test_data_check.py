"""``btinet data check``: what it finds, its manifest, and training on exactly the files of a manifest."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from btinet.cli import main
from btinet.data import (
    DataSource,
    LayoutOptions,
    MaskFormat,
    audit,
    read_collection,
    read_manifest,
    split_collection,
    write_manifest,
)
from btinet.errors import UserError

Publish = Callable[[str], Any]


@pytest.fixture
def busi(publish: Publish) -> Any:
    return publish("busi")


def findings(root: Path, **options: Any) -> dict[str, tuple[str, ...]]:
    return {finding.title: finding.entries for finding in audit(read_collection(root), **options).findings}


def test_a_clean_set_has_no_findings(busi: Any) -> None:
    result = audit(read_collection(busi.root))
    assert result.usable
    assert result.findings == ()
    assert result.near_duplicates == {}
    assert result.image_kinds == {"RGB": 18}
    assert result.image_sizes == {(48, 40): 18}
    assert result.mask_kinds == {"1, values 0 and 1": 12}
    assert sum(result.lesions.values()) == 12
    assert result.hashes[busi.image] == hashlib.sha256(busi.image.read_bytes()).hexdigest()
    assert len(result.hashes) == 18 + 12


def test_every_bad_file_is_listed_not_only_the_first(busi: Any) -> None:
    folder = busi.image.parent
    (folder / "benign (2).png").write_bytes(b"")
    (folder / "benign (3).png").write_bytes(busi.image.read_bytes()[:200])
    Image.new("1", (9, 9)).save(folder / "benign (4)_mask.png")
    grey = np.arange(40 * 48, dtype=np.uint32).reshape(40, 48) % 5 * 60
    Image.fromarray(grey.astype(np.uint8)).save(folder / "benign (5)_mask.png")
    found = findings(busi.root)
    assert [Path(entry.split(":")[0]).name for entry in found["images that cannot be used"]] == [
        "benign (2).png",
        "benign (3).png",
    ]
    size, values = found["masks that cannot be used"]
    assert "benign (4)_mask.png: the mask is 9×9 pixels but its image is 48×40" in size
    assert "benign (5)_mask.png" in values
    assert "5 different values" in values
    assert len(findings(busi.root, mask_format=MaskFormat(127))["masks that cannot be used"]) == 1


def test_lesions_where_none_are_expected_and_the_reverse(busi: Any) -> None:
    Image.new("1", (48, 40)).save(busi.mask)
    shutil.copy(
        busi.image.with_name("benign (2)_mask.png"), busi.root.glob("*/normal").__next__() / "normal (3)_mask.png"
    )
    assert findings(busi.root) == {
        "no lesion in the mask, in a class where most images have one": ("benign/benign (1).png",),
        "a lesion in the mask, in a class where most images have none": ("normal/normal (3).png",),
    }


def test_duplicates_inside_and_across_classes(busi: Any) -> None:
    folder = busi.image.parent
    shutil.copy(busi.image, folder / "benign (2).png")
    shutil.copy(folder / "benign (3).png", folder.parent / "malignant" / "malignant (4).png")
    pixels = np.asarray(Image.open(folder / "benign (5).png")) // 2 + 9
    Image.fromarray(pixels).save(folder / "benign (6).png")
    assert findings(busi.root) == {
        "the same file more than once, in different classes": ("benign/benign (3).png, malignant/malignant (4).png",),
        "the same file more than once, in one class": ("benign/benign (1).png, benign/benign (2).png",),
        "near-duplicates, in one class": ("benign/benign (5).png, benign/benign (6).png",),
    }
    assert audit(read_collection(busi.root)).usable, "duplicates are warnings"


def test_leaks_of_a_split_file(busi: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(busi.image, busi.image.with_name("benign (2).png"))
    ids = [sample.id for sample in read_collection(busi.root).samples]
    split = tmp_path / "split.csv"
    parts = {"benign/benign (2).png": "test", "benign/benign (3).png": "val"}
    split.write_text("image,split\n" + "".join(f"{i},{parts.get(i, 'train')}\n" for i in ids))
    arguments = ["data", "check", str(busi.root), "--split", str(split), "--out", str(tmp_path / "m.json")]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "near-duplicates on both sides of the split (1)" in printed
    assert "benign/benign (1).png (train), benign/benign (2).png (test)" in printed
    assert main([*arguments, "--strict"]) == 1
    recorded = json.loads((tmp_path / "m.json").read_text())
    assert recorded["counts"]["benign"] == {"train": 4, "test": 1, "val": 1}
    assert {s["id"]: s["split"] for s in recorded["samples"]} == {i: parts.get(i, "train") for i in ids}
    back = read_manifest(tmp_path / "m.json", busi.root)
    assert split_collection(back, {}) == {i: parts.get(i, "train") for i in ids}, "the leak is reported, not repaired"


def test_groups_in_two_prescribed_parts_are_an_error(publish: Publish) -> None:
    table = publish("csv").table
    header, *lines = table.read_text().splitlines()
    groups = ["p", "p", *range(10)]
    splits = ["train", "test", *["train"] * 10]
    rows = [f"{line},{group},{split}" for line, group, split in zip(lines, groups, splits, strict=True)]
    table.write_text("\n".join([f"{header},group,split", *rows]) + "\n")
    result = audit(read_collection(table))
    assert not result.usable
    assert result.findings[0].title == "groups divided by the prescribed split"
    assert result.findings[0].entries == ("0.png (train), 1.png (test)",)


def test_a_set_that_cannot_be_trained_on_is_still_checked(publish: Publish, tmp_path: Path) -> None:
    whu = publish("busi_whu_mendeley")
    result = audit(DataSource(whu.root).read())
    assert [finding.title for finding in result.findings] == ["training would refuse the set"]
    assert "none of the 36 images is labelled" in result.findings[0].entries[0]
    write_manifest(tmp_path / "m.json", DataSource(whu.root).read(), result)
    assert json.loads((tmp_path / "m.json").read_text())["counts"] == {
        "not labelled": {"train": 12, "val": 12, "test": 12}
    }


def test_the_summary_is_short_unless_all_is_asked_for(busi: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("benign", "malignant"):
        for number in range(1, 5):
            (busi.image.parents[1] / folder / f"{folder} ({number}).png").write_bytes(b"x")
    assert main(["data", "check", str(busi.root)]) == 1
    printed = capsys.readouterr().out
    assert "images that cannot be used (8)" in printed
    assert "… 3 more" in printed
    assert "malignant (4).png" not in printed
    main(["data", "check", str(busi.root), "--all"])
    assert "malignant (4).png" in capsys.readouterr().out


def test_check_writes_beside_the_data_and_reading_is_left_alone(busi: Any, publish: Publish) -> None:
    before = read_collection(busi.root)
    assert main(["data", "check", str(busi.root)]) == 0
    assert (busi.root / "manifest.json").is_file()
    assert read_collection(busi.root) == before
    table = publish("csv").table
    assert main(["data", "check", str(table)]) == 0
    assert (table.parent / "manifest.json").is_file()


@pytest.mark.parametrize("flags", [["--fold", "1"], ["--split", "nowhere.csv"], ["--curated", "nowhere.csv"]])
def test_check_refuses_what_it_cannot_read(flags: list[str], busi: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(busi.root), *flags]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert (flags[1] if flags[0] != "--fold" else "--split FILE") in error
    assert not (busi.root / "manifest.json").exists()


def manifest_of(published: Any, path: Path) -> Path:
    assert main(["data", "check", str(published.root), "--out", str(path), *published.flags]) == 0
    return path


def test_a_manifest_gives_back_the_same_samples(published: Any, tmp_path: Path) -> None:
    manifest = manifest_of(published, tmp_path / "m.json")
    names = [flag.removeprefix("--").replace("-", "_") for flag in published.flags[::2]]
    options = LayoutOptions(**dict(zip(names, map(Path, published.flags[1::2]), strict=True)))
    collection = read_collection(published.root, options=options)
    back = DataSource(published.root, manifest=manifest).read()
    assert back.name == collection.name
    assert back.root == collection.root
    assert back.classes == collection.classes

    def bare(samples: Any) -> list[tuple[object, ...]]:
        return [(s.id, s.image, s.masks, s.label, s.split, s.stratum) for s in samples]

    assert bare(back.samples) == bare(collection.samples)

    def partition(samples: Any) -> set[frozenset[str]]:
        groups: dict[str, set[str]] = {}
        for s in samples:
            groups.setdefault(s.group or s.id, set()).add(s.id)
        return set(map(frozenset, groups.values()))

    assert partition(back.samples) == partition(collection.samples)
    reverse = read_manifest(manifest, published.root, collection.classes[::-1])
    assert [s.label for s in reverse.samples] == [len(collection.classes) - 1 - s.label for s in collection.samples]


def test_a_manifest_follows_the_data_to_another_place_and_ignores_additions(busi: Any, tmp_path: Path) -> None:
    manifest = manifest_of(busi, tmp_path / "m.json")
    before = read_manifest(manifest, busi.root)
    moved = Path(shutil.move(busi.root, tmp_path / "elsewhere"))
    extra = moved / "Dataset_BUSI_with_GT" / "benign" / "benign (99).png"
    Image.new("L", (40, 40)).save(extra)
    after = read_manifest(manifest, moved)
    assert [s.id for s in after.samples] == [s.id for s in before.samples]
    assert after.root == moved / "Dataset_BUSI_with_GT"


def test_near_duplicates_are_recorded_as_groups(busi: Any, tmp_path: Path) -> None:
    shutil.copy(busi.image, busi.image.with_name("benign (2).png"))
    collection = read_manifest(manifest_of(busi, tmp_path / "m.json"), busi.root)
    assert {s.id: s.group for s in collection.samples if s.group} == {
        "benign/benign (1).png": "benign/benign (1).png",
        "benign/benign (2).png": "benign/benign (1).png",
    }


@pytest.mark.parametrize(
    ("damage", "pattern"),
    [
        (
            lambda busi, m: busi.image.write_bytes(busi.image.read_bytes() + b"x"),
            r"benign \(1\)\.png: has changed .*1 of",
        ),
        (lambda busi, m: Image.new("1", (48, 40)).save(busi.mask), r"benign \(1\)_mask\.png: has changed since"),
        (lambda busi, m: busi.mask.unlink(), r"benign \(1\)_mask\.png: is missing, but .*m\.json lists it \(1 of 30"),
        (lambda busi, m: m.write_text("{"), r"m\.json: is not a manifest of btinet data check \(Expecting"),
        (lambda busi, m: m.write_text("[1]"), r"m\.json: is not a manifest of btinet data check; write one"),
        (lambda busi, m: m.write_bytes(b"\xff\xfe"), r"m\.json: is not a manifest"),
        (lambda busi, m: m.unlink(), r"m\.json: could not be read \(No such file"),
        (lambda busi, m: m.write_text(m.read_text().replace('"split": null', '"split": "x"')), "split 'x', expected"),
        (lambda busi, m: m.write_text(m.read_text().replace('"label": "benign"', '"label": "x"')), "class 'x' is none"),
        (lambda busi, m: m.write_text(m.read_text().replace('"masks"', '"mask"')), r"not a whole manifest \('masks'\)"),
        (lambda busi, m: m.write_text(m.read_text().replace('"busi"', '"x"')), r"not a whole manifest \('x'\)"),
        (lambda busi, m: m.write_text(json.dumps(json.loads(m.read_text()) | {"samples": []})), "lists no image"),
        (lambda busi, m: m.write_text(json.dumps(json.loads(m.read_text()) | {"samples": 3})), "not a whole manifest"),
    ],
)
def test_training_refuses_what_is_not_as_recorded(
    damage: Callable[[Any, Path], object],
    pattern: str,
    busi: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    manifest = manifest_of(busi, tmp_path / "m.json")
    damage(busi, manifest)
    capsys.readouterr()
    out = tmp_path / "run"
    flags = ["--model", "btinet_mobilenetv3_small_050", "--image-size", "32", "--epochs", "1", "--device", "cpu"]
    assert main(["train", "--data", str(busi.root), "--manifest", str(manifest), "--out", str(out), *flags]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    with pytest.raises(UserError, match=pattern):
        DataSource(busi.root, manifest=manifest).read()
    assert not out.exists()


def test_a_manifest_excludes_the_options_it_replaces(busi: Any, tmp_path: Path) -> None:
    manifest = manifest_of(busi, tmp_path / "m.json")
    with pytest.raises(UserError, match="leave out --curated"):
        DataSource(busi.root, options=LayoutOptions(curated=manifest), manifest=manifest).read()
    with pytest.raises(UserError, match=r"nowhere: no such file or folder"):
        DataSource(tmp_path / "nowhere", manifest=manifest).read()
