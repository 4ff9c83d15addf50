from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import machine

from btinet.allocator import SYSTEM_DEFAULT, keep_pages

keep_pages()  # before anything is allocated, the same for all variants

import pytest  # noqa: E402
import torch  # noqa: E402
from cases import Workload, cpu_workloads, gpu_workloads  # noqa: E402
from machine_limit import Machine, cpu_peaks  # noqa: E402
from modules import ModuleProblem, module_cases  # noqa: E402
from variants import Problem  # noqa: E402

from btinet_kernels.backends import native_module  # noqa: E402

HERE = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("interaction benchmarks")
    group.addoption("--quick", action="store_true", help="only the decoder's shapes in float32, channels_last")
    group.addoption("--full", action="store_true", help="also the combinations that take long to compile")
    group.addoption("--no-compile", action="store_true", help="the network without torch.compile, which takes minutes")
    group.addoption("--shapes", default="", help="only workloads whose name contains this, e.g. '384x14'")
    group.addoption("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    group.addoption("--rounds", type=int, default=20, help="samples of each variant at least (default 20)")
    group.addoption("--time-limit", type=float, default=540, help="seconds after which no case is begun (default 540)")
    group.addoption("--save-results", action="store_true", help="write RESULTS/<machine>/interaction.json")
    group.addoption("--results", type=Path, default=HERE / "results", help="where (default benchmarks/results)")


class Recorder:
    """Collects what was measured, and writes it."""

    def __init__(self, config: pytest.Config) -> None:
        asked = config.getoption("device")
        self.device = asked if asked != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        self.limits = Machine(self.device)
        self.not_measured: list[dict[str, str]] = []
        self.modules: list[dict[str, Any]] = []
        self.network: list[dict[str, Any]] = []
        self.foreign: list[dict[str, Any]] = []
        self.loading: list[dict[str, Any]] = []
        self._measured: list[tuple[Workload, str, dict[str, Any]]] = []
        self._deadline = time.monotonic() + config.getoption("time_limit")

    def workloads(self, config: pytest.Config) -> list[Workload]:
        options = {name: config.getoption(name) for name in ("quick", "full")}
        workloads = gpu_workloads(**options) if self.device == "cuda" else cpu_workloads(**options)
        return [w for w in workloads if config.getoption("shapes") in w.name]

    def refuse_if_late(self, name: str) -> None:
        if time.monotonic() > self._deadline:
            self.not_measured.append({"name": name, "reason": "the time limit was reached"})
            pytest.skip("the time limit was reached (--time-limit)")

    def add(self, workload: Workload, direction: str, measured: dict[str, Any]) -> None:
        """One case; its limit follows in ``finish``."""
        self.limits.limit(workload, direction)
        self._measured.append((workload, direction, measured))

    def finish(self) -> list[dict[str, Any]]:
        """Every case with its limit, from the best rates seen at two moments."""
        if self._measured:
            self.limits.measure_again()
        return [self._case(*entry) for entry in self._measured]

    def _case(self, workload: Workload, direction: str, measured: dict[str, Any]) -> dict[str, Any]:
        limit = self.limits.limit(workload, direction)
        return {
            "name": workload.name,
            "channels": workload.channels,
            "size": workload.size,
            "batch": workload.batch,
            "dtype": workload.dtype_name,
            "layout": workload.layout,
            "direction": direction,
            "max_autotune": workload.max_autotune,
            "mode": "inference" if workload.inference else "training",
            "bytes": limit.bytes,
            "flops": limit.flops,
            "limit_ms": round(limit.ms, 6),
            **measured,
        }

    def others(self) -> dict[str, list[dict[str, Any]]]:
        """What was measured beside the interaction, by the name of its file."""
        return {"modules": self.modules, "network": self.network, "foreign": self.foreign, "loading": self.loading}

    def write(self, cases: list[dict[str, Any]], folder: Path) -> list[Path]:
        """The interaction's cases, and each of the others', a file each, where any were measured."""
        described = machine.describe(self.device)
        folder = folder / described["slug"]
        written = []
        if cases:
            content = {"machine": described, "limits": self.limits.as_dict(), "cases": cases}
            written.append(_write(folder / "interaction.json", content | {"not_measured": self.not_measured}))
        ending = "_system_malloc" if described["allocator"] == SYSTEM_DEFAULT else ""
        for name, measured in self.others().items():
            if measured:
                peaks = {what: round(rate / 1e9, 1) for what, rate in cpu_peaks().items()}
                content = {"machine": described, "peak_gflop_per_s": peaks, "cases": measured}
                content |= {"not_measured": self.not_measured}
                written.append(_write(folder / f"{name}{ending}.json", content))
        return written


def _write(path: Path, content: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    unfinished.replace(path)
    return path


_recorder = pytest.StashKey[Recorder]()


def pytest_configure(config: pytest.Config) -> None:
    if native_module is None and config.getoption("device") != "cuda":
        raise pytest.UsageError(
            "the compiled part is missing: run `pip install .` and `pytest` (`python -m pytest` imports the checkout)."
        )
    config.stash[_recorder] = Recorder(config)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "problem" in metafunc.fixturenames:
        workloads = metafunc.config.stash[_recorder].workloads(metafunc.config)
        metafunc.parametrize("problem", workloads, indirect=True, scope="module", ids=lambda w: w.name)
    if "module_problem" in metafunc.fixturenames:
        cases = [c for c in module_cases() if metafunc.config.getoption("shapes") in c.name]
        metafunc.parametrize("module_problem", cases, indirect=True, scope="module", ids=lambda c: c.name)


@pytest.fixture(scope="session")
def recorder(request: pytest.FixtureRequest) -> Recorder:
    return request.config.stash[_recorder]


@pytest.fixture(scope="module")
def problem(request: pytest.FixtureRequest, recorder: Recorder) -> Iterator[Problem]:
    """One per workload, for all its directions: what was compiled once serves them all."""
    recorder.refuse_if_late(request.param.name)
    yield Problem(request.param, recorder.device)
    if recorder.device == "cuda":
        torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def module_problem(request: pytest.FixtureRequest, recorder: Recorder) -> ModuleProblem:
    """One per case, for both directions."""
    if recorder.device != "cpu":
        pytest.skip("the modules are measured on the CPU")
    recorder.refuse_if_late(request.param.name)
    return ModuleProblem(request.param)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    recorder = config.stash[_recorder]
    cases = recorder.finish()
    others = [case for measured in recorder.others().values() for case in measured]
    if not cases and not others:
        return
    terminalreporter.section("interleaved medians in ms (quartiles), and the machine's limit")
    for case in cases + others:
        limit = case.get("limit_ms")
        terminalreporter.line(f"{case['name']}, {case['direction']}" + (f": limit {limit:.3f}" if limit else ""))
        for name, summary in case["variants"].items():
            line = f"    {name:<20} {summary['median_ms']:9.3f}  ({summary['q1_ms']:.3f} … {summary['q3_ms']:.3f})"
            share = f", {limit / summary['median_ms']:.0%} of the limit's speed" if limit else ""
            terminalreporter.line(line + share)
        for name, peak in case.get("peak_mib", {}).items():
            terminalreporter.line(f"    {name:<20} {peak:9.0f} MiB peak")
        for name, reason in case.get("unavailable", {}).items():
            terminalreporter.line(f"    {name:<20} not measured: {reason}")
    if config.getoption("save_results"):
        for path in recorder.write(cases, config.getoption("results")):
            terminalreporter.line(f"written: {path}")
