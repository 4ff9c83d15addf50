"""The tables are what the JSON says, losses included, and the README is up to date with the committed results."""

import copy
import json
from pathlib import Path

import pytest
import report
import report_modules

SHAPES = [(384, 14), (192, 28), (96, 56), (48, 112)]


def case(channels: int, size: int, medians: dict[str, float], **changed: object) -> dict:
    summaries = {n: {"median_ms": m, "q1_ms": m, "q3_ms": m, "min_ms": m, "rounds": 20} for n, m in medians.items()}
    return {
        "name": f"{channels}x{size}x{size}, B=8, float32, channels_last",
        "channels": channels,
        "size": size,
        "batch": 8,
        "dtype": "float32",
        "layout": "channels_last",
        "direction": "forward+backward",
        "max_autotune": False,
        "mode": "training",
        "bytes": 1e7,
        "flops": 1e9,
        "limit_ms": 1.5,
        "automatic": "native",
        "inputs": "warm",
        "variants": summaries,
        "unavailable": {},
        **changed,
    }


@pytest.fixture
def result() -> dict:
    machine = {"slug": "2-core-abacus", "device": "cpu", "cpu": "Abacus", "cores": 2, "threads": 2}
    machine |= {"instruction_sets": ["avx2"], "torch": "2.15.0", "date": "2026-01-02", "allocator": "glibc"}
    levels = [case(*shape, {"native": 2.0, "eager": 20.0, "compile": 8.0}) for shape in SHAPES]
    return {
        "machine": machine,
        "limits": {"formula": "sum", "copy_gb_per_s": {"2408448": 100.0}, "peak_gflop_per_s": {"fma_float32": 500.0}},
        "cases": levels,
        "not_measured": [],
    }


def gpu(result: dict) -> dict:
    changed = copy.deepcopy(result)
    changed["machine"] |= {"device": "cuda", "gpu": "Loom", "cuda": "13.0", "triton": "3.6.0"}
    changed["limits"]["peak_gflop_per_s"] = {"product_tf32": 1000.0, "product_float32": 100.0}
    for entry in changed["cases"]:
        entry["automatic"] = "triton"
        times = {"triton": 2.0, "eager": 20.0, "triton graph": 1.75, "eager graph": 14.0, "compile graph": 3.5}
        entry["variants"] = case(1, 1, times)["variants"]
    return changed


def test_levels_and_their_sum_are_rows_with_ratios(result: dict) -> None:
    block = report.readme_block([result], "measure")
    first = "| 384×14², B=8, forward+backward | channels_last | float32 | 20 | 8 | 2 | 1.5 | 10.0 | 4.0 | 75% |"
    assert first in block
    total = "| four levels, B=8, forward+backward | channels_last | float32 | 80 | 32 | 8 | 6 | 10.0 | 4.0 | 75% |"
    assert total in block
    assert "No baseline was faster in any of the 4 cases" in block


def test_a_loss_is_printed_with_both_numbers(result: dict) -> None:
    result["cases"].append(case(96, 56, {"native": 3.0, "eager": 2.5}, direction="forward", dtype="bfloat16"))
    block = report.readme_block([result], "measure")
    assert "- 96×56², B=8, forward, channels_last, bfloat16: eager 2.5, torch.compile –, ours **3**" in block


def test_cuda_graphs_are_compared_with_cuda_graphs(result: dict) -> None:
    graphs = [r for r in report.headline(gpu(result)) if "CUDA graph" in r.label]
    assert [(r.eager, r.compiled, r.ours) for r in graphs] == [(56.0, 14.0, 7.0)]
    launched = [r for r in report.headline(gpu(result)) if "CUDA graph" not in r.label]
    assert [(r.eager, r.compiled, r.ours) for r in launched] == [(80.0, None, 8.0)]


def test_incomplete_levels_have_no_sum(result: dict) -> None:
    assert report.four_levels(result["cases"][:3]) == []


def test_one_command_writes_everything(result: dict, tmp_path: Path) -> None:
    for machine in (result, gpu(result)):
        folder = tmp_path / "results" / machine["machine"]["device"]
        folder.mkdir(parents=True)
        (folder / "interaction.json").write_text(json.dumps(machine))
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.main(["--results", str(tmp_path / "results"), "--readme", str(readme), "--docs", str(tmp_path)])
    text = readme.read_text()
    assert text.startswith(f"before\n{report.BEGIN}\n")
    assert text.endswith(f"{report.END}\nafter\n")
    assert "old" not in text
    assert "**Abacus, avx2, 2 threads, torch 2.15.0, 2026-01-02**" in text
    assert "20 (20–20)" in (tmp_path / "interaction_benchmarks.md").read_text()
    assert (tmp_path / "interaction_roofline.png").stat().st_size > 10_000


