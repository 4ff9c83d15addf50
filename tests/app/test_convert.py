"""`btinet convert`: every layout of file, what comes out, the way back, and what is refused."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from btinet.cli import main
from btinet.data.preprocessing import Preprocessing, default_preprocessing
from btinet.models import create_model, keras_network, load_checkpoint, save_checkpoint
from btinet.models.convert import export_keras, import_keras
from btinet.models.keras_files import KERAS_SCALES, open_keras
from btinet.models.keras_names import identities

AUTOMATIC = r"(dense|conv2d|conv2d_transpose|separable_conv2d|batch_normalization|normalization|rescaling)"


class Variable(NamedTuple):
    name: str
    keras3: str
    keras2: str
    shape: tuple[int, ...]


Variables = Sequence[Variable]
Values = Mapping[str, np.ndarray]


def renumbered(path: str, by: int) -> str:
    """The path as in a process that had made ``by`` layers of each class before."""
    return re.sub(rf"(?<![^/]){AUTOMATIC}(?:_(\d+))?(?![^/])", lambda m: f"{m[1]}_{int(m[2] or 0) + by}", path)


def put(group: h5py.Group, path: str, variable: Variable, values: Values | None) -> None:
    """One dataset; without values it takes no space."""
    if values is None:
        group.create_dataset(path, variable.shape, np.float32)
    else:
        group[path] = values[variable.name]


def write_keras3(
    file: Path | io.BytesIO,
    variables: Variables,
    values: Values | None = None,
    names: Callable[[str], str] | None = lambda name: name,
    group: Callable[[str], str] = lambda group: group,
    rescalings: int = 2,
) -> None:
    """As Keras 3 writes weights, with an optimizer's; ``names``: None writes none, as older versions do."""
    with h5py.File(file, "w") as h5:
        h5["optimizer/vars/0"] = np.array(7)
        h5["optimizer/vars/1"] = np.zeros((3, 3))
        h5.create_group("vars")
        for variable in variables:
            outer, _, inner = variable.keras3.partition("/")
            put(h5, f"layers/{group(outer)}/{inner}", variable, values)
            if names is not None:
                held = h5.require_group(f"layers/{group(outer)}/vars")
                held.attrs["name"] = names(variable.name.partition("/")[0])
        for i in range(rescalings):
            h5.create_group("layers/rescaling" + (f"_{i}" if i else "") + "/vars")


def write_keras2(file: Path, variables: Variables, root: str = "", by: int = 0) -> None:
    """As Keras 2 writes a network (``root``: model_weights) or its weights alone."""
    with h5py.File(file, "w") as h5:
        weights = h5.require_group(root) if root else h5
        weights.attrs["layer_names"] = np.array([b"input_1", b"rescaling"])
        for layer in ("input_1", "rescaling", "normalization", "tf.math.multiply", "dropout"):
            weights.require_group(layer)
        for variable in variables:
            put(weights, renumbered(variable.keras2, by), variable, None)
        if root:
            h5["optimizer_weights/Adam/iterations:0"] = np.array(7)
            h5.attrs["model_config"] = json.dumps({"config": {"layers": layer_configs(256, "batch_input_shape")}})


def layer_configs(size: int, shape_key: str = "batch_shape", scale: float = 1 / 255) -> list[dict[str, Any]]:
    return [
        {"class_name": "InputLayer", "config": {shape_key: [None, size, size, 3], "name": "input_layer"}},
        {"class_name": "Rescaling", "config": {"name": "rescaling", "scale": scale, "offset": 0.0}},
        {"class_name": "Normalization", "config": {"name": "normalization"}},
    ]


def write_archive(file: Path, weights: bytes, size: int = 224, scale: float = 1 / 255) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("metadata.json", json.dumps({"keras_version": "3.15.1"}))
        archive.writestr("config.json", json.dumps({"config": {"layers": layer_configs(size, scale=scale)}}))
        archive.writestr("model.weights.h5", weights)


def keras3_bytes(variables: Variables, values: Values | None = None, **options: Any) -> bytes:
    stream = io.BytesIO()
    write_keras3(stream, variables, values, **options)
    return stream.getvalue()


