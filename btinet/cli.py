"""The command line: ``btinet train``, ``evaluate``, ``analyse``, ``predict``, ``ablate`` and so on.

Exit codes: 0 done, 1 ``data check`` found what should be corrected or runs of ``ablate`` failed, 2 the input cannot be
used (one sentence on standard error), 130 interrupted.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

from jsonargparse import ActionYesNo, ArgumentError, ArgumentParser, Namespace

from btinet import __version__
from btinet.allocator import keep_pages
from btinet.errors import UserError
from btinet.quiet import quiet_libraries
from btinet.training.options import CHOSEN_BY_ABLATE, TrainOptions

Device = Literal["auto", "cpu", "cuda"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    Without ``arguments`` the process is ours: the command is on its command line, and freed memory stays in it (see
    ``btinet.allocator``).
    """
    parser = _parser()
    try:
        if arguments is None:
            keep_pages()  # before a command imports torch
        options = parser.parse_args(list(sys.argv[1:] if arguments is None else arguments))
        quiet_libraries()
        return _COMMANDS[options.command](options[options.command]) or 0
    except ArgumentError as error:
        return _refuse(_in_flags(" ".join(str(error).split())))
    except UserError as error:
        return _refuse(str(error), error.details)
    except KeyboardInterrupt:
        print("btinet: interrupted; what a run had saved is in its folder.", file=sys.stderr)
        return 130


def _refuse(sentence: str, details: Sequence[str] = ()) -> int:
    for line in (f"btinet: error: {sentence}", *(f"  {detail}" for detail in details)):
        print("".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line), file=sys.stderr)
    return 2


def _in_flags(message: str) -> str:
    """Name options as the user typed them: ``train.data`` or ``Parser key "data"`` become ``--data``."""
    pattern = rf"\b(?:{'|'.join(_COMMANDS)})\.(?:check\.|split\.)?(\w+)|Parser key \"(\w+)\""
    return re.sub(pattern, lambda match: _flag(match[1] or match[2]), message)


def _train(options: Namespace) -> None:
    from btinet.training.train import resume, train

    values = options.as_dict()
    values.pop("config")
    run = values.pop("resume")
    if run is None:
        for name in ("data", "out"):
            if values[name] is None:
                raise UserError(f"train needs {_flag(name)}, or --resume with the folder of a run.")
        train(TrainOptions(**values))
        return
    defaults = {option.name: None if option.default is MISSING else option.default for option in fields(TrainOptions)}
    given = [_flag(name) for name in values if name != "extend_epochs" and values[name] != defaults[name]]
    if given:
        raise UserError(f"--resume takes the options of the run from its config.yaml; leave out {', '.join(given)}.")
    resume(run, values["extend_epochs"])


def _evaluate(options: Namespace) -> None:
    from btinet.evaluation import EvaluateOptions, evaluate_run, print_summary

    print_summary(evaluate_run(EvaluateOptions(**_with_layout(options))))


def _analyse(options: Namespace) -> None:
    from btinet.evaluation.analysis import AnalyseOptions, analyse_run, print_analysis

    print_analysis(analyse_run(AnalyseOptions(**_with_layout(options))))


def _with_layout(options: Namespace) -> dict[str, Any]:
    """The values of a command, those of the layout in one."""
    from btinet.data import LayoutOptions

    values = options.as_dict()
    of_layout = {field.name: values.pop(field.name) for field in fields(LayoutOptions)}
    return {**values, "layout_options": LayoutOptions(**of_layout)}


def _predict(options: Namespace) -> None:
    from btinet.serving import PredictOptions, predict_files

    values = options.as_dict()
    rows = predict_files(PredictOptions(**{**values, "inputs": tuple(values["inputs"])}))
    print(f"{len(rows)} image{'s' * (len(rows) != 1)} predicted, written to {options.out}")


