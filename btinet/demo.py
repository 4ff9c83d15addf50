"""``btinet demo``: train, evaluate and predict on the shipped sample, and write one HTML report."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from btinet.data import sample_csv
from btinet.evaluation import EvaluateOptions, evaluate_run, print_summary
from btinet.serving import PredictOptions, Report, predict_files, write_report
from btinet.training import run_folder
from btinet.training.options import TrainOptions
from btinet.training.resume import STATE_NAMES
from btinet.training.train import train

REPORT_NAME = "report.html"
DATA_NOTE = (
    "Data: 100 dermoscopic images of the ISIC 2017 challenge (Codella et al., arXiv 1710.05006), released under CC-0; "
    "shipped with this package."
)


def run_demo(out: Path, *, quick: bool = False, seed: int = 42) -> Path:
    """Run the whole chain in ``out`` and return the path of the report.

    Args:
        out: new or empty folder; it gets ``run/``, ``predictions/`` and ``report.html``.
        quick: a few epochs on small images, within a minute on two CPU cores; else a few minutes.
        seed: of the split and the training.

    Raises:
        UserError: ``out`` is not empty or cannot be written.
    """
    console = Console(highlight=False, soft_wrap=True)
    run_folder.claim(out)
    run = train(_options(out / "run", quick, seed), console)
    for name in STATE_NAMES.values():  # many times the size of the model, and nobody will resume a demo
        (run / name).unlink()
    evaluation = run / "evaluation-test"
    print_summary(evaluate_run(EvaluateOptions(run=run, out=evaluation)), console)
    images = sample_csv().parent / "images"
    shown = sorted(images.iterdir())[:: 10 if quick else 5]
    predict_files(PredictOptions(run=run, inputs=tuple(shown), out=out / "predictions"))
    report = out / REPORT_NAME
    write_report(report, Report(run=run, evaluation=evaluation, data_note=DATA_NOTE))
    console.print(f"masks and overlays of {len(shown)} images: {out / 'predictions'}")
    console.print(f"report: {report}")
    return report


def _options(out: Path, quick: bool, seed: int) -> TrainOptions:
    return TrainOptions(
        data=str(sample_csv()),
        out=str(out),
        dataset="csv",
        model="btinet_resnet18",
        epochs=4 if quick else 40,
        stage2_epochs=1 if quick else 4,
        image_size=64 if quick else 128,
        lr=1e-3,
        seed=seed,
        device="cpu",
    )
