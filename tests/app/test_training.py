"""Two-stage training on a small set in the BUSI layout."""

import csv
import json
import math
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from btinet import UserError, load_checkpoint
from btinet.data import SegmentationDataset, read_collection, read_split
from btinet.training import run_folder
from btinet.training.options import TrainOptions
from btinet.training.train import train

SMALL = {"model": "btinet_mobilenetv3_small_050", "image_size": 32, "epochs": 2, "stage2_epochs": 1, "device": "cpu"}


def options(data: Path, out: Path, **changes: object) -> TrainOptions:
    return replace(TrainOptions(data=str(data), out=str(out), dataset="busi", lr=1e-3), **{**SMALL, **changes})


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_what_a_run_leaves_behind(ultrasound: Path, tmp_path: Path) -> None:
    run = train(options(ultrasound, tmp_path / "run"))
    assert {p.name for p in run.iterdir()} >= {
        "config.yaml",
        "split.csv",
        "metrics.jsonl",
        "model.safetensors",
        "config.json",
        "curves.png",
        "environment.json",
    }
    rows = metrics(run)
    assert [(row["stage"], row["epoch"]) for row in rows] == [(1, 1), (1, 2), (2, 1)]
    for row in rows:
        assert row["val_score"] == pytest.approx(0.7 * row["val_iou"] + 0.3 * row["val_accuracy"])
    checkpoint = load_checkpoint(run)
    assert checkpoint.classes == ("benign", "malignant", "normal")
    assert checkpoint.preprocessing.image_size == (32, 32)
    environment = json.loads((run / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__.split("+")[0]
    split = read_split(run / "split.csv", read_collection(ultrasound, "busi"))
    assert sorted(set(split.values())) == ["test", "train", "val"]


@pytest.mark.slow
def test_same_seed_same_run_whatever_prepares_the_images(ultrasound: Path, tmp_path: Path) -> None:
    runs = [
        train(options(ultrasound, tmp_path / name, seed=7, workers=workers, stage2_epochs=1))
        for name, workers in (("a", 0), ("b", 2))
    ]
    (first, second) = ([{k: v for k, v in row.items() if k != "seconds"} for row in metrics(run)] for run in runs)
    assert first == second
    other = train(options(ultrasound, tmp_path / "c", seed=8))
    assert metrics(other)[0]["train_loss"] != first[0]["train_loss"]


def test_every_epoch_has_its_own_order_and_augmentation(
    ultrasound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: list[tuple[int, int]] = []
    fetch = SegmentationDataset.__getitem__

    def recording(self: SegmentationDataset, key: tuple[int, int] | int) -> dict[str, object]:
        if self.augmentation is not None and isinstance(key, tuple):
            keys.append(key)
        return fetch(self, key)

    monkeypatch.setattr(SegmentationDataset, "__getitem__", recording)
    train(options(ultrasound, tmp_path / "run"))
    orders = {epoch: [index for index, of in keys if of == epoch] for _, epoch in keys}
    assert sorted(orders) == [0, 1, 2]  # two epochs of stage 1, one of stage 2
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])
    assert orders[0] != orders[1]


def test_stage_two_moves_the_gates_alone(ultrasound: Path, tmp_path: Path) -> None:
    alone = train(options(ultrasound, tmp_path / "alone", stage2_epochs=0))
    both = train(options(ultrasound, tmp_path / "both", stage2_epochs=2))
    before, after = load_checkpoint(alone).model.state_dict(), load_checkpoint(both).model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(".upa." in name for name in moved)


def test_split_is_reused(ultrasound: Path, tmp_path: Path) -> None:
    first = train(options(ultrasound, tmp_path / "first", epochs=1, stage2_epochs=0))
    second = train(
        options(ultrasound, tmp_path / "second", epochs=1, stage2_epochs=0, seed=5, split=str(first / "split.csv"))
    )
    collection = read_collection(ultrasound, "busi")
    assert read_split(first / "split.csv", collection) == read_split(second / "split.csv", collection)


def test_config_is_complete_and_absolute(ultrasound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ultrasound.parent)
    run = train(options(Path(ultrasound.name), tmp_path / "run", epochs=1, stage2_epochs=0, preset="parity"))
    content = yaml.safe_load((run / "config.yaml").read_text())
    assert Path(content["data"]) == ultrasound.resolve()
    assert content["recipe"]["hard_boundary"] is True
    assert TrainOptions(**content).preset == "parity"


@pytest.mark.parametrize("preset", ["paper", "parity"])
def test_other_presets_train(ultrasound: Path, tmp_path: Path, preset: str) -> None:
    run = train(options(ultrasound, tmp_path / "run", epochs=1, preset=preset))
    assert len(metrics(run)) == 2
    scale = load_checkpoint(run).preprocessing.scale
    assert scale == pytest.approx(1 / 255**2 if preset == "parity" else 1 / 255)


@pytest.mark.parametrize("interaction", ["none", "fixed", "none,none,gated,gated"])
def test_interactions_train(ultrasound: Path, tmp_path: Path, interaction: str) -> None:
    run = train(options(ultrasound, tmp_path / "run", epochs=1, interaction=interaction))
    assert [row["stage"] for row in metrics(run)] == ([1, 2] if "gated" in interaction else [1])


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bf16-mixed"},
        {"channels": 1},
        {"dataset": "folders"},
        {"signals": "variance", "pool": "softmax"},
        {"decoder_channels": [16, 8]},
        {"freeze_stages": 1},
    ],
    ids=str,
)
def test_options_train(ultrasound: Path, tmp_path: Path, changes: dict[str, object]) -> None:
    run = train(options(ultrasound, tmp_path / "run", epochs=1, **changes))
    rows = metrics(run)
    assert len(rows) == 2
    assert all(math.isfinite(row["train_loss"]) for row in rows)
    channels = load_checkpoint(run).preprocessing.channels
    assert channels == changes.get("channels", 3)


