"""Every module against numbers of the official implementation: outputs and all gradients, on every backend."""

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from btinet_kernels import backends, use_backend
from btinet_kernels import nn as kernels_nn

# The largest error relative to the largest magnitude of the tensor. float32 sums of a few hundred terms, done in
# another order than TensorFlow's, differ by about 1e-6.
TOLERANCE = 1e-5


class Official:
    """One entry of the file; weights are found by what is left of their name without Keras's automatic numbers."""

    def __init__(self, file: np.lib.npyio.NpzFile, name: str) -> None:
        self.file, self.name = file, name

    def tensor(self, key: str) -> Tensor:
        return torch.from_numpy(self.file[f"{self.name}/{key}"])

    def count(self, kind: str) -> int:
        return sum(key.startswith(f"{self.name}/{kind}/") for key in self.file.files)

    def weights(self, kind: str = "weight") -> dict[str, Tensor]:
        """Variable name → value, named `scope/layer/variable`; automatic numbers become the order of appearance."""
        found: dict[str, Tensor] = {}
        seen: dict[tuple[str, str], list[str]] = {}
        for key in self.file.files:
            if not key.startswith(f"{self.name}/{kind}/"):
                continue
            *scope, layer, variable = key.removeprefix(f"{self.name}/{kind}/").split("/")
            automatic = re.fullmatch(r"(dense|conv2d|separable_conv2d|batch_normalization)(_\d+)?", layer)
            if automatic:
                layers = seen.setdefault(("/".join(scope), automatic[1]), [])
                if layer not in layers:
                    layers.append(layer)
                layer = f"{automatic[1]}#{layers.index(layer)}"
            found["/".join([*scope[1:], layer, variable])] = self.tensor(f"{kind}/{key.split('/', 2)[2]}")
        return found


def conv(kernel: Tensor) -> Tensor:
    return kernel.permute(3, 2, 0, 1)


def depthwise(kernel: Tensor) -> Tensor:
    return kernel.permute(2, 3, 0, 1)


def dense(kernel: Tensor) -> Tensor:
    return kernel.t()


def pointwise_as_linear(kernel: Tensor) -> Tensor:
    return kernel[0, 0].t()


def same(value: Tensor) -> Tensor:
    return value


# pattern of the official variable name → our parameter, and how Keras's layout becomes ours
Mapping = list[tuple[str, str, Callable[[Tensor], Tensor]]]


def linear_mapping(official: str, ours: str) -> Mapping:
    return [(f"{official}/kernel", f"{ours}.weight", dense), (f"{official}/bias", f"{ours}.bias", same)]


def conv_mapping(official: str, ours: str) -> Mapping:
    return [(f"{official}/kernel", f"{ours}.weight", conv), (f"{official}/bias", f"{ours}.bias", same)]


def separable_mapping(official: str, ours: str) -> Mapping:
    return [
        (f"{official}/depthwise_kernel", f"{ours}.depthwise.weight", depthwise),
        (f"{official}/pointwise_kernel", f"{ours}.pointwise.weight", conv),
        (f"{official}/bias", f"{ours}.pointwise.bias", same),
    ]


def norm_mapping(official: str, ours: str) -> Mapping:
    return [
        (f"{official}/gamma", f"{ours}.weight", same),
        (f"{official}/beta", f"{ours}.bias", same),
        (f"{official}/moving_mean", f"{ours}.running_mean", same),
        (f"{official}/moving_variance", f"{ours}.running_var", same),
    ]


