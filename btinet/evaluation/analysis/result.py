"""What an analysis finds."""

from __future__ import annotations

from dataclasses import dataclass

from btinet.evaluation.analysis.signals import SignalSummary
from btinet.evaluation.segmentation import Distribution
from btinet.models.network import Interaction

BEFORE, AFTER = "before_gate", "after_gate"
STREAMS = ("seg", "clf")  # a gate per stream, and a difficulty per task


@dataclass(frozen=True)
class Difficulty:
    """How hard the images are for one task.

    Attributes:
        definition: what difficulty is.
        overall: over the images that have one.
        undefined: number of the others.
        terciles: the same per group, see ``terciles``.
    """

    definition: str
    overall: Distribution
    undefined: int
    terciles: dict[str, Distribution]


@dataclass(frozen=True)
class LevelAnalysis:
    """One decoder level.

    Attributes:
        interaction: "none", "fixed" or "gated".
        displacement: per direction ("seg_to_clf", "clf_to_seg"), of the features that TIM enhanced ("before_gate") and,
            at a gated level, of those that its gate passed on ("after_gate"); empty without interaction.
        gates: per stream; empty without a gate.
        proxies: per name; empty without a gate.
    """

    interaction: Interaction
    displacement: dict[str, dict[str, SignalSummary]]
    gates: dict[str, SignalSummary]
    proxies: dict[str, SignalSummary]


@dataclass(frozen=True)
class Analysis:
    """The analysis of a run on a set of images.

    Attributes:
        run, data, out: folders (``data`` may be a CSV file).
        split: as in ``AnalyseOptions``.
        images: number of images.
        classes: names.
        bootstrap: resamples behind each interval.
        difficulty: per task, "seg" and "clf".
        levels: per decoder level, coarse to fine.
        notes: sentences about what is missing or to be read with care.
    """

    run: str
    data: str
    out: str
    split: str
    images: int
    classes: tuple[str, ...]
    bootstrap: int
    difficulty: dict[str, Difficulty]
    levels: dict[str, LevelAnalysis]
    notes: tuple[str, ...]
