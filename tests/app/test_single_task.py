"""Training, evaluation and prediction of a network for one task."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.utils.data import default_collate

from btinet import UserError, load_checkpoint
from btinet.cli import main
from btinet.data import SegmentationDataset, read_collection, read_split
from btinet.evaluation import EvaluateOptions, evaluate_run, print_summary
from btinet.serving import PredictOptions, predict_files
from btinet.training.losses import LossOptions, classification_loss, segmentation_loss
from btinet.training.options import TrainOptions
from btinet.training.train import resume, train

SMALL = {"model": "btinet_mobilenetv3_small_050", "image_size": 32, "epochs": 1, "device": "cpu", "lr": 1e-3}
TASKS = ("segmentation", "classification")


@pytest.fixture(scope="module")
def runs(shared_ultrasound: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("single")
    plain = TrainOptions(data=str(shared_ultrasound), out="", dataset="busi", interaction="none", **SMALL)  # type: ignore[arg-type]
    return {tasks: train(replace(plain, out=str(out / tasks), tasks=tasks)) for tasks in TASKS}


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("tasks", "score", "other"), [("segmentation", "iou", "accuracy"), ("classification", "accuracy", "iou")]
)
def test_training_is_judged_by_the_task_alone(runs: dict[str, Path], tasks: str, score: str, other: str) -> None:
    rows = metrics(runs[tasks])
    assert [(row["stage"], row["epoch"]) for row in rows] == [(1, 1)]  # there are no gates to train
    for row in rows:
        assert row["val_score"] == row[f"val_{score}"]
        assert f"val_{other}" not in row
    before = (runs[tasks] / "model.safetensors").stat().st_mtime_ns
    resume(runs[tasks])  # finished
    assert (runs[tasks] / "model.safetensors").stat().st_mtime_ns == before


def test_the_loss_is_that_of_the_task_alone(runs: dict[str, Path], shared_ultrasound: Path) -> None:
    """Of the validation images, which make one batch, from the weights that the only epoch left."""
    collection = read_collection(shared_ultrasound, "busi")
    for tasks, run in runs.items():
        split = read_split(run / "split.csv", collection)
        checkpoint = load_checkpoint(run)
        data = SegmentationDataset([s for s in collection.samples if split[s.id] == "val"], checkpoint.preprocessing)
        batch = default_collate([data[i] for i in range(len(data))])
        with torch.no_grad():
            output = checkpoint.model(batch["image"])
        if tasks == "segmentation":
            expected = segmentation_loss(output.seg_logits, batch["mask"], LossOptions())
        else:
            expected = classification_loss(output.cls_logits, batch["label"], LossOptions())
        assert metrics(run)[0]["val_loss"] == pytest.approx(expected.item(), rel=1e-4)


def test_evaluation_reports_the_task_alone(runs: dict[str, Path]) -> None:
    for tasks, run in runs.items():
        summary = evaluate_run(EvaluateOptions(run))
        stored = json.loads((run / "evaluation-test" / "summary.json").read_text())
        with (run / "evaluation-test" / "per_image.csv").open(newline="") as file:
            columns = csv.DictReader(file).fieldnames or []
        files = {file.name for file in (run / "evaluation-test").iterdir()}
        console = Console(record=True, width=200)
        print_summary(summary, console)
        text = console.export_text()
        segments = tasks == "segmentation"
        assert (stored["segmentation"] is not None) == segments == ("iou" in columns) == ("cases.png" in files)
        assert (stored["classification"] is None) == segments == ("predicted" not in columns)
        assert ("confusion_matrix.png" in files) != segments
        assert ("does not segment" in text) != segments
        assert ("does not classify" in text) == segments
        assert ("macro F1" in text) != segments


def test_prediction_gives_the_task_alone(runs: dict[str, Path], shared_ultrasound: Path, tmp_path: Path) -> None:
    image = shared_ultrasound / "benign" / "benign (1).png"
    rows = {tasks: predict_files(PredictOptions(run, (image,), tmp_path / tasks))[0] for tasks, run in runs.items()}
    assert rows["segmentation"].keys() == {"image", "lesion_area_pixels", "lesion_area_fraction"}
    assert rows["classification"].keys() == {
        "image",
        "predicted",
        *(f"prob_{n}" for n in ("benign", "malignant", "normal")),
    }
    assert (tmp_path / "segmentation" / "masks" / image.name).is_file()
    assert sorted(p.name for p in (tmp_path / "classification").iterdir()) == ["predictions.csv", "predictions.json"]


def test_only_segmentation_needs_a_lesion_to_validate(
    runs: dict[str, Path], shared_ultrasound: Path, tmp_path: Path
) -> None:
    split = tmp_path / "split.csv"
    lines = (runs["segmentation"] / "split.csv").read_text().splitlines()
    split.write_text("\n".join(x.replace(",val", ",train") if "normal" not in x else x for x in lines) + "\n")
    plain = TrainOptions(data=str(shared_ultrasound), out="", dataset="busi", interaction="none", **SMALL)  # type: ignore[arg-type]
    for tasks in TASKS:
        of_task = replace(plain, out=str(tmp_path / tasks), tasks=tasks, split=str(split))  # type: ignore[arg-type]
        if tasks == "classification":
            assert train(of_task).is_dir()
        else:
            with pytest.raises(UserError, match="no validation image shows a lesion"):
                train(of_task)


def test_one_task_needs_no_weighting(runs: dict[str, Path], shared_ultrasound: Path, tmp_path: Path) -> None:
    assert metrics(runs["classification"])[0]["clf_weight"] == 1
    assert "seg_weight" not in metrics(runs["classification"])[0]
    options = TrainOptions(
        data=str(shared_ultrasound),
        out=str(tmp_path / "run"),
        interaction="none",
        tasks="segmentation",
        weighting="uncertainty",
    )
    with pytest.raises(UserError, match="--weighting uncertainty: balances two tasks, not with --tasks segmentation"):
        train(options)


def test_interaction_must_be_none(shared_ultrasound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", SMALL["model"], "--image-size", "32", "--device", "cpu", "--tasks", "segmentation"]
    assert main(["train", "--data", str(shared_ultrasound), "--out", str(tmp_path / "run"), *map(str, flags)]) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert "a single task has no other to interact with" in sentence
    assert not (tmp_path / "run").exists()


def test_a_task_alone_needs_no_answers_of_the_other(ultrasound: Path, tmp_path: Path) -> None:
    images = sorted(p for p in ultrasound.glob("*/*.png") if "_mask" not in p.name)
    table = ultrasound / "set.csv"
    for task, row in (
        ("segmentation", lambda image: f"{image.stem}_mask.png,"),
        ("classification", lambda image: f"?,{image.parent.name}"),
    ):
        lines = []
        for image in images:
            mask, label = row(image).split(",")
            lines.append(f"{image},{mask if mask == '?' else image.with_name(mask)},{label}")
        table.write_text("\n".join(["image,mask,label", *lines]) + "\n")
        changes = SMALL | {"data": str(table), "dataset": "csv", "tasks": task, "interaction": "none"}
        with pytest.raises(UserError, match=f"or train the {task} alone"):
            train(TrainOptions(**changes | {"tasks": "both", "out": str(tmp_path / "both")}))
        run = train(TrainOptions(**changes, out=str(tmp_path / task)))
        summary = evaluate_run(EvaluateOptions(run))
        assert (summary.segmentation is None) == (task == "classification")
        assert (summary.classification is None) == (task == "segmentation")