TIM: Mapping = [
    (r".*seg_to_clf/conv2d#0/kernel", "context.weight", pointwise_as_linear),
    (r".*seg_to_clf/conv2d#0/bias", "context.bias", same),
    *linear_mapping(r".*seg_to_clf/dense#0", "dense"),
    *norm_mapping(r".*seg_to_clf/batch_normalization#0", "norm"),
    *linear_mapping(r".*clf_to_seg/dense#0", "clf_to_seg"),
    *linear_mapping(r".*seg_gate", "seg_gate"),
    *linear_mapping(r".*clf_gate", "clf_gate"),
]
UPA: Mapping = [
    (r".*_sp/kernel", "seg_projection.weight", dense),
    (r".*_cp/kernel", "clf_projection.weight", dense),
    *linear_mapping(r".*_wn/dense#0", "hidden"),
    *linear_mapping(r".*_wn/dense#1", "output"),
]
VARIANCE: Mapping = [
    *linear_mapping(r".*weight_network/dense#0", "hidden"),
    *linear_mapping(r".*weight_network/dense#1", "output"),
]
FUSION: Mapping = [
    *separable_mapping(r".*sep_conv_1", "scales.0"),
    *separable_mapping(r".*sep_conv_2", "scales.1"),
    *separable_mapping(r".*sep_conv_4", "scales.2"),
    *linear_mapping(r".*scale_attention/dense#0", "scale_attention.0"),
    *linear_mapping(r".*scale_attention/dense#1", "scale_attention.2"),
    *conv_mapping(r".*_fusion", "fusion"),
]
DUAL: Mapping = [
    *linear_mapping(r".*channel_path/dense#0", "channel_path.0"),
    *linear_mapping(r".*channel_path/dense#1", "channel_path.2"),
    *conv_mapping(r".*_spatial", "spatial_path"),
]
GATE: Mapping = [
    *conv_mapping(r".*x_transform", "skip_transform"),
    *conv_mapping(r".*g_transform", "gating_transform"),
    *separable_mapping(r".*context_attention/separable_conv2d#0", "context.0"),
    *separable_mapping(r".*context_attention/separable_conv2d#1", "context.1"),
    *conv_mapping(r".*context_attention/conv2d#0", "context.2"),
]


def inside(name: str, mapping: Mapping) -> Mapping:
    return [(official, f"{name}.{ours}", layout) for official, ours, layout in mapping]


RESIDUAL: Mapping = [
    *separable_mapping(r".*_conv1", "conv1"),
    *norm_mapping(r".*_bn1", "norm1"),
    *separable_mapping(r".*_conv2", "conv2"),
    *norm_mapping(r".*_bn2", "norm2"),
    *conv_mapping(r".*_proj", "projection"),
    *inside("multi_scale", FUSION),
    *inside("attention", DUAL),
]


def build(entry: Official) -> tuple[nn.Module, Mapping]:
    """The module of this entry, with sizes read from its tensors."""
    first = entry.tensor("input/0")
    channels = first.shape[-1]
    match entry.name:
        case "tim_eval" | "tim_train":
            return kernels_nn.TaskInteractionModule(channels, entry.tensor("input/1").shape[1]), TIM
        case "upa":
            return kernels_nn.UncertaintyProxyAttention(channels, entry.tensor("input/2").shape[1]), UPA
        case "variance_gate":
            module = kernels_nn.UncertaintyProxyAttention(channels, entry.tensor("input/2").shape[1], "variance")
            return module, VARIANCE
        case "tim_upa_eval":
            level = kernels_nn.TaskInteractionLevel(channels, entry.tensor("input/1").shape[1])
            return level, [*inside("tim", TIM), *inside("upa", UPA)]
        case "multi_scale_context_fusion":
            return kernels_nn.MultiScaleContextFusion(channels), FUSION
        case "dual_path_attention":
            return kernels_nn.DualPathAttention(channels), DUAL
        case "residual_block_eval":
            return kernels_nn.ResidualBlock(channels, entry.tensor("output/0").shape[-1]), RESIDUAL
        case "residual_block_projected_eval":
            block = kernels_nn.ResidualBlock(channels, entry.tensor("output/0").shape[-1], attention=False)
            return block, RESIDUAL
        case "attention_gate":
            inter = next(v for k, v in entry.weights().items() if k.endswith("x_transform/bias")).shape[0]
            return kernels_nn.AttentionGate(channels, entry.tensor("input/1").shape[-1], inter), GATE
    raise AssertionError(entry.name)


def load(
    module: nn.Module, mapping: Mapping, weights: dict[str, Tensor]
) -> dict[str, tuple[str, Callable[[Tensor], Tensor]]]:
    """Copy the official weights in; returns official name → (our name, how Keras's layout becomes ours)."""
    state = module.state_dict()
    missing = {key for key in state if not key.endswith("num_batches_tracked")}
    placed: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {}
    for name, value in weights.items():
        ours, layout = next((ours, layout) for official, ours, layout in mapping if re.fullmatch(official, name))
        assert state[ours].shape == layout(value).shape, (name, ours)
        state[ours].copy_(layout(value))
        missing.discard(ours)
        placed[name] = (ours, layout)
    assert not missing, f"no official weight for {sorted(missing)}"
    return placed


