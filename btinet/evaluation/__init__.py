"""Scores of a trained model: definitions, the evaluation of a run, and its figures."""

from btinet.evaluation.classification import ClassificationScores, classification_scores
from btinet.evaluation.console import print_summary
from btinet.evaluation.evaluate import EvaluateOptions, Summary, evaluate_run
from btinet.evaluation.segmentation import (
    SegmentationScores,
    SegmentationSummary,
    hausdorff95,
    segmentation_scores,
    summarise_segmentation,
)

__all__ = [
    "ClassificationScores",
    "EvaluateOptions",
    "SegmentationScores",
    "SegmentationSummary",
    "Summary",
    "classification_scores",
    "evaluate_run",
    "hausdorff95",
    "print_summary",
    "segmentation_scores",
    "summarise_segmentation",
]
