"""What the finished runs of an ablation say, read from their files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from btinet.data.tables import read_table
from btinet.errors import UserError
from btinet.evaluation.segmentation import MEASURES
from btinet.evaluation.tables import spreadsheet_text
from btinet.experiments.process import EVALUATION_NAME
from btinet.experiments.statistics import Difference, Spread, multi_task_gain, paired_difference, spread
from btinet.experiments.variants import SINGLE_TASK, Variant

HEADLINE = {"iou": "IoU", "dice": "Dice", "accuracy": "accuracy", "macro_f1": "macro F1", "macro_auroc": "AUROC"}
PAIRED = ("iou", "dice", "accuracy")  # means over images, so that images can be paired

_OF_CLASSES = ("accuracy", "balanced_accuracy", "macro_f1", "weighted_f1", "macro_auroc")
_PER_CLASS = ("sensitivity", "specificity", "auroc")


@dataclass(frozen=True)
class Run:
    """One training: a variant, a seed and, of a cross-validation, the fold that is tested."""

    variant: str
    seed: int
    fold: int | None

    def folder(self, out: Path) -> Path:
        """Where it lies in the folder of the ablation."""
        return out / "runs" / self.variant / (f"seed{self.seed}" + ("" if self.fold is None else f"-fold{self.fold}"))

    def is_finished(self, out: Path) -> bool:
        """Whether it was trained and evaluated; the summary is the last file of an evaluation."""
        return (self.folder(out) / EVALUATION_NAME / "summary.json").is_file()


@dataclass(frozen=True)
class RunScores:
    """The scores of a finished run on its test part.

    Attributes:
        run: which one.
        scores: of the whole part, by the names of the columns of ablation.csv; nan: undefined.
        per_image: name in ``PAIRED`` → image → score. IoU and Dice are those of the images with a lesion, accuracy is
            0 or 1 of each labelled image.
    """

    run: Run
    scores: dict[str, float]
    per_image: dict[str, dict[str, float]]


@dataclass(frozen=True)
class VariantResult:
    """A row of the table.

    Attributes:
        variant: the switches.
        runs: how many are finished.
        scores: name in ``HEADLINE`` → over these runs.
        differences: name in ``PAIRED`` → from the reference; empty for the reference itself.
        multi_task_gain: Δm in per cent, of the means over the runs that it and both single-task variants share; nan
            where there are none.
    """

    variant: Variant
    runs: int
    scores: dict[str, Spread]
    differences: dict[str, Difference]
    multi_task_gain: float


def read_run(run: Run, out: Path) -> RunScores:
    """Read the evaluation of a finished run; raises ``UserError`` when its files are not those of an evaluation."""
    folder = run.folder(out) / EVALUATION_NAME
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        return RunScores(run, _scores(summary), _per_image(folder / "per_image.csv"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder}: not an evaluation by this version of btinet ({error!r}); remove it and repeat the command."
        ) from error


def read_groups_of_split(file: Path) -> dict[str, str]:
    """Image, as per_image.csv names it, → its group in the split."""
    rows = (row for _, row in read_table(file, ("image", "group")))
    return {spreadsheet_text(row["image"]): row["group"] for row in rows if row["group"]}


def summarise(
    results: Sequence[RunScores], variants: Mapping[str, Variant], reference: str, group_of: Mapping[str, str]
) -> dict[str, VariantResult]:
    """The rows of the table, by the names of the variants and in their order."""
    of = {name: {(r.run.seed, r.run.fold): r for r in results if r.run.variant == name} for name in variants}
    summary = {}
    for name, variant in variants.items():
        runs = of[name]
        shared = [key for key in runs if key in of[reference]]
        pairs = [(runs[key].per_image, of[reference][key].per_image) for key in shared]
        differences = {
            score: paired_difference([(ours[score], theirs[score]) for ours, theirs in pairs], group_of)
            for score in PAIRED
            if name != reference
        }
        scores = {score: spread([_score(result, score) for result in runs.values()]) for score in HEADLINE}
        summary[name] = VariantResult(variant, len(runs), scores, differences, _gain(name, variant, of))
    return summary


def _gain(name: str, variant: Variant, of: Mapping[str, Mapping[Any, RunScores]]) -> float:
    if variant.tasks != "both" or not SINGLE_TASK.keys() <= of.keys():
        return math.nan
    shared = [key for key in of[name] if all(key in of[single] for single in SINGLE_TASK)]

    def mean(which: str, score: str) -> float:
        return spread([_score(of[which][key], score) for key in shared]).mean

    multi = {score: mean(name, score) for score in SINGLE_TASK.values()}
    return multi_task_gain(multi, {score: mean(single, score) for single, score in SINGLE_TASK.items()})


def _score(result: RunScores, name: str) -> float:
    return result.scores.get(name, math.nan)


def _scores(summary: Mapping[str, Any]) -> dict[str, float]:
    scores: dict[str, Any] = {"images": summary["images"]}
    segmentation, classification = summary["segmentation"], summary["classification"]
    if segmentation is not None:
        lesion, every = segmentation["lesion_images"], segmentation["all_images"]
        scores |= {name: lesion["measures"][name]["mean"] for name in MEASURES}
        scores |= {f"{name}_all_images": every["measures"][name]["mean"] for name in MEASURES}
        scores |= {name: lesion[name] for name in ("pooled_iou", "pooled_dice", "n_missed")}
        scores["false_positive_rate"] = segmentation["false_positive_rate"]
    if classification is not None:
        scores |= {name: classification[name] for name in _OF_CLASSES}
        for name in _PER_CLASS:
            scores |= {f"{name}_{label}": value for label, value in classification[name].items()}
    return {name: math.nan if value is None else float(value) for name, value in scores.items()}


def _per_image(file: Path) -> dict[str, dict[str, float]]:
    scores: dict[str, dict[str, float]] = {name: {} for name in PAIRED}
    for _, row in read_table(file, ("image", "label")):
        image = row["image"]
        if int(row.get("target_pixels") or 0) > 0:
            scores["iou"][image], scores["dice"][image] = float(row["iou"]), float(row["dice"])
        if row["label"] and "predicted" in row:
            scores["accuracy"][image] = float(row["predicted"] == row["label"])
    return scores