def test_the_network_has_the_official_variables_under_the_official_names(official_variables: Variables) -> None:
    with torch.device("meta"):
        ours = create_model("btinet_tf_efficientnet_b4", 3).state_dict()
    listed = keras_network.official_variables()
    assert [variable.name for variable in listed] == [variable.name for variable in official_variables]
    for mine, theirs in zip(listed[3:], official_variables[3:], strict=True):
        assert mine.keras_shape(ours[mine.ours].shape) == theirs.shape, mine
    filled = [variable.ours for variable in listed[3:]]
    assert sorted(filled) == sorted(name for name in ours if not name.endswith("num_batches_tracked"))


def backwards(variables: Variables) -> Callable[[str], str]:
    """Groups of every class in the opposite order, which only the stored names then tell apart."""
    by_class: dict[str, list[str]] = {}
    for group in dict.fromkeys(variable.keras3.partition("/")[0] for variable in variables):
        by_class.setdefault(re.sub(r"_\d+$", "", group), []).append(group)
    turned = {a: b for groups in by_class.values() for a, b in zip(groups, reversed(groups), strict=True)}
    return turned.__getitem__


@pytest.mark.parametrize(
    "layout", ["keras3", "without names", "renumbered", "backwards", "later release", "keras 2.13"]
)
def test_every_variable_is_found_in_a_file_of_keras_3(
    layout: str, official_variables: Variables, tmp_path: Path
) -> None:
    file, options = tmp_path / "m.weights.h5", {}
    match layout:
        case "without names":
            options = {"names": None, "rescalings": 0}
        case "renumbered":
            options = {"names": lambda name: renumbered(name, 17)}
        case "backwards":
            options = {"group": backwards(official_variables)}
        case "later release":
            options = {
                "names": None,
                "group": lambda group: group.replace("uncertainty_proxy_attention", "supervised_reliability_gate"),
            }
        case "keras 2.13":
            options = {"names": None}
    write_keras3(file, official_variables, **options)
    if layout == "keras 2.13":
        with h5py.File(file, "a") as h5:
            h5.move("layers", "_layer_checkpoint_dependencies")
    group = options.get("group", lambda name: name)
    expected = {}
    for variable in official_variables:
        outer, _, inner = variable.keras3.partition("/")
        expected[variable.name] = f"{group(outer)}/{inner}"
    assert places(file, official_variables) == expected
    with open_keras(file, keras_network.official_variables()) as opened:
        assert opened.scales == (None if layout == "without names" else KERAS_SCALES)


@pytest.mark.parametrize("root", ["", "model_weights"])
@pytest.mark.parametrize("by", [0, 17])
def test_every_variable_is_found_in_a_file_of_keras_2(
    root: str, by: int, official_variables: Variables, tmp_path: Path
) -> None:
    write_keras2(tmp_path / "m.h5", official_variables, root, by)
    expected = {variable.name: renumbered(variable.keras2, by) for variable in official_variables}
    assert places(tmp_path / "m.h5", official_variables) == expected
    with open_keras(tmp_path / "m.h5", keras_network.official_variables()) as opened:
        assert opened.scales == KERAS_SCALES
        assert opened.image_size == ((256, 256) if root else None)


def places(file: Path, variables: Variables) -> dict[str, str]:
    """Official variable → path in the file, below the group of all layers."""
    names = {identity: name for name, identity in identities(variable.name for variable in variables).items()}
    with open_keras(file, keras_network.official_variables()) as opened:
        return {
            names[held.identity]: re.sub(r"^(layers|_layer_checkpoint_dependencies|model_weights)/", "", held.path)
            for held in opened.variables
        }


