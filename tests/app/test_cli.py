"""The command line as a process: the whole chain, and one clear sentence for bad input."""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from btinet.cli import main

MODEL = ["--model", "btinet_mobilenetv3_small_050", "--image-size", "32", "--device", "cpu"]


def btinet(*arguments: object, limit_kib: int | None = None, check: bool = False) -> subprocess.CompletedProcess[str]:
    """Run `btinet`; limit_kib: the largest file it may write, as on a disk that runs full."""
    command = [sys.executable, "-m", "btinet.cli", *map(str, arguments)]
    if limit_kib is not None:
        command = ["bash", "-c", f'ulimit -f {limit_kib}; exec "$@"', "bash", *command]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd="/")
    if check:
        assert done.returncode == 0, done.stderr
    return done


def one_sentence(code: int, stderr: str, *words: str) -> None:
    """Exit code 2, and one line on standard error that holds the words."""
    assert code == 2, stderr
    lines = stderr.strip().splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("btinet: error: ")
    for word in words:
        assert word in lines[0]


Refused = Callable[..., None]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run a command in this process, which saves the seconds of importing torch, and check how it is refused."""

    def run(arguments: Sequence[object], *words: str) -> None:
        code = main([str(argument) for argument in arguments])
        one_sentence(code, capsys.readouterr().err, *words)

    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, shared_ultrasound: Path) -> Path:
    out = tmp_path_factory.mktemp("runs") / "x"
    flags = ["--dataset", "busi", "--epochs", "2", "--stage2-epochs", "1", "--batch-size", "8", "--lr", "1e-3"]
    flags += ["--seed", "3", "--precision", "32-true", "--workers", "0", "--weights", "none"]
    done = btinet("train", "--data", shared_ultrasound, "--out", out, *MODEL, *flags, check=True)
    assert "stage 2 epoch  1/1" in done.stdout
    assert f"run saved in {out}" in done.stdout
    return out


def test_evaluate(run: Path) -> None:
    done = btinet("evaluate", run, check=True)
    assert "IoU" in done.stdout
    out = run / "evaluation-test"
    with (out / "per_image.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    with (run / "split.csv").open(newline="") as file:
        tested = {row["image"] for row in csv.DictReader(file) if row["split"] == "test"}
    assert {row["image"] for row in rows} == tested
    summary = json.loads((out / "summary.json").read_text())
    ious = [float(row["iou"]) for row in rows if int(row["target_pixels"]) > 0]
    assert summary["segmentation"]["lesion_images"]["measures"]["iou"]["mean"] == pytest.approx(np.mean(ious))
    assert Image.open(out / "cases.png").size[0] > 300


@pytest.mark.slow
def test_analyse(run: Path) -> None:
    done = btinet(
        "analyse", run, "--split", "val", "--bootstrap", "200", "--device", "cpu", "--batch-size", "3", check=True
    )
    out = run / "analysis-val"
    assert f"Written to {out}" in done.stdout
    assert all(f"\n  {level} " in done.stdout for level in ("d1", "d2", "d3", "d4"))
    with (out / "images.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    with (run / "split.csv").open(newline="") as file:
        validated = {row["image"] for row in csv.DictReader(file) if row["split"] == "val"}
    assert {row["image"] for row in rows} == validated
    found = json.loads((out / "analysis.json").read_text())
    for level in ("d1", "d2", "d3", "d4"):
        mean = found["levels"][level]["displacement"]["clf_to_seg"]["before_gate"]["overall"]["mean"]
        assert mean == pytest.approx(
            np.mean([float(row[f"displacement_clf_to_seg_{level}"]) for row in rows]), rel=1e-4
        )
        assert 0 < mean < 0.7  # the strength of the interaction bounds it
    assert Image.open(out / "displacement.png").size[0] > 300


def test_predict(run: Path, ultrasound: Path, tmp_path: Path) -> None:
    images = sorted((ultrasound / "benign").glob("*).png"))[:2]
    btinet("predict", run, images[0], ultrasound / "malignant", "--out", tmp_path / "out", check=True)
    rows = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert len(rows) == 1 + 12  # masks beside the images are not images
    with (tmp_path / "out" / "predictions.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(rows)
    for row in rows:
        probabilities = [row[f"prob_{name}"] for name in ("benign", "malignant", "normal")]
        assert sum(probabilities) == pytest.approx(1, abs=1e-5)
        assert {f"gate_{stream}_d{i}" for stream in ("seg", "clf") for i in (1, 2, 3, 4)} <= set(row)
    masks = sorted((tmp_path / "out" / "masks").rglob("*.png"))
    assert len(masks) == len(list((tmp_path / "out" / "overlays").rglob("*.png"))) == 13
    first = next(m for m in masks if m.name == images[0].name)
    assert Image.open(first).size == Image.open(images[0]).size
    assert set(np.unique(np.asarray(Image.open(first)))) <= {0, 255}


@pytest.mark.slow
def test_a_runs_config_trains_again(run: Path, tmp_path: Path) -> None:
    done = btinet("train", "--config", run / "config.yaml", "--out", tmp_path / "again", "--epochs", "1", check=True)
    assert "stage 1 epoch  1/1" in done.stdout
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    again = json.loads((tmp_path / "again" / "metrics.jsonl").read_text().splitlines()[0])
    assert again["train_loss"] == first["train_loss"]


def truncate(folder: Path) -> str:
    image = folder / "benign" / "benign (3).png"
    image.write_bytes(image.read_bytes()[:200])
    return image.name


def resize_mask(folder: Path) -> str:
    mask = folder / "benign" / "benign (3)_mask.png"
    Image.open(mask).resize((9, 9)).save(mask)
    return mask.name


def blur_mask(folder: Path) -> str:
    mask = folder / "malignant" / "malignant (5)_mask.png"
    pixels = np.asarray(Image.open(mask)) // 2
    Image.fromarray((pixels + np.arange(pixels.shape[1]) % 7).astype(np.uint8)).save(mask)
    return mask.name


def unknown_class(folder: Path) -> str:
    (folder / "cyst").mkdir()
    Image.new("L", (40, 40)).save(folder / "cyst" / "cyst (1).png")
    return "cyst"


def empty_class(folder: Path) -> str:
    for file in (folder / "normal").iterdir():
        file.unlink()
    return "normal"


def missing_mask(folder: Path) -> str:
    (folder / "malignant" / "malignant (7)_mask.png").unlink()
    return "malignant (7).png"


@pytest.mark.parametrize("damage", [truncate, resize_mask, blur_mask, unknown_class, empty_class, missing_mask])
def test_bad_data_is_named_and_nothing_is_written(
    damage: Callable[[Path], str], ultrasound: Path, tmp_path: Path, refused: Refused
) -> None:
    name = damage(ultrasound)
    out = tmp_path / "run"
    refused(["train", "--data", ultrasound, "--out", out, "--epochs", 1, *MODEL], name)
    assert not out.exists()


@pytest.mark.slow
def test_a_full_disk_leaves_nothing_half_written(ultrasound: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = btinet("train", "--data", ultrasound, "--out", out, "--epochs", 1, *MODEL, limit_kib=200)
    one_sentence(done.returncode, done.stderr, "stage1.pt", "could not be written", "disk full?")
    assert not (out / "stage1.pt").exists()
    assert not (out / "model.safetensors").exists()
    assert not [p for p in out.iterdir() if p.name.startswith(".")]


def test_a_checkpoint_of_another_model(run: Path, tmp_path: Path, ultrasound: Path, refused: Refused) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name in ("model.safetensors", "config.json", "config.yaml", "split.csv"):
        (other / name).write_bytes((run / name).read_bytes())
    config = (other / "config.json").read_text()
    (other / "config.json").write_text(config.replace("mobilenetv3_small_050", "resnet18"))
    weights = str(other / "model.safetensors")
    image = ultrasound / "benign" / "benign (1).png"
    refused(["predict", other, image, "--out", tmp_path / "out"], weights, "another model")
    refused(["evaluate", other], weights, "another model")
    refused(["analyse", other], weights, "another model")
    assert not (tmp_path / "out").exists()


def test_a_bad_image_among_good_ones_stops_prediction_before_anything_is_written(
    run: Path, ultrasound: Path, tmp_path: Path, refused: Refused
) -> None:
    name = truncate(ultrasound)
    refused(["predict", run, ultrasound / "benign", "--out", tmp_path / "out"], name)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--out", "/tmp/x"], ["--data"]),
        (["train", "--data", "/nowhere", "--out", "/tmp/x-new"], ["/nowhere"]),
        (["train", "--data", "{data}", "--out", "/tmp/x-new", "--epochs", "0"], ["--epochs 0", "at least 1"]),
        (["train", "--data", "{data}", "--out", "/tmp/x-new", "--model", "unet"], ["'unet'", "btinet_"]),
        (["train", "--data", "{data}", "--out", "/tmp/x-new", "--weights", "a.pth"], ["'a.pth'", "no such file"]),
        (["train", "--data", "{data}", "--out", "/tmp/x-new", "--preset", "best"], ["--preset", "parity"]),
        (["train", "--data", "{data}", "--out", "/tmp/x-new", "--recipe", "{a: 1}"], ["recipe", "'a'"]),
        (["train", "--data", "{data}", "--out", "/tmp/x-new", "--colour", "red"], ["--colour"]),
        (["evaluate", "/nowhere"], ["/nowhere"]),
        (["analyse", "/nowhere"], ["/nowhere"]),
        (["analyse", "/nowhere", "--bootstrap", "10"], ["--bootstrap 10", "at least 100"]),
        (["analyse", "/nowhere", "--split", "best"], ["--split", "val"]),
        (["predict", "/nowhere", "{data}", "--out", "/tmp/x-new"], ["/nowhere"]),
        (["demo", "--out", "{data}"], ["not empty"]),
        (["paint"], ["paint", "train"]),
    ],
)
def test_wrong_arguments(arguments: list[str], words: list[str], shared_ultrasound: Path, refused: Refused) -> None:
    refused([a.format(data=shared_ultrasound) if a == "{data}" else a for a in arguments], *words)


def test_models_and_backends(capsys: pytest.CaptureFixture[str], refused: Refused) -> None:
    assert main(["models", "resnet1*"]) == 0
    assert "btinet_resnet18" in capsys.readouterr().out.split()
    assert main(["backends"]) == 0
    assert "fused_task_interaction" in capsys.readouterr().out
    refused(["models", "zebra*"], "zebra*")