def to_ours(value: Tensor) -> Tensor:
    return value.permute(0, 3, 1, 2) if value.ndim == 4 else value


def assert_close(ours: Tensor, official: Tensor, what: str) -> None:
    error = ((ours - official).abs().max() / official.abs().max()).item()
    assert error <= TOLERANCE, f"{what}: relative error {error:.2e}"


MODULES = [
    "tim_eval",
    "tim_train",
    "upa",
    "tim_upa_eval",
    "variance_gate",
    "multi_scale_context_fusion",
    "dual_path_attention",
    "residual_block_eval",
    "residual_block_projected_eval",
    "attention_gate",
]
INTERACTIONS = ["tim_eval", "tim_train", "upa", "tim_upa_eval", "variance_gate"]


@pytest.fixture
def official(request: pytest.FixtureRequest) -> np.lib.npyio.NpzFile:
    return np.load(request.config.getoption("--official"))


def run(entry: Official, *, channels_last: bool, spoil: str | None = None) -> None:
    module, mapping = build(entry)
    module.train(entry.name.endswith("_train"))
    placed = load(module, mapping, entry.weights())
    if spoil is not None:
        with torch.no_grad():
            module.get_parameter(spoil).mul_(1.001)
    inputs = [to_ours(entry.tensor(f"input/{i}")) for i in range(entry.count("input"))]
    if not channels_last:
        inputs = [x.contiguous() for x in inputs]
    inputs = [x.clone().requires_grad_() for x in inputs]
    result = module(*inputs)
    outputs = [result] if isinstance(result, Tensor) else list(result)[: entry.count("output")]
    for i, output in enumerate(outputs):
        assert_close(output, to_ours(entry.tensor(f"output/{i}")), f"output {i}")

    cotangents = [to_ours(entry.tensor(f"cotangent/{i}")) for i in range(len(outputs))]
    torch.autograd.backward(outputs, cotangents)
    for i, x in enumerate(inputs):
        assert x.grad is not None
        assert_close(x.grad, to_ours(entry.tensor(f"grad_input/{i}")), f"gradient of input {i}")
    gradients = {name: module.get_parameter(placed[name][0]).grad for name in entry.weights("grad_weight")}
    for name, value in entry.weights("grad_weight").items():
        ours, layout = placed[name]
        assert_close(gradients[name], layout(value), f"gradient of {ours}")
    for name, value in entry.weights("after").items():
        assert_close(module.get_buffer(placed[name][0]), value, f"{placed[name][0]} after the call")
    if entry.name == "upa":
        assert_close(result.gates, torch.stack((entry.tensor("gate_seg"), entry.tensor("gate_clf")), 1), "gates")


# The other modules are plain PyTorch on every backend.
CASES = [("reference", name) for name in MODULES] + [("native", name) for name in INTERACTIONS]


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(("backend", "name"), CASES)
def test_module(official: np.lib.npyio.NpzFile, name: str, backend: str, channels_last: bool) -> None:
    with use_backend(backend):
        run(Official(official, name), channels_last=channels_last)


@pytest.mark.parametrize(
    ("name", "parameter"),
    [
        ("tim_eval", "context.weight"),
        ("tim_train", "norm.weight"),
        ("upa", "seg_projection.weight"),
        ("tim_upa_eval", "tim.clf_to_seg.weight"),
        ("variance_gate", "hidden.weight"),
        ("multi_scale_context_fusion", "fusion.weight"),
        ("dual_path_attention", "spatial_path.weight"),
        ("residual_block_eval", "conv1.depthwise.weight"),
        ("attention_gate", "gating_transform.weight"),
    ],
)
def test_a_weight_off_by_a_thousandth_is_seen(official: np.lib.npyio.NpzFile, name: str, parameter: str) -> None:
    with pytest.raises(AssertionError, match="relative error"):
        run(Official(official, name), channels_last=False, spoil=parameter)


def test_native_serves_here() -> None:
    report = backends(verbose=False)
    assert all(lines["native"].startswith("serves") for lines in report.values())