def btinet(*arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "btinet.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def converted(official_variables: Variables, official_values: Values, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run converted from a ``.keras`` archive of 256×256 images, built without ImageNet weights."""
    folder = tmp_path_factory.mktemp("converted")
    write_archive(folder / "m.keras", keras3_bytes(official_variables, official_values, rescalings=1), size=256)
    told = btinet("convert", folder / "m.keras", "--out", folder / "run")
    assert "1068 variables" in told
    assert "benign, malignant, normal" in told
    (folder / "m.keras").unlink()
    return folder / "run"


def test_the_converted_checkpoint_holds_the_official_numbers(converted: Path, official_values: Values) -> None:
    checkpoint = load_checkpoint(converted)
    assert checkpoint.classes == ("benign", "malignant", "normal")
    assert checkpoint.config["model"]["backbone"] == "tf_efficientnet_b4"
    state = {name: value.numpy() for name, value in checkpoint.model.state_dict().items()}
    v = official_values
    np.testing.assert_array_equal(state["encoder.conv_stem.weight"][5, 2, 0, 1], v["stem_conv/kernel"][0, 1, 2, 5])
    depthwise = v["block3c_dwconv/kernel"]
    np.testing.assert_array_equal(state["encoder.blocks.2.2.conv_dw.weight"][7, 0], depthwise[:, :, 7, 0])
    transposed = v["conv2d_transpose_1/kernel"]
    np.testing.assert_array_equal(state["levels.d2.upsample.weight"][11, 3], transposed[:, :, 3, 11])
    np.testing.assert_array_equal(state["clf_head.0.weight"], v["dense_44/kernel"].T)
    np.testing.assert_array_equal(state["clf_head.2.running_var"], v["batch_normalization_4/moving_variance"])
    assert all(value.dtype == np.float32 for name, value in state.items() if "tracked" not in name)


def test_the_images_are_prepared_as_keras_does(converted: Path, official_values: Values) -> None:
    preprocessing = load_checkpoint(converted).preprocessing
    assert preprocessing.image_size == (256, 256)
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3, 1)[:, :, None]
    x = pixels.double() / 255 / 255
    mean, variance = (torch.tensor(official_values[f"normalization/{n}"]).view(3, 1, 1) for n in ("mean", "variance"))
    torch.testing.assert_close(preprocessing.normalise(pixels), ((x - mean) / variance.sqrt()).float())


@pytest.mark.slow
def test_predict_takes_the_converted_checkpoint(converted: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    btinet("predict", converted, tmp_path / "image.png", "--out", tmp_path / "out", "--device", "cpu")
    (row,) = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert sum(row[f"prob_{name}"] for name in ("benign", "malignant", "normal")) == pytest.approx(1, abs=1e-5)
    assert 0 < row["gate_seg_d1"] < 1


@pytest.mark.slow
def test_there_and_back_is_the_same_to_the_bit(
    converted: Path, official_variables: Variables, official_values: Values, tmp_path: Path
) -> None:
    assert main(["convert", str(converted), "--to-keras", str(tmp_path / "back.npz")]) == 0
    with np.load(tmp_path / "back.npz") as back:
        assert back.files == [variable.name for variable in official_variables]
        for variable in official_variables:
            assert back[variable.name].shape == variable.shape
            np.testing.assert_array_equal(back[variable.name], official_values[variable.name])
    assert main(["convert", str(tmp_path / "back.npz"), "--out", str(tmp_path / "again")]) == 0
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (converted / name).read_bytes()


@pytest.mark.slow
def test_a_network_of_ours_sees_the_same_in_keras(converted: Path, tmp_path: Path) -> None:
    """Its normalisation of pixels in [0, 255] becomes one of pixels that were divided by 255 twice."""
    ours = default_preprocessing((160, 224), 3)
    run = tmp_path / "run"
    save_checkpoint(run, load_checkpoint(converted).model, ("x", "y", "z"), ours)
    export_keras(run, tmp_path / "keras.npz")
    with np.load(tmp_path / "keras.npz") as file:
        mean, variance = (torch.tensor(file[f"normalization/{name}"]).view(3, 1, 1) for name in ("mean", "variance"))
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3, 1)[:, :, None]
    scale = torch.tensor(KERAS_SCALES[1], dtype=torch.float64).view(3, 1, 1)
    theirs = (pixels.double() / 255 / 255 - mean) / variance.double().sqrt() * scale
    torch.testing.assert_close(theirs.float(), ours.normalise(pixels), rtol=1e-5, atol=1e-5)

    again = import_keras(tmp_path / "keras.npz", tmp_path / "again")
    assert (again.classes, again.image_size) == (("x", "y", "z"), (160, 224))
    preprocessing = load_checkpoint(tmp_path / "again").preprocessing
    torch.testing.assert_close(preprocessing.normalise(pixels), ours.normalise(pixels), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("mean", "std"), [(0.0, (1.0, 1.0, 1.0)), (0.485, (0.229**0.5, 0.224**0.5, 0.225**0.5))])
def test_files_that_do_not_say_how_the_encoder_was_built(
    mean: float, std: tuple[float, ...], official_variables: Variables, tmp_path: Path
) -> None:
    """Only ImageNet weights bring a normalisation and with it the second rescaling."""
    write_keras3(tmp_path / "m.weights.h5", official_variables, names=None, rescalings=0)
    with h5py.File(tmp_path / "m.weights.h5", "a") as h5:
        h5["layers/normalization/vars/0"][:] = mean
        h5["layers/normalization/vars/1"][:] = 1
    import_keras(tmp_path / "m.weights.h5", tmp_path / "run")
    preprocessing = json.loads((tmp_path / "run" / "config.json").read_text())["preprocessing"]
    assert preprocessing["mean"] == pytest.approx([mean] * 3)
    assert preprocessing["std"] == pytest.approx(std)


