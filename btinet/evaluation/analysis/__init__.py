"""What the interaction of a run does: displacement of the features, gates and proxies, split by difficulty."""

from btinet.evaluation.analysis.analyse import AnalyseOptions, analyse_run
from btinet.evaluation.analysis.displacement import displacement, recorded_displacements
from btinet.evaluation.analysis.report import print_analysis
from btinet.evaluation.analysis.result import Analysis, Difficulty, LevelAnalysis
from btinet.evaluation.analysis.signals import Correlation, SignalSummary, spearman, terciles

__all__ = [
    "AnalyseOptions",
    "Analysis",
    "Correlation",
    "Difficulty",
    "LevelAnalysis",
    "SignalSummary",
    "analyse_run",
    "displacement",
    "print_analysis",
    "recorded_displacements",
    "spearman",
    "terciles",
]
