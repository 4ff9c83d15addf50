from __future__ import annotations

import csv
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from btinet.data.preprocessing import Preprocessing
from btinet.models.checkpoint import Checkpoint


class _Output(NamedTuple):
    seg_logits: Tensor
    cls_logits: Tensor
    gates: dict[str, Tensor]
    proxies: dict[str, Tensor]


class _BrightnessModel(nn.Module):
    """Pixels brighter than one half are lesion; images brighter than a quarter on average are of class 1."""

    def forward(self, image: Tensor) -> _Output:
        mean = image.mean(dim=(1, 2, 3))
        signals = torch.stack([mean, 1 - mean], dim=1)
        return _Output(
            seg_logits=40 * (image.mean(dim=1, keepdim=True) - 0.5),
            cls_logits=torch.stack([torch.zeros_like(mean), 20 * (mean - 0.25)], dim=1),
            gates={"d1": signals, "d2": signals / 2},
            proxies={"d1": torch.stack([mean, mean, mean], dim=1)},
        )


@pytest.fixture
def brightness_checkpoint() -> Checkpoint:
    """Stand-in for a trained network whose answers can be computed by hand; sees 32×32 RGB scaled to 0..1."""
    return Checkpoint(
        model=_BrightnessModel().eval(),  # type: ignore[arg-type]
        classes=("dark", "=bright"),
        preprocessing=Preprocessing((32, 32), 3, 1 / 255, (0.0,) * 3, (1.0,) * 3),
        proxy_names=("align", "seg_energy", "clf_energy"),
        config={},
    )


class OfficialVariable(NamedTuple):
    name: str  # path in Keras 3
    keras3: str  # below layers/ of a .weights.h5 file of Keras 3
    keras2: str  # in an .h5 file of Keras 2
    shape: tuple[int, ...]


@pytest.fixture(scope="session")
def official_variables() -> list[OfficialVariable]:
    """The variables of the official BTI-Net with three classes, in the order of ``model.weights``."""
    with (Path(__file__).parent / "data" / "official_btinet_variables.csv").open(newline="") as file:
        return [
            OfficialVariable(
                row["variable"], row["keras3"], row["keras2"], tuple(int(n) for n in row["shape"].split("x") if n)
            )
            for row in csv.DictReader(file)
        ]


@pytest.fixture(scope="session")
def official_values(official_variables: list[OfficialVariable]) -> dict[str, np.ndarray]:
    """Random values for them, of sizes that keep the network's signals near one."""
    random = np.random.default_rng(0)
    values = {}
    for name, _, _, shape in official_variables:
        draw = random.standard_normal(shape, dtype=np.float32)
        match name.rpartition("/")[2]:
            case "gamma" | "moving_variance":
                value = 1 + 0.2 * draw.clip(-2, 2)
            case "kernel" | "pointwise_kernel" | "depthwise_kernel":
                inputs = shape[3] * 2.25 if "transpose" in name else np.prod(shape[:-1])
                value = draw / np.float32(9 if "depthwise" in name or "dwconv" in name else inputs) ** 0.5
            case _:
                value = 0.2 * draw
        values[name] = np.asarray(value, dtype=np.float32)
    values["normalization/mean"] = np.array([0.485, 0.456, 0.406], dtype=np.float32) / 255
    values["normalization/variance"] = np.array([0.229, 0.224, 0.225], dtype=np.float32) ** 2 / 255**2
    values["normalization/count"] = np.array(0)
    return values