def _ablate(options: Namespace) -> int:
    from btinet.experiments.ablation import AblateOptions, ablate

    values = options.as_dict()
    values.pop("config")
    for name in ("data", "out"):
        if values[name] is None:
            raise UserError(f"ablate needs {_flag(name)}.")
    own = {name: values.pop(name) for name in ("out", "variants", "table", "seeds", "folds", "reference")}
    failures = ablate(AblateOptions(**own, train=TrainOptions(**values, out=str(own["out"]))))
    return int(bool(failures))


def _data(options: Namespace) -> int:
    from btinet.data.commands import check_data, split_data

    command = {"check": check_data, "split": split_data}[options.command]
    return command(options[options.command].as_dict())


def _convert(options: Namespace) -> None:
    from btinet.models.convert import export_keras, import_keras

    if (options.out is None) == (options.to_keras is None):
        raise UserError(
            "convert: give either --out FOLDER, to read Keras's file, or --to-keras FILE.npz, to write one."
        )
    if options.to_keras is not None:
        if options.classes is not None or options.image_size is not None:
            raise UserError("convert: --to-keras takes classes and image size from the run; leave the options out.")
        done = export_keras(options.source, options.to_keras)
    else:
        classes = None if options.classes is None else [name.strip() for name in options.classes.split(",")]
        size = None if options.image_size is None else (options.image_size, options.image_size)
        done = import_keras(options.source, options.out, classes, size)
    height, width = done.image_size
    print(
        f"{done.variables} variables converted, classes {', '.join(done.classes)}, images {height}×{width}, "
        f"written to {done.file}"
    )


def _demo(options: Namespace) -> None:
    from btinet.demo import run_demo

    run_demo(options.out, quick=options.quick, seed=options.seed)


def _models(options: Namespace) -> None:
    from btinet.models import list_models

    names = list_models(options.pattern)
    if not names:
        raise UserError(f"models {options.pattern!r}: no timm backbone with a feature pyramid matches.")
    print("\n".join(names))


def _backends(options: Namespace) -> None:
    import btinet_kernels

    btinet_kernels.backends()


_COMMANDS = {
    "train": _train,
    "evaluate": _evaluate,
    "analyse": _analyse,
    "predict": _predict,
    "ablate": _ablate,
    "data": _data,
    "convert": _convert,
    "demo": _demo,
    "models": _models,
    "backends": _backends,
}


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="btinet",
        description="Joint segmentation and classification of medical images with decoder-level task interaction.",
        exit_on_error=False,
        version=__version__,
    )
    commands = parser.add_subcommands(dest="command", required=True)
    for name, build in (
        ("train", _train_parser),
        ("evaluate", _evaluate_parser),
        ("analyse", _analyse_parser),
        ("predict", _predict_parser),
        ("ablate", _ablate_parser),
        ("data", _data_parser),
        ("convert", _convert_parser),
        ("demo", _demo_parser),
        ("models", _models_parser),
        ("backends", _backends_parser),
    ):
        sub = build()
        commands.add_subcommand(name, sub, help=sub.description)
        if name == "data":
            _add_data_commands(sub)  # jsonargparse wants the outer command first
    return parser


def _train_parser() -> ArgumentParser:
    parser = _sub("Train a network in two stages.")
    parser.add_argument("--config", action="config", help="YAML file of these options, e.g. a run's config.yaml.")
    parser.add_argument(
        "--resume",
        type=Path | None,
        default=None,
        help="Folder of an interrupted run to continue with its own options; only --extend-epochs may be added.",
    )
    _add_train_options(parser)
    return parser


def _add_train_options(parser: ArgumentParser, leave_out: Collection[str] = ()) -> None:
    hints = get_type_hints(TrainOptions)
    for option in fields(TrainOptions):
        if option.name in leave_out:
            continue
        if hints[option.name] is bool:
            kind: dict[str, Any] = {"action": ActionYesNo(no_prefix="no-")}
        elif option.default is MISSING:
            kind = {"type": hints[option.name] | None}  # required unless --resume is given
        else:
            kind = {"type": hints[option.name]}
        default = None if option.default is MISSING else option.default
        parser.add_argument(_flag(option.name), default=default, help=option.metadata["help"], **kind)


