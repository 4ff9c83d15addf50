"""What the project set out to reach on two CPU cores, and what was measured, for ``docs/network_benchmarks.md``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

Case = dict[str, Any]
BOTH = "forward+backward"


@dataclass(frozen=True)
class Target:
    """``measured`` returns a ratio, or None where the cases do not hold it; ``wanted`` is its least or most."""

    what: str
    wanted: float
    measured: Callable[[list[Case]], float | None]
    at_most: bool = False

    def row(self, cases: list[Case]) -> tuple[str, ...] | None:
        found = self.measured(cases)
        if found is None:
            return None
        reached = found <= self.wanted if self.at_most else found >= self.wanted
        shown = (f"≤ {self.wanted:.0%}", f"{found:.0%}") if self.at_most else (f"≥ {self.wanted:g}×", f"{found:.2f}×")
        return self.what, *shown, "reached" if reached else "missed"


def target_rows(cases: Iterable[Case]) -> list[tuple[str, ...]]:
    """A row for each target that was measured: what, wanted, measured, verdict."""
    listed = list(cases)
    return [row for target in TARGETS if (row := target.row(listed)) is not None]


def _network(mode: str, batch: int, ours: str, baseline: str) -> Callable[[list[Case]], float | None]:
    def measured(cases: list[Case]) -> float | None:
        for case in cases:
            if case.get("mode") == mode and case["batch"] == batch and "dropout" not in case["name"]:
                return _quotient(case, ours, baseline)
        return None

    return measured


def _operator(
    name: str, ours: str = "ours", baseline: str = "eager", at: str = ""
) -> Callable[[list[Case]], float | None]:
    """Of all shapes together, or of one."""

    def measured(cases: list[Case]) -> float | None:
        chosen = [c for c in cases if c.get("operator") == name and c["direction"] == BOTH and at in c["name"]]
        totals = [sum(c["variants"][variant]["median_ms"] for c in chosen) for variant in (baseline, ours)]
        return totals[0] / totals[1] if chosen else None

    return measured


def _foreign(cases: list[Case]) -> float | None:
    for case in cases:
        if case["name"].startswith("segmentation_models_pytorch"):
            return _quotient(case, "ours", "eager")
    return None


def _memory(cases: list[Case]) -> float | None:
    for case in cases:
        if case.get("mode") == "training step" and case.get("peak_mib"):
            return case["peak_mib"]["ours"] / case["peak_mib"]["eager"]
    return None


def _quotient(case: Case, ours: str, baseline: str) -> float | None:
    found = case["variants"]
    return found[baseline]["median_ms"] / found[ours]["median_ms"] if {ours, baseline} <= found.keys() else None


TRAINING, INFERENCE, FUSED = "training step", "inference", "ours, fuse()"
TARGETS = (
    Target("training step, B=8, against eager", 1.7, _network(TRAINING, 8, "ours", "eager")),
    Target("training step, B=8, against torch.compile", 1.55, _network(TRAINING, 8, "ours", "compile")),
    Target("peak memory of a training step, of eager's", 0.6, _memory, at_most=True),
    Target("inference, B=8, fuse(), against eager", 1.5, _network(INFERENCE, 8, FUSED, "eager")),
    Target("inference, B=8, fuse(), against torch.compile", 1.3, _network(INFERENCE, 8, FUSED, "compile")),
    Target(
        "inference, B=8, bfloat16, against eager float32", 2.2, _network(INFERENCE, 8, f"{FUSED}, bfloat16", "eager")
    ),
    Target("inference, B=1, fuse(), against eager", 1.5, _network(INFERENCE, 1, FUSED, "eager")),
    Target("segmentation_models_pytorch's Unet, training step, against eager", 1.15, _foreign),
    Target("multi-scale fusion, all shapes, against eager", 2.4, _operator("multi-scale fusion")),
    Target("multi-scale fusion, 48x112x112, against eager", 3.3, _operator("multi-scale fusion", at="48x112x112")),
    Target("multi-scale fusion, 144x112x112, against eager", 3.3, _operator("multi-scale fusion", at="144x112x112")),
    Target("dual-path attention, 144x112x112, against eager", 4.0, _operator("dual-path attention", at="144x112x112")),
    Target("attention gate, 144x112x112, against eager", 2.5, _operator("attention gate", at="144x112x112")),
)
