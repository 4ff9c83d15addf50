"""Tables and the roofline picture from the committed measurements: ``python benchmarks/report.py``.

Rewrites the README between its two marker comments, ``docs/interaction_benchmarks.md`` (every case and variant),
``docs/interaction_roofline.png`` and ``docs/network_benchmarks.md``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report_modules import network_report, network_summary

CHECKOUT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- interaction benchmarks -->", "<!-- end of interaction benchmarks -->"
DECODER = ((384, 14), (192, 28), (96, 56), (48, 112))
GRAPH = " graph"
COLUMNS = ("", "layout", "dtype", "eager", "torch.compile", "ours", "limit", "× eager", "× compile", "of the limit")

Result = dict[str, Any]  # what the benchmarks write: machine, limits, cases
Case = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One line of a table; times in ms, None where there is no measurement."""

    label: str
    layout: str
    dtype: str
    ours: float
    limit: float
    eager: float | None = None
    compiled: float | None = None

    @property
    def loses(self) -> bool:
        return any(other is not None and other < self.ours for other in (self.eager, self.compiled))

    def cells(self) -> list[str]:
        return [
            self.label,
            self.layout,
            self.dtype,
            *(milliseconds(value) for value in (self.eager, self.compiled, self.ours, self.limit)),
            *("–" if other is None else f"{other / self.ours:.1f}" for other in (self.eager, self.compiled)),
            f"{self.limit / self.ours:.0%}",
        ]


def load(folder: Path) -> list[Result]:
    """The results of every machine, in the order of their names."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*/interaction.json"))]


def row(case: Case, launch: str = "") -> Row | None:
    """Of one case; ``launch``: "" as launched, ``GRAPH`` replayed as a CUDA graph. None where ours was not measured."""
    medians = {name: summary["median_ms"] for name, summary in case["variants"].items()}
    ours = medians.get(case["automatic"] + launch)
    if ours is None:
        return None
    shape = f"{case['channels']}×{case['size']}², B={case['batch']}, {case['direction']}"
    compiled = medians.get("compile" + launch)
    if case["max_autotune"]:
        shape, compiled = f"{shape}, max-autotune", medians.get("max-autotune" + launch)
    eager = medians.get("eager" + launch)
    return Row(shape + _launched(launch), case["layout"], case["dtype"], ours, case["limit_ms"], eager, compiled)


def four_levels(cases: Iterable[Case], launch: str = "") -> list[Row]:
    """Sums over the decoder's four levels, for every batch, dtype, layout and direction that has all four."""
    groups: dict[tuple[Any, ...], dict[tuple[int, int], Case]] = {}
    for case in cases:
        key = tuple(case[name] for name in ("batch", "layout", "dtype", "direction", "max_autotune"))
        groups.setdefault(key, {})[case["channels"], case["size"]] = case
    sums = []
    for (batch, layout, dtype, direction, searched), found in groups.items():
        rows = [row(found[shape], launch) for shape in DECODER if shape in found]
        levels = [r for r in rows if r is not None]
        if len(levels) < len(DECODER):
            continue
        label = f"four levels, B={batch}, {direction}" + (", max-autotune" if searched else "") + _launched(launch)
        totals = [_total([getattr(r, name) for r in levels]) for name in ("ours", "limit", "eager", "compiled")]
        sums.append(Row(label, layout, dtype, *totals))  # type: ignore[arg-type]
    return sums


def headline(result: Result) -> list[Row]:
    """What the README shows: on a CPU the levels and all sums, on a GPU the sums in float32, channels_last."""
    cases = result["cases"]
    if result["machine"]["device"] == "cuda":
        rows = [r for launch in ("", GRAPH) for r in four_levels(cases, launch)]
        return [r for r in rows if r.dtype == "float32" and r.layout == "channels_last"]
    training = [c for c in cases if c["dtype"] == "float32" and c["direction"] != "forward"]
    levels = [row(c) for c in training if c["layout"] == "channels_last"]
    return [r for r in levels if r is not None] + four_levels(cases)


def losses(result: Result) -> list[Row]:
    """Every case in which a baseline is faster than what ``auto`` takes."""
    launches = ("", GRAPH) if result["machine"]["device"] == "cuda" else ("",)
    rows = [row(case, launch) for case in result["cases"] for launch in launches]
    return [r for r in rows if r is not None and r.loses]


def readme_block(results: Sequence[Result], results_command: str) -> str:
    """What stands between the markers."""
    if not results:
        return f"No measurements are committed yet; `{results_command}` makes them.\n"
    every_case = "[docs/interaction_benchmarks.md](docs/interaction_benchmarks.md)"
    parts = [f"Medians in ms, interleaved in one process; every case and the spread: {every_case}.\n"]
    for result in results:
        parts += [f"**{title(result['machine'])}**\n", table(COLUMNS, [r.cells() for r in headline(result)])]
        parts.append(verdict(losses(result), len(result["cases"])))
    parts.append("![Achieved against possible speed](docs/interaction_roofline.png)\n")
    return "\n".join(parts)


def verdict(lost: Sequence[Row], measured: int) -> str:
    """Which cases a baseline wins, with both numbers."""
    if not lost:
        return f"No baseline was faster in any of the {measured} cases measured.\n"
    lines = [
        f"- {r.label}, {r.layout}, {r.dtype}: eager {milliseconds(r.eager)}, torch.compile {milliseconds(r.compiled)}, "
        f"ours **{milliseconds(r.ours)}**"
        for r in lost
    ]
    return "\n".join([f"A baseline was faster in these of the {measured} cases measured:\n", *lines]) + "\n"