def _evaluate_parser() -> ArgumentParser:
    parser = _sub("Score a run on the images it was not trained on.")
    _add_run_and_data(parser)
    parser.add_argument(
        "--eval-size",
        type=Literal["native", "model"],
        default="native",
        help="Score at each image's own size or at the network's.",
    )
    parser.add_argument(
        "--hd95-empty",
        type=Literal["diagonal", "inf", "exclude"],
        default="diagonal",
        help="HD95 where exactly one of the two masks is empty.",
    )
    _add_device_and_batch(parser)
    _add_precision(parser)
    return parser


def _analyse_parser() -> ArgumentParser:
    parser = _sub("Show what the interaction of a run does: displacement, gates and proxies, by difficulty.")
    _add_run_and_data(parser)
    parser.add_argument("--bootstrap", type=int, default=2000, help="Resamples behind the intervals.")
    _add_device_and_batch(parser)
    return parser


def _predict_parser() -> ArgumentParser:
    parser = _sub("Predict masks, classes and gates of new images.")
    parser.add_argument("run", type=Path, help="Folder of the run.")
    parser.add_argument("inputs", type=Path, nargs="+", help="Images, or folders of images.")
    parser.add_argument("--out", type=Path, required=True, help="Folder for masks, overlays and tables.")
    parser.add_argument(
        "--threshold", type=float, default=0.5, help="Lesion probability above which a pixel is lesion."
    )
    _add_device_and_batch(parser)
    _add_precision(parser)
    return parser


def _ablate_parser() -> ArgumentParser:
    parser = _sub("Train variants of the network over seeds and folds, and compare them.")
    parser.add_argument("--config", action="config", help="YAML file of these options.")
    parser.add_argument(
        "--out", type=Path | None, default=None, help="Folder of the ablation, new or with runs of it to continue."
    )
    parser.add_argument(
        "--variants",
        type=str | None,
        default=None,
        help="Names of variants, separated by commas; see docs/ablation.md.",
    )
    parser.add_argument(
        "--table",
        type=Literal["paper", "all"] | None,
        default=None,
        help="Instead of --variants: the six of the paper's table, the default, or every variant.",
    )
    parser.add_argument(
        "--seeds", type=int | str, default=1, help="How many, from 42 on, or which, e.g. 0,1,2; a single one as 7,."
    )
    parser.add_argument(
        "--folds", type=int | None, default=None, help="Cross-validation with this many folds; default: one split."
    )
    parser.add_argument(
        "--reference",
        type=str | None,
        default=None,
        help="The variant that the others are compared with; default: gated if it is there, else the first.",
    )
    _add_train_options(parser, leave_out=CHOSEN_BY_ABLATE)
    return parser


def _data_parser() -> ArgumentParser:
    return _sub("Check a data set, or divide it.")


def _add_data_commands(parser: ArgumentParser) -> None:
    commands = parser.add_subcommands(dest="command", required=True)
    check = _sub("Say what is wrong or suspicious in a data set, and write its manifest.json.")
    _add_data(check)
    check.add_argument("--split", type=Path | None, default=None, help="Look for leaks between the parts of this file.")
    check.add_argument("--fold", type=int | None, default=None, help="With folds in --split: the one that is tested.")
    check.add_argument("--mask-threshold", type=int | None, default=None, help="As in btinet train.")
    check.add_argument("--mask-classes", type=str | None, default=None, help="As in btinet train.")
    check.add_argument(
        "--out", type=Path | None, default=None, help="The manifest; default: manifest.json in the data's folder."
    )
    check.add_argument("--strict", action="store_true", help="Exit with 1 for warnings, too.")
    check.add_argument("--all", action="store_true", help="Print every finding instead of the first of each kind.")
    split = _sub("Write a split, or folds, for btinet train --split.")
    _add_data(split)
    split.add_argument("--out", type=Path, required=True, help="The CSV file to write.")
    split.add_argument("--folds", type=int | None, default=None, help="Cross-validation with this many folds.")
    split.add_argument("--fractions", type=float, nargs=3, default=[0.70, 0.15, 0.15], help="Of train, val and test.")
    split.add_argument("--groups", type=Path | None, default=None, help="As in btinet train.")
    split.add_argument("--seed", type=int, default=42, help="Another seed gives another split.")
    for name, sub in (("check", check), ("split", split)):
        commands.add_subcommand(name, sub, help=sub.description)


