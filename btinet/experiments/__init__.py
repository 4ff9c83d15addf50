"""Experiments of many trainings: ablations and cross-validation."""