@pytest.fixture(scope="session")
def shared_ultrasound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the BUSI layout, 12 images a class: benign = a disc, malignant = a square, normal = noise only."""
    root = tmp_path_factory.mktemp("data") / "Dataset_BUSI_with_GT"
    random = np.random.default_rng(0)
    for name in ("benign", "malignant", "normal"):
        (root / name).mkdir(parents=True)
        for i in range(1, 13):
            height, width = 44 + i, 60 - i
            y, x = np.mgrid[:height, :width]
            y, x = y - random.integers(18, 26), x - random.integers(18, 30)
            shape = {"benign": x**2 + y**2 < 100, "malignant": (abs(x) < 9) & (abs(y) < 9), "normal": x > 1000}[name]
            pixels = random.normal(90, 25, (height, width)) + 90 * shape
            grey = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            grey.convert("RGB").save(root / name / f"{name} ({i}).png")
            Image.fromarray(shape.astype(np.uint8) * 255).save(root / name / f"{name} ({i})_mask.png")
    return root


@pytest.fixture
def ultrasound(shared_ultrasound: Path, tmp_path: Path) -> Path:
    """A copy of the folder that a test may damage."""
    return Path(shutil.copytree(shared_ultrasound, tmp_path / "data" / "Dataset_BUSI_with_GT"))


@dataclass(frozen=True)
class PublishedSet:
    """A small data set in the layout of a published one."""

    root: Path
    image: Path  # of one sample with a lesion
    mask: Path
    table: Path | None = None  # that names the classes
    flags: tuple[str, ...] = ()


def write_picture(image: Path, mask: Path | None, number: int) -> None:
    """Write noise with a bright disc, and the disc as its mask; without ``mask``, noise alone."""
    random = np.random.default_rng(number)
    y, x = np.mgrid[:40, :48]
    disc = (x - random.integers(16, 32)) ** 2 + (y - random.integers(14, 26)) ** 2 < 60
    pixels = np.kron(random.integers(0, 130, (8, 8)), np.ones((5, 6))) + 90 * (disc if mask else 0)
    image.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).convert("RGB").save(image)
    if mask is not None:
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(disc).save(mask)


def write_rows(path: Path, *rows: Sequence[object]) -> Path:
    path.write_text("".join(",".join(map(str, row)) + "\n" for row in rows))
    return path


def _busi(root: Path, each: int) -> PublishedSet:
    folder = root / "Dataset_BUSI_with_GT"
    for number in range(3 * each):
        name = ("benign", "malignant", "normal")[number % 3]
        image = folder / name / f"{name} ({number // 3 + 1}).png"
        write_picture(image, None if name == "normal" else image.with_name(f"{image.stem}_mask.png"), number)
    first = folder / "benign" / "benign (1).png"
    return PublishedSet(root, first, first.with_name("benign (1)_mask.png"))


def _busi_whu_mendeley(root: Path, each: int) -> PublishedSet:
    rows = [("file", "label")]
    for number in range(6 * each):
        part = ("train", "val", "test")[number % 3]
        image = root / part / "img" / f"{number:05d}.bmp"
        write_picture(image, root / part / "gt" / f"{number:05d}_anno.bmp", number)
        rows.append((image.name, ("benign", "malignant")[number // 3 % 2]))
    table = write_rows(root.parent / "labels.csv", *rows)
    train = root / "train"
    flags = ("--labels", str(table))
    return PublishedSet(root, train / "img" / "00000.bmp", train / "gt" / "00000_anno.bmp", table, flags)


def _busi_whu_named(root: Path, each: int) -> PublishedSet:
    for part in ("train", "validation", "test"):
        rows = [("image_file_name", "mask_file_name")]
        for number in range(2 * each):
            name = f"{('benign', 'malignant')[number % 2]}_{number:04d}.png"
            write_picture(root / part / "images" / name, root / part / "masks" / name, 1000 * len(part) + number)
            rows.append((f"images/{name}", f"masks/{name}"))
        write_rows(root / part / "metadata.csv", *rows)
    train = root / "train"
    name = "benign_0000.png"
    return PublishedSet(root, train / "images" / name, train / "masks" / name, train / "metadata.csv")


HAM_CLASSES = ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")


def _ham_pictures(root: Path, each: int, folders: Sequence[str]) -> list[tuple[str, str, str]]:
    """Write images, two of one lesion each, and their masks; return image, lesion and class of each."""
    rows = []
    for number in range(7 * each):
        stem = f"ISIC_{24306 + number:07d}"
        image = root / folders[number % len(folders)] / f"{stem}.jpg"
        write_picture(image, root / "HAM10000_segmentations_lesion_tschandl" / f"{stem}_segmentation.png", number)
        rows.append((stem, f"HAM_{number // 2:07d}", HAM_CLASSES[number // 2 % 7]))
    return rows


def _ham10000(root: Path, each: int) -> PublishedSet:
    folders = ("HAM10000_images_part_1", "HAM10000_images_part_2")
    rows = [
        (lesion, image, dx, "histo", "", "male", "back") for image, lesion, dx in _ham_pictures(root, each, folders)
    ]
    header = ("lesion_id", "image_id", "dx", "dx_type", "age", "sex", "localization")
    table = write_rows(root / "HAM10000_metadata.csv", header, *rows)
    mask = root / "HAM10000_segmentations_lesion_tschandl" / "ISIC_0024306_segmentation.png"
    return PublishedSet(root, root / folders[0] / "ISIC_0024306.jpg", mask, table)


def _isic2018(root: Path, each: int) -> PublishedSet:
    order = ("mel", "nv", "bcc", "akiec", "bkl", "df", "vasc")
    folder = "ISIC2018_Task3_Training_Input"
    pictures = _ham_pictures(root, each, (folder,))
    rows = [(image, *(f"{float(dx == name):.1f}" for name in order)) for image, _, dx in pictures]
    table = write_rows(
        root / "ISIC2018_Task3_Training_GroundTruth.csv", ("image", *(name.upper() for name in order)), *rows
    )
    write_rows(
        root.parent / "groups.csv",
        ("image", "lesion_id", "diagnosis_confirm_type"),
        *((image, lesion, "histopathology") for image, lesion, _ in pictures),
    )
    mask = root / "HAM10000_segmentations_lesion_tschandl" / "ISIC_0024306_segmentation.png"
    flags = ("--lesion-groups", str(root.parent / "groups.csv"))
    return PublishedSet(root, root / folder / "ISIC_0024306.jpg", mask, table, flags)


def _isic2017(root: Path, each: int) -> PublishedSet:
    for start, part in ((0, "Training"), (500, "Validation"), (800, "Test_v2")):
        rows: list[tuple[object, ...]] = [("image_id", "melanoma", "seborrheic_keratosis")]
        for number in range(start, start + 3 * each):
            stem = f"ISIC_{number:07d}"
            masks = root / f"ISIC-2017_{part}_Part1_GroundTruth"
            write_picture(root / f"ISIC-2017_{part}_Data" / f"{stem}.jpg", masks / f"{stem}_segmentation.png", number)
            rows.append((stem, float(number % 3 == 1), float(number % 3 == 2)))
        write_rows(root / f"ISIC-2017_{part}_Part3_GroundTruth.csv", *rows)
        Image.new("RGB", (40, 30)).save(root / f"ISIC-2017_{part}_Data" / f"{stem}_superpixels.png")
    image = root / "ISIC-2017_Training_Data" / "ISIC_0000000.jpg"
    mask = root / "ISIC-2017_Training_Part1_GroundTruth" / "ISIC_0000000_segmentation.png"
    return PublishedSet(root, image, mask, root / "ISIC-2017_Training_Part3_GroundTruth.csv")


BRISC_CODES = {"glioma": "gl", "meningioma": "me", "pituitary": "pi", "no_tumor": "no"}


def _brisc(root: Path, each: int) -> PublishedSet:
    inner = root / "brisc2025"
    number = 0
    for split, count in (("train", 3 * each), ("test", each)):
        for name, code in BRISC_CODES.items():
            for index in range(count):
                number += 1
                stem = f"brisc2025_{split}_{number:05d}_{code}_{('ax', 'co', 'sa')[index % 3]}_t1"
                image = inner / "classification_task" / split / name / f"{stem}.jpg"
                mask = inner / "segmentation_task" / split / "masks" / f"{stem}.png"
                write_picture(image, None if name == "no_tumor" else mask, number)
    stem = "brisc2025_train_00001_gl_ax_t1"
    image = inner / "classification_task" / "train" / "glioma" / f"{stem}.jpg"
    return PublishedSet(root, image, inner / "segmentation_task" / "train" / "masks" / f"{stem}.png")


def _cheng(root: Path, each: int) -> PublishedSet:
    rows: list[tuple[object, ...]] = [("id", "label", "tumor_type")]
    for number in range(1, 60 * each + 1):
        label = (number - 1) // 20 % 3
        if (number - 1) % 20 < 2:  # a few slices of each block of neighbours
            write_picture(root / "images" / f"{number}.jpg", root / "masks" / f"{number}_mask.png", number)
            rows.append((number, label + 1, ("meningioma", "glioma", "pituitary")[label]))
    return PublishedSet(
        root, root / "images" / "1.jpg", root / "masks" / "1_mask.png", write_rows(root / "labels.csv", *rows)
    )


def _folders(root: Path, each: int) -> PublishedSet:
    for number in range(2 * each):
        image = root / ("polyp", "ulcer")[number % 2] / f"{number}.png"
        write_picture(image, image.with_name(f"{number}_mask.png"), number)
    return PublishedSet(root, root / "polyp" / "0.png", root / "polyp" / "0_mask.png")


def _csv(root: Path, each: int) -> PublishedSet:
    rows = [("image", "mask", "label")]
    for number in range(2 * each):
        write_picture(root / f"{number}.png", root / "masks" / f"{number}.png", number)
        rows.append((f"{number}.png", f"masks/{number}.png", ("cat", "dog")[number % 2]))
    return PublishedSet(root, root / "0.png", root / "masks" / "0.png", write_rows(root / "data.csv", *rows))


PUBLISHED: dict[str, Callable[[Path, int], PublishedSet]] = {
    "busi": _busi,
    "busi_whu_mendeley": _busi_whu_mendeley,
    "busi_whu_named": _busi_whu_named,
    "ham10000": _ham10000,
    "isic2018": _isic2018,
    "isic2017": _isic2017,
    "brisc": _brisc,
    "cheng": _cheng,
    "folders": _folders,
    "csv": _csv,
}


@pytest.fixture(scope="session")
def _published_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], PublishedSet]:
    made: dict[str, PublishedSet] = {}

    def make(name: str) -> PublishedSet:
        if name not in made:
            made[name] = PUBLISHED[name](tmp_path_factory.mktemp(name) / "set", 6)
        return made[name]

    return make


@pytest.fixture(params=list(PUBLISHED))
def published(
    request: pytest.FixtureRequest, _published_once: Callable[[str], PublishedSet], tmp_path: Path
) -> PublishedSet:
    """A copy of each published data set in turn, six images a class and part or more, that a test may damage."""
    return _copied(_published_once(request.param), tmp_path / "published")


@pytest.fixture
def publish(_published_once: Callable[[str], PublishedSet], tmp_path: Path) -> Callable[[str], PublishedSet]:
    """Give a copy of the data set of that name, which the test may damage."""
    return lambda name: _copied(_published_once(name), tmp_path / "published" / name)


def _copied(original: PublishedSet, here: Path) -> PublishedSet:
    shutil.copytree(original.root.parent, here)

    def moved(path: Path) -> Path:
        return here / path.relative_to(original.root.parent)

    return PublishedSet(
        moved(original.root),
        moved(original.image),
        moved(original.mask),
        original.table and moved(original.table),
        tuple(flag if flag.startswith("--") else str(moved(Path(flag))) for flag in original.flags),
    )