def _convert_parser() -> ArgumentParser:
    parser = _sub("Take over an official Keras checkpoint of BTI-Net, or write one's variables.")
    parser.add_argument("source", type=Path, help="Keras's .keras, .weights.h5 or .h5 file, or a run with --to-keras.")
    parser.add_argument("--out", type=Path | None, default=None, help="Folder for the converted checkpoint.")
    parser.add_argument(
        "--to-keras",
        type=Path | None,
        default=None,
        help="Write the run's weights as Keras's variables into this .npz.",
    )
    parser.add_argument(
        "--classes",
        type=str | None,
        default=None,
        help="Class names in the order of the outputs, separated by commas; default: the official data set's.",
    )
    parser.add_argument(
        "--image-size", type=int | None, default=None, help="Side of the images; default: as the file says, else 224."
    )
    return parser


def _demo_parser() -> ArgumentParser:
    parser = _sub("Train, evaluate and predict on a small real sample, and write a report.")
    parser.add_argument("--out", type=Path, default=Path("btinet-demo"), help="Folder for the run and the report.")
    parser.add_argument("--quick", action="store_true", help="Within a minute, to see that everything works.")
    parser.add_argument("--seed", type=int, default=42, help="Seed of the training.")
    return parser


def _models_parser() -> ArgumentParser:
    parser = _sub("List the names --model takes.")
    parser.add_argument("pattern", type=str, nargs="?", default="*", help="Shell pattern, e.g. '*resnet*'.")
    return parser


def _backends_parser() -> ArgumentParser:
    return _sub("Show which backend serves which operator here, and why the others do not.")


def _sub(description: str) -> ArgumentParser:
    return ArgumentParser(description=description, exit_on_error=False)


def _add_run_and_data(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="Folder of the run.")
    parser.add_argument("--data", type=Path | None, default=None, help="The data, if they moved or are others.")
    parser.add_argument("--dataset", type=str | None, default=None, help="Layout of --data; recognised without.")
    _add_layout_options(parser)
    parser.add_argument("--manifest", type=Path | None, default=None, help="manifest.json of --data.")
    parser.add_argument(
        "--split",
        type=Literal["train", "val", "test", "all"],
        default="test",
        help="Part of the run's split, or all images.",
    )
    parser.add_argument("--out", type=Path | None, default=None, help="Results; default: inside the run.")


def _add_data(parser: ArgumentParser) -> None:
    parser.add_argument("data", type=Path, help="Folder of the data set, or the CSV file.")
    parser.add_argument("--dataset", type=str, default="auto", help="Layout of the data; auto recognises it.")
    _add_layout_options(parser)


def _add_layout_options(parser: ArgumentParser) -> None:
    parser.add_argument("--curated", type=Path | None, default=None, help="BUSI: table class;id of images to keep.")
    parser.add_argument("--labels", type=Path | None, default=None, help="BUSI-WHU on Mendeley: table file,label.")
    parser.add_argument("--lesion-groups", type=Path | None, default=None, help="ISIC 2018: table image,lesion_id.")
    parser.add_argument(
        "--drop-train-duplicates-of-test",
        action="store_true",
        help="Leave out images that nearly equal one of the prescribed test images.",
    )


def _add_device_and_batch(parser: ArgumentParser) -> None:
    parser.add_argument("--device", type=Device, default="auto", help="Where to compute.")
    parser.add_argument("--batch-size", type=int, default=8, help="Images at a time.")


def _add_precision(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--precision",
        type=Literal["float32", "bfloat16"],
        default="float32",
        help="What the network computes in; bfloat16 is faster on CPUs with AVX512_BF16.",
    )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


if __name__ == "__main__":
    sys.exit(main())