@pytest.mark.parametrize("batch_size", [8, 64])
def test_a_last_batch_of_one_image_and_a_set_smaller_than_a_batch(
    ultrasound: Path, tmp_path: Path, batch_size: int
) -> None:
    """Nine images to train on: 8 + 1, and all of them in one."""
    rows = [["image", "mask", "label", "split"]]
    for image in sorted(ultrasound.rglob("*).png")):
        number = int(image.stem.split("(")[1].rstrip(")"))
        if number <= 5:
            split = "train" if number <= 3 else "val" if number == 4 else "test"
            rows.append([str(image), str(image.with_name(f"{image.stem}_mask.png")), image.parent.name, split])
    file = tmp_path / "data.csv"
    with file.open("w", newline="") as handle:
        csv.writer(handle).writerows(rows)
    run = train(replace(options(file, tmp_path / "run", epochs=1, batch_size=batch_size), dataset="csv"))
    assert len(metrics(run)) == 2


def test_a_folder_that_is_in_use_is_left_alone(ultrasound: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is not empty"):
        train(options(ultrasound, tmp_path / "run"))
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_divergence_is_explained(ultrasound: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="training diverged"):
        train(options(ultrasound, tmp_path / "run", lr=1e30))


def test_curves_are_drawn_now_and_then_and_at_the_end(
    ultrasound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    monkeypatch.setattr(run_folder, "draw_curves", lambda folder, rows: drawn.append(len(rows)))
    train(options(ultrasound, tmp_path / "often", epochs=3, stage2_epochs=0))
    assert drawn == [1, 3]
    monkeypatch.setattr("btinet.training.train.train_gates", lambda session: signal.raise_signal(signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in what they run behind
    try:
        with pytest.raises(KeyboardInterrupt):
            train(options(ultrasound, tmp_path / "interrupted", epochs=2))
    finally:
        signal.signal(signal.SIGINT, before)
    assert drawn == [1, 3, 1, 2]


@pytest.mark.slow
def test_it_learns(ultrasound: Path, tmp_path: Path) -> None:
    """Discs and squares brighter than the noise around them: far above what an untrained network reaches."""
    run = train(options(ultrasound, tmp_path / "run", model="btinet_resnet18", epochs=12, image_size=64))
    rows = metrics(run)
    assert max(row["val_iou"] for row in rows) > 0.5
    assert rows[11]["train_loss"] < 0.6 * rows[0]["train_loss"]
