"""Reading checkpoints of Keras without Keras: ``.keras`` archives, both HDF5 layouts, and named arrays in ``.npz``."""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from btinet.data.preprocessing import IMAGENET_STD
from btinet.errors import UserError
from btinet.models.keras_names import KerasVariable, identities, layer_identities

Scales = tuple[tuple[float, ...], ...]  # of the Rescaling layers at the input, each one factor or one per channel
# Keras's EfficientNet; the second is there when it was built with weights="imagenet".
KERAS_SCALES: Scales = ((1 / 255,), tuple(1 / std**0.5 for std in IMAGENET_STD))

_HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_WEIGHTS_IN_ARCHIVE = "model.weights.h5"
_LAYERS = ("layers", "_layer_checkpoint_dependencies")  # the latter in Keras 2.12 and 2.13
_LATER_GATE = "supervised_reliability_gate"  # what the authors' later release calls uncertainty_proxy_attention


@dataclass(frozen=True)
class StoredVariable:
    """A variable in a file.

    Attributes:
        path: where the file holds it.
        identity: as ``keras_names.identities`` gives it; anything else for what the official network does not have.
        data: an array, or what h5py reads as one.
    """

    path: str
    identity: str
    data: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """As stored."""
        return tuple(self.data.shape)

    def read(self) -> np.ndarray:
        """Its values in float32; raises ``UserError`` for anything but plain numbers, and where the file is damaged."""
        if self.data.dtype.kind not in "fiu":
            raise UserError(f"{self.path}: holds {self.data.dtype}, expected float32; save the network in float32.")
        try:
            return np.asarray(self.data[()], dtype=np.float32)
        except OSError as error:
            raise UserError(f"{self.path}: could not be read ({_first_line(error)}); get the file again.") from error


@dataclass(frozen=True)
class KerasFile:
    """What a checkpoint says of a network; None where it says nothing.

    Attributes:
        variables: without those of optimizers.
        image_size: height and width of the input.
        scales: of the input.
        classes: names, in the order of the outputs; only a file of ours knows them.
    """

    variables: list[StoredVariable]
    image_size: tuple[int, int] | None = None
    scales: Scales | None = None
    classes: tuple[str, ...] | None = None


@contextmanager
def open_keras(path: Path, official: Sequence[KerasVariable]) -> Iterator[KerasFile]:
    """Open a checkpoint, whose variables can be read until the context ends.

    Args:
        path: the file; its content says what it is, not its name.
        official: the network whose variables are looked for.

    Raises:
        UserError: no such file, damaged, or of another kind; h5py is missing.
    """
    with ExitStack() as stack:
        try:
            file = _open(path, official, stack)
        except UserError:
            raise
        except (OSError, RuntimeError, ValueError, LookupError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path}: damaged or cut off ({_first_line(error)}); get the file again.") from error
        yield file


def _open(path: Path, official: Sequence[KerasVariable], stack: ExitStack) -> KerasFile:
    try:
        with path.open("rb") as stream:
            signature = stream.read(len(_HDF5_SIGNATURE))
    except OSError as error:
        raise UserError(f"{path}: could not be read ({error.strerror}); give a checkpoint of Keras.") from error
    if signature == _HDF5_SIGNATURE:
        file = stack.enter_context(_hdf5(path))
        return _read_hdf5(file, _json(file.attrs.get("model_config", "{}")), official, path)
    if not zipfile.is_zipfile(path):
        raise UserError(
            f"{path}: neither HDF5 nor an archive, or cut off; expected a .keras, .weights.h5 or .h5 file of Keras, or "
            "an .npz of its variables."
        )
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if names and all(name.endswith(".npy") for name in names):
            return _read_arrays(path, archive.comment)
        if _WEIGHTS_IN_ARCHIVE not in names:
            raise UserError(
                f"{path}: an archive without {_WEIGHTS_IN_ARCHIVE}; expected what model.save('….keras') writes."
            )
        config = _json(archive.read("config.json"))
        file = stack.enter_context(_hdf5(io.BytesIO(archive.read(_WEIGHTS_IN_ARCHIVE))))
    return _read_hdf5(file, config, official, path)


def _hdf5(source: Path | io.BytesIO) -> Any:
    try:
        import h5py
    except ImportError as error:
        raise UserError("reading checkpoints of Keras needs h5py; pip install 'btinet-kernels[convert]'.") from error
    return h5py.File(source, "r")


def _read_hdf5(file: Any, config: Mapping[str, Any], official: Sequence[KerasVariable], path: Path) -> KerasFile:
    layers = next((name for name in _LAYERS if name in file), None)
    legacy = file.get("model_weights", file)
    if layers is not None:
        variables, names = _read_layers(file[layers], official)
    elif any(name.startswith("layer_names") for name in legacy.attrs):
        variables, names = _read_legacy(legacy), list(legacy)
    else:
        raise UserError(
            f"{path}: HDF5, but not of Keras: found {', '.join(list(file)[:5]) or 'nothing'} at its root, expected "
            "layers or model_weights."
        )
    layers_of_config = config.get("config", {}).get("layers", [])
    return KerasFile(variables, _image_size(layers_of_config), _scales(names, layers_of_config, path))


