"""The analysis of a run: its files agree with each other, with the evaluation and with scipy."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from dataclasses import astuple, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from scipy.stats import spearmanr
from torch import nn

from btinet import UserError, create_model
from btinet.data import SegmentationDataset, default_preprocessing, read_collection, write_split
from btinet.evaluation import EvaluateOptions, evaluate_run
from btinet.evaluation.analysis import AnalyseOptions, Analysis, analyse_run, print_analysis, spearman, terciles
from btinet.evaluation.analysis.figures import by_difficulty_figure, displacement_figure
from btinet.evaluation.analysis.report import analysis_markdown
from btinet.models import save_checkpoint

TESTED = 12
FIGURES = {"displacement.png", "displacement_by_difficulty.png", "gates.png", "gates_by_difficulty.png"}
TABLES = {"images.csv", "analysis.json", "analysis.md"}

MakeRun = Callable[..., Path]


@pytest.fixture(scope="module")
def make_run(shared_ultrasound: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeRun:
    """Make the folder of a run whose random network answers differently to every image."""

    def make(interaction: Any = "gated", **options: Any) -> Path:
        run = tmp_path_factory.mktemp("run")
        torch.manual_seed(0)
        model = create_model("btinet_mobilenetv3_small_050", 3, interaction=interaction, **options)
        collection = read_collection(shared_ultrasound, "busi")
        preprocessing = default_preprocessing((32, 32), 3)
        images = SegmentationDataset(collection.samples, preprocessing)
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.momentum = 1.0  # the statistics become those of one batch
        with torch.no_grad():
            model.train()(torch.stack([images[i]["image"] for i in range(len(images))]))
        save_checkpoint(run, model.eval(), collection.classes, preprocessing)
        parts = {
            s.id: "test" if i % 3 == 0 else "val" if i % 3 == 1 else "train" for i, s in enumerate(collection.samples)
        }
        write_split(run / "split.csv", collection, parts, {})
        (run / "config.yaml").write_text(f"data: '{shared_ultrasound}'\ndataset: busi\nmask_threshold: null\n")
        return run

    return make


@pytest.fixture(scope="module")
def gated(make_run: MakeRun) -> tuple[Path, Analysis]:
    run = make_run()
    return run, analyse_run(AnalyseOptions(run, bootstrap=200, batch_size=5))


def read_rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as handle:
        return list(csv.DictReader(handle))


def numbers(rows: list[dict[str, str]], name: str) -> np.ndarray:
    return np.array([float(row[name] or "nan") for row in rows])


def test_files(gated: tuple[Path, Analysis]) -> None:
    run, analysis = gated
    out = run / "analysis-test"
    assert {path.name for path in out.iterdir()} == FIGURES | TABLES
    assert analysis.out == str(out)
    for name in FIGURES:
        with Image.open(out / name) as picture:
            assert min(picture.size) > 200
    rows = read_rows(out / "images.csv")
    assert len(rows) == analysis.images == TESTED
    columns = {
        f"displacement_{g}{d}_d{n}" for g in ("", "gated_") for d in ("seg_to_clf", "clf_to_seg") for n in range(1, 5)
    }
    columns |= {f"gate_{stream}_d{n}" for stream in ("seg", "clf") for n in range(1, 5)}
    columns |= {f"proxy_{name}_d{n}" for name in ("alignment", "seg_energy", "clf_energy") for n in range(1, 5)}
    assert columns <= set(rows[0])
    stored = json.loads((out / "analysis.json").read_text())
    assert list(stored["levels"]) == ["d1", "d2", "d3", "d4"]
    assert stored["levels"]["d1"]["gates"]["seg"]["overall"]["n"] == TESTED


def test_masks_classes_gates_and_proxies_are_those_of_the_evaluation(gated: tuple[Path, Analysis]) -> None:
    run, _ = gated
    evaluate_run(EvaluateOptions(run, out=run / "evaluation"))
    evaluated = read_rows(run / "evaluation" / "per_image.csv")
    analysed = read_rows(run / "analysis-test" / "images.csv")
    for ours, theirs in zip(analysed, evaluated, strict=True):
        for name in ("image", "label", "predicted", "target_pixels"):
            assert ours[name] == theirs[name]
        for name in ("iou", *(n for n in ours if n.startswith(("gate_", "proxy_")))):
            assert float(ours[name]) == pytest.approx(float(theirs[name]), rel=1e-4, abs=1e-6)
        confidence = max(float(theirs[f"prob_{name}"]) for name in ("benign", "malignant", "normal"))
        assert float(ours["difficulty_clf"]) == pytest.approx(1 - confidence, abs=1e-5)
        assert (ours["target_pixels"] == "0") == (ours["label"] == "normal") == (ours["difficulty_seg"] == "")
        if ours["difficulty_seg"]:
            assert float(ours["difficulty_seg"]) == pytest.approx(1 - float(ours["iou"]), abs=1e-5)


def test_summaries_are_those_of_the_table(gated: tuple[Path, Analysis]) -> None:
    run, analysis = gated
    rows = read_rows(run / "analysis-test" / "images.csv")
    hard = {task: numbers(rows, f"difficulty_{task}") for task in ("seg", "clf")}
    assert np.isnan(hard["seg"]).sum() == analysis.difficulty["seg"].undefined == 4
    labels = np.array([row["label"] for row in rows])
    for task in hard:
        assert [row[f"tercile_{task}"] or None for row in rows] == terciles(hard[task])
    checked = 0
    for name, level in analysis.levels.items():
        found = {f"gate_{stream}_{name}": gate for stream, gate in level.gates.items()}
        found |= {f"proxy_{proxy}_{name}": summary for proxy, summary in level.proxies.items()}
        for direction, stages in level.displacement.items():
            found[f"displacement_{direction}_{name}"] = stages["before_gate"]
            found[f"displacement_gated_{direction}_{name}"] = stages["after_gate"]
        for column, summary in found.items():
            values = numbers(rows, column)
            assert summary.overall.mean == pytest.approx(values.mean(), rel=1e-5)
            assert summary.by_class["benign"].mean == pytest.approx(values[labels == "benign"].mean(), rel=1e-5)
            groups = np.array([row["tercile_clf"] for row in rows])
            assert summary.by_difficulty["clf"]["hard"].mean == pytest.approx(values[groups == "hard"].mean(), rel=1e-5)
            lesion = ~np.isnan(hard["seg"])
            constant = np.ptp(values[lesion]) == 0  # no edges are measured on maps lower than eight rows
            rho = math.nan if constant else spearmanr(values[lesion], hard["seg"][lesion]).statistic
            assert summary.correlation["seg"].n == 8
            assert summary.correlation["seg"].rho == pytest.approx(rho, abs=0.1, nan_ok=True)  # six digits make ties
            checked += 1
    assert checked == 4 * (2 + 3 + 4)
    gate = analysis.levels["d4"].gates["seg"]
    assert gate.histogram.edges == pytest.approx(np.linspace(0, 1, 21).tolist())
    again = spearman(numbers(rows, "gate_seg_d4"), hard["clf"], resamples=200)
    assert astuple(gate.correlation["clf"]) == pytest.approx(astuple(again))
    for name in ("d1", "d2", "d3", "d4"):
        for stream, direction in (("seg", "clf_to_seg"), ("clf", "seg_to_clf")):
            product = numbers(rows, f"displacement_{direction}_{name}") * numbers(rows, f"gate_{stream}_{name}")
            np.testing.assert_allclose(numbers(rows, f"displacement_gated_{direction}_{name}"), product, rtol=1e-3)


def test_bars_are_the_means(gated: tuple[Path, Analysis]) -> None:
    _, analysis = gated
    axes = displacement_figure(analysis.levels).axes[0]
    heights = [bar.get_height() for bar in axes.patches]  # type: ignore[attr-defined]
    expected = [
        level.displacement[direction][stage].overall.mean
        for direction in ("seg_to_clf", "clf_to_seg")
        for stage in ("before_gate", "after_gate")
        for level in analysis.levels.values()
    ]
    assert heights == pytest.approx(expected)
    gates = {name: level.gates["seg"] for name, level in analysis.levels.items()}
    panels = by_difficulty_figure({"seg gate": gates}, "gate").axes
    for panel, task in zip(panels, ("seg", "clf"), strict=True):
        bars = [bar.get_height() for bar in panel.patches]  # type: ignore[attr-defined]
        means = [
            gate.by_difficulty[task][group].mean for group in ("easy", "medium", "hard") for gate in gates.values()
        ]
        assert bars == pytest.approx(means, nan_ok=True)
    level = list(analysis.levels.values())[2].displacement["seg_to_clf"]["before_gate"].overall
    error = axes.collections[0].get_segments()[2]  # type: ignore[attr-defined]
    assert np.ptp(error[:, 1]) / 2 == pytest.approx(level.sd / TESTED**0.5)
    assert [text.get_text() for text in panels[1].get_xticklabels()] == ["d1", "d2", "d3", "d4"]


def test_document_states_numbers_definitions_and_notes(gated: tuple[Path, Analysis]) -> None:
    run, analysis = gated
    text = (run / "analysis-test" / "analysis.md").read_text()
    gate = analysis.levels["d2"].gates["clf"]
    line = next(line for line in text.splitlines() if line.startswith("| d2 | clf gate |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[2] == f"{gate.overall.mean:.3g} ± {gate.overall.sd:.3g}"
    assert cells[5] == f"{gate.overall.median:.3g}"
    rho = gate.correlation["clf"]
    assert f"{rho.rho:.2f} [{rho.low:.2f}, {rho.high:.2f}]" in text
    thirds = " | ".join(f"{gate.by_difficulty['clf'][group].mean:.3g}" for group in ("easy", "medium", "hard"))
    assert f" | {thirds} | {rho.rho:.2f} [" in text
    means = [gate.by_class[name] for name in ("benign", "malignant", "normal")]
    classes = " | ".join(f"{values.mean:.3g} ± {values.sd:.3g}" for values in means)
    assert f"| d2 | clf gate | {classes} |" in text
    assert "4 of 12 images have no lesion or no mask" in text
    assert "Only 8 images have a difficulty of the segmentation" in text
    assert "‖enhanced − base‖₂ / ‖base‖₂" in text
    for name in FIGURES:
        assert f"]({name})" in text
    tables = [
        list(lines) for of_table, lines in groupby(text.splitlines(), lambda line: line.startswith("|")) if of_table
    ]
    assert len(tables) == 1 + 3 * 3
    assert all(len({line.count("|") for line in table}) == 1 for table in tables)


def test_names_of_classes_do_not_break_tables(gated: tuple[Path, Analysis]) -> None:
    _, analysis = gated
    assert r"\|" not in analysis_markdown(analysis, [])
    level = analysis.levels["d1"]
    gate = replace(level.gates["seg"], by_class={"a|b": level.gates["seg"].by_class["benign"]})
    only = replace(level, displacement={}, proxies={}, gates={"seg": gate})
    assert r"| a\|b |" in analysis_markdown(replace(analysis, levels={"d1": only}, classes=("a|b",)), [])


def test_printed_tables_have_a_line_per_level(gated: tuple[Path, Analysis]) -> None:
    _, analysis = gated
    stream = io.StringIO()
    print_analysis(analysis, Console(file=stream, width=80))
    lines = [line for line in stream.getvalue().splitlines() if line.strip().startswith(tuple(analysis.levels))]
    assert [line.split()[0] for line in lines] == ["d1", "d2", "d3", "d4"] * 2
    moved = analysis.levels["d1"].displacement
    stages = [moved[d][s].overall.mean for d in ("seg_to_clf", "clf_to_seg") for s in ("before_gate", "after_gate")]
    assert lines[0].split()[1:] == [f"{mean:.3g}" for mean in stages]
    gate = analysis.levels["d4"].gates["clf"]
    rho = gate.correlation["clf"]
    last = [f"{gate.overall.mean:.3g}", f"{rho.rho:.2f}", f"[{rho.low:.2f},", f"{rho.high:.2f}]"]
    assert lines[7].split()[-4:] == last
    assert analysis.out in stream.getvalue()


def test_levels_without_interaction_or_gate_are_said(make_run: MakeRun) -> None:
    run = make_run(["none", "fixed", "none", "gated"])
    analysis = analyse_run(AnalyseOptions(run, bootstrap=100))
    assert [level.interaction for level in analysis.levels.values()] == ["none", "fixed", "none", "gated"]
    notes = " ".join(analysis.notes)
    assert "d1, d3: no interaction" in notes
    assert "d2: interaction without a gate" in notes
    assert analysis.levels["d1"].displacement == {}
    assert set(analysis.levels["d2"].displacement["seg_to_clf"]) == {"before_gate"}
    assert analysis.levels["d2"].gates == analysis.levels["d2"].proxies == {}
    assert set(analysis.levels["d4"].gates) == {"seg", "clf"}
    names = set(read_rows(run / "analysis-test" / "images.csv")[0])
    assert {n for n in names if n.endswith(("_d1", "_d3"))} == set()
    assert {n for n in names if n.endswith("_d2")} == {"displacement_seg_to_clf_d2", "displacement_clf_to_seg_d2"}
    bars = displacement_figure(analysis.levels).axes[0].patches
    shown = [bar.get_height() for bar in bars if not math.isnan(bar.get_height())]  # type: ignore[attr-defined]
    assert len(shown) == 2 + 4


@pytest.mark.parametrize(
    ("interaction", "drawn"), [("none", set()), ("fixed", {"displacement.png", "displacement_by_difficulty.png"})]
)
def test_networks_without_gates_are_analysed(make_run: MakeRun, interaction: str, drawn: set[str]) -> None:
    run = make_run(interaction)
    out = run / "analysis-test"
    out.mkdir()
    for name in FIGURES:
        (out / name).write_text("of an earlier analysis")
    analysis = analyse_run(AnalyseOptions(run, bootstrap=100))
    assert {path.name for path in out.iterdir()} == TABLES | drawn
    assert "d1, d2, d3, d4: " in analysis.notes[0]
    assert "## Gates" not in (out / "analysis.md").read_text()
    assert analysis.difficulty["clf"].overall.n == TESTED
    print_analysis(analysis, Console(file=io.StringIO()))


def test_gates_that_compare_the_images_of_a_batch_are_said_to(make_run: MakeRun) -> None:
    run = make_run(signals="variance")
    analysis = analyse_run(AnalyseOptions(run, bootstrap=100))
    assert any("batch size" in note for note in analysis.notes)
    assert set(analysis.levels["d1"].proxies) == {"seg_variance", "clf_variance"}


def test_other_gates_do_not_depend_on_the_batch(gated: tuple[Path, Analysis]) -> None:
    run, analysis = gated
    assert not any("batch size" in note for note in analysis.notes)
    analyse_run(AnalyseOptions(run, bootstrap=100, batch_size=12, out=run / "whole"))
    whole, fives = read_rows(run / "whole" / "images.csv"), read_rows(run / "analysis-test" / "images.csv")
    for name in whole[0]:
        if name.startswith(("displacement", "gate", "proxy")):
            np.testing.assert_allclose(numbers(whole, name), numbers(fives, name), rtol=1e-3, atol=1e-5)


def test_split_and_data_are_found_as_in_the_evaluation(
    gated: tuple[Path, Analysis], make_run: MakeRun, shared_ultrasound: Path, tmp_path: Path
) -> None:
    run, _ = gated
    assert analyse_run(AnalyseOptions(run, split="all", bootstrap=100)).images == 36
    assert (run / "analysis-all" / "images.csv").exists()
    other = make_run()
    config = other / "config.yaml"
    config.write_text(config.read_text().replace(str(shared_ultrasound), str(tmp_path / "moved")))
    with pytest.raises(UserError, match="--data"):
        analyse_run(AnalyseOptions(other))
    assert analyse_run(AnalyseOptions(other, data=shared_ultrasound, split="val", bootstrap=100)).images == 12


@pytest.mark.parametrize(
    ("change", "words"), [({"bootstrap": 99}, "--bootstrap 99"), ({"batch_size": 0}, "batch size 0")]
)
def test_options_that_make_no_sense(change: dict[str, int], words: str) -> None:
    with pytest.raises(UserError, match=words):
        AnalyseOptions(Path("run"), **change)  # type: ignore[arg-type]


def test_images_without_a_mask_or_a_class_are_analysed(
    make_run: MakeRun, shared_ultrasound: Path, tmp_path: Path
) -> None:
    lines = ["image,mask,label"]
    for name, mask, label in (
        ("benign (1)", "?", "benign"),
        ("benign (2)", "benign (2)_mask.png", ""),
        ("benign (3)", "", "benign"),
    ):
        of_mask = mask if mask in ("", "?") else shared_ultrasound / "benign" / mask
        lines.append(f"{shared_ultrasound / 'benign' / f'{name}.png'},{of_mask},{label}")
    table = tmp_path / "data.csv"
    table.write_text("\n".join(lines) + "\n")
    run = make_run()
    analysis = analyse_run(AnalyseOptions(run, data=table, dataset="csv", split="all", bootstrap=100))
    rows = read_rows(run / "analysis-all" / "images.csv")
    assert [row["iou"] == "" for row in rows] == [True, False, False]
    assert [row["difficulty_seg"] == "" for row in rows] == [True, False, True]
    assert [row["label"] for row in rows] == ["benign", "", "benign"]
    gate = analysis.levels["d1"].gates["seg"]
    assert (gate.overall.n, gate.by_class["benign"].n, gate.correlation["seg"].n) == (3, 2, 1)
    assert "2 of 3 images have no lesion or no mask" in " ".join(analysis.notes)


@pytest.mark.parametrize("interaction", ["fixed", "gated"])
@pytest.mark.parametrize("direction", ["seg_to_clf", "clf_to_seg"])
def test_one_way_networks_have_one_direction(make_run: MakeRun, direction: str, interaction: str) -> None:
    run = make_run(interaction, directions=direction)
    analysis = analyse_run(AnalyseOptions(run, bootstrap=100))
    assert all(set(level.displacement) == {direction} for level in analysis.levels.values())
    moved = [n for n in read_rows(run / "analysis-test" / "images.csv")[0] if n.startswith("displacement_")]
    assert len(moved) == (4 if interaction == "fixed" else 8)
    assert all(direction in name for name in moved)
    assert any("One-way" in note for note in analysis.notes)
    print_analysis(analysis, Console(file=io.StringIO()))


@pytest.mark.parametrize(("tasks", "known"), [("segmentation", "seg"), ("classification", "clf")])
def test_networks_for_one_task_have_one_difficulty(make_run: MakeRun, tasks: str, known: str) -> None:
    analysis = analyse_run(AnalyseOptions(make_run("none", tasks=tasks), bootstrap=100))
    for task, difficulty in analysis.difficulty.items():
        assert (difficulty.overall.n > 0) == (task == known)
    assert any(f"for {tasks} alone" in note for note in analysis.notes)
    assert "no interaction" in analysis.notes[0]
