from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from btinet.data import Collection, Sample, check_trainable, read_collection, read_mask, sample_csv
from btinet.errors import UserError


def picture(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 6), value, np.uint8)).save(path)
    return path


@pytest.fixture
def busi(tmp_path: Path) -> Path:
    root = tmp_path / "Dataset_BUSI_with_GT"
    for name in ("benign", "malignant", "normal"):
        for number in (1, 2, 10):
            picture(root / name / f"{name} ({number}).png")
            if name != "normal":
                picture(root / name / f"{name} ({number})_mask.png")
    return root


def test_busi_samples_masks_and_order(busi: Path) -> None:
    for number in (1, 2):
        picture(busi / "benign" / f"benign (10)_mask_{number}.png")
    picture(busi / "normal" / "normal (2)_mask.png")
    (busi / "benign" / ".DS_Store").write_bytes(b"x")
    picture(busi / "malignant" / "._malignant (1).png")
    collection = read_collection(busi, "busi")
    assert collection.name == "busi"
    assert collection.root == busi
    assert collection.classes == ("benign", "malignant", "normal")
    assert [sample.id for sample in collection.samples] == [
        f"{name}/{name} ({number}).png" for name in ("benign", "malignant", "normal") for number in (1, 10, 2)
    ]
    assert [sample.label for sample in collection.samples] == [0] * 3 + [1] * 3 + [2] * 3
    masks = {sample.id: [mask.name for mask in sample.masks] for sample in collection.samples}
    assert masks["benign/benign (1).png"] == ["benign (1)_mask.png"]
    assert masks["benign/benign (10).png"] == [
        "benign (10)_mask.png",
        "benign (10)_mask_1.png",
        "benign (10)_mask_2.png",
    ]
    assert masks["normal/normal (1).png"] == []
    assert masks["normal/normal (2).png"] == ["normal (2)_mask.png"]
    assert all(sample.image == busi / sample.id for sample in collection.samples)


def test_busi_is_found_from_its_parent_and_recognised(busi: Path) -> None:
    assert read_collection(busi.parent) == read_collection(busi) == read_collection(busi, "busi")
    renamed = busi.rename(busi.parent / "busi")
    assert read_collection(renamed).name == "busi"


def test_busi_with_the_class_order_of_a_checkpoint(busi: Path) -> None:
    collection = read_collection(busi, classes=("normal", "benign", "malignant", "other"))
    assert collection.classes == ("normal", "benign", "malignant", "other")
    assert {sample.id.split("/")[0]: sample.label for sample in collection.samples} == {
        "benign": 1,
        "malignant": 2,
        "normal": 0,
    }
    with pytest.raises(UserError, match=r"normal: .* none of the classes benign, malignant"):
        read_collection(busi, classes=("benign", "malignant"))


def test_busi_defects_are_named(busi: Path) -> None:
    def expect(pattern: str) -> None:
        with pytest.raises(UserError, match=pattern) as caught:
            read_collection(busi, "busi")
        assert "\n" not in str(caught.value)

    stray = picture(busi / "benign" / "benign (3)_mask.png")
    expect(r"benign \(3\)_mask\.png: the mask has no image")
    stray.rename(busi / "benign" / "benign (3).png")
    expect(r"benign \(3\)\.png: has no mask; expected benign \(3\)_mask\.png")
    (busi / "benign" / "benign (3).png").unlink()
    twin = picture(busi / "benign" / "benign (1).jpg")
    expect(r"benign \(1\)\.png: there is also benign \(1\)\.jpg")
    twin.unlink()
    unknown = picture(busi / "cyst" / "cyst (1).png")
    expect(r"cyst: the folder is none of the classes benign, malignant, normal")
    unknown.unlink()
    assert len(read_collection(busi, "busi").samples) == 9, "an empty unknown folder is harmless"
    for file in (busi / "normal").iterdir():
        file.unlink()
    expect("normal: holds no images")
    (busi / "normal").rmdir()
    expect(r"class folder normal is missing; expected Dataset_BUSI_with_GT/\{benign,malignant,normal\}/")


