"""Sets that are more than one mask and one class an image: several mask classes, and missing masks or classes."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from btinet import UserError, load_checkpoint
from btinet.data import audit, read_collection, read_manifest, write_manifest
from btinet.evaluation import EvaluateOptions, evaluate_run
from btinet.serving import PredictOptions, predict_files
from btinet.training.options import TrainOptions
from btinet.training.train import resume, train

SMALL: dict[str, Any] = {
    "model": "btinet_mobilenetv3_small_050",
    "image_size": 32,
    "epochs": 2,
    "stage2_epochs": 1,
    "device": "cpu",
    "lr": 1e-3,
}


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def nested(tmp_path: Path) -> Path:
    """30 images of a bright core in a grey rim; of class small or large; some without a rim, or without both."""
    random = np.random.default_rng(0)
    rows = ["image,mask,label"]
    folder = tmp_path / "nested"
    folder.mkdir()
    y, x = np.mgrid[:48, :48]
    for number in range(30):
        large = number % 2
        distance = np.hypot(x - random.integers(20, 28), y - random.integers(20, 28))
        numbers = np.zeros((48, 48), dtype=np.uint8)
        if number % 10 != 9:
            if number % 5 != 4:
                numbers[distance < 14 + 4 * large] = 2
            numbers[distance < 7 + 2 * large] = 1
        pixels = random.normal(60, 12, (48, 48)) + np.array([0, 120, 60])[numbers]
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")
        Image.fromarray(numbers).save(folder / f"{number}_m.png")
        rows.append(f"{number}.png,{number}_m.png,{('small', 'large')[large]}")
    (folder / "set.csv").write_text("\n".join(rows) + "\n")
    return folder / "set.csv"


def test_several_mask_classes_from_training_to_prediction(nested: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = train(TrainOptions(**SMALL, data=str(nested), out=str(out), mask_classes="core, rim"))
    checkpoint = load_checkpoint(run)
    assert checkpoint.mask_classes == ("core", "rim")
    assert checkpoint.model.seg_head[-1].out_channels == 2

    summary = evaluate_run(EvaluateOptions(run, split="all"))
    rows = table(run / "evaluation-all" / "per_image.csv")
    assert len(rows) == 30
    for row in rows:
        number = int(Path(row["image"]).stem)
        truth = np.array(Image.open(nested.parent / f"{number}_m.png"))
        for name, value in (("core", 1), ("rim", 2)):
            assert int(row[f"target_pixels_{name}"]) == (truth == value).sum()
        assert int(row["target_pixels"]) == (truth > 0).sum()
        assert int(row["predicted_pixels"]) == sum(int(row[f"predicted_pixels_{name}"]) for name in ("core", "rim"))
    by_class = summary.segmentation_by_class
    assert list(by_class) == ["core", "rim"]
    shown = [float(row["dice_rim"]) for row in rows if int(row["target_pixels_rim"])]
    assert by_class["rim"].lesion_images.images == len(shown) == 24
    assert by_class["rim"].lesion_images.measures["dice"].mean == pytest.approx(np.mean(shown), abs=1e-5)
    assert json.loads((run / "evaluation-all" / "summary.json").read_text())["segmentation_by_class"]["core"]

    predicted = predict_files(PredictOptions(run, (nested.parent / "0.png",), tmp_path / "predicted"))
    mask = Image.open(tmp_path / "predicted" / "masks" / "0.png")
    assert mask.mode == "P"
    for value, name in ((1, "core"), (2, "rim")):
        assert (np.asarray(mask) == value).sum() == predicted[0][f"area_pixels_{name}"]
    assert predicted[0]["lesion_area_pixels"] == (np.asarray(mask) > 0).sum()


@pytest.mark.slow
def test_several_mask_classes_are_learned(nested: Path, tmp_path: Path) -> None:
    options = TrainOptions(
        **SMALL | {"model": "btinet_resnet18", "image_size": 64, "epochs": 45},
        data=str(nested),
        out=str(tmp_path / "run"),
        mask_classes="core,rim",
    )
    summary = evaluate_run(EvaluateOptions(train(options), split="all"))
    for scores in summary.segmentation_by_class.values():
        assert scores.lesion_images.measures["dice"].mean > 0.9


def test_masks_of_other_numbers_are_refused_before_training(nested: Path, tmp_path: Path) -> None:
    options = TrainOptions(**SMALL, data=str(nested), out=str(tmp_path / "run"), mask_classes="core")
    with pytest.raises(UserError, match=r"_m\.png: a mask must hold 0 and at most one other value"):
        train(options)
    command = [sys.executable, "-m", "btinet.cli", "data", "check", str(nested), "--mask-classes", "a,b"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert (nested.parent / "manifest.json").exists()


@pytest.fixture
def partly(ultrasound: Path) -> Path:
    """A third of the images without a mask, a third without a class."""
    rows = ["image,mask,label"]
    for folder in sorted(ultrasound.iterdir()):
        for number in range(1, 13):
            image = folder / f"{folder.name} ({number}).png"
            mask = "?" if number % 3 == 0 else f"{folder.name}/{image.stem}_mask.png"
            rows.append(f"{folder.name}/{image.name},{mask},{'' if number % 3 == 1 else folder.name}")
    path = ultrasound / "partly.csv"
    path.write_text("\n".join(rows) + "\n")
    return path


def test_missing_masks_and_classes_from_check_to_evaluation(partly: Path, tmp_path: Path) -> None:
    collection = read_collection(partly)
    assert sum(sample.masks is None for sample in collection.samples) == 12
    found = audit(collection)
    assert found.usable
    assert len(found.lesions) == 24
    write_manifest(tmp_path / "manifest.json", collection, found)
    again = read_manifest(tmp_path / "manifest.json", partly)
    assert [s.masks for s in again.samples] == [s.masks for s in collection.samples]

    run = train(TrainOptions(**SMALL, data=str(partly), out=str(tmp_path / "run"), class_weights="balanced"))
    for row in metrics(run):
        assert np.isfinite([value for name, value in row.items() if name.endswith("_loss")]).all()
    summary = evaluate_run(EvaluateOptions(run, split="all"))
    assert summary.images_without_mask == 12
    assert summary.segmentation.all_images.images == 24
    assert summary.classification is not None
    assert summary.classification.images == 24
    rows = table(run / "evaluation-all" / "per_image.csv")
    assert sum(row["iou"] == "" for row in rows) == 12
    assert sum(row["label"] == "" for row in rows) == 12


def test_every_part_has_images_with_and_without_masks(partly: Path, tmp_path: Path) -> None:
    from btinet.data import split_collection

    collection = read_collection(partly)
    split = split_collection(collection, {})
    for part in ("train", "val", "test"):
        masks = [s.masks is None for s in collection.samples if split[s.id] == part]
        assert any(masks)
        assert not all(masks)


@pytest.mark.parametrize("weighting", ["scheduled", "uncertainty", "dynamic_average", "upgrad"])
def test_each_weighting_trains(weighting: str, ultrasound: Path, tmp_path: Path) -> None:
    if weighting == "upgrad":
        pytest.importorskip("torchjd")
    common = SMALL | {"data": str(ultrasound), "weighting": weighting, "stage2_epochs": 0, "epochs": 3}
    rows = metrics(train(TrainOptions(**common, out=str(tmp_path / "run"))))
    weights = [(row["seg_weight"], row["clf_weight"]) for row in rows]
    assert (len(set(weights)) > 1) == (weighting != "upgrad")
    if weighting != "uncertainty":
        for row in rows:
            total = row["seg_weight"] * row["train_seg_loss"] + row["clf_weight"] * row["train_clf_loss"]
            assert row["train_loss"] == pytest.approx(total, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("weighting", ["uncertainty", "dynamic_average"])
def test_what_a_weighting_has_learned_survives_an_interruption(
    weighting: str, ultrasound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from btinet.training import records

    monkeypatch.setattr(records, "WRITING_INTERVAL", 0)
    common = SMALL | {"data": str(ultrasound), "weighting": weighting, "epochs": 4, "deterministic": True}
    whole = train(TrainOptions(**common, out=str(tmp_path / "whole")))
    write = records.RunWriter.epoch

    def stop(self: records.RunWriter, state: Any, better: bool, last: bool) -> None:
        write(self, state, better, last)
        if state.epoch == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(records.RunWriter, "epoch", stop)
    with pytest.raises(KeyboardInterrupt):
        train(TrainOptions(**common, out=str(tmp_path / "parts")))
    monkeypatch.setattr(records.RunWriter, "epoch", write)
    parts = resume(tmp_path / "parts")
    for ours, theirs in zip(metrics(parts), metrics(whole), strict=True):
        assert {k: v for k, v in ours.items() if k != "seconds"} == {k: v for k, v in theirs.items() if k != "seconds"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"class_weights": [1.0, 2.0]},
            "--class-weights .*each of the 3 classes, in the order benign, malignant, normal",
        ),
        ({"class_weights": [1.0, 0.0, 2.0]}, "--class-weights .*positive"),
        ({"mask_classes": "a,a"}, "--mask-classes 'a,a'"),
        ({"mask_classes": "a,b", "preset": "parity"}, "keras_truncated"),
        ({"weighting": "uncertainty", "recipe": {"clf_weight": 0}}, "--weighting uncertainty: .* positive"),
        ({"weighting": "pcgrad", "compile": True}, "--weighting pcgrad: .* --compile"),
    ],
)
def test_bad_options(changes: dict[str, Any], words: str, ultrasound: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        train(TrainOptions(**SMALL, data=str(ultrasound), out=str(tmp_path / "run"), **changes))
