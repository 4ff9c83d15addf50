"""The roofline picture: what the machine allows, and what each variant reaches of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

GRAPH = " graph"
COLOURS = {"eager": "#9a9a9a", "torch.compile": "#4878cf", "ours": "#d65f5f"}


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """One row per machine: its roofline with every level, and the fraction of the limit per level."""
    figure = Figure(figsize=(11, 4 * len(results)), layout="constrained")
    axes = figure.subplots(len(results), 2, squeeze=False)
    for (left, right), result in zip(axes, results, strict=True):
        cases = chosen(result["cases"])
        _roofline(left, result, cases)
        _fractions(right, cases)
        left.set_title(result["machine"]["slug"])
        right.set_title("float32, channels_last, forward + backward")
    figure.savefig(path, dpi=110, metadata={"Software": None})


def chosen(cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Training steps in float32, channels_last, with the default search of torch.compile."""
    return [
        case
        for case in cases
        if case["dtype"] == "float32"
        and case["layout"] == "channels_last"
        and case["direction"] != "forward"
        and not case["max_autotune"]
    ]


def best(case: dict[str, Any]) -> dict[str, float]:
    """Median ms of eager, torch.compile and ours: the faster of launched and replayed as a CUDA graph."""
    names = {"eager": "eager", "torch.compile": "compile", "ours": case["automatic"]}
    times = {}
    for label, name in names.items():
        found = [case["variants"][n]["median_ms"] for n in (name, name + GRAPH) if n in case["variants"]]
        if found:
            times[label] = min(found)
    return times


def _roofline(axes: Axes, result: dict[str, Any], cases: Sequence[dict[str, Any]]) -> None:
    bandwidths = result["limits"]["copy_gb_per_s"].values()
    peak = _product_peak(result)
    intensities = [case["flops"] / case["bytes"] for case in cases] or [1.0]
    span = [min(intensities) / 2, max(intensities) * 2]
    for rate, style in ((max(bandwidths), ":"), (min(bandwidths), "-")):
        line = [min(peak, rate * x) for x in _between(*span)]
        axes.plot(_between(*span), line, style, color="black", linewidth=1, label=f"limit, copy {rate:.0f} GB/s")
    for case in cases:
        for label, ms in best(case).items():
            point = case["flops"] / ms / 1e6
            axes.plot(case["flops"] / case["bytes"], point, "o", color=COLOURS[label], markersize=6)
            if label == "ours":
                place = (case["flops"] / case["bytes"], point)
                axes.annotate(f" {case['channels']}×{case['size']}²", place, fontsize=7, va="bottom")
    for label, colour in COLOURS.items():
        axes.plot([], [], "o", color=colour, label=label)
    axes.set(xscale="log", yscale="log", xlabel="flop per unavoidable byte", ylabel="GFLOP/s")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(LogLocator(2))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3, which="both")


def _fractions(axes: Axes, cases: Sequence[dict[str, Any]]) -> None:
    width = 0.8 / len(COLOURS)
    for offset, (label, colour) in enumerate(COLOURS.items()):
        for place, case in enumerate(cases):
            ms = best(case).get(label)
            if ms is None:
                continue
            fraction = case["limit_ms"] / ms
            bar = axes.bar(place + offset * width, fraction, width, color=colour)
            axes.bar_label(bar, [f"{fraction:.0%}"], fontsize=6)
    axes.axhline(1, color="black", linewidth=1)
    names = [f"{case['channels']}×{case['size']}²\nB={case['batch']}" for case in cases]
    axes.set_xticks([place + width for place in range(len(cases))], names, fontsize=7)
    axes.set(ylabel="fraction of the limit's speed")
    axes.grid(alpha=0.3, axis="y")


def _product_peak(result: dict[str, Any]) -> float:
    peaks = result["limits"]["peak_gflop_per_s"]
    name = "product_tf32" if result["machine"]["device"] == "cuda" else "fma_float32"
    return peaks.get(name) or peaks["product_float32"]


def _between(low: float, high: float, points: int = 64) -> list[float]:
    return [low * (high / low) ** (i / (points - 1)) for i in range(points)]
