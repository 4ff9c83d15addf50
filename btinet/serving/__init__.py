"""Predictions of a trained model: in memory, as files, and as a report."""

from btinet.serving.predict import PredictOptions, predict_files
from btinet.serving.predictor import Prediction, Predictor
from btinet.serving.report import Report, write_report

__all__ = [
    "PredictOptions",
    "Prediction",
    "Predictor",
    "Report",
    "predict_files",
    "write_report",
]
