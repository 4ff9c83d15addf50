"""A converted network against the official one, evaluated in numpy from what Keras says its layers compute."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from btinet.models import create_model, load_checkpoint
from btinet.models.convert import import_keras
from btinet.models.keras_files import KERAS_SCALES, KerasFile, open_keras, write_arrays
from btinet.models.keras_names import identities
from btinet.models.keras_network import official_variables

Values = dict[str, np.ndarray]
SIZE = 128  # the coarsest decoder level then has 8 rows, the fewest whose energy the official gate looks at


def padded(x: np.ndarray, width: int, stride: int, dilation: int) -> np.ndarray:
    """Keras's padding "same": what is left over goes to the end."""
    pads = []
    for size in x.shape[1:3]:
        total = max((-(-size // stride) - 1) * stride + (width - 1) * dilation + 1 - size, 0)
        pads.append((total // 2, total - total // 2))
    return np.pad(x, [(0, 0), *pads, (0, 0)])


def windows(x: np.ndarray, width: int, stride: int, dilation: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """The pixels that each entry of the kernel meets, ``[B, H, W, C]``."""
    height, breadth = (-(-size // stride) for size in x.shape[1:3])
    x = padded(x, width, stride, dilation)
    for i in range(width):
        for j in range(width):
            rows, columns = (
                slice(k * dilation, k * dilation + n * stride, stride) for k, n in ((i, height), (j, breadth))
            )
            yield i, j, x[:, rows, columns][:, :height, :breadth]


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def swish(x: np.ndarray) -> np.ndarray:
    return x * sigmoid(x)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


class Official:
    """The layers, by the names of their variables; images and maps are ``[B, H, W, C]``."""

    def __init__(self, values: Values) -> None:
        self.values = values

    def nth(self, scope: str, layer_class: str, position: int) -> str:
        """The layer that Keras named, in order of creation."""
        pattern = re.compile(rf"({re.escape(scope)}/?{layer_class}(?:_(\d+))?)/[^/]+")
        found = {match[1]: int(match[2] or 0) for match in map(pattern.fullmatch, self.values) if match}
        return sorted(found, key=found.__getitem__)[position]

    def variable(self, name: str) -> np.ndarray:
        return self.values[name].astype(np.float64)

    def conv(self, name: str, x: np.ndarray, stride: int = 1) -> np.ndarray:
        kernel = self.variable(f"{name}/kernel")
        out = sum(w @ kernel[i, j] for i, j, w in windows(x, kernel.shape[0], stride, 1))
        return out + (self.variable(f"{name}/bias") if f"{name}/bias" in self.values else 0)

    def depthwise(self, kernel: np.ndarray, x: np.ndarray, stride: int = 1, dilation: int = 1) -> np.ndarray:
        return sum(w * kernel[i, j, :, 0] for i, j, w in windows(x, kernel.shape[0], stride, dilation))

    def separable(self, name: str, x: np.ndarray, dilation: int = 1) -> np.ndarray:
        x = self.depthwise(self.variable(f"{name}/depthwise_kernel"), x, dilation=dilation)
        return x @ self.variable(f"{name}/pointwise_kernel")[0, 0] + self.variable(f"{name}/bias")

    def transposed(self, name: str, x: np.ndarray) -> np.ndarray:
        """Every pixel adds its multiple of the kernel at twice its place; "same" keeps the first 2n of 2n + 1."""
        kernel = self.variable(f"{name}/kernel")  # [3, 3, out, in]
        batch, height, width, _ = x.shape
        out = np.zeros((batch, 2 * height + 1, 2 * width + 1, kernel.shape[2]))
        for i in range(3):
            for j in range(3):
                out[:, i : i + 2 * height : 2, j : j + 2 * width : 2] += x @ kernel[i, j].T
        return out[:, : 2 * height, : 2 * width] + self.variable(f"{name}/bias")

    def dense(self, name: str, x: np.ndarray) -> np.ndarray:
        bias = self.variable(f"{name}/bias") if f"{name}/bias" in self.values else 0
        return x @ self.variable(f"{name}/kernel") + bias

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        gamma, beta, mean, variance = (
            self.variable(f"{name}/{v}") for v in ("gamma", "beta", "moving_mean", "moving_variance")
        )
        return (x - mean) / np.sqrt(variance + 1e-3) * gamma + beta

    def inverted_residual(self, name: str, x: np.ndarray, stride: int) -> tuple[np.ndarray, np.ndarray]:
        """The block's output, and its map after the expansion."""
        expanded = x
        if f"{name}_expand_conv/kernel" in self.values:
            expanded = swish(self.norm(f"{name}_expand_bn", self.conv(f"{name}_expand_conv", x)))
        out = self.depthwise(self.variable(f"{name}_dwconv/kernel"), expanded, stride)
        out = swish(self.norm(f"{name}_bn", out))
        squeezed = swish(self.conv(f"{name}_se_reduce", out.mean((1, 2), keepdims=True)))
        out = out * sigmoid(self.conv(f"{name}_se_expand", squeezed))
        out = self.norm(f"{name}_project_bn", self.conv(f"{name}_project_conv", out))
        return (x + out if out.shape == x.shape else out), expanded

    def encoder(self, image: np.ndarray, rescaling: np.ndarray) -> list[np.ndarray]:
        """``image`` in [0, 1]; the maps of stride 2, 4, 8, 16 and 32."""
        variance = self.variable("normalization/variance")
        x = (image / 255 - self.variable("normalization/mean")) / np.sqrt(variance) * rescaling
        x = swish(self.norm("stem_bn", self.conv("stem_conv", x, stride=2)))
        taps = []
        for stage, (blocks, stride) in enumerate(zip((2, 4, 4, 6, 6, 8, 2), (1, 2, 2, 2, 1, 2, 1), strict=True), 1):
            for letter in "abcdefgh"[:blocks]:
                x, expanded = self.inverted_residual(f"block{stage}{letter}", x, stride if letter == "a" else 1)
                if letter == "a" and stride == 2:
                    taps.append(expanded)
        return [*taps, swish(self.norm("top_bn", self.conv("top_conv", x)))]

    def squeeze(self, scope: str, x: np.ndarray) -> np.ndarray:
        """Means of a map, a dense layer with ReLU, a dense layer."""
        hidden = relu(self.dense(self.nth(scope, "dense", 0), x.mean((1, 2))))
        return self.dense(self.nth(scope, "dense", 1), hidden)[:, None, None]

    def residual(self, name: str, x: np.ndarray) -> np.ndarray:
        path = f"{name}/{name}"
        out = self.norm(f"{path}_bn1", relu(self.separable(f"{path}_conv1", x)))
        out = self.norm(f"{path}_bn2", self.separable(f"{path}_conv2", out))
        scales, dual = f"{path}_multiscale/{name}_multiscale", f"{path}_attention/{name}_attention"
        shares = softmax(self.squeeze(f"{scales}_scale_attention", out))
        parts = [self.separable(f"{scales}_sep_conv_{dilation}", out, dilation) for dilation in (1, 2, 4)]
        out = self.conv(f"{scales}_fusion", sum(part * shares[..., [i]] for i, part in enumerate(parts)))
        if f"{dual}_spatial/kernel" in self.values:
            channels = sigmoid(self.squeeze(f"{dual}_channel_path", out))
            extremes = np.stack((out.max(-1), out.mean(-1)), -1)
            out = out * channels * sigmoid(self.conv(f"{dual}_spatial", extremes))
        if f"{path}_proj/kernel" in self.values:
            x = self.conv(f"{path}_proj", x)
        return relu(out + x)

    def attention_gate(self, name: str, x: np.ndarray, g: np.ndarray) -> np.ndarray:
        path = f"{name}/{name}"
        out = relu(self.conv(f"{path}_x_transform", x) + self.conv(f"{path}_g_transform", g))
        out = self.separable(self.nth(f"{path}_context_attention", "separable_conv2d", 0), out)
        out = self.separable(self.nth(f"{path}_context_attention", "separable_conv2d", 1), out, dilation=2)
        return x * sigmoid(self.conv(self.nth(f"{path}_context_attention", "conv2d", 0), out))

    def interaction(self, level: str, seg: np.ndarray, clf: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Both streams after the interaction and its gate, and the gate ``[B, 2]``."""
        path = f"task_interaction_{level}/task_interaction_{level}"
        there = f"{path}_seg_to_clf"
        context = relu(self.conv(self.nth(there, "conv2d", 0), seg)).mean((1, 2))
        context = relu(self.dense(self.nth(there, "dense", 0), context))
        context = self.norm(self.nth(there, "batch_normalization", 0), context)
        clf_enhanced = clf + sigmoid(self.dense(f"{path}_clf_gate", context)) * context
        back = sigmoid(self.dense(self.nth(f"{path}_clf_to_seg", "dense", 0), clf))
        share = sigmoid(self.dense(f"{path}_seg_gate", seg.mean((1, 2))))
        seg_enhanced = seg * (1 + 0.7 * share * back)[:, None, None]

        gate = f"upa_{level}/upa_{level}"
        directions = [
            self.dense(f"{gate}_sp", (seg_enhanced - seg).mean((1, 2))),
            self.dense(f"{gate}_cp", clf_enhanced - clf),
        ]
        p, q = (d / np.sqrt(np.maximum((d**2).sum(1, keepdims=True), 1e-12)) for d in directions)
        steps = np.abs(np.diff(seg, axis=1)).sum((1, 2, 3)) + np.abs(np.diff(seg, axis=2)).sum((1, 2, 3))
        signals = np.stack(((p * q).sum(1), steps / seg[0].size, np.log1p(clf_enhanced.var(1))), 1)
        hidden = relu(self.dense(self.nth(f"{gate}_wn", "dense", 0), signals))
        gates = sigmoid(self.dense(self.nth(f"{gate}_wn", "dense", 1), hidden))
        seg = seg + gates[:, :1, None, None] * (seg_enhanced - seg)
        return seg, clf + gates[:, 1:] * (clf_enhanced - clf), gates

    def network(self, image: np.ndarray, rescaling: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
        """Logits of both tasks, and the gates."""
        maps = self.encoder(image, rescaling)
        maps = [self.residual(f"bti_res_{n}", x) for n, x in zip(("s1", "s2", "s3", "s4", "bridge"), maps, strict=True)]
        seg, vectors, gates = maps[-1], [x.mean((1, 2)) for x in maps[1:]], []
        for i in range(4):
            level = f"d{i + 1}"
            seg = self.transposed(self.nth("", "conv2d_transpose", i), seg)
            skip = self.attention_gate(f"att_gate_{level}", maps[3 - i], seg)
            seg = self.residual(f"bti_res_{level}", np.concatenate((seg, skip), -1))
            clf = relu(self.dense(f"clf_{level}_features", maps[4 - i].mean((1, 2))))
            seg, clf, gate = self.interaction(level, seg, clf)
            vectors.append(clf)
            gates.append(gate)
        seg = relu(self.conv(self.nth("", "conv2d", 0), self.transposed(self.nth("", "conv2d_transpose", 4), seg)))
        clf = relu(self.dense(self.nth("", "dense", 0), np.concatenate(vectors, 1)))
        clf = self.norm(self.nth("", "batch_normalization", 0), clf)
        return self.conv("segmentation_output", seg), self.dense("classification_output", clf), gates


def assert_close(ours: torch.Tensor, official: np.ndarray) -> None:
    error = np.abs(ours.numpy() - official).max()
    assert error <= 1e-5, f"largest difference {error:.1e}, of values up to {np.abs(official).max():.1f}"


@pytest.mark.parametrize("imagenet", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_converted_network_computes_what_the_official_one_does(
    official_values: Values, tmp_path: Path, imagenet: bool
) -> None:
    scales = KERAS_SCALES[: 1 + imagenet]
    write_arrays(tmp_path / "official.npz", official_values, KerasFile([], (SIZE, SIZE), scales))
    import_keras(tmp_path / "official.npz", tmp_path / "run")
    checkpoint = load_checkpoint(tmp_path / "run")
    pixels = np.random.default_rng(1).integers(0, 256, (2, SIZE, SIZE, 3), dtype=np.uint8)
    pixels[1] //= 3

    seg, clf, gates = Official(official_values).network(pixels / 255, np.array(scales[1]) if imagenet else np.ones(3))

    with torch.inference_mode():
        output = checkpoint.model(checkpoint.preprocessing.normalise(torch.from_numpy(pixels).permute(0, 3, 1, 2)))
    assert_close(output.seg_logits.permute(0, 2, 3, 1), seg)
    assert_close(output.cls_logits, clf)
    for ours, official in zip(output.gates.values(), gates, strict=True):
        assert_close(ours, official)


@pytest.mark.slow
def test_keras_own_encoder(tmp_path: Path) -> None:
    """The real EfficientNet-B4 of Keras 3, saved and loaded by Keras, and ours: the same maps."""
    os.environ.setdefault("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras", minversion="3")
    random = np.random.default_rng(0)
    image = keras.Input((SIZE, SIZE, 3))
    net = keras.applications.EfficientNetB4(include_top=False, weights=None, input_tensor=image)
    for variable in net.weights:
        if not variable.path.startswith("normalization"):
            positive = variable.path.endswith(("gamma", "moving_variance"))
            spread = (
                0.2
                if variable.ndim == 1
                else 1 / np.sqrt(np.prod(variable.shape[:-1]) / (variable.shape[2] if "dwconv" in variable.path else 1))
            )
            variable.assign(positive + spread * random.standard_normal(variable.shape).clip(-2, 2))
    taps = ["block2a_expand_activation", "block3a_expand_activation", "block4a_expand_activation"]
    taps += ["block6a_expand_activation", "top_activation"]
    pixels = random.integers(0, 256, (1, SIZE, SIZE, 3)).astype(np.float32)
    official = keras.Model(image, [net.get_layer(name).output for name in taps])(pixels)

    net.save_weights(tmp_path / "encoder.weights.h5")
    model = create_model("btinet_tf_efficientnet_b4", 3).eval()
    encoder = [variable for variable in official_variables() if variable.ours.startswith("encoder.")]
    identity = identities(variable.name for variable in official_variables())
    with open_keras(tmp_path / "encoder.weights.h5", official_variables()) as file, torch.no_grad():
        stored = {held.identity: held for held in file.variables}
        for variable in encoder:
            ours = model.state_dict()[variable.ours]
            value = stored[identity[variable.name]].read()
            ours.copy_(torch.from_numpy(variable.to_ours(value, ours.shape)))
        maps = model.encoder(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255)
    for ours, theirs in zip(maps, official, strict=True):
        assert_close(ours.permute(0, 2, 3, 1), keras.ops.convert_to_numpy(theirs))
