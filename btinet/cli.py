"""The command line: ``btinet train | evaluate | predict | convert | demo | models | backends``.

Exit codes: 0 done, 2 the input cannot be used (one sentence on standard error), 130 interrupted.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Literal, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from btinet import __version__
from btinet.allocator import keep_pages
from btinet.errors import UserError
from btinet.training.options import TrainOptions

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
        _quiet()
        _COMMANDS[options.command](options[options.command])
    except ArgumentError as error:
        return _refuse(_in_flags(" ".join(str(error).split())))
    except UserError as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        print("btinet: interrupted; what a run had saved is in its folder.", file=sys.stderr)
        return 130
    return 0


def _refuse(sentence: str) -> int:
    print(f"btinet: error: {sentence}", file=sys.stderr)
    return 2


def _in_flags(message: str) -> str:
    """Name options as the user typed them: ``train.data`` or ``Parser key "data"`` become ``--data``."""
    pattern = rf"\b(?:{'|'.join(_COMMANDS)})\.(\w+)|Parser key \"(\w+)\""
    return re.sub(pattern, lambda match: _flag(match[1] or match[2]), message)


def _train(options: Namespace) -> None:
    from btinet.training.train import train

    values = options.as_dict()
    values.pop("config")
    train(TrainOptions(**values))


def _evaluate(options: Namespace) -> None:
    from btinet.evaluation import EvaluateOptions, evaluate_run, print_summary

    print_summary(evaluate_run(EvaluateOptions(**options.as_dict())))


def _predict(options: Namespace) -> None:
    from btinet.serving import PredictOptions, predict_files

    values = options.as_dict()
    rows = predict_files(PredictOptions(**{**values, "inputs": tuple(values["inputs"])}))
    print(f"{len(rows)} image{'s' * (len(rows) != 1)} predicted, written to {options.out}")


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
    "predict": _predict,
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
        ("predict", _predict_parser),
        ("convert", _convert_parser),
        ("demo", _demo_parser),
        ("models", _models_parser),
        ("backends", _backends_parser),
    ):
        sub = build()
        commands.add_subcommand(name, sub, help=sub.description)
    return parser


def _train_parser() -> ArgumentParser:
    parser = _sub("Train a network in two stages.")
    parser.add_argument("--config", action="config", help="YAML file of these options, e.g. a run's config.yaml.")
    hints = get_type_hints(TrainOptions)
    for option in fields(TrainOptions):
        required = option.default is MISSING
        parser.add_argument(
            _flag(option.name),
            type=hints[option.name],
            help=option.metadata["help"],
            **({"required": True} if required else {"default": option.default}),
        )
    return parser


def _evaluate_parser() -> ArgumentParser:
    parser = _sub("Score a run on the images it was not trained on.")
    parser.add_argument("run", type=Path, help="Folder of the run.")
    parser.add_argument("--data", type=Path | None, default=None, help="The data, if they moved or are others.")
    parser.add_argument("--dataset", type=str | None, default=None, help="Layout of --data; recognised without.")
    parser.add_argument(
        "--split",
        type=Literal["train", "val", "test", "all"],
        default="test",
        help="Part of the run's split, or all images.",
    )
    parser.add_argument("--out", type=Path | None, default=None, help="Results; default: inside the run.")
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
    return parser


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


def _add_device_and_batch(parser: ArgumentParser) -> None:
    parser.add_argument("--device", type=Device, default="auto", help="Where to compute.")
    parser.add_argument("--batch-size", type=int, default=8, help="Images at a time.")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _quiet() -> None:
    # Advice of libraries to their own callers, not to whoever runs this command.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(lightning|torch|timm)\..*")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(lightning|torch|timm)\..*")


if __name__ == "__main__":
    sys.exit(main())
