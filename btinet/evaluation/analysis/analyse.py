"""The papers' figures from any run: displacement per level and direction, gates and proxies, split by difficulty."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from btinet.data.masks import MaskFormat
from btinet.errors import UserError
from btinet.evaluation.analysis.displacement import DIRECTIONS, column, interactions, recorded_displacements
from btinet.evaluation.analysis.figures import ARROWS, TASKS, by_difficulty_figure, displacement_figure
from btinet.evaluation.analysis.report import analysis_markdown
from btinet.evaluation.analysis.result import AFTER, BEFORE, STREAMS, Analysis, Difficulty, LevelAnalysis
from btinet.evaluation.analysis.signals import TERCILES, Images, SignalSummary, by_group, summarise_signal
from btinet.evaluation.evaluate import ImageResult, Reader, evaluate_images
from btinet.evaluation.figures import save_figure
from btinet.evaluation.run_data import RunOptions, read_run_data
from btinet.evaluation.segmentation import distribution
from btinet.evaluation.tables import write_csv, write_json
from btinet.files import write_text
from btinet.models.checkpoint import load_checkpoint
from btinet.models.network import BTINetConfig, Interaction
from btinet.serving.predictor import Predictor
from btinet.serving.report_figures import GateTable, gate_boxes_figure

LEAST_RESAMPLES = 100
FEW_IMAGES = 30  # below, intervals by the bootstrap are too narrow
DIFFICULTIES = {
    "seg": "1 − IoU of the predicted mask at the image's own size; images without a lesion or a mask have none",
    "clf": "1 − probability of the predicted class",
}
_MISSING: dict[Interaction, str] = {
    "none": "no interaction, so there is no displacement, gate or proxy.",
    "fixed": "interaction without a gate, so all of it passes, and there is no gate or proxy.",
}


@dataclass(frozen=True)
class AnalyseOptions(RunOptions):
    """What to analyse, and how; the results go to ``analysis-SPLIT`` unless ``out`` says otherwise.

    Attributes:
        bootstrap: resamples behind the interval of a correlation.

    Raises:
        UserError: ``bootstrap`` below 100.
    """

    bootstrap: int = 2000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bootstrap < LEAST_RESAMPLES:
            raise UserError(f"--bootstrap {self.bootstrap}: expected at least {LEAST_RESAMPLES} resamples.")


def analyse_run(options: AnalyseOptions) -> Analysis:
    """Analyse the interaction of a run and write ``images.csv``, ``analysis.json``, ``analysis.md`` and figures.

    A figure for which the network has nothing to show is left out, and that of an earlier analysis removed.

    Raises:
        UserError: the run, its data or its split cannot be read or do not belong together, the split is
            empty, or a result cannot be written.
    """
    predictor = Predictor(load_checkpoint(options.run), options.device)
    data = read_run_data(options, predictor.classes)
    reader = Reader(predictor, "native", MaskFormat(data.mask_threshold, predictor.mask_classes))
    with recorded_displacements(predictor.model) as displacements:
        results = list(evaluate_images(reader, data.samples, options.batch_size))

    columns = {**displacements, **{name: [r.signals[name] for r in results] for name in results[0].signals}}
    images = _images(results, data.classes)
    out = options.out or options.folder / f"analysis-{options.split}"
    levels = {
        level: _level(level, kind, columns, images, predictor.proxy_names, options.bootstrap)
        for level, kind in interactions(predictor.model).items()
    }
    analysis = Analysis(
        run=str(options.folder),
        data=str(data.path),
        out=str(out),
        split=options.split,
        images=len(results),
        classes=data.classes,
        bootstrap=options.bootstrap,
        difficulty={task: _difficulty(task, images) for task in STREAMS},
        levels=levels,
        notes=tuple(_notes(levels, predictor.model.config, images)),
    )
    rows = [_row(position, result, images, columns) for position, result in enumerate(results)]
    write_csv(out / "images.csv", rows, list(rows[0]))
    figures = _figures(analysis, columns)
    for name, figure in figures.items():
        if figure is None:
            (out / name).unlink(missing_ok=True)
        else:
            save_figure(figure, out / name)
    write_text(out / "analysis.md", analysis_markdown(analysis, [name for name, figure in figures.items() if figure]))
    write_json(out / "analysis.json", asdict(analysis))
    return analysis


def _images(results: Sequence[ImageResult], classes: Sequence[str]) -> Images:
    seg = [1 - r.scores.iou if r.scores is not None and r.scores.target_pixels else math.nan for r in results]
    clf = [1 - float(r.probabilities.max()) if r.probabilities.size else math.nan for r in results]
    labels = [classes[result.sample.label] if result.sample.label >= 0 else None for result in results]
    return Images(labels, classes, {"seg": np.array(seg), "clf": np.array(clf)})


def _difficulty(task: str, images: Images) -> Difficulty:
    values = images.difficulty[task]
    return Difficulty(
        definition=DIFFICULTIES[task],
        overall=distribution(values.tolist()),
        undefined=int(np.isnan(values).sum()),
        terciles=by_group(values, images.terciles[task], TERCILES),
    )


def _level(
    level: str,
    interaction: Interaction,
    columns: Mapping[str, Sequence[float]],
    images: Images,
    proxy_names: Sequence[str],
    bootstrap: int,
) -> LevelAnalysis:
    def summary(name: str, limits: tuple[float, float] | None = None) -> SignalSummary:
        return summarise_signal(columns[name], images, limits=limits, resamples=bootstrap)

    gated = interaction == "gated"
    return LevelAnalysis(
        interaction=interaction,
        displacement={
            direction: {
                stage: summary(column(direction, level, gated=after))
                for stage, after in ((BEFORE, False), (AFTER, True))
                if column(direction, level, gated=after) in columns
            }
            for direction in DIRECTIONS
            if column(direction, level, gated=False) in columns
        },
        gates={stream: summary(f"gate_{stream}_{level}", (0.0, 1.0)) for stream in STREAMS if gated},
        proxies={name: summary(f"proxy_{name}_{level}") for name in proxy_names if gated},
    )


def _notes(levels: Mapping[str, LevelAnalysis], config: BTINetConfig, images: Images) -> list[str]:
    of_kind = {kind: [name for name, level in levels.items() if level.interaction == kind] for kind in _MISSING}
    notes = [f"{', '.join(names)}: {_MISSING[kind]}" for kind, names in of_kind.items() if names]
    if config.signals == "variance" and any(level.gates for level in levels.values()):
        notes.append("The gates compare the images of a batch with each other: another batch size gives other gates.")
    if config.directions != "both":
        notes.append(
            f"One-way interaction, {ARROWS[config.directions]}: the other stream passes; a gate of it does nothing."
        )
    if config.tasks != "both":
        notes.append(f"A network for {config.tasks} alone: the other task has no difficulty.")
    without = int(np.isnan(images.difficulty["seg"]).sum())
    if without and config.tasks != "classification":
        of = f"{without} of {len(images.labels)}"
        notes.append(f"{of} images have no lesion or no mask, so no difficulty of the segmentation.")
    for task, values in images.difficulty.items():
        n = int((~np.isnan(values)).sum())
        if n < FEW_IMAGES and config.tasks in ("both", TASKS[task]):
            notes.append(
                f"Only {n} images have a difficulty of the {TASKS[task]}: its intervals are not to be relied on."
            )
    return notes


def _figures(analysis: Analysis, columns: Mapping[str, Sequence[float]]) -> dict[str, Figure | None]:
    """File name → figure; None: there is nothing to draw."""
    levels = analysis.levels
    gated = tuple(name for name, level in levels.items() if level.gates)
    boxes = GateTable(gated, (), *(_transposed([columns[f"gate_{s}_{name}"] for name in gated]) for s in STREAMS))
    moved = {name: level.displacement for name, level in levels.items() if level.displacement}
    proposals = {
        arrow: {n: of[direction][BEFORE] for n, of in moved.items()}
        for direction, arrow in ARROWS.items()
        if any(direction in of for of in moved.values())
    }
    gates = {f"{stream} gate": {name: levels[name].gates[stream] for name in gated} for stream in STREAMS}
    return {
        "displacement.png": displacement_figure(levels) if moved else None,
        "displacement_by_difficulty.png": by_difficulty_figure(proposals, "displacement") if moved else None,
        "gates.png": gate_boxes_figure(boxes) if gated else None,
        "gates_by_difficulty.png": by_difficulty_figure(gates, "gate") if gated else None,
    }


def _transposed(values: Sequence[Sequence[float]]) -> list[list[float]]:
    return [list(row) for row in zip(*values, strict=True)]


def _row(position: int, result: ImageResult, images: Images, columns: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "image": result.sample.id,
        "label": images.labels[position] or "",
        "predicted": images.classes[int(result.probabilities.argmax())] if result.probabilities.size else None,
        "iou": None if result.scores is None else result.scores.iou,
        "target_pixels": None if result.scores is None else result.scores.target_pixels,
    }
    for task in STREAMS:
        row[f"difficulty_{task}"] = float(images.difficulty[task][position])
        row[f"tercile_{task}"] = images.terciles[task][position]
    return row | {name: values[position] for name, values in columns.items()}