def test_folders_classes_are_sorted_and_a_class_may_be_without_lesions(tmp_path: Path) -> None:
    for name in ("polyp", "clear", "ulcer"):
        picture(tmp_path / name / "a.jpg")
        picture(tmp_path / name / "b.tif")
    for name in ("polyp", "ulcer"):
        picture(tmp_path / name / "a_mask.png")
        picture(tmp_path / name / "b_MASK.PNG")
    collection = read_collection(tmp_path)
    assert collection.name == "folders"
    assert collection.classes == ("clear", "polyp", "ulcer")
    assert [(sample.id, sample.label, len(sample.masks)) for sample in collection.samples] == [
        ("clear/a.jpg", 0, 0),
        ("clear/b.tif", 0, 0),
        ("polyp/a.jpg", 1, 1),
        ("polyp/b.tif", 1, 1),
        ("ulcer/a.jpg", 2, 1),
        ("ulcer/b.tif", 2, 1),
    ]
    assert read_collection(tmp_path, classes=("ulcer", "polyp", "clear")).samples[0].label == 2
    (tmp_path / "polyp" / "b_MASK.PNG").unlink()
    with pytest.raises(UserError, match=r"b\.tif: has no mask; expected b_mask\.png"):
        read_collection(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: holds no images"):
        read_collection(tmp_path, "folders")


def table(folder: Path, text: str) -> Path:
    for name in ("a", "b", "c"):
        picture(folder / f"{name}.png")
        picture(folder / "masks" / f"{name}.png")
    path = folder / "data.csv"
    path.write_text(text)
    return path


def test_csv_rows_become_samples(tmp_path: Path) -> None:
    outside = picture(tmp_path / "elsewhere" / "d.png")
    path = table(
        tmp_path / "set",
        "split,label,image,mask,group,remark\n"
        "test,zebra,./b.png,masks/b.png;masks/c.png,p1,x\n"
        ",ant,a.png,,,\n"
        "\n"
        f",,{outside}\n",
    )
    collection = read_collection(path)
    root = tmp_path / "set"
    assert collection == Collection(
        "csv",
        root,
        ("ant", "zebra"),
        (
            Sample("../elsewhere/d.png", outside, (), -1),
            Sample("a.png", root / "a.png", (), 0),
            Sample("b.png", root / "b.png", (root / "masks/b.png", root / "masks/c.png"), 1, "p1", "test"),
        ),
    )
    assert read_collection(root) == collection, "the folder with this one table"
    assert read_collection(path, classes=("zebra", "cat", "ant")).samples[1].label == 2


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("image,mask\na.png,\n", "columns image, label; label not found in 'image,mask'"),
        ("image;label\na.png;x\n", "image, label not found"),
        ("image,label,label\na.png,x,x\n", "column 'label' appears more than once"),
        ("image,label\n", "holds no images"),
        ("image,label\na.png,x\nq.png,x\n", "line 3 names the image 'q.png'"),
        ("image,label,mask\na.png,x,masks/a.png;masks/q.png\n", "line 2 names the mask 'masks/q.png'"),
        ("image,label\n,x\n", "line 2 names no image"),
        ("image,label\na.png,x\nb.png,x\n./a.png,x\n", "line 4 lists the image './a.png' a second time"),
        ("image,label,split\na.png,x,training\n", "line 2 has the split 'training'"),
        ("image,label\na.png,x,y\n", "line 2 has 3 cells but the header has 2"),
        ("image,label\nmasks,x\n", "line 2 names the image 'masks'"),
    ],
)
def test_csv_defects_name_file_line_and_value(tmp_path: Path, text: str, pattern: str) -> None:
    path = table(tmp_path, text)
    with pytest.raises(UserError, match=pattern) as caught:
        read_collection(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_csv_label_outside_the_given_classes(tmp_path: Path) -> None:
    path = table(tmp_path, "image,label\na.png,x\nb.png,y\n")
    with pytest.raises(UserError, match="line 3 has the label 'y', expected one of x, z"):
        read_collection(path, classes=("x", "z"))
    with pytest.raises(UserError, match="'x' is listed more than once"):
        read_collection(path, classes=("x", "y", "x"))


def test_binary_file_and_byte_order_mark(tmp_path: Path) -> None:
    path = table(tmp_path, "")
    path.write_bytes(b"\xef\xbb\xbfimage,label\r\na.png,x\r\n")
    assert read_collection(path).samples[0].id == "a.png"
    with pytest.raises(UserError, match=r"a\.png: is not a comma-separated UTF-8"):
        read_collection(tmp_path / "a.png")


def test_auto_says_what_it_cannot_decide(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no known layout"):
        read_collection(tmp_path)
    with pytest.raises(UserError, match="no such file or folder"):
        read_collection(tmp_path / "nothing")
    with pytest.raises(UserError, match="dataset: found 'ham'"):
        read_collection(tmp_path, "ham")
    path = table(tmp_path, "image,label\na.png,x\n")
    (tmp_path / "groups.csv").write_text("group,image\n")
    assert read_collection(tmp_path).name == "csv", "a table without these columns does not count"
    (tmp_path / "other.csv").write_bytes(path.read_bytes())
    with pytest.raises(UserError, match=r"exactly one CSV file .* found data\.csv, other\.csv"):
        read_collection(tmp_path)
    (tmp_path / "other.csv").unlink()
    picture(tmp_path / "x" / "a.png")
    picture(tmp_path / "x" / "a_mask.png")
    with pytest.raises(UserError, match=r"both data\.csv and class folders"):
        read_collection(tmp_path)


def test_check_trainable(tmp_path: Path) -> None:
    def collection(labels: list[int], masks: tuple[Path, ...]) -> Collection:
        samples = tuple(Sample(str(i), tmp_path, masks, label) for i, label in enumerate(labels))
        return Collection("csv", tmp_path, ("x", "y", "z"), samples)

    mask = (tmp_path / "m.png",)
    check_trainable(collection([0, 1, 2, -1], mask))
    with pytest.raises(UserError, match=r"samples of 1 class \(y\)"):
        check_trainable(collection([1, 1, -1], mask))
    with pytest.raises(UserError, match="class 'z' has no sample"):
        check_trainable(collection([0, 1], mask))
    with pytest.raises(UserError, match="no sample has a lesion mask"):
        check_trainable(collection([0, 1, 2], ()))


def test_the_shipped_sample_is_whole_and_small() -> None:
    collection = read_collection(sample_csv().parent)
    check_trainable(collection)
    assert collection.classes == ("melanoma", "nevus", "seborrheic_keratosis")
    labels = [sample.label for sample in collection.samples]
    assert [labels.count(label) for label in range(3)] == [28, 44, 28]
    assert all(0.03 <= read_mask(sample.masks, 256, 256).mean() <= 0.5 for sample in collection.samples)
    files = [path for path in sample_csv().parent.rglob("*") if path.is_file()]
    assert len(files) == 202, "100 images, 100 masks, the table, the README"
    assert sum(path.stat().st_size for path in files) < 1_500_000
