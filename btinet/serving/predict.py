"""Predictions for image files, as files."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track

from btinet.data.images import read_image
from btinet.errors import UserError
from btinet.evaluation.tables import write_csv, write_json
from btinet.files import atomic_path
from btinet.models.checkpoint import load_checkpoint
from btinet.serving.overlays import OUTLINES, draw_overlay
from btinet.serving.predictor import Precision, Prediction, Predictor, signal_columns

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
MASK_NAME = re.compile(r".+_mask(_\d+)?\.png$", re.IGNORECASE)


@dataclass(frozen=True)
class PredictOptions:
    """What to predict, and where to.

    Attributes:
        run: run folder, or its ``model.safetensors``.
        inputs: image files and folders. Folders are walked recursively; there, hidden files, masks lying
            beside their images (``*_mask.png``, ``*_mask_1.png``, ...) and everything under ``out`` are left
            out.
        out: folder for the results, made if missing.
        device: "auto", "cpu", "cuda" or "cuda:N".
        batch_size: images per forward pass.
        threshold: lesion probability above which a pixel is lesion.
        precision: "float32" or "bfloat16"; see ``Predictor``.
    """

    run: Path
    inputs: tuple[Path, ...]
    out: Path
    device: str = "auto"
    batch_size: int = 8
    threshold: float = 0.5
    precision: Precision = "float32"


def predict_files(options: PredictOptions) -> list[dict[str, Any]]:
    """Predict masks and classes of image files.

    Writes ``masks/NAME.png`` (size of the image; 0 and 255, or, for several mask classes, 0, 1, 2, … in colours) and
    ``overlays/NAME.png`` per image, then ``predictions.csv`` and ``predictions.json`` with one row per image. NAME is
    the image's path below the deepest folder that holds all inputs, so that equal names in different folders never
    meet. Every input is decoded once before anything is written: a bad file stops the command with nothing written.
    A network for one task gives what belongs to that task.

    Returns:
        The rows: image, predicted, prob_CLASS..., lesion_area_pixels, lesion_area_fraction (of any mask class),
        area_pixels_CLASS... where there are several mask classes, gates and proxies.

    Raises:
        UserError: an input is missing, unreadable or not an image, a folder holds no image, or a result
            cannot be written or would overwrite an input.
    """
    if options.batch_size < 1:
        raise UserError(f"batch size {options.batch_size}: expected at least 1.")
    if options.out.exists() and not options.out.is_dir():
        raise UserError(f"{options.out}: is a file, expected an output folder; choose another name.")
    images = find_images(options.inputs, options.out)
    names = output_names(images, options.inputs)
    _refuse_overwriting(images, names, options.out)
    predictor = Predictor(load_checkpoint(options.run), options.device, options.threshold, options.precision)
    channels = predictor.preprocessing.channels
    for path in images:
        read_image(path, channels)
    for table in ("predictions.csv", "predictions.json"):
        (options.out / table).unlink(missing_ok=True)

    rows: list[dict[str, Any]] = []
    starts = range(0, len(images), options.batch_size)
    for start in track(starts, "Predicting", console=Console(stderr=True), transient=True):
        paths = images[start : start + options.batch_size]
        pixels = [read_image(path, channels) for path in paths]
        for path, image, prediction in zip(paths, pixels, predictor(pixels), strict=True):
            if prediction.numbers is not None:
                mask = _mask_picture(prediction.numbers, len(predictor.mask_classes))
                _write_png(options.out / "masks" / names[path], mask)
                overlay = Image.fromarray(draw_overlay(image, prediction.numbers))
                _write_png(options.out / "overlays" / names[path], overlay)
            rows.append(_row(path, prediction, predictor))
    write_csv(options.out / "predictions.csv", rows, list(rows[0]))
    write_json(options.out / "predictions.json", rows)
    return rows


def find_images(inputs: Sequence[Path], out: Path) -> list[Path]:
    """List the image files that ``inputs`` name, in order and each once; see ``PredictOptions.inputs``.

    Raises:
        UserError: no input was given, one does not exist, or a folder holds no image.
    """
    if not inputs:
        raise UserError("No input: name at least one image file or folder.")
    found: dict[str, Path] = {}
    for item in inputs:
        if item.is_dir():
            images = list(_walk(item, out))
            if not images:
                raise UserError(
                    f"{item}: no image in this folder; expected files ending in {', '.join(IMAGE_SUFFIXES)}."
                )
        elif item.is_file():
            images = [item]
        else:
            raise UserError(f"{item}: no such file or folder.")
        for image in images:
            found.setdefault(os.path.abspath(image), image)
    return list(found.values())


def output_names(images: Sequence[Path], inputs: Sequence[Path]) -> dict[Path, Path]:
    """Map each image to the relative path of its results, unique and ending in ``.png``.

    Images that differ in their suffix only keep it: ``a.jpg`` and ``a.png`` give ``a.jpg.png`` and
    ``a.png.png``.

    Raises:
        UserError: two images would still share one name.
    """
    folders = [os.path.abspath(item if item.is_dir() else item.parent) for item in inputs]
    root = os.path.commonpath(folders)
    relative = {image: Path(os.path.relpath(os.path.abspath(image), root)) for image in images}
    stems = Counter(path.with_suffix("") for path in relative.values())
    names = {
        image: path.with_suffix(".png") if stems[path.with_suffix("")] == 1 else path.with_name(path.name + ".png")
        for image, path in relative.items()
    }
    taken: dict[Path, Path] = {}
    for image, name in names.items():
        if name in taken:
            raise UserError(f"{taken[name]} and {image}: both results would be named {name}; rename one of the two.")
        taken[name] = image
    return names


def _walk(folder: Path, out: Path) -> Iterator[Path]:
    skipped = {os.path.abspath(path) for path in (out, out / "masks", out / "overlays")}
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and os.path.abspath(os.path.join(parent, name)) not in skipped
        )
        for name in sorted(files):
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".") and not MASK_NAME.fullmatch(name):
                yield Path(parent, name)


def _refuse_overwriting(images: Sequence[Path], names: dict[Path, Path], out: Path) -> None:
    inputs = {os.path.realpath(image) for image in images}
    for name in names.values():
        for kind in ("masks", "overlays"):
            if os.path.realpath(out / kind / name) in inputs:
                raise UserError(
                    f"{out / kind / name}: is an input and would be overwritten; choose another output folder."
                )


def _mask_picture(numbers: np.ndarray, mask_classes: int) -> Image.Image:
    if mask_classes == 1:
        return Image.fromarray(numbers * np.uint8(255))
    picture = Image.fromarray(numbers, mode="P")
    colours = [OUTLINES[index % len(OUTLINES)] for index in range(mask_classes)]
    picture.putpalette([0, 0, 0, *(value for colour in colours for value in colour)])
    return picture


def _write_png(path: Path, picture: Image.Image) -> None:
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG")


def _row(path: Path, prediction: Prediction, predictor: Predictor) -> dict[str, Any]:
    classes, probabilities = predictor.classes, prediction.class_probabilities.tolist()
    row: dict[str, Any] = {"image": path.as_posix()}
    if probabilities:
        row["predicted"] = classes[int(prediction.class_probabilities.argmax())]
        row |= {f"prob_{name}": value for name, value in zip(classes, probabilities, strict=True)}
    numbers, names = prediction.numbers, predictor.mask_classes
    if numbers is not None:
        area = int((numbers > 0).sum())
        row |= {"lesion_area_pixels": area, "lesion_area_fraction": area / numbers.size}
        if len(names) > 1:
            row |= {f"area_pixels_{name}": int((numbers == i).sum()) for i, name in enumerate(names, start=1)}
    return row | signal_columns(prediction, predictor.proxy_names)