Refused = Callable[..., list[str]]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run `btinet convert` and check that it refuses in one sentence; returns the lines that follow it."""

    def run(*arguments: object, words: Sequence[str]) -> list[str]:
        assert main(["convert", *map(str, arguments)]) == 2
        sentence, *rest = capsys.readouterr().err.strip().splitlines()
        assert sentence.startswith("btinet: error: ")
        for word in words:
            assert word in sentence
        return rest

    return run


def changed(variables: Variables, name: str, **fields: Any) -> list[Variable]:
    return [Variable(*v)._replace(**fields) if v.name == name else v for v in variables]


def test_what_is_missing_left_over_or_of_another_shape_is_listed(
    official_variables: Variables, tmp_path: Path, refused: Refused
) -> None:
    file = tmp_path / "m.weights.h5"
    variables = [v for v in official_variables if v.name != "conv2d_transpose_2/kernel"]
    variables = changed(variables, "bti_res_s3/bti_res_s3_conv1/pointwise_kernel", shape=(1, 1, 336, 335))
    write_keras3(file, [*variables, Variable("squeeze/kernel", "dense_99/vars/0", "", (4, 5))])
    lines = refused(file, "--out", tmp_path / "run", words=["m.weights.h5", "1 missing, 1 unexpected, 1 misshapen"])
    assert len(lines) == 3
    assert "conv2d_transpose_2/kernel [3, 3, 96, 192] → levels.d3.upsample.weight" in lines[0]
    assert "layers/dense_99/vars/0 [4, 5]" in lines[1]
    place = next(v.keras3 for v in variables if v.name == "bti_res_s3/bti_res_s3_conv1/pointwise_kernel")
    assert f"layers/{place} [1, 1, 336, 335], expected [1, 1, 336, 336]" in lines[2]
    assert "refine.2.conv1.pointwise.weight" in lines[2]
    assert not (tmp_path / "run").exists()


def test_another_network_is_refused(tmp_path: Path, refused: Refused) -> None:
    stream = io.BytesIO()
    with h5py.File(stream, "w") as h5:
        for i in range(30):
            h5[f"layers/dense_{i}/vars/0"] = np.zeros((4, 4), np.float32)
    write_archive(tmp_path / "other.keras", stream.getvalue())
    lines = refused(tmp_path / "other.keras", "--out", tmp_path / "run", words=["another network", "missing"])
    assert len(lines) <= 33
    assert any("more" in line for line in lines)


def test_a_variable_that_is_there_twice_is_refused(
    official_variables: Variables, tmp_path: Path, refused: Refused
) -> None:
    """Two layers with the same name, as when files were merged."""
    variables = [*official_variables, Variable("stem_bn/gamma", "batch_normalization_500/vars/0", "", (48,))]
    write_keras3(tmp_path / "m.weights.h5", variables)
    lines = refused(tmp_path / "m.weights.h5", "--out", tmp_path / "run", words=["0 missing, 1 unexpected"])
    assert "batch_normalization" in lines[0]


@pytest.fixture(scope="module")
def sparse(official_variables: Variables) -> bytes:
    """Weights without values."""
    return keras3_bytes(official_variables)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("absent", ["No such file"]),
        ("folder", ["Is a directory"]),
        ("text", ["neither HDF5 nor an archive"]),
        ("empty", ["neither HDF5 nor an archive"]),
        ("cut h5", ["damaged or cut off"]),
        ("cut archive", ["neither HDF5 nor an archive, or cut off"]),
        ("cut inside the archive", ["damaged or cut off"]),
        ("archive without config", ["damaged or cut off", "config.json"]),
        ("other archive", ["model.weights.h5"]),
        ("other h5", ["HDF5, but not of Keras", "images"]),
        ("pickle", ["plain arrays"]),
        ("other scale", ["rescaled by 1.0"]),
        ("small", ["96×96", "128"]),
    ],
)
def test_files_that_cannot_be_used(
    kind: str, words: list[str], sparse: bytes, tmp_path: Path, refused: Refused
) -> None:
    file = tmp_path / "file"
    match kind:
        case "folder":
            file.mkdir()
        case "text":
            file.write_text("version https://git-lfs.github.com/spec/v1\n")
        case "empty":
            file.touch()
        case "cut h5":
            file.write_bytes(sparse[: len(sparse) // 2])
        case "cut archive":
            write_archive(file, sparse)
            file.write_bytes(file.read_bytes()[:-100])
        case "cut inside the archive":
            write_archive(file, sparse[: len(sparse) // 2])
        case "archive without config":
            with zipfile.ZipFile(file, "w") as archive:
                archive.writestr("model.weights.h5", sparse)
        case "other archive":
            with zipfile.ZipFile(file, "w") as archive:
                archive.writestr("word/document.xml", "")
        case "other h5":
            with h5py.File(file, "w") as h5:
                h5["images"] = np.zeros(3)
        case "pickle":
            np.savez(tmp_path / "x.npz", a=np.array([{}], dtype=object))
            (tmp_path / "x.npz").rename(file)
        case "other scale":
            write_archive(file, sparse, scale=1.0)
        case "small":
            write_archive(file, sparse, size=96)
    assert refused(file, "--out", tmp_path / "run", words=["file", *words]) == []
    assert not (tmp_path / "run").exists()


def test_numbers_that_are_not_plain_are_refused(
    tmp_path: Path, official_variables: Variables, refused: Refused
) -> None:
    write_keras3(tmp_path / "m.weights.h5", official_variables)
    with h5py.File(tmp_path / "m.weights.h5", "a") as h5:
        del h5["layers/dense/vars/1"]
        h5.create_dataset("layers/dense/vars/1", (256,), np.dtype("V2"))  # how h5py stores bfloat16
    words = ["layers/dense/vars/1", "expected float32"]
    assert refused(tmp_path / "m.weights.h5", "--out", tmp_path / "run", words=words) == []


def test_classes(tmp_path: Path, official_variables: Variables, refused: Refused) -> None:
    variables = changed(official_variables, "classification_output/kernel", shape=(256, 5))
    variables = changed(variables, "classification_output/bias", shape=(5,))
    file = tmp_path / "m.weights.h5"
    write_keras3(file, variables)
    out = ("--out", tmp_path / "run")
    refused(file, *out, words=["5 classes", "--classes"])
    refused(file, *out, "--classes", "a,b,c", words=["--classes a,b,c", "3", "5"])
    refused(file, *out, "--classes", "a,b,c,d,a", words=["5 different"])
    assert main(["convert", str(file), "--out", str(tmp_path / "run"), "--classes", "a, b,c,d,e"]) == 0
    checkpoint = load_checkpoint(tmp_path / "run")
    assert checkpoint.classes == tuple("abcde")
    assert checkpoint.preprocessing.image_size == (224, 224)
    refused(file, *out, "--classes", "a,b,c,d,e", words=["holds model.safetensors already"])


def test_arguments_that_do_not_go_together(tmp_path: Path, refused: Refused) -> None:
    refused(tmp_path, words=["--out", "--to-keras"])
    refused(tmp_path, "--out", tmp_path / "a", "--to-keras", tmp_path / "b.npz", words=["either"])
    refused(tmp_path, "--to-keras", tmp_path / "b.npz", "--classes", "a,b", words=["leave the options out"])
    refused(tmp_path, "--to-keras", tmp_path / "b.h5", words=[".npz"])


def test_networks_without_a_counterpart_are_not_exported(tmp_path: Path, refused: Refused) -> None:
    model = create_model("btinet_mobilenetv3_small_050", 2, interaction="fixed")
    save_checkpoint(tmp_path, model, ("a", "b"), Preprocessing((32, 32), 3, 1.0, (0.0,) * 3, (1.0,) * 3))
    words = ["backbone is 'mobilenetv3_small_050', not 'tf_efficientnet_b4'", "interaction is 'fixed', not 'gated'"]
    refused(tmp_path, "--to-keras", tmp_path / "x.npz", words=words)
    assert not (tmp_path / "x.npz").exists()


def test_without_h5py(tmp_path: Path, sparse: bytes, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.h5").write_bytes(sparse)
    monkeypatch.setitem(sys.modules, "h5py", None)
    refused(tmp_path / "m.h5", "--out", tmp_path / "run", words=["h5py", "pip install 'btinet-kernels[convert]'"])
