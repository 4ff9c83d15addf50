"""Checkpoints of the official Keras BTI-Net to ours, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from btinet.data.preprocessing import Preprocessing
from btinet.errors import UserError
from btinet.files import atomic_path
from btinet.models.checkpoint import CONFIG_NAME, WEIGHTS_NAME, load_checkpoint, save_checkpoint
from btinet.models.factory import build_model
from btinet.models.keras_files import KERAS_SCALES, KerasFile, Scales, StoredVariable, open_keras, write_arrays
from btinet.models.keras_names import KerasVariable, identities
from btinet.models.keras_network import BACKBONE, official_variables
from btinet.models.network import OFFICIAL_DECODER_CHANNELS, BTINetConfig

# Of the official data sets, which their number tells apart: BUSI, BRISC, HAM10000.
OFFICIAL_CLASSES = {
    3: ("benign", "malignant", "normal"),
    4: ("glioma", "meningioma", "pituitary", "no_tumor"),
    7: ("mel", "nv", "bcc", "akiec", "bkl", "df", "vasc"),
}
_INPUT_SHAPES = {"normalization/mean": (3,), "normalization/variance": (3,), "normalization/count": ()}
_OUTPUT = "classification_output/kernel"
_LOADER_SCALE = 1 / 255  # of the official loaders; the network scales once more
_SMALLEST_DEVIATION = 1e-7  # Keras's Normalization divides by no less
_DEFAULT_SIZE = (224, 224)
_SMALLEST_SIDE = 128  # the official gate leaves out the energy of maps with less than 8 rows, here the coarsest level's
_SCALES_KEY = "keras_scales"  # in config.json
_LISTED = 10


@dataclass(frozen=True)
class Conversion:
    """What was converted.

    Attributes:
        file: the folder or file written.
        variables: number of Keras variables.
        classes: names, in the order of the outputs.
        image_size: height and width of the input.
    """

    file: Path
    variables: int
    classes: tuple[str, ...]
    image_size: tuple[int, int]


def import_keras(
    file: Path, out: Path, classes: Sequence[str] | None = None, image_size: tuple[int, int] | None = None
) -> Conversion:
    """Turn an official checkpoint into one of ours, which sees images as the official loaders and network do.

    Args:
        file: ``.keras``, ``.weights.h5``, ``.h5``, or ``.npz`` as ``export_keras`` writes it.
        out: folder for ``model.safetensors`` and ``config.json``.
        classes: names in the order of the outputs; default: those in the file, else of the official data set with as
            many.
        image_size: height and width; default: as the file says, else 224×224.

    Raises:
        UserError: the file cannot be read or holds another network, class names or size do not fit, or ``out`` holds a
            checkpoint already.
    """
    for name in (WEIGHTS_NAME, CONFIG_NAME):
        if (out / name).exists():
            raise UserError(f"--out {out}: holds {name} already; choose another folder.")
    official = official_variables()
    with open_keras(file, official) as stored:
        count = next((v.shape[-1] for v in stored.variables if v.identity.endswith(_OUTPUT) and v.shape), 3)
        with torch.device("meta"):  # every weight comes from the file
            model = build_model(BTINetConfig(BACKBONE, count))
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        values = {v.name: held.read() for v, held in _matched(stored, official, shapes, file)}
    names = _class_names(classes or stored.classes, count, file)
    size = image_size or stored.image_size or _DEFAULT_SIZE
    if min(size) < _SMALLEST_SIDE:
        raise UserError(
            f"{file}: its images are {size[0]}×{size[1]}, where the official gates work differently; "
            f"expected sides of at least {_SMALLEST_SIDE} pixels."
        )
    mean, variance = values["normalization/mean"], values["normalization/variance"]
    scales = stored.scales or _usual_scales(mean, variance)
    preprocessing = _preprocessing(mean, variance, scales, size)
    state = {v.ours: torch.from_numpy(v.to_ours(values[v.name], shapes[v.ours])) for v in official if v.ours}
    counters = {name: torch.tensor(0) for name in shapes if name.endswith("num_batches_tracked")}  # Keras has none
    model.load_state_dict(state | counters, assign=True)
    save_checkpoint(out, model, names, preprocessing, extra={_SCALES_KEY: scales})
    return Conversion(out, len(official), names, size)


def export_keras(run: Path, file: Path) -> Conversion:
    """Write the weights of a checkpoint as the variables of the official network, in the order of ``model.weights``.

    Its normalisation variables are chosen so that the official network on images in [0, 1] sees what ours does.

    Args:
        run: run folder, or its ``model.safetensors``.
        file: ``.npz`` with one array per variable, named by its path in Keras.

    Raises:
        UserError: the run cannot be read, its network is not the official one, or the file cannot be written.
    """
    if file.suffix != ".npz":
        raise UserError(f"--to-keras {file}: expected the name of an .npz file.")
    checkpoint = load_checkpoint(run)
    model, preprocessing = checkpoint.model, checkpoint.preprocessing
    _require_official(run, model.config)
    scales: Scales = tuple(tuple(scale) for scale in checkpoint.config.get(_SCALES_KEY, KERAS_SCALES))
    arrays = _normalisation(preprocessing, scales)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    official = official_variables()
    arrays |= {v.name: v.to_keras(state[v.ours]) for v in official if v.ours}
    ordered = {variable.name: arrays[variable.name] for variable in official}
    about = KerasFile([], preprocessing.image_size, scales, checkpoint.classes)
    with atomic_path(file) as temporary:
        write_arrays(temporary, ordered, about)
    return Conversion(file, len(ordered), checkpoint.classes, preprocessing.image_size)


def _matched(
    stored: KerasFile, official: Sequence[KerasVariable], ours: Mapping[str, tuple[int, ...]], file: Path
) -> list[tuple[KerasVariable, StoredVariable]]:
    """Every official variable with the stored one; raises ``UserError`` unless they are the same, one by one."""
    shapes = {v.name: v.keras_shape(ours[v.ours] if v.ours else _INPUT_SHAPES[v.name]) for v in official}
    identity = identities(shapes)
    found: dict[str, StoredVariable] = {}
    unexpected = []
    known = set(identity.values())
    for held in stored.variables:
        if held.identity in known and held.identity not in found:
            found[held.identity] = held
        else:
            unexpected.append(f"{held.path} {list(held.shape)}")
    missing, misshapen, pairs = [], [], []
    for variable in official:
        match, shape = found.get(identity[variable.name]), list(shapes[variable.name])
        place = variable.ours or "preprocessing"
        if match is None:
            missing.append(f"{variable.name} {shape} → {place}")
        elif list(match.shape) != shape:
            misshapen.append(f"{match.path} {list(match.shape)}, expected {shape} → {place}")
        else:
            pairs.append((variable, match))
    if missing or unexpected or misshapen:
        raise _difference(file, {"missing": missing, "unexpected": unexpected, "misshapen": misshapen})
    return pairs


def _difference(file: Path, groups: Mapping[str, Sequence[str]]) -> UserError:
    """One sentence, then the variables concerned, by their path in Keras and, after the arrow, with us."""
    counts = ", ".join(f"{len(lines)} {kind}" for kind, lines in groups.items())
    details = []
    for kind, lines in groups.items():
        details += [f"{kind:<10}  {line}" for line in lines[:_LISTED]]
        if len(lines) > _LISTED:
            details.append(f"{kind:<10}  … and {len(lines) - _LISTED} more")
    return UserError(
        f"{file}: holds another network than the official BTI-Net with EfficientNet-B4; of its variables {counts}.",
        details,
    )


def _class_names(given: Sequence[str] | None, count: int, file: Path) -> tuple[str, ...]:
    names = tuple(given) if given is not None else OFFICIAL_CLASSES.get(count, ())
    if not names:
        raise UserError(f"{file}: has {count} classes, as no official data set has; name them with --classes a,b,….")
    if len(names) != count or len(set(names)) != count or not all(names):
        raise UserError(f"--classes {','.join(names)}: found {len(names)} names, expected {count} different ones.")
    return names


def _usual_scales(mean: np.ndarray, variance: np.ndarray) -> Scales:
    """For files that do not say: only without ImageNet weights does Keras leave the normalisation as it makes it."""
    untouched = not mean.any() and (variance == 1).all()
    return KERAS_SCALES[:1] if untouched else KERAS_SCALES


def _preprocessing(
    mean: np.ndarray, variance: np.ndarray, scales: Scales, image_size: tuple[int, int]
) -> Preprocessing:
    """((pixel · loader's scale · network's scale) − mean) / √variance · the second scale, as one normalisation."""
    deviation = np.maximum(np.sqrt(variance.astype(np.float64)), _SMALLEST_DEVIATION)
    std = deviation / (np.array(scales[1]) if len(scales) > 1 else 1)
    return Preprocessing(
        image_size=image_size,
        channels=3,
        scale=_LOADER_SCALE * scales[0][0],
        mean=tuple(mean.astype(np.float64).tolist()),
        std=tuple(std.tolist()),
    )


def _normalisation(preprocessing: Preprocessing, scales: Scales) -> dict[str, np.ndarray]:
    """The inverse of ``_preprocessing``, for any scale of the pixels."""
    factor = _LOADER_SCALE * scales[0][0] / preprocessing.scale
    deviation = np.array(preprocessing.std) * factor * (np.array(scales[1]) if len(scales) > 1 else 1)
    return {
        "normalization/mean": (np.array(preprocessing.mean) * factor).astype(np.float32),
        "normalization/variance": (deviation**2).astype(np.float32),
        "normalization/count": np.array(0),
    }


def _require_official(run: Path, config: BTINetConfig) -> None:
    official = asdict(BTINetConfig(BACKBONE, config.num_classes, dropout=config.dropout))
    given = asdict(config)
    if given["decoder_channels"] == OFFICIAL_DECODER_CHANNELS:
        given["decoder_channels"] = None
    other = [f"{key} is {value!r}, not {official[key]!r}" for key, value in given.items() if value != official[key]]
    if other:
        raise UserError(f"{run}: its network has no counterpart in Keras: {'; '.join(other)}.")
