from __future__ import annotations

import csv
import shutil
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
