"""Each published layout: what is read from it, and every kind of damage, through the command line."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from btinet.cli import main
from btinet.data import (
    DATASETS,
    Collection,
    DataSource,
    LayoutOptions,
    check_trainable,
    read_collection,
    read_mask,
    split_collection,
)
from btinet.errors import UserError
from btinet.training.options import TrainOptions

Publish = Callable[[str], Any]


def layout_options(published: Any) -> LayoutOptions:
    names = [flag.removeprefix("--").replace("-", "_") for flag in published.flags[::2]]
    return LayoutOptions(**dict(zip(names, map(Path, published.flags[1::2]), strict=True)))


def read(published: Any, **options: Any) -> Collection:
    return read_collection(published.root, **{"options": layout_options(published)} | options)


def counts(collection: Collection) -> dict[tuple[str, str | None], int]:
    return Counter((collection.classes[s.label] if s.label >= 0 else "?", s.split) for s in collection.samples)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def expect(published: Any, pattern: str, **options: Any) -> None:
    with pytest.raises(UserError, match=pattern) as caught:
        read(published, **options)
    assert "\n" not in str(caught.value)


def test_recognised_whole_and_trainable(published: Any) -> None:
    collection = read(published)
    assert collection.name in DATASETS
    check_trainable(collection)
    assert [s.id for s in collection.samples] == sorted({s.id for s in collection.samples})
    assert {s.image for s in collection.samples} >= {published.image}
    sample = next(s for s in collection.samples if s.image == published.image)
    assert sample.masks == (published.mask,)
    assert (collection.root / sample.id) == sample.image
    assert read(published, dataset=collection.name) == collection
    reverse = read(published, classes=collection.classes[::-1])
    last = len(collection.classes) - 1
    assert [s.label for s in reverse.samples] == [last - s.label for s in collection.samples]
    expect(published, r"(none|one) of (the classes )?a, b", classes=("a", "b"))
    split = split_collection(collection, {})
    for part in ("train", "val", "test"):
        assert {s.label for s in collection.samples if split[s.id] == part} == set(range(len(collection.classes)))


def test_the_order_of_a_directory_listing_does_not_matter(published: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    collection = read(published)
    listing = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda self: iter(sorted(listing(self), reverse=True)))
    assert read(published) == collection


def truncate(published: Any) -> str:
    published.image.write_bytes(published.image.read_bytes()[:250])
    return published.image.name


def empty_file(published: Any) -> str:
    published.image.write_bytes(b"")
    return published.image.name


def text_as_image(published: Any) -> str:
    published.image.write_text("<html>404</html>")
    return published.image.name


def resize_mask(published: Any) -> str:
    Image.open(published.mask).resize((9, 9)).save(published.mask)
    return published.mask.name


def grey_mask(published: Any) -> str:
    pixels = np.asarray(Image.open(published.mask).convert("L"))
    Image.fromarray((pixels // 2 + np.arange(pixels.shape[1]) % 7).astype(np.uint8)).save(published.mask)
    return published.mask.name


def missing_mask(published: Any) -> str:
    published.mask.unlink()
    return published.image.name if published.root.name != "csv" else published.mask.name


def missing_image(published: Any) -> str:
    published.image.unlink()
    return published.image.stem


FILES = [truncate, empty_file, text_as_image, resize_mask, grey_mask]


@pytest.fixture
def run(published: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def command(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in (*arguments, *published.flags)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


def train_flags(published: Any, out: Path) -> list[object]:
    model = ["--model", "btinet_mobilenetv3_small_050", "--image-size", 32, "--epochs", 1, "--device", "cpu"]
    return ["train", "--data", published.root, "--out", out, *model]


@pytest.mark.parametrize("damage", FILES)
def test_a_bad_file_is_named_and_nothing_is_written(
    damage: Callable[[Any], str], published: Any, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    name = damage(published)
    code, _, error = run(*train_flags(published, tmp_path / "out"))
    assert code == 2
    assert len(error.strip().splitlines()) == 1
    assert name in error
    assert not (tmp_path / "out").exists()
    manifest = tmp_path / "manifest.json"
    code, out, error = run("data", "check", published.root, "--out", manifest)
    assert (code, error) == (1, "")
    assert f"error: {'masks' if damage in (resize_mask, grey_mask) else 'images'} that cannot be used (1)" in out
    assert name in out
    assert not manifest.exists()


@pytest.mark.parametrize("damage", [missing_mask, missing_image])
def test_an_incomplete_set_is_refused_by_every_command(
    damage: Callable[[Any], str], published: Any, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    name = damage(published)
    out = tmp_path / "out"
    for arguments in (
        train_flags(published, out),
        ["data", "check", published.root, "--out", out],
        ["data", "split", published.root, "--out", out],
    ):
        code, _, error = run(*arguments)
        assert code == 2
        assert len(error.strip().splitlines()) == 1
        assert name in error
        assert not out.exists()


def test_check_split_and_train_accept_the_whole_set(
    published: Any, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    manifest = tmp_path / "manifest.json"
    code, out, error = run("data", "check", published.root, "--out", manifest, "--strict")
    assert (code, error) == (0, "")
    assert "nothing to complain about" in out
    assert len(json.loads(manifest.read_text())["samples"]) == len(read(published).samples)
    split = tmp_path / "split.csv"
    assert run("data", "split", published.root, "--out", split)[0] == 0
    assert len(split.read_text().splitlines()) == len(read(published).samples) + 1


def test_the_command_line_knows_every_layout() -> None:
    from typing import get_args, get_type_hints

    assert get_args(get_type_hints(TrainOptions)["dataset"]) == DATASETS


def test_nothing_known_prints_the_expected_trees(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read_collection(tmp_path)
    for word in ("Dataset_BUSI_with_GT", "_anno.bmp", "HAM10000_metadata", "brisc2025", "ISIC-2017_Training_Data"):
        assert word in str(caught.value)
    for name, word in (
        ("brisc", "classification_task"),
        ("isic2017", "ISIC-2017_"),
        ("ham10000", "HAM10000_images"),
        ("busi_whu", "_anno.bmp"),
        ("isic2018", "ISIC2018_Task3"),
    ):
        with pytest.raises(UserError, match=word):
            read_collection(tmp_path, name)


def test_an_option_of_another_layout_is_refused(publish: Publish) -> None:
    ham = publish("ham10000")
    for name in ("curated", "labels", "lesion_groups"):
        with pytest.raises(UserError, match=f"--{name.replace('_', '-')}: .* of layout ham10000"):
            read_collection(ham.root, options=LayoutOptions(**{name: ham.table}))


def test_busi_curated(publish: Publish, tmp_path: Path) -> None:
    busi = publish("busi")
    table = tmp_path / "curated.csv"

    def curated(text: str) -> list[str]:
        table.write_text(text)
        return [s.id for s in read(busi, options=LayoutOptions(curated=table)).samples]

    assert curated("class;id\nnormal;2\nbenign;4\nbenign;1\n") == [
        "benign/benign (1).png",
        "benign/benign (4).png",
        "normal/normal (2).png",
    ]
    for text, pattern in (
        ("class,id\nbenign,1\n", "semicolon-separated columns class, id"),
        ("class;id\n", "lists no image"),
        ("class;id\nbenign;1\ncyst;1\n", "line 3: the class 'cyst' is none of benign"),
        ("class;id\nbenign;44\n", r"line 2 names benign \(44\), which is not in"),
        ("class;id\nbenign;1\nbenign;1\n", r"line 3 lists benign \(1\) a second time"),
    ):
        with pytest.raises(UserError, match=pattern):
            curated(text)


def test_busi_masks_of_every_kind_are_united(publish: Publish) -> None:
    busi = publish("busi")
    folder = busi.image.parent
    first = np.zeros((40, 48), bool)
    first[5:9, 5:9] = True
    second, third = np.roll(first, 10, 0), np.roll(first, 20, 1)
    rgba = np.dstack([np.where(second, 255, 0)] * 3 + [np.full((40, 48), 255)]).astype(np.uint8)
    Image.fromarray(first).save(busi.mask)
    Image.fromarray(rgba).save(folder / "benign (1)_mask_1.png")
    Image.fromarray(np.where(third, 255, 0).astype(np.uint8)).convert("RGB").save(folder / "benign (1)_mask_2.png")
    sample = next(s for s in read(busi).samples if s.image == busi.image)
    assert len(sample.masks) == 3
    assert np.array_equal(read_mask(sample.masks, 40, 48), first | second | third)


def test_busi_whu_labels_are_given_or_absent_but_never_guessed(publish: Publish, tmp_path: Path) -> None:
    whu = publish("busi_whu_mendeley")
    bare = read(whu, options=LayoutOptions())
    assert {s.label for s in bare.samples} == {-1}
    assert bare.classes == ("benign", "malignant")
    assert Counter(s.split for s in bare.samples) == {"train": 12, "val": 12, "test": 12}
    with pytest.raises(UserError, match=r"none of the 36 images is labelled.*--labels FILE"):
        check_trainable(bare)
    labelled = read(whu)
    assert counts(labelled) == {(name, part): 6 for name in bare.classes for part in ("train", "val", "test")}
    for folder in ("train", "val", "test"):
        (whu.root / folder / "gt").rename(whu.root / folder / "mask")
    assert [s.label for s in read(whu).samples] == [s.label for s in labelled.samples]

    edit(whu.table, "00000.bmp,benign", "train/img/00000.bmp,")
    assert [s.label for s in read(whu).samples if s.image.name == "00000.bmp"] == [-1], "some may be unlabelled"
    for old, new, pattern in (
        ("00003.bmp,malignant", "00003.bmp,cyst", "line 5: the class 'cyst' is none of benign, malignant"),
        ("00003.bmp,cyst", "99999.bmp,benign", "line 5 names '99999.bmp', which is not an image"),
        ("99999.bmp,benign", "00004.bmp,benign", "lists '00004.bmp' a second time"),
        ("file,label", "image,label", "columns file, label; file not found"),
    ):
        edit(whu.table, old, new)
        expect(whu, pattern)


def test_busi_whu_a_name_in_two_parts_needs_its_path(publish: Publish) -> None:
    whu = publish("busi_whu_mendeley")
    shutil.copy(whu.root / "val" / "img" / "00001.bmp", whu.root / "train" / "img" / "00001.bmp")
    shutil.copy(whu.root / "val" / "gt" / "00001_anno.bmp", whu.root / "train" / "gt" / "00001_anno.bmp")
    expect(whu, "'00001.bmp', which is in train/img/00001.bmp and val/img/00001.bmp; give its path")


def test_busi_whu_named(publish: Publish) -> None:
    whu = publish("busi_whu_named")
    assert counts(read(whu)) == {(n, p): 6 for n in ("benign", "malignant") for p in ("train", "val", "test")}
    expect(whu, "--labels .*: not needed", options=LayoutOptions(labels=whu.table))
    edit(whu.table, "images/benign_0002.png", "images/benign_0000.png")
    expect(whu, r"line 4 lists the image 'benign_0000\.png' a second time")
    edit(whu.table, "images/benign_0000.png,masks/benign_0002.png\n", "")
    expect(whu, r"benign_0002\.png: is not in .*metadata\.csv")
    (whu.root / "train" / "images" / "benign_0002.png").rename(whu.root / "train" / "images" / "lesion_0002.png")
    edit(whu.table, "\n", "\nimages/lesion_0002.png,masks/benign_0002.png\n")
    expect(whu, r"line 2: expected a name such as benign_0001\.png, found 'lesion_0002\.png'")


def test_ham10000_lesions_are_groups_and_never_straddle(publish: Publish) -> None:
    collection = read(publish("ham10000"))
    assert collection.classes == ("mel", "nv", "bcc", "akiec", "bkl", "df", "vasc")
    assert Counter(Counter(s.group for s in collection.samples).values()) == {2: 21}
    for seed in range(3):
        split = split_collection(collection, {}, seed=seed)
        assert len({(s.group, split[s.id]) for s in collection.samples}) == 21


def test_ham10000_as_it_is_found_in_the_wild(publish: Publish) -> None:
    """Metadata without a suffix, with the later column, names in lower case, and folders that are there twice."""
    ham = publish("ham10000")
    collection = read(ham)
    lines = ham.table.read_text().splitlines()
    plain = ham.root / "HAM10000_metadata"
    plain.write_text("\n".join([f"{lines[0]},dataset", *(f"{line},rosendahl" for line in lines[1:])]) + "\n")
    expect(ham, "found HAM10000_metadata, HAM10000_metadata.csv")
    ham.table.unlink()
    assert read(ham) == collection
    for path in list(ham.root.iterdir()):
        path.rename(path.with_name(path.name.lower()))
    lower = read(ham)
    assert [(s.id.lower(), s.label, s.group) for s in lower.samples] == [
        (s.id.lower(), s.label, s.group) for s in collection.samples
    ]
    shutil.copytree(ham.root / "ham10000_images_part_1", ham.root / "HAM10000_images_part_1")
    assert len(read(ham).samples) == 42
    shutil.copy(ham.root / "ham10000_images_part_2" / "ISIC_0024307.jpg", ham.root / "HAM10000_images_part_1")
    expect(ham, r"ISIC_0024307\.jpg: there is also")


@pytest.mark.parametrize(
    ("old", "new", "pattern"),
    [
        ("ISIC_0024306,", "ISIC_0099999,", r"ISIC_0024306\.jpg: is not in"),
        ("akiec", "wart", "line 2: the class 'wart' is none of mel, nv"),
        ("HAM_0000000,", ",", "line 2 names no lesion_id"),
        ("ISIC_0024306", "ISIC_0024307", "line 3 lists the image 'ISIC_0024307' a second time"),
        ("lesion_id", "lesion", "lesion_id not found"),
        ("akiec,", "akiec,x,", "line 2 has 8 cells but the header has 7"),
    ],
)
def test_ham10000_table_defects(publish: Publish, old: str, new: str, pattern: str) -> None:
    ham = publish("ham10000")
    edit(ham.table, old, new)
    expect(ham, pattern)


def test_ham10000_masks(publish: Publish) -> None:
    ham = publish("ham10000")
    stray = ham.mask.with_name("ISIC_0000001_segmentation.png")
    shutil.copy(ham.mask, stray)
    expect(ham, r"ISIC_0000001_segmentation\.png: the mask has no image")
    shutil.rmtree(ham.mask.parent)
    expect(ham, "HAM10000_segmentations_lesion_tschandl with the lesion masks is missing")


def test_isic2018(publish: Publish) -> None:
    isic = publish("isic2018")
    collection = read(isic)
    assert Counter(Counter(s.group for s in collection.samples).values()) == {2: 21}
    assert {s.group for s in read(isic, options=LayoutOptions()).samples} == {None}
    by_name = isic.root / "ISIC2018_Task3_Training_LesionGroupings.csv"
    shutil.copy(layout_options(isic).lesion_groups, by_name)
    inner = isic.root / "ISIC2018_Task3_Training_GroundTruth"
    inner.mkdir()
    isic.table.rename(inner / isic.table.name)
    assert read(isic, options=LayoutOptions()) == collection
    edit(by_name, "ISIC_0024306,HAM_0000000", "ISIC_0024306,")
    expect(isic, r"names no lesion_id for 1 image\(s\), the first is 'ISIC_0024306'", options=LayoutOptions())
    table = inner / isic.table.name
    edit(table, "ISIC_0024306,0.0", "ISIC_0024306,1.0")
    expect(isic, "line 2 says MEL and AKIEC; an image has one class")
    edit(table, "1.0,0.0,0.0,1.0", "0.0,0.0,0.0,0.0")
    expect(isic, "line 2 has a 1 in no column")
    edit(table, "ISIC_0024306,0.0", "ISIC_0024306,yes")
    expect(isic, "line 2 has 'yes' in the column MEL, expected 0 or 1")


def test_isic2017(publish: Publish) -> None:
    isic = publish("isic2017")
    collection = read(isic)
    names = ("melanoma", "nevus", "seborrheic_keratosis")
    assert counts(collection) == {(name, part): 6 for name in names for part in (None, "val", "test")}
    split = split_collection(collection, {})
    assert all(split[s.id] == (s.split or "train") for s in collection.samples)
    for path in isic.root.glob("*Test_v2*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert Counter(s.split for s in read(isic).samples) == {None: 18, "val": 18}
    for old, new, pattern in (
        ("ISIC_0000001,1.0,0.0", "ISIC_0000001,1.0,1.0", "line 3 says melanoma and seborrheic_keratosis"),
        ("ISIC_0000001,1.0,1.0", "ISIC_0000002,1.0,0.0", "names the image 'ISIC_0000002', which is not in .*or listed"),
        ("ISIC_0000002,1.0,0.0\n", "", r"ISIC_0000001\.jpg: is not in"),
    ):
        edit(isic.table, old, new)
        expect(isic, pattern)


def test_brisc_official_test_strata_and_codes(publish: Publish) -> None:
    brisc = publish("brisc")
    collection = read(brisc)
    assert collection.classes == ("glioma", "meningioma", "pituitary", "no_tumor")
    assert counts(collection) == {(n, p): c for n in collection.classes for p, c in ((None, 18), ("test", 6))}
    assert all(bool(s.masks) == (s.label != 3) for s in collection.samples)
    assert read_collection(brisc.root / "brisc2025") == collection
    for seed in range(3):
        split = split_collection(collection, {}, fractions=(0.5, 1 / 3, 1 / 6), seed=seed)
        assert {i for i, part in split.items() if part == "test"} == {s.id for s in collection.samples if s.split}
        held = Counter((s.label, s.stratum) for s in collection.samples if split[s.id] == "val")
        assert len(held) == 12, "every class in every plane"
        assert set(held.values()) <= {2, 3}
    folder = brisc.image.parents[1] / "no_tumor"
    old = sorted(folder.iterdir())[0]
    old.rename(old.with_name(old.name.replace("_no_", "_nt_")))
    assert counts(read(brisc)) == counts(collection)


def test_brisc_defects(publish: Publish) -> None:
    brisc = publish("brisc")
    wrong = brisc.image.with_name(brisc.image.name.replace("_gl_", "_me_"))
    brisc.image.rename(wrong)
    expect(brisc, "the name says train and me, the folder train and glioma")
    other = brisc.image.with_name(brisc.image.name.replace("_train_", "_test_"))
    wrong.rename(other)
    expect(brisc, "the name says test and gl, the folder train and glioma")
    other.rename(brisc.image.with_name("scan.jpg"))
    expect(brisc, r"scan\.jpg: expected a name such as brisc2025_train_00001_gl_ax_t1\.jpg")
    brisc.image.with_name("scan.jpg").unlink()
    expect(brisc, r"brisc2025_train_00001_gl_ax_t1\.png: the mask has no image")
    brisc.mask.unlink()
    shutil.rmtree(brisc.image.parents[1] / "pituitary")
    expect(brisc, "pituitary: no such folder")


def test_brisc_train_duplicates_of_test_are_kept_reported_or_dropped(
    publish: Publish, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    brisc = publish("brisc")
    source = DataSource(brisc.root)
    plain = source.read()
    tested = next(s for s in plain.samples if s.split == "test" and s.label == 0)
    shutil.copy(tested.image, brisc.image)  # byte for byte
    twin = brisc.image.relative_to(plain.root).as_posix()
    kept = source.read()
    assert len(kept.samples) == len(plain.samples)
    out = tmp_path / "split.csv"
    assert main(["data", "split", str(brisc.root), "--out", str(out)]) == 0
    parts = {line.split(",")[0]: line.split(",")[3] for line in out.read_text().splitlines()[1:]}
    assert parts[twin] in ("train", "val"), "the official test part is not added to"
    capsys.readouterr()
    arguments = ["data", "check", str(brisc.root), "--out", str(tmp_path / "m.json")]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "near-duplicates on both sides of the split (1)" in printed
    assert f"{tested.id} (test), {twin} (train)" in printed
    assert main([*arguments, "--strict"]) == 1
    assert main([*arguments, "--strict", "--drop-train-duplicates-of-test"]) == 0
    dropped = DataSource(brisc.root, options=LayoutOptions(drop_train_duplicates_of_test=True)).read()
    assert {s.id for s in kept.samples} - {s.id for s in dropped.samples} == {twin}
    with pytest.raises(UserError, match="prescribes no test images"):
        read(publish("folders"), options=LayoutOptions(drop_train_duplicates_of_test=True))


def test_cheng_blocks_of_neighbours_are_groups(publish: Publish) -> None:
    cheng = publish("cheng")
    collection = read(cheng)
    assert collection.classes == ("meningioma", "glioma", "pituitary")
    assert len({s.group for s in collection.samples}) == 18
    assert all(
        len({s.label for s in collection.samples if s.group == group}) == 1
        for group in {s.group for s in collection.samples}
    )
    for old, new, pattern in (
        ("\n2,1,meningioma", "\n2,2,meningioma", "line 3 has the label '2' and the tumor_type 'meningioma'"),
        ("\n2,2,meningioma", "\n²,1,meningioma", "line 3 has the id '²'"),
        ("\n²,1,meningioma", "\n1,1,meningioma", "line 3 names the slice 1, which is not in .* or listed twice"),
        ("\n1,1,meningioma\n1,", "\n1,", r"2\.jpg: is not in"),
    ):
        edit(cheng.table, old, new)
        expect(cheng, pattern)


def test_a_folder_that_may_not_be_read(publish: Publish, monkeypatch: pytest.MonkeyPatch) -> None:
    ham = publish("ham10000")

    def refuse(self: Path) -> None:
        raise PermissionError(13, os.strerror(13), str(self))

    monkeypatch.setattr(Path, "iterdir", refuse)
    expect(ham, "could not be read .Permission denied")
