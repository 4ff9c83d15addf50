"""One page about a run of ``gpu_report.sh``, printed and written as summary.txt: tests, medians, limits, targets."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from cases import BOTH, FORWARD
from report import GRAPH, Result, Row, four_levels, load, losses, milliseconds, title

# For the four levels together in float32, channels_last: batch, launch, µs forward, µs backward.
TARGETS = ((128, "", 545, 900), (8, GRAPH, 60, 100))
COMPILE_FACTOR = 2.0


def tests_line(path: Path) -> str:
    """How many tests passed, failed and were skipped."""
    if not path.exists():
        return "tests: no report; they were stopped or did not start"
    suites = list(ElementTree.parse(path).getroot().iter("testsuite"))
    total, failures, errors, skipped = (
        sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "failures", "errors", "skipped")
    )
    return f"tests: {total - failures - errors - skipped} passed, {failures + errors} failed, {skipped} skipped"


def target_lines(result: Result) -> Iterator[str]:
    """Each target of the four levels together, what was measured, and whether it is met."""
    for batch, launch, forward_target, backward_target in TARGETS:
        forward, both = (level_sum(result, batch, launch, direction) for direction in (FORWARD, BOTH))
        name = f"B={batch}{', CUDA graph' if launch else ''}"
        yield against(f"{name}, forward", None if forward is None else forward.ours * 1e3, forward_target)
        backward = None if forward is None or both is None else (both.ours - forward.ours) * 1e3
        yield against(f"{name}, backward (forward+backward less forward)", backward, backward_target)
    for batch in (1, 8, 32, 128):
        for launch in ("", GRAPH):
            for direction in (FORWARD, BOTH):
                found = level_sum(result, batch, launch, direction)
                ratio = None if found is None or found.compiled is None else found.compiled / found.ours
                label = f"B={batch}{', CUDA graph' if launch else ''}, {direction}: × torch.compile"
                met = "not measured" if ratio is None else "met" if ratio >= COMPILE_FACTOR else "MISSED"
                yield f"  {label:<58} {'–' if ratio is None else f'{ratio:.2f}':>8}  (≥ {COMPILE_FACTOR:.0f}) {met}"


def against(label: str, microseconds: float | None, target: float) -> str:
    """One line that says by how much a target is missed."""
    if microseconds is None:
        return f"  {label:<58} {'–':>8}  (≤ {target} µs) not measured"
    met = "met" if microseconds <= target else f"MISSED by {microseconds / target - 1:.0%}"
    return f"  {label:<58} {microseconds:8.1f}  (≤ {target} µs) {met}"


def level_sum(result: Result, batch: int, launch: str, direction: str) -> Row | None:
    """The four levels together in float32, channels_last."""
    cases = [
        case
        for case in result["cases"]
        if (case["batch"], case["direction"]) == (batch, direction)
        and (case["dtype"], case["layout"], case["max_autotune"]) == ("float32", "channels_last", False)
    ]
    return next(iter(four_levels(cases, launch)), None)


def summary(result: Result) -> list[str]:
    """The part about one machine."""
    lines = [title(result["machine"]), "", "four levels together, medians in ms: eager, torch.compile, ours, limit"]
    launches = ("", GRAPH) if result["machine"]["device"] == "cuda" else ("",)
    for row in (r for launch in launches for r in four_levels(result["cases"], launch)):
        times = "".join(f"{milliseconds(value):>9}" for value in (row.eager, row.compiled, row.ours, row.limit))
        lines.append(f"  {row.label + ', ' + row.layout + ', ' + row.dtype:<76}{times}  {row.limit / row.ours:4.0%}")
    if result["machine"]["device"] == "cuda":
        lines += ["", "targets, four levels together in float32, channels_last", *target_lines(result)]
    lost = losses(result)
    lines += ["", f"where a baseline is faster: {len(lost)} times, in {len(result['cases'])} cases, launched and graph"]
    lines += [f"  {r.label}, {r.layout}, {r.dtype}: ours {milliseconds(r.ours)}, limit {r.limit:.3f}" for r in lost]
    reasons = sorted({f"  {name}: {why}" for case in result["cases"] for name, why in case["unavailable"].items()})
    late = [f"  {entry['name']}: {entry['reason']}" for entry in result["not_measured"]]
    return [*lines, "", f"not measured: {len(reasons)} variants, {len(late)} workloads", *reasons, *late]


def main() -> None:
    """Print and write the summary of the newest results in a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--tests", type=Path, required=True, help="pytest's JUnit file")
    parser.add_argument("--seconds", type=int, required=True, help="how long the report took so far")
    options = parser.parse_args()
    newest = sorted(options.results.glob("*/interaction.json"), key=lambda path: path.stat().st_mtime)[-1:]
    measured = [r for r in load(options.results) if newest and r["machine"]["slug"] == newest[0].parent.name]
    lines = [f"report of {options.seconds} s", tests_line(options.tests), ""]
    for result in measured:
        lines += summary(result)
    if not measured:
        lines.append(f"benchmarks: no results in {options.results}")
    text = "\n".join(lines) + "\n"
    (options.results / "summary.txt").write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
