"""``btinet ablate`` on a small set with a prescribed test part, so that two folds suffice."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from btinet.cli import main
from btinet.errors import UserError
from btinet.evaluation import evaluate
from btinet.evaluation.tables import write_csv
from btinet.experiments import ablation, process
from btinet.experiments.ablation import AblateOptions, ablate
from btinet.experiments.report import NAMES
from btinet.experiments.results import Run, read_groups_of_split, read_run
from btinet.experiments.variants import PAPER_TABLE, Variant, all_variants, choose_variants
from btinet.training import run_folder
from btinet.training.options import CHOSEN_BY_ABLATE, TrainOptions

SMALL = {"model": "btinet_mobilenetv3_small_050", "image_size": 32, "epochs": 1, "stage2_epochs": 1, "device": "cpu"}
VARIANTS = ("gated", "segmentation", "classification")


@pytest.fixture(scope="module", autouse=True)
def _without_the_figures_of_single_runs() -> Iterator[None]:
    """They take a third of the time, and have tests of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder, "draw_curves", lambda folder, rows: None)
        patch.setattr(evaluate, "save_figure", lambda figure, path: None)
        yield


@pytest.fixture(scope="module")
def table(shared_ultrasound: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ultrasound images as a CSV file: the last four of each class are for testing, one pair is a group."""
    rows = [["image", "mask", "label", "group", "split"]]
    for image in sorted(shared_ultrasound.rglob("*).png")):
        number = int(image.stem.split("(")[1].rstrip(")"))
        group = "pair" if image.parent.name == "benign" and number > 10 else ""
        mask = image.with_name(f"{image.stem}_mask.png")
        rows.append([str(image), str(mask), image.parent.name, group, "test" if number > 8 else ""])
    file = tmp_path_factory.mktemp("table") / "data.csv"
    with file.open("w", newline="") as handle:
        csv.writer(handle).writerows(rows)
    return file


def options(table: Path, out: Path, **changes: Any) -> AblateOptions:
    base = TrainOptions(data=str(table), out=str(out), dataset="csv", lr=1e-3, deterministic=True, **SMALL)  # type: ignore[arg-type]
    return replace(AblateOptions(out, base, variants=",".join(VARIANTS), folds=2), **changes)


def in_this_process(options: TrainOptions) -> str | None:
    """What the process of a run does, without the seconds of starting it."""
    try:
        process._train_and_evaluate(options)
    except UserError as error:
        return str(error)
    return None


@pytest.fixture(scope="module")
def ablated(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ablation") / "x"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablation, "train_in_own_process", in_this_process)
        assert ablate(options(table, out)) == {}
    return out


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as handle:
        return list(csv.DictReader(handle))


def per_image(out: Path, variant: str, fold: int) -> dict[str, dict[str, str]]:
    file = out / "runs" / variant / f"seed42-fold{fold}" / "evaluation-test" / "per_image.csv"
    return {row["image"]: row for row in rows_of(file)}


def test_every_variant_sees_the_same_folds(ablated: Path, table: Path) -> None:
    prescribed = {row["image"] for row in rows_of(table) if row["split"] == "test"}
    validated: list[set[str]] = []
    for fold in (0, 1):
        splits = [
            {
                row["image"]: row["split"]
                for row in rows_of(ablated / "runs" / name / f"seed42-fold{fold}" / "split.csv")
            }
            for name in VARIANTS
        ]
        assert all(split == splits[0] for split in splits)
        validated.append({image for image, part in splits[0].items() if part == "val"})
        tested = {image for image, part in splits[0].items() if part == "test"}
        assert {Path(image).name for image in tested} == {Path(image).name for image in prescribed}
        for name in VARIANTS:
            assert {Path(image).name for image in per_image(ablated, name, fold)} == {Path(i).name for i in tested}
    assert not validated[0] & validated[1]


def test_one_row_per_run_with_the_scores_of_its_evaluation(ablated: Path) -> None:
    rows = rows_of(ablated / "ablation.csv")
    assert [(row["variant"], row["seed"], row["fold"]) for row in rows] == [
        (name, "42", str(fold)) for fold in (0, 1) for name in VARIANTS
    ]
    for row in rows:
        run = ablated / "runs" / row["variant"] / f"seed42-fold{row['fold']}"
        summary = json.loads((run / "evaluation-test" / "summary.json").read_text())
        assert not list(run.glob("*.pt"))
        if row["variant"] == "classification":
            assert row["iou"] == row["pooled_dice"] == ""
        else:
            of_lesions = summary["segmentation"]["lesion_images"]
            assert float(row["iou"]) == pytest.approx(of_lesions["measures"]["iou"]["mean"], rel=1e-5)
            assert float(row["pooled_dice"]) == pytest.approx(of_lesions["pooled_dice"], rel=1e-5)
        if row["variant"] == "segmentation":
            assert row["accuracy"] == row["sensitivity_benign"] == ""
        else:
            assert float(row["accuracy"]) == pytest.approx(summary["classification"]["accuracy"], rel=1e-5)
            assert float(row["sensitivity_benign"]) == pytest.approx(summary["classification"]["sensitivity"]["benign"])


def test_the_summary_by_hand(ablated: Path) -> None:
    rows = rows_of(ablated / "ablation.csv")
    stored = json.loads((ablated / "ablation.json").read_text())

    def column(name: str, score: str) -> list[float]:
        return [float(row[score]) for row in rows if row["variant"] == name]

    assert stored["reference"] == "gated"
    for name, variant in stored["variants"].items():
        assert variant["runs"] == 2
        for score in ("iou", "accuracy"):
            if score == {"segmentation": "accuracy", "classification": "iou"}.get(name):
                assert variant["scores"][score] == {"mean": None, "sd": None, "n": 0}
                continue
            values = column(name, score)
            assert variant["scores"][score]["mean"] == pytest.approx(np.mean(values), abs=1e-5)
            assert variant["scores"][score]["sd"] == pytest.approx(np.std(values, ddof=1), abs=1e-5)
    for score, single in (("iou", "segmentation"), ("accuracy", "classification")):
        assert stored["variants"]["gated"]["differences"] == {}
        differences: dict[str, list[float]] = {}
        for fold in (0, 1):
            ours, theirs = per_image(ablated, single, fold), per_image(ablated, "gated", fold)
            for image in ours:
                if score == "accuracy":
                    pair = [float(row[image]["predicted"] == row[image]["label"]) for row in (ours, theirs)]
                elif theirs[image]["target_pixels"] == "0":
                    continue
                else:
                    pair = [float(row[image]["iou"]) for row in (ours, theirs)]
                differences.setdefault(image, []).append(pair[0] - pair[1])
        difference = stored["variants"][single]["differences"][score]
        assert difference["mean"] == pytest.approx(np.mean([np.mean(d) for d in differences.values()]), abs=1e-6)
        assert difference["images"] == len(differences) == (8 if score == "iou" else 12)
        assert difference["groups"] == difference["images"] - 1  # the pair
        assert difference["low"] <= difference["mean"] <= difference["high"]
        assert difference["runs"] == 2
    gains = [
        (np.mean(column("gated", score)) - np.mean(column(single, score))) / np.mean(column(single, score))
        for score, single in (("iou", "segmentation"), ("accuracy", "classification"))
    ]
    assert stored["variants"]["gated"]["multi_task_gain"] == pytest.approx(100 * np.mean(gains), rel=1e-3)
    assert stored["variants"]["segmentation"]["multi_task_gain"] is None


def test_the_table_and_the_figure(ablated: Path) -> None:
    stored = json.loads((ablated / "ablation.json").read_text())["variants"]
    lines = (ablated / "ablation.md").read_text().splitlines()
    cells = {row[0]: row for row in ([c.strip() for c in line.strip("|").split("|")] for line in lines if "|" in line)}
    heading = cells["variant"]
    assert set(VARIANTS) < set(cells)
    for name in VARIANTS:
        row = dict(zip(heading, cells[name], strict=True))
        iou, gain = stored[name]["scores"]["iou"], stored[name]["multi_task_gain"]
        assert row["IoU"] == ("–" if iou["mean"] is None else f"{iou['mean']:.3f} ± {iou['sd']:.3f}")
        assert row["Δm %"] == ("–" if gain is None else f"{gain:+.2f}")
        assert row["runs"] == "2"
        difference = stored[name]["differences"].get("accuracy")
        if difference is None or difference["mean"] is None:
            assert row["Δ accuracy"] == "–"
        else:
            numbers = [f"{difference[key]:+.3f}" for key in ("mean", "low", "high")]
            assert row["Δ accuracy"] == f"{numbers[0]} [{numbers[1]}, {numbers[2]}]"
    assert dict(zip(heading, cells["gated"], strict=True))["has"] == "MSCF, TIM + UPA"
    with Image.open(ablated / "ablation.png") as image:
        assert min(image.size) > 300


def test_finished_runs_are_left_alone_and_others_are_added(
    ablated: Path, table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[str] = []

    def record(options: TrainOptions) -> str | None:
        started.append(options.out)
        return in_this_process(options)

    monkeypatch.setattr(ablation, "train_in_own_process", record)
    before = {name: (ablated / name).read_bytes() for name in NAMES}
    assert ablate(options(table, ablated)) == {}
    assert started == []
    assert "6 of them finished" in capsys.readouterr().out
    assert {name: (ablated / name).read_bytes() for name in NAMES if name != "ablation.png"} == {
        name: content for name, content in before.items() if name != "ablation.png"
    }
    assert ablate(options(table, ablated, variants="gated,baseline", reference="baseline")) == {}
    assert started == [str(ablated / "runs" / "baseline" / f"seed42-fold{fold}") for fold in (0, 1)]
    stored = json.loads((ablated / "ablation.json").read_text())
    assert list(stored["variants"]) == ["gated", "baseline"]
    assert stored["reference"] == "baseline"
    assert ablate(options(table, ablated)) == {}
    assert (ablated / "ablation.md").read_bytes() == before["ablation.md"]


def test_a_failed_run_is_named_and_the_others_go_on(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_once(options: TrainOptions) -> str | None:
        return "the disk is full." if "fixed" in options.out else in_this_process(options)

    out = tmp_path / "x"
    two = options(table, out, variants="fixed,baseline", folds=None)
    monkeypatch.setattr(ablation, "train_in_own_process", fail_once)
    assert ablate(two) == {"runs/fixed/seed42": "the disk is full."}
    stored = json.loads((out / "ablation.json").read_text())
    assert list(stored["failures"].values()) == ["the disk is full."]
    assert stored["variants"]["fixed"]["runs"] == 0
    assert stored["variants"]["baseline"]["runs"] == 1
    assert "the disk is full." in (out / "ablation.md").read_text()
    monkeypatch.setattr(ablation, "train_in_own_process", in_this_process)
    assert ablate(two) == {}
    assert json.loads((out / "ablation.json").read_text())["failures"] == {}


def test_a_run_that_was_killed_before_it_began_begins_anew(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "x"
    one = options(table, out, variants="baseline", folds=None)

    def killed(options: TrainOptions) -> str:
        Path(options.out).mkdir(parents=True)
        (Path(options.out) / "split.csv").write_text("half")
        return "killed."

    monkeypatch.setattr(ablation, "train_in_own_process", killed)
    assert list(ablate(one).values()) == ["killed."]
    assert not (out / "ablation.csv").exists()
    monkeypatch.setattr(ablation, "train_in_own_process", in_this_process)
    assert ablate(one) == {}


def test_what_is_paired_of_an_image(tmp_path: Path) -> None:
    """IoU of images with a lesion, accuracy of labelled ones, groups of names that a spreadsheet must not run."""
    run = Run("gated", 1, None)
    folder = run.folder(tmp_path) / "evaluation-test"
    folder.mkdir(parents=True)
    rows = [
        {"image": "=a.png", "label": "x", "predicted": "x", "iou": 0.5, "dice": 0.7, "target_pixels": 9},
        {"image": "b.png", "label": "", "predicted": "x", "iou": 0.0, "dice": 0.0, "target_pixels": 4},
        {"image": "c.png", "label": "y", "predicted": "x", "iou": 1.0, "dice": 1.0, "target_pixels": 0},
    ]
    write_csv(folder / "per_image.csv", rows, list(rows[0]))
    (folder / "summary.json").write_text('{"images": 3, "segmentation": null, "classification": null}')
    assert run.is_finished(tmp_path)
    result = read_run(run, tmp_path)
    assert result.scores == {"images": 3}
    assert result.per_image["iou"] == {"'=a.png": 0.5, "b.png": 0.0}
    assert result.per_image["dice"] == {"'=a.png": 0.7, "b.png": 0.0}
    assert result.per_image["accuracy"] == {"'=a.png": 1.0, "c.png": 0.0}
    split = tmp_path / "split.csv"
    split.write_text("image,label,group,split\n=a.png,x,g,test\nb.png,,g,test\nc.png,y,,test\n")
    assert read_groups_of_split(split) == {"'=a.png": "g", "b.png": "g"}
    (folder / "summary.json").write_text('{"images": 3}')
    with pytest.raises(UserError, match="not an evaluation by this version"):
        read_run(run, tmp_path)


def test_variants() -> None:
    four = all_variants(4)
    assert [name for name in PAPER_TABLE if name not in four] == []
    assert {(v.multi_scale, v.interaction) for v in choose_variants(None, None, 4).values()} == {
        (multi_scale, interaction) for multi_scale in (False, True) for interaction in ("none", "fixed", "gated")
    }
    assert four["only_d2"].interaction == "none,gated,none,none"
    assert four["without_d4"].interaction == "gated,gated,gated,none"
    assert len({repr(variant) for variant in four.values()}) == len(four)
    for levels in (1, 2, 3):
        assert len({repr(v) for v in all_variants(levels).values()}) == len(all_variants(levels))
    assert four["gated"] == Variant() and Variant().description() == "MSCF, TIM + UPA"  # noqa: PT018
    assert four["baseline"].description() == "none"
    assert four["fixed"].description() == "MSCF, TIM"
    assert four["without_d1"].description() == "MSCF, TIM + UPA at d2, d3, d4"
    assert four["seg_to_clf"].description() == "MSCF, TIM + UPA, seg → clf only"
    assert four["classification"].description() == "MSCF, classification alone"
    defaults = TrainOptions(data="", out="")
    for name in vars(Variant()):
        assert name in CHOSEN_BY_ABLATE
        assert getattr(defaults, name) == getattr(Variant(), name)


REFUSED: list[tuple[list[str], list[str]]] = [
    (["--variants", "gatd"], ["--variants 'gatd'", "baseline", "without_d4"]),
    (["--variants", "gated,fixed,gated"], ["'gated' more than once"]),
    (["--variants", "gated", "--table", "all"], ["leave one of them out"]),
    (["--table", "mine"], ["--table", "paper"]),
    (["--seeds", "0"], ["--seeds 0", "at least 1"]),
    (["--seeds", "1,1"], ["--seeds 1,1", "different"]),
    (["--seeds", "one"], ["--seeds one"]),
    (["--folds", "1"], ["--folds 1", "at least 2"]),
    (["--folds", "2", "--split", "{table}"], ["leave one out"]),
    (["--variants", "tim", "--reference", "gated"], ["--reference 'gated'", "tim"]),
    (["--epochs", "0"], ["--epochs 0"]),
    (["--model", "unet"], ["'unet'"]),
    (["--interaction", "none"], ["--interaction"]),
    (["--split", "/nowhere.csv"], ["/nowhere.csv"]),
]


@pytest.mark.parametrize(("flags", "words"), REFUSED, ids=lambda value: " ".join(value))
def test_unusable_input_is_refused_before_anything_is_trained(
    flags: list[str], words: list[str], table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x"
    flags = [str(table) if flag == "{table}" else flag for flag in flags]
    model = [] if "--model" in flags else ["--model", str(SMALL["model"])]
    assert main(["ablate", "--data", str(table), "--out", str(out), *model, *flags]) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    for word in words:
        assert word in sentence
    assert not (out / "runs").exists()


def test_folders_that_hold_something_else_are_refused(ablated: Path, table: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lr was 0\.001, is 0\.01"):
        ablate(options(table, ablated, train=replace(options(table, ablated).train, lr=0.01)))
    with pytest.raises(UserError, match="folds was 2, is None"):
        ablate(options(table, ablated, folds=None))
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is not empty"):
        ablate(options(table, tmp_path))


def test_folds_of_a_file_are_used(ablated: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[tuple[int | None, int, str]] = []

    def record(options: TrainOptions) -> str:
        trained.append((options.fold, options.seed, options.weighting))
        return "not now."

    monkeypatch.setattr(ablation, "train_in_own_process", record)
    given = options(table, tmp_path / "x", variants="gated,segmentation", folds=None, seeds="3,4")
    of_file = replace(given.train, split=str(ablated / "split.csv"), weighting="uncertainty")
    ablate(replace(given, train=of_file))
    runs = [(0, 3), (1, 3), (0, 4), (1, 4)]
    assert trained == [(*run, weighting) for run in runs for weighting in ("uncertainty", "fixed")]
    assert (tmp_path / "x" / "split.csv").read_text() == (ablated / "split.csv").read_text()


def command(table: Path, out: Path, *flags: object) -> list[str]:
    small = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    arguments = ["--data", table, "--out", out, "--dataset", "csv", "--lr", "1e-3", "--deterministic", *small, *flags]
    return [sys.executable, "-m", "btinet.cli", "ablate", *map(str, arguments)]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_the_command_as_a_process(ablated: Path, table: Path, tmp_path: Path) -> None:
    """Finished runs, one that fails because a file is where its folder should be, and a healthy one."""
    out = tmp_path / "x"
    shutil.copytree(ablated, out)
    for name in ("tim", "mscf"):
        shutil.copytree(out / "runs" / "gated" / "seed42-fold1", out / "runs" / name / "seed42-fold1")
    (out / "runs" / "tim" / "seed42-fold0").write_text("")
    flags = ("--folds", "2", "--variants", "gated,tim,mscf", "--reference", "mscf")
    done = subprocess.run(command(table, out, *flags), capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "6 runs, 4 of them finished" in done.stdout
    assert "runs/tim/seed42-fold0 failed: --out " in done.stdout
    assert "run 3 of 6: runs/mscf/seed42-fold0" in done.stdout
    assert "| mscf | MSCF |" in done.stdout
    rows = [(row["variant"], row["fold"]) for row in rows_of(out / "ablation.csv")]
    assert rows == [("gated", "0"), ("mscf", "0"), ("gated", "1"), ("tim", "1"), ("mscf", "1")]
    run = out / "runs" / "mscf" / "seed42-fold0"
    assert json.loads((run / "config.json").read_text())["model"]["interaction"] == "none"
    assert not list(run.glob("*.pt"))


@pytest.mark.slow
def test_a_killed_ablation_continues_to_the_same_table(table: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    flags = ("--variants", "gated,segmentation")
    assert subprocess.run(command(table, whole, *flags), env=ENVIRONMENT, stdout=subprocess.DEVNULL).returncode == 0
    first = broken / "runs" / "gated" / "seed42"
    moments: list[Callable[[], bool]] = [
        (first / "stage1.pt").exists,
        (first / "evaluation-test" / "per_image.csv").exists,
    ]
    for moment in moments:
        started = subprocess.Popen(command(table, broken, *flags), env=ENVIRONMENT, stdout=subprocess.DEVNULL)
        while not moment():
            assert started.poll() is None, "it ended before that"
            time.sleep(0.001)
        started.send_signal(signal.SIGKILL)
        started.wait()
    assert subprocess.run(command(table, broken, *flags), env=ENVIRONMENT, stdout=subprocess.DEVNULL).returncode == 0
    for name in ("ablation.csv", "ablation.md", "ablation.json"):
        assert (broken / name).read_text() == (whole / name).read_text()
    assert not [file for file in broken.rglob(".*") if file.is_file()]


@pytest.mark.slow
def test_a_process_that_dies_is_a_failed_run(table: Path, tmp_path: Path) -> None:
    started = subprocess.Popen(
        command(table, tmp_path / "x", "--variants", "mscf"), env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )
    run = tmp_path / "x" / "runs" / "mscf" / "seed42"
    while not (run / "config.yaml").exists():
        assert started.poll() is None, "it ended before that"
        time.sleep(0.001)
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
    for child in children:
        if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text():
            os.kill(int(child), signal.SIGKILL)
    output, _ = started.communicate()
    assert started.returncode == 1
    assert "runs/mscf/seed42 failed: its process was killed" in output
