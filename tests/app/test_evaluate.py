from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from btinet.errors import UserError
from btinet.evaluation import evaluate
from btinet.evaluation.console import print_summary
from btinet.evaluation.evaluate import EvaluateOptions, choose_cases, evaluate_run
from btinet.models.checkpoint import Checkpoint

SIDE = 64
# name: bright columns, columns of the mask, split. The stand-in outlines exactly the bright columns.
IMAGES = {
    "dark/a": (range(8), range(8), "test"),  # Dice 1
    "dark/b": (range(8), range(4, 12), "test"),  # Dice 0.5
    "dark/e": (range(0), range(0), "test"),  # rightly empty
    "dark/f": (range(4), range(0), "test"),  # false alarm
    "=bright/c": (range(32), range(8, 40), "test"),  # Dice 0.75
    "=bright/d": (range(0), range(16), "test"),  # missed, wrong class
    "=bright/g": (range(32), range(32), "train"),
    "dark/h": (range(8), range(8), "val"),
}


def columns(which: range) -> Image.Image:
    pixels = np.zeros((SIDE, SIDE), dtype=np.uint8)
    pixels[:, list(which)] = 255
    return Image.fromarray(pixels)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, brightness_checkpoint: Checkpoint) -> Path:
    monkeypatch.setattr(evaluate, "load_checkpoint", lambda path: brightness_checkpoint)
    data, run = tmp_path / "data", tmp_path / "run"
    run.mkdir()
    lines = ["image,label,group,split"]
    for name, (bright, mask, split) in IMAGES.items():
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        columns(bright).save(data / f"{name}.png")
        columns(mask).save(data / f"{name}_mask.png")
        lines.append(f"{name}.png,{name.split('/')[0]},,{split}")
    (run / "split.csv").write_text("\n".join(lines) + "\n")
    (run / "config.yaml").write_text(f"data: '{data}'\ndataset: folders\nmask_threshold: null\n")
    return run


def test_scores_of_the_test_split_by_hand(run: Path) -> None:
    summary = evaluate_run(EvaluateOptions(run, batch_size=4))
    assert summary.images == 6
    lesion, every = summary.segmentation.lesion_images, summary.segmentation.all_images
    assert lesion.measures["dice"].mean == pytest.approx((1 + 0.5 + 0.75 + 0) / 4)
    assert lesion.measures["iou"].mean == pytest.approx((1 + 1 / 3 + 3 / 5 + 0) / 4)
    assert every.measures["dice"].mean == pytest.approx((1 + 0.5 + 0.75 + 0 + 1 + 0) / 6)
    assert lesion.measures["hd95"].mean == pytest.approx((0 + 4 + 8 + SIDE * math.sqrt(2)) / 4)
    assert lesion.n_missed == 1
    assert summary.segmentation.false_positive_rate == 0.5
    assert summary.classification is not None
    assert summary.classification.accuracy == pytest.approx(5 / 6)
    assert summary.classification.confusion == ((4, 0), (1, 1))
    background, foreground = (summary.baselines[f"all_{kind}_iou"] for kind in ("background", "foreground"))
    assert background == {"lesion_images": 0.0, "all_images": pytest.approx(2 / 6)}
    fractions = (8 + 8 + 32 + 16) / SIDE
    assert foreground == {
        "lesion_images": pytest.approx(fractions / 4),
        "all_images": pytest.approx(fractions / 6),
    }


def test_files_of_an_evaluation(run: Path) -> None:
    evaluate_run(EvaluateOptions(run))
    out = run / "evaluation-test"
    assert sorted(path.name for path in out.iterdir()) == [
        "cases.png",
        "confusion_matrix.png",
        "per_image.csv",
        "summary.json",
    ]
    with (out / "per_image.csv").open(newline="") as handle:
        rows = {row["image"]: row for row in csv.DictReader(handle)}
    assert set(rows) == {"'=bright/c.png", "'=bright/d.png", *(f"dark/{name}.png" for name in "abef")}
    b = rows["dark/b.png"]
    assert (b["label"], b["predicted"], b["dice"], b["hd95"]) == ("dark", "dark", "0.5", "4")
    assert (b["target_pixels"], b["predicted_pixels"], b["overlap_pixels"]) == ("512", "512", "256")
    assert float(b["gate_seg_d1"]) == pytest.approx(8 / 64, abs=1e-3)
    assert float(b["proxy_align_d1"]) == pytest.approx(8 / 64, abs=1e-3)
    assert rows["dark/e.png"]["sensitivity"] == ""
    stored = json.loads((out / "summary.json").read_text())
    assert stored["segmentation"]["lesion_images"]["n_missed"] == 1
    assert stored["classification"]["auroc"]["dark"] is not None
    for picture in ("cases.png", "confusion_matrix.png"):
        with Image.open(out / picture) as image:
            assert min(image.size) > 200


