"""An analysis as a Markdown document and as a table in the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from btinet.evaluation.analysis.figures import ARROWS, TASKS
from btinet.evaluation.analysis.result import AFTER, BEFORE, Analysis, LevelAnalysis
from btinet.evaluation.analysis.signals import TERCILES, Correlation, SignalSummary
from btinet.evaluation.segmentation import Distribution

DEFINITIONS = (
    "Displacement: ‖enhanced − base‖₂ / ‖base‖₂ per image, then averaged; seg→clf changes the classification's "
    "features, clf→seg the segmentation's. Before the gate: what TIM makes of them; after it: what reaches the next "
    "level or the classifier. Images whose base is all zero have none.",
    "Easy, medium, hard: thirds of the images by difficulty; images of equal difficulty stay together.",
    "ρ: Spearman's rank correlation with difficulty, in brackets its 95 % bootstrap interval over images. Of so many "
    "intervals, some miss zero by chance.",
)
PICTURES = "Lines: standard error of the mean. Boxes: median and quartiles, whiskers to 1.5 interquartile ranges."
_Row = tuple[str, str, SignalSummary]  # level, name of the signal, its summary


def analysis_markdown(analysis: Analysis, figures: Sequence[str]) -> str:
    """Return the document; ``figures`` are the names of the picture files beside it."""
    of = {
        "Displacement": [row for name, level in analysis.levels.items() for row in _displacements(name, level)],
        "Gates": [(n, f"{s} gate", g) for n, level in analysis.levels.items() for s, g in level.gates.items()],
        "Proxies": [(n, proxy, p) for n, level in analysis.levels.items() for proxy, p in level.proxies.items()],
    }
    parts = [
        "# Analysis of the interaction\n",
        f"{analysis.images} images of split {analysis.split!r}; intervals from {analysis.bootstrap} resamples.\n",
        _listed(analysis.notes),
        "## Difficulty\n",
        _difficulties(analysis),
    ]
    for title, rows in of.items():
        if rows:
            parts += [f"## {title}\n", _distributions(rows), _by_difficulty(rows), _by_class(rows, analysis.classes)]
    parts += ["## Definitions\n", _listed(DEFINITIONS)]
    if figures:
        parts += ["## Pictures\n", f"{PICTURES}\n", *(f"![{name}]({name})\n" for name in figures)]
    return "\n".join(part for part in parts if part)


def print_analysis(analysis: Analysis, console: Console | None = None) -> None:
    """Print the means of each decoder level, the notes and the definitions."""
    console = console or Console()
    console.print(f"[bold]{analysis.images} images[/bold] of split {analysis.split!r}.", highlight=False)
    for table in (_displacement_table(analysis), _gate_table(analysis)):
        if table.row_count:
            console.print(table)
    for sentence in (*analysis.notes, *DEFINITIONS):
        console.print(f"[dim]{escape(sentence)}[/dim]", highlight=False)
    console.print(f"Written to {escape(analysis.out)}", highlight=False, soft_wrap=True)


def _displacement_table(analysis: Analysis) -> Table:
    table = _level_table("Mean displacement", ("seg→clf", "after gate", "clf→seg", "after gate"))
    for name, level in analysis.levels.items():
        moved = [level.displacement.get(direction, {}).get(stage) for direction in ARROWS for stage in (BEFORE, AFTER)]
        if any(moved):
            table.add_row(name, *("–" if summary is None else _number(summary.overall.mean) for summary in moved))
    return table


def _gate_table(analysis: Analysis) -> Table:
    headings = ("seg gate", "ρ, difficulty of seg", "clf gate", "ρ, difficulty of clf")
    table = _level_table("Mean gate, and its rank correlation with difficulty", headings)
    for name, level in analysis.levels.items():
        cells = [
            (_number(gate.overall.mean), _correlation(gate.correlation[task])) for task, gate in level.gates.items()
        ]
        if cells:
            table.add_row(name, *(cell for pair in cells for cell in pair))
    return table


def _level_table(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD)
    for heading in ("level", *headings):
        table.add_column(heading, justify="left" if heading == "level" else "right")
    return table


def _displacements(name: str, level: LevelAnalysis) -> list[_Row]:
    return [
        (name, f"{arrow}, {stage.replace('_', ' ')}", summary)
        for direction, arrow in ARROWS.items()
        for stage, summary in level.displacement.get(direction, {}).items()
    ]


def _difficulties(analysis: Analysis) -> str:
    rows = []
    for task, difficulty in analysis.difficulty.items():
        groups = [f"{_number(group.mean)} ({group.n})" for group in difficulty.terciles.values()]
        rows.append((TASKS[task], difficulty.definition, _number(difficulty.overall.mean), *groups))
    return _table(("task", "difficulty", "mean", *(f"{name} (images)" for name in TERCILES)), rows)


def _distributions(rows: Sequence[_Row]) -> str:
    shown = ("0.05", "0.25", "0.5", "0.75", "0.95")
    cells = [
        (level, name, _mean(s.overall), *(_number(s.quantiles[q]) for q in shown), str(s.overall.n), str(s.undefined))
        for level, name, s in rows
    ]
    return _table(
        ("level", "signal", "mean ± sd", "5 %", "25 %", "median", "75 %", "95 %", "images", "undefined"), cells
    )


def _by_difficulty(rows: Sequence[_Row]) -> str:
    header = ["level", "signal", *(f"{group}, {task}" for task in TASKS for group in (*TERCILES, "ρ"))]
    cells = []
    for level, name, summary in rows:
        line = [level, name]
        for task in TASKS:
            line += [_number(summary.by_difficulty[task][group].mean) for group in TERCILES]
            line.append(_correlation(summary.correlation[task]))
        cells.append(line)
    return _table(header, cells)


def _by_class(rows: Sequence[_Row], classes: Sequence[str]) -> str:
    cells = [(level, name, *(_mean(summary.by_class[c]) for c in classes)) for level, name, summary in rows]
    return _table(("level", "signal", *classes), cells)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = (header, ["---"] * len(header), *rows)
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def _listed(sentences: Sequence[str]) -> str:
    return "".join(f"- {sentence}\n" for sentence in sentences)


def _mean(values: Distribution) -> str:
    return f"{_number(values.mean)} ± {_number(values.sd)}"


def _correlation(found: Correlation) -> str:
    if math.isnan(found.rho):
        return "–"
    return f"{found.rho:.2f} [{found.low:.2f}, {found.high:.2f}]"


def _number(value: float) -> str:
    """Three significant digits; an undefined number as a dash."""
    return "–" if math.isnan(value) else f"{value:.3g}"
