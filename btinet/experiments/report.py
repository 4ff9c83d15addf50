"""The files of an ablation: ``ablation.csv``, ``.json``, ``.md`` and ``.png``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from btinet.evaluation.figures import save_figure
from btinet.evaluation.tables import write_csv, write_json
from btinet.experiments.figure import ablation_figure
from btinet.experiments.results import HEADLINE, RunScores, VariantResult
from btinet.experiments.statistics import LEVEL, RESAMPLES, Difference, Spread
from btinet.experiments.variants import SINGLE_TASK
from btinet.files import write_text

NAMES = ("ablation.csv", "ablation.json", "ablation.md", "ablation.png")
COMPARED = ("iou", "accuracy")  # in the table; Dice goes with IoU

Failures = Mapping[str, str]  # folder of a run → why it failed


def write_report(
    out: Path,
    results: Sequence[RunScores],
    summary: Mapping[str, VariantResult],
    reference: str,
    failures: Failures,
) -> None:
    """Write the four files; raises ``UserError`` when one cannot be written."""
    rows = [{"variant": r.run.variant, "seed": r.run.seed, "fold": r.run.fold, **r.scores} for r in results]
    write_csv(out / "ablation.csv", rows, list(dict.fromkeys(name for row in rows for name in row)))
    write_json(
        out / "ablation.json",
        {
            "reference": reference,
            "definitions": definitions(reference),
            "variants": {name: asdict(result) for name, result in summary.items()},
            "runs": rows,
            "failures": failures,
        },
    )
    write_text(out / "ablation.md", markdown(summary, reference, failures))
    save_figure(ablation_figure(results, summary, reference), out / "ablation.png")


def markdown(summary: Mapping[str, VariantResult], reference: str, failures: Failures) -> str:
    """The table with what its numbers mean."""
    heading = ["variant", "has", *HEADLINE.values(), *(f"Δ {HEADLINE[name]}" for name in COMPARED), "Δm %", "runs"]
    lines = [heading, ["---", "---", *["---:"] * (len(heading) - 2)]]
    for name, result in summary.items():
        scores = [_mean_sd(result.scores[score]) for score in HEADLINE]
        differences = [_interval(result.differences.get(score)) for score in COMPARED]
        gain = "–" if math.isnan(result.multi_task_gain) else f"{result.multi_task_gain:+.2f}"
        lines.append([name, result.variant.description(), *scores, *differences, gain, str(result.runs)])
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    parts = ["# Ablation", table, "\n".join(f"- {sentence}" for sentence in definitions(reference))]
    if failures:
        failed = "\n".join(f"- {folder}: {reason}" for folder, reason in failures.items())
        parts += [f"Failed runs, which the table lacks ({len(failures)}):", failed]
    return "\n\n".join(parts) + "\n"


def definitions(reference: str) -> list[str]:
    """What the numbers mean, one sentence each."""
    segmentation, classification = SINGLE_TASK
    return [
        "Scores are of the test part: IoU and Dice of the lesion per image at its own size, averaged over the images "
        "with a lesion; mean ± sd over the runs (seeds and folds), sd with divisor n-1.",
        f"Δ is the difference from {reference}, averaged over the images that both were tested on in runs of the same "
        f"seed and fold, with its {LEVEL} % interval: {RESAMPLES} paired bootstrap resamples of the images, those of "
        "one group (patient, lesion, near-duplicates) together. It covers the choice of images, not that of seeds, and "
        "is not corrected for the number of comparisons.",
        f"Δm is the mean over the tasks of (multi − single) / single, with IoU against the variant {segmentation} and "
        f"accuracy against {classification}, of the means over the runs that all three share.",
    ]


def _mean_sd(values: Spread) -> str:
    if math.isnan(values.mean):
        return "–"
    return f"{values.mean:.3f}" + ("" if math.isnan(values.sd) else f" ± {values.sd:.3f}")


def _interval(difference: Difference | None) -> str:
    if difference is None or math.isnan(difference.mean):
        return "–"
    limits = "" if math.isnan(difference.low) else f" [{difference.low:+.3f}, {difference.high:+.3f}]"
    return f"{difference.mean:+.3f}{limits}"