def full_report(results: Sequence[Result]) -> str:
    """Every case and variant of every machine."""
    parts = [
        "# Benchmarks of the interaction\n",
        "Written by `python benchmarks/report.py` from `benchmarks/results`. Times in ms: median (quartiles),\n"
        "interleaved in one process after a comparison with float64. *Forward* in training records for the\n"
        "backward; at B=1 it is inference. The limit and its formula: `benchmarks/machine_limit.py`.\n",
    ]
    for result in results:
        parts += [f"## {title(result['machine'])}\n", _facts(result)]
        variants = list(dict.fromkeys(name for case in result["cases"] for name in case["variants"]))
        lines = []
        for case in result["cases"]:
            cells = [_spread(case["variants"].get(name)) for name in variants]
            lines.append([f"{case['name']}, {case['direction']}", *cells, milliseconds(case["limit_ms"])])
        parts.append(table(("case", *variants, "limit"), lines))
        missing = sorted({f"{name}: {why}" for case in result["cases"] for name, why in case["unavailable"].items()})
        left_out = [f"{entry['name']}: {entry['reason']}" for entry in result["not_measured"]]
        if missing or left_out:
            parts.append("Not measured:\n\n" + "\n".join(f"- {line}" for line in missing + left_out) + "\n")
    return "\n".join(parts)


def title(machine: dict[str, Any]) -> str:
    """The machine and what the numbers depend on, in a line."""
    if machine["device"] == "cuda":
        return (
            f"{machine['gpu']}, CUDA {machine['cuda']}, torch {machine['torch']}, triton {machine['triton']}, "
            + (machine["date"])
        )
    widest = next((name for name in ("avx512", "avx2", "sve", "neon") if name in machine["instruction_sets"]), "scalar")
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] != 1)}"
    return f"{machine['cpu']}, {widest}, {threads}, torch {machine['torch']}, {machine['date']}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """As Markdown; numbers are aligned to the right."""
    rule = ["---"] + ["---:" if name not in ("layout", "dtype") else "---" for name in header[1:]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows)) + "\n"


def milliseconds(value: float | None) -> str:
    """Three significant digits, or a dash."""
    if value is None:
        return "–"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def replaced(text: str, block: str) -> str:
    """``text`` with ``block`` between the markers."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"the README needs the lines {BEGIN} and {END} once each.")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{block}{END}{rest.split(END)[1]}"


def updated_readme(readme: Path, results: Sequence[Result], summary: str = "") -> str:
    """What the README should be; ``summary``: of the network and its modules."""
    block = readme_block(results, "pytest benchmarks/ --benchmark-only --save-results")
    return replaced(readme.read_text(), block + summary)


def main(arguments: Sequence[str] | None = None) -> None:
    """Rewrite what is generated."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=CHECKOUT / "benchmarks" / "results")
    parser.add_argument("--readme", type=Path, default=CHECKOUT / "README.md")
    parser.add_argument("--docs", type=Path, default=CHECKOUT / "docs")
    options = parser.parse_args(arguments)
    results = load(options.results)
    options.readme.write_text(updated_readme(options.readme, results, network_summary(options.results)))
    if results:
        from report_figure import draw

        (options.docs / "interaction_benchmarks.md").write_text(full_report(results))
        draw(results, options.docs / "interaction_roofline.png")
    if any(any(options.results.glob(f"*/{name}.json")) for name in ("modules", "network", "loading")):
        (options.docs / "network_benchmarks.md").write_text(network_report(options.results))
    slugs = ", ".join(result["machine"]["slug"] for result in results)
    print(f"reported: {slugs or f'nothing, there are no results in {options.results}'}")


def _facts(result: Result) -> str:
    machine, limits = result["machine"], result["limits"]
    names = ("cores", "threads", "allocator", "native_instruction_set", "python", "triton", "convolutions_use_tf32")
    facts = [f"{name.replace('_', ' ')}: {machine[name]}" for name in names if machine.get(name) is not None]
    copies = ", ".join(f"{int(size) / 2**20:.1f} MiB {rate}" for size, rate in limits["copy_gb_per_s"].items())
    peaks = ", ".join(f"{name.replace('_', ' ')} {rate}" for name, rate in limits["peak_gflop_per_s"].items())
    inputs = sorted({case["inputs"] for case in result["cases"]})
    lines = [
        *facts,
        f"copy bandwidth by size, GB/s: {copies}",
        f"peaks, GFLOP/s: {peaks}",
        f"limit: {limits['formula']}",
    ]
    return "\n".join(f"- {line}" for line in [*lines, *(f"inputs: {text}" for text in inputs)]) + "\n"


def _spread(summary: dict[str, float] | None) -> str:
    if summary is None:
        return "–"
    return f"{milliseconds(summary['median_ms'])} ({milliseconds(summary['q1_ms'])}–{milliseconds(summary['q3_ms'])})"


def _total(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) if len(present) == len(values) else None


def _launched(launch: str) -> str:
    return ", CUDA graph" if launch else ""


if __name__ == "__main__":
    main()
