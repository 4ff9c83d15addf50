"""``docs/network_benchmarks.md`` from the committed measurements of modules and of the network.

``python benchmarks/report.py`` calls it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from report_targets import target_rows

VARIANTS = ("eager", "compile", "ours", "ours compiled")
BASELINES = ("eager", "compile")
Case = dict[str, Any]


def network_report(results: Path) -> str:
    """Every case of every machine, and where a baseline was faster."""
    parts = [
        "# Benchmarks of the network and its modules\n",
        "Written by `python benchmarks/report.py` from `benchmarks/results`. Float32, channels_last, medians in ms\n"
        "(quartiles), interleaved in one process after a comparison with float64 (modules) or with eager PyTorch\n"
        "(network). *eager* and *compile* are plain PyTorch modules and `torch.compile` of them, *ours compiled* is\n"
        "`torch.compile` of ours. Module forwards are without recording; those of *ours* keep merged weights.\n",
    ]
    for measured in _measured(results):
        machine = measured[0]["machine"]
        parts.append(f"## {machine['cpu']}, {machine['cores']} cores\n")
        parts.append(f"torch {machine['torch']}, {machine['allocator']}, {machine['date']}.\n")
        own = [m for m in measured if m["machine"]["allocator"] == machine["allocator"]]
        parts += [_peak_rates(m) for m in own]
        rows = target_rows(case for m in own for case in m["cases"])
        parts.append(_lines([("training and inference in float32 unless said", "wanted", "measured", ""), *rows]))
        for cases, allocator in ((m["cases"], m["machine"]["allocator"]) for m in measured):
            if allocator != machine["allocator"]:
                parts.append(f"With another memory allocator, {allocator}:\n")
            parts.append(_table(case for case in cases if "operator" in case))
            parts.append(_network_table(_networks(cases)))
            parts.append(_loading(case for case in cases if "images" in case))
            parts.append(_sums(cases))
            parts.append(_losses(cases))
        parts += [_peaks(m["cases"]) for m in own]
        parts.append(_profile(results / machine["slug"] / "network_profile.json"))
    return "\n".join(part for part in parts if part)


def network_summary(results: Path) -> str:
    """What the README shows: the whole network, and every operator over all its shapes."""
    parts = []
    for measured in _measured(results):
        machine = measured[0]["machine"]
        cases = [case for m in measured if m["machine"]["allocator"] == machine["allocator"] for case in m["cases"]]
        where = f"{machine['cpu']}, {machine['cores']} threads, torch {machine['torch']}, {machine['date']}"
        parts.append(f"\n**{where}**\n")
        parts.append(_network_table(_networks(cases)))
        parts.append(_peaks(cases))
        parts.append(_sums(cases))
    return "\n".join(part for part in parts if part)


def _measured(results: Path) -> Iterator[list[dict[str, Any]]]:
    """What there is of each machine, the network first."""
    for folder in sorted(results.iterdir()) if results.exists() else ():
        names = ("network", "foreign", "modules", "loading", "network_system_malloc")
        files = [folder / f"{name}.json" for name in names]
        if measured := [json.loads(file.read_text()) for file in files if file.exists()]:
            yield measured


def _table(cases: Iterable[Case]) -> str:
    lines = [("case", *VARIANTS, "× eager", "× compile")]
    for case in cases:
        found = case["variants"]
        spreads = [_spread(found.get(name)) for name in VARIANTS]
        ours = found["ours"]["median_ms"]
        ratios = [f"{found[n]['median_ms'] / ours:.2f}" if n in found else "–" for n in BASELINES]
        lines.append((_label(case), *spreads, *ratios))
    return _lines(lines)


def _network_table(cases: Iterable[Case]) -> str:
    """A row for each variant: cases have different ones."""
    lines = [("case", "variant", "ms (quartiles)", "× eager", "× compile")]
    for case in cases:
        found = case["variants"]
        for name, summary in found.items():
            ratios = [f"{found[n]['median_ms'] / summary['median_ms']:.2f}" if n in found else "–" for n in BASELINES]
            lines.append((case["name"], name, _spread(summary), *ratios))
    return _lines(lines)


def _networks(cases: Iterable[Case]) -> Iterator[Case]:
    """Those that are neither of one operator nor of the loading of images."""
    return (case for case in cases if "operator" not in case and "images" not in case)


def _loading(cases: Iterable[Case]) -> str:
    """Images per second, prepared and taken."""
    lines = [("case", "variant", "images/s (quartiles)")]
    for case in cases:
        for name, summary in case["variants"].items():
            median, slow, fast = (1000 * case["images"] / summary[f"{q}_ms"] for q in ("median", "q3", "q1"))
            lines.append((_label(case), name, f"{_rate(median)} ({_rate(slow)} … {_rate(fast)})"))
    explained = (
        "Images that the loader prepares, the start of its workers included, and that a training step takes:\n\n"
    )
    return explained + _lines(lines) if len(lines) > 1 else ""


def _lines(rows: list[tuple[str, ...]]) -> str:
    """A table, where there is more than its header."""
    lines = [rows[0], ("---",) * len(rows[0]), *rows[1:]] if len(rows) > 1 else []
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _sums(cases: Iterable[Case]) -> str:
    """Of an operator over all its shapes."""
    totals: dict[tuple[str, str], dict[str, float]] = {}
    for case in cases:
        if "operator" not in case:
            continue
        total = totals.setdefault((case["operator"], case["direction"]), dict.fromkeys(VARIANTS, 0.0))
        for name in VARIANTS:
            total[name] += case["variants"][name]["median_ms"]
    lines = [
        f"- {operator}, {direction}, all shapes: eager {t['eager']:.0f}, compile {t['compile']:.0f}, ours "
        f"{t['ours']:.0f}: {t['eager'] / t['ours']:.2f}× and {t['compile'] / t['ours']:.2f}×"
        for (operator, direction), t in totals.items()
    ]
    return "\n".join(lines) + "\n" if lines else ""


def _losses(cases: Iterable[Case]) -> str:
    lost = [
        f"- {_label(case)}: {name} {case['variants'][name]['median_ms']:.2f}, "
        f"ours {case['variants']['ours']['median_ms']:.2f}"
        for case in cases
        for name in BASELINES
        if name in case["variants"] and case["variants"][name]["median_ms"] < case["variants"]["ours"]["median_ms"]
    ]
    return "A baseline was faster here:\n\n" + "\n".join(lost) + "\n" if lost else ""


def _peaks(cases: Iterable[Case]) -> str:
    lines = [
        f"- {case['name']}: eager {peaks['eager']:.0f} MiB, ours {peaks['ours']:.0f} MiB "
        f"({peaks['ours'] / peaks['eager']:.0%})"
        for case in cases
        if (peaks := case.get("peak_mib"))
    ]
    return "Peak resident memory of a process that takes three steps:\n\n" + "\n".join(lines) + "\n" if lines else ""


def _peak_rates(measured: dict[str, Any]) -> str:
    """What the processor could compute, at the time of the measurement."""
    rates = measured.get("peak_gflop_per_s")
    if not rates:
        return ""
    what = "modules" if "operator" in measured["cases"][0] else measured["cases"][0]["name"].split(",")[0]
    listed = ", ".join(f"{name.replace('_', ' ')} {rate:.0f}" for name, rate in rates.items())
    return f"Peak rates after the measurement of {what}, GFLOP/s: {listed}.\n"


def _profile(file: Path) -> str:
    """Where a training step's time goes, and the least time that its arithmetic needs."""
    if not file.exists():
        return ""
    content = json.loads(file.read_text())
    rates = content["peak_gflop_per_s"]
    least = ", ".join(
        f"{content['gflop'] / rates[name] * 1e3:.0f} ms at {rates[name]:.0f} GFLOP/s ({name.replace('_', ' ')})"
        for name in ("fma_float32", "product_float32")
    )
    parts = [
        f"### Profile of {content['case']}\n",
        f"{content['gflop']:.0f} GFLOP in convolutions and products: at least {least}.\n"
        "CPU time of each operator without what it calls, averaged over steps that were recorded, which costs time\n"
        "(`python benchmarks/network_profile.py`).\n",
    ]
    for variant, times in content["profiles"].items():
        total = sum(times.values())
        rows = [(f"{variant}: operator", "ms", "share")]
        rows += [(f"`{name}`", f"{ms:.0f}", f"{ms / total:.0%}") for name, ms in times.items()]
        parts.append(_lines([*rows, ("together", f"{total:.0f}", "")]))
    return "\n".join(parts)


def _spread(summary: dict[str, float] | None) -> str:
    return f"{summary['median_ms']:.1f} ({summary['q1_ms']:.1f} … {summary['q3_ms']:.1f})" if summary else "–"


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _label(case: Case) -> str:
    return case["name"] if case["direction"] in case["name"] else f"{case['name']}, {case['direction']}"