def test_readme_and_docs_are_what_the_committed_results_say() -> None:
    folder, readme = report.CHECKOUT / "benchmarks" / "results", report.CHECKOUT / "README.md"
    results, summary = report.load(folder), report_modules.network_summary(folder)
    assert readme.read_text() == report.updated_readme(readme, results, summary), "run `python benchmarks/report.py`"
    if results:
        every_case = report.CHECKOUT / "docs" / "interaction_benchmarks.md"
        assert every_case.read_text() == report.full_report(results), "run `python benchmarks/report.py`"


def test_modules_are_summed_and_losses_said(tmp_path: Path) -> None:
    def module(size: int, **medians: float) -> dict:
        made = case(8, size, {"ours compiled": 5.0, **medians})
        return made | {"operator": "sieve", "name": f"sieve 8x{size}x{size}, B=8", "direction": "forward"}

    cases = [module(4, eager=12.0, compile=9.0, ours=4.0), module(2, eager=3.0, compile=1.0, ours=2.0)]
    machine = {"cpu": "Abacus", "cores": 2, "torch": "2.15.0", "allocator": "glibc", "date": "2026-01-02"}
    (tmp_path / "abacus").mkdir()
    (tmp_path / "abacus" / "modules.json").write_text(json.dumps({"machine": machine, "cases": cases}))
    text = report_modules.network_report(tmp_path)
    assert "eager 15, compile 10, ours 6: 2.50× and 1.67×" in text
    assert "- sieve 8x2x2, B=8, forward: compile 1.00, ours 2.00" in text
    assert "3.00 | 2.25 |" in text


def test_every_variant_of_the_network_is_a_row(tmp_path: Path) -> None:
    network = case(1, 1, {"eager": 12.0, "ours": 8.0, "ours, fuse()": 6.0}, direction="inference")
    network |= {"name": "net, inference", "peak_mib": {"eager": 200.0, "ours": 150.0}}
    machine = {"cpu": "Abacus", "cores": 2, "torch": "2.15.0", "allocator": "glibc", "date": "2026-01-02"}
    (tmp_path / "abacus").mkdir()
    (tmp_path / "abacus" / "network.json").write_text(json.dumps({"machine": machine, "cases": [network]}))
    for text in (report_modules.network_report(tmp_path), report_modules.network_summary(tmp_path)):
        assert "| net, inference | ours, fuse() | 6.0 (6.0 … 6.0) | 2.00 | – |" in text
        assert "eager 200 MiB, ours 150 MiB (75%)" in text


def test_the_committed_network_report_is_up_to_date() -> None:
    results = report.CHECKOUT / "benchmarks" / "results"
    assert (report.CHECKOUT / "docs" / "network_benchmarks.md").read_text() == report_modules.network_report(results)


def test_loading_is_reported_in_images_per_second(tmp_path: Path) -> None:
    loaded = case(1, 1, {"in memory, 0 workers": 400.0}, direction="an epoch of 128") | {"name": "PNG", "images": 128}
    loaded["variants"]["in memory, 0 workers"] |= {"q1_ms": 320.0, "q3_ms": 640.0}
    step = case(1, 1, {"training step": 4000.0}, direction="training step") | {
        "name": "net, training step",
        "images": 8,
    }
    machine = {
        "slug": "abacus",
        "cpu": "Abacus",
        "cores": 2,
        "torch": "2.15.0",
        "allocator": "glibc",
        "date": "2026-01-02",
    }
    (tmp_path / "abacus").mkdir()
    (tmp_path / "abacus" / "loading.json").write_text(json.dumps({"machine": machine, "cases": [loaded, step]}))
    text = report_modules.network_report(tmp_path)
    assert "| PNG, an epoch of 128 | in memory, 0 workers | 320 (200 … 400) |" in text
    assert "| net, training step | training step | 2 (2 … 2) |" in text
    assert "PNG" not in report_modules.network_summary(tmp_path)