def _read_layers(group: Any, official: Sequence[KerasVariable]) -> tuple[list[StoredVariable], list[str]]:
    """Keras 3, and 2.12 to 2.15: groups are called by class and order, and hold ``vars/0``, ``vars/1``, …"""
    found = _datasets(group)
    groups = {path.partition("/")[0] for path, _ in found}
    held = {name: group.get(f"{name}/vars") for name in groups}
    names = {name: of.attrs["name"] for name, of in held.items() if of is not None and "name" in of.attrs}
    if len(names) == len(groups):
        identity = layer_identities(names.values())
        layers = {name: identity[given] for name, given in names.items()}
    else:  # older versions of Keras do not write names
        layers = _official_layers(groups, official)
    identity = identities(variable.name for variable in official)
    outer = layer_identities(variable.layer for variable in official)
    by_place = {(outer[variable.layer], variable.place): identity[variable.name] for variable in official}
    variables = []
    for path, data in found:
        name, _, rest = path.partition("/")
        place = re.sub(r"(^|/)vars/(?=\d+$)", r"\1", rest)
        stored = by_place.get((layers[name], place), f"{layers[name]}/{place}")
        variables.append(StoredVariable(f"{group.name}/{path}".lstrip("/"), stored, data))
    return variables, list(group)


def _official_layers(groups: set[str], official: Sequence[KerasVariable]) -> dict[str, str]:
    """Groups of HDF5 → identities of the official layers of that class, in the official order."""
    identity = layer_identities(variable.layer for variable in official)
    by_class: dict[str, list[str]] = {}
    for variable in official:
        layers = by_class.setdefault(variable.layer_class, [])
        if identity[variable.layer] not in layers:
            layers.append(identity[variable.layer])
    result = {}
    for group in groups:
        match = re.fullmatch(r"(.+?)(?:_(\d+))?", group)
        assert match is not None
        layer_class = "uncertainty_proxy_attention" if match[1] == _LATER_GATE else match[1]
        layers, position = by_class.get(layer_class, []), int(match[2] or 0)
        result[group] = layers[position] if position < len(layers) else group
    return result


def _read_legacy(group: Any) -> list[StoredVariable]:
    """``model.save('….h5')``, and weights of Keras 2: groups are called as the layers, and hold paths of variables."""
    found = _datasets(group)
    identity = identities(path for path, _ in found)
    return [StoredVariable(f"{group.name}/{path}".lstrip("/"), identity[path], data) for path, data in found]


def _read_arrays(path: Path, comment: bytes) -> KerasFile:
    """An ``.npz`` whose names are the paths of the variables; one of ours says the rest in the archive's comment."""
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
    except ValueError as error:  # what numpy says of pickles and damaged headers
        raise UserError(f"{path}: not an .npz of plain arrays ({_first_line(error)}).") from error
    identity = identities(arrays)
    variables = [StoredVariable(name, identity[name], array) for name, array in arrays.items()]
    said = _json(comment or b"{}")
    classes, size, scales = (said.get(key) for key in ("classes", "image_size", "scales"))
    return KerasFile(
        variables,
        image_size=None if size is None else (size[0], size[1]),
        scales=None if scales is None else tuple(tuple(scale) for scale in scales),
        classes=None if classes is None else tuple(classes),
    )


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], of: KerasFile) -> None:
    """Write what ``open_keras`` reads back; to ``numpy.load`` the file holds the arrays alone.

    Args:
        path: an ``.npz`` file.
        arrays: by the paths of the variables.
        of: what else is known of the network; its variables are not looked at.
    """
    np.savez(path, **arrays)  # type: ignore[arg-type]
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = json.dumps({"classes": of.classes, "image_size": of.image_size, "scales": of.scales}).encode()


def _datasets(group: Any) -> list[tuple[str, Any]]:
    """Paths and datasets below a group."""
    found: list[tuple[str, Any]] = []

    def collect(path: str, item: Any) -> None:
        if hasattr(item, "shape"):
            found.append((path, item))

    group.visititems(collect)
    return found


def _image_size(layers: Sequence[Mapping[str, Any]]) -> tuple[int, int] | None:
    for layer in layers:
        if layer.get("class_name") == "InputLayer":
            config = layer.get("config", {})
            shape = config.get("batch_shape") or config.get("batch_input_shape") or []
            if len(shape) == 4 and isinstance(shape[1], int) and isinstance(shape[2], int):
                return shape[1], shape[2]
    return None


def _scales(names: Sequence[str], layers: Sequence[Mapping[str, Any]], path: Path) -> Scales | None:
    """By the layers without variables, which all but the oldest files list; Keras 2 has an operation for the second."""
    configs = [layer.get("config", {}) for layer in layers if layer.get("class_name") == "Rescaling"]
    for config, scale in zip(configs, KERAS_SCALES, strict=False):
        if not np.allclose(config["scale"], scale) or np.any(config.get("offset", 0)):
            raise UserError(
                f"{path}: its input is rescaled by {config['scale']}, expected {scale} without offset as in the "
                "official BTI-Net."
            )
    count = sum(re.fullmatch(r"rescaling(_\d+)?|tf_op_lambda|tf\.math\..+", name) is not None for name in names)
    return KERAS_SCALES[:count] if count in (1, 2) else None


def _json(text: Any) -> dict[str, Any]:
    content = json.loads(text)
    return content if isinstance(content, dict) else {}


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]