def test_scores_at_the_size_of_the_network(run: Path) -> None:
    evaluate_run(EvaluateOptions(run, eval_size="model", out=run / "small"))
    with (run / "small/per_image.csv").open(newline="") as handle:
        rows = {row["image"]: row for row in csv.DictReader(handle)}
    b = rows["dark/b.png"]
    assert (b["height"], b["width"], b["target_pixels"], b["predicted_pixels"]) == ("32", "32", "128", "128")
    assert (b["dice"], b["hd95"]) == ("0.5", "2")


def test_split_chooses_the_images(run: Path) -> None:
    assert evaluate_run(EvaluateOptions(run, split="train")).images == 1
    assert (run / "evaluation-train/per_image.csv").exists()
    val = evaluate_run(EvaluateOptions(run, split="val"))
    assert val.classification is not None
    assert val.classification.absent_classes == ("=bright",)
    assert evaluate_run(EvaluateOptions(run, split="all")).images == len(IMAGES)


def test_data_that_moved_is_named(run: Path, tmp_path: Path) -> None:
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="--data"):
        evaluate_run(EvaluateOptions(run))
    assert evaluate_run(EvaluateOptions(run, data=tmp_path / "elsewhere")).images == 6


def test_other_data_needs_no_split(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    (other / "dark").mkdir(parents=True)
    columns(range(8)).save(other / "dark/x.png")
    columns(range(8)).save(other / "dark/x_mask.png")
    (run / "split.csv").unlink()
    options = EvaluateOptions(run, data=other, dataset="folders", split="all")
    assert evaluate_run(options).segmentation.lesion_images.measures["dice"].mean == 1.0


def test_damaged_configuration_is_named(run: Path) -> None:
    (run / "config.yaml").write_text("data: [unclosed")
    with pytest.raises(UserError, match=r"config\.yaml"):
        evaluate_run(EvaluateOptions(run))
    (run / "config.yaml").write_text("just text")
    with pytest.raises(UserError, match=r"config\.yaml"):
        evaluate_run(EvaluateOptions(run))


def test_unlabelled_data_has_no_class_scores(run: Path, tmp_path: Path) -> None:
    table = tmp_path / "data/samples.csv"
    table.write_text("image,label,mask\ndark/a.png,,dark/a_mask.png\ndark/e.png,,\n")
    summary = evaluate_run(EvaluateOptions(run, data=table, dataset="csv", split="all"))
    assert summary.classification is None
    assert not (run / "evaluation-all/confusion_matrix.png").exists()
    text = printed(summary)
    assert "No image is labelled" in text


def test_printed_summary_states_scores_and_definitions(run: Path) -> None:
    text = printed(evaluate_run(EvaluateOptions(run, hd95_empty="inf")))
    assert "0.562" in text  # mean Dice of lesion images
    assert "inf" in text
    assert "1 of 2 (0.500)" in text
    assert "0.833" in text  # accuracy
    for words in ("above 0.5", "each image's own size", "infinity", "n-1"):
        assert words in text


def printed(summary: evaluate.Summary) -> str:
    stream = io.StringIO()
    print_summary(summary, Console(file=stream, width=200))
    return stream.getvalue()


def test_cases_are_the_best_the_median_and_the_worst() -> None:
    dice = [0.5, 0.9, 0.1, 0.7, 0.3, 1.0, 0.0, 0.6, 0.4, 0.8, 0.2]
    names = {name: [dice[index] for index in row] for name, row in choose_cases(dice).items()}
    assert names == {"best": [1.0, 0.9, 0.8], "median": [0.6, 0.5, 0.4], "worst": [0.2, 0.1, 0.0]}
    assert choose_cases([0.3]) == {"best": [0]}
    assert choose_cases([0.3, 0.8]) == {"best": [1], "worst": [0]}
    assert choose_cases([0.3, 0.8, 0.5]) == {"best": [1], "median": [2], "worst": [0]}
