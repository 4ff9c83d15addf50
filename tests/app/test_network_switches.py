"""Networks without multi-scale fusion, with a one-way interaction, for one task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from btinet import BTINet, UserError, create_model
from btinet.data.preprocessing import default_preprocessing
from btinet.models import load_checkpoint, save_checkpoint
from btinet.models.convert import export_keras
from btinet.models.network import BTINetConfig, DecoderLevel
from btinet_kernels import use_backend
from btinet_kernels.nn import MultiScaleContextFusion, ResidualBlock

SMALL = "btinet_mobilenetv3_small_050"
SWITCHED: list[dict[str, Any]] = [
    {"multi_scale": False},
    {"directions": "seg_to_clf"},
    {"directions": "clf_to_seg", "interaction": "fixed"},
    {"tasks": "segmentation", "interaction": "none"},
    {"tasks": "classification", "interaction": "none"},
]


def randomised(model: nn.Module) -> Any:
    """Weights and statistics that no initial value is left among."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, std=0.3)
    return model.eval()


@pytest.mark.parametrize("attention", [True, False])
def test_a_residual_block_without_fusion_is_two_convolutions(attention: bool) -> None:
    block: ResidualBlock = randomised(ResidualBlock(4, 6, attention=attention, multi_scale=False).double())
    assert not [module for module in block.modules() if isinstance(module, MultiScaleContextFusion)]
    x = torch.randn(2, 4, 9, 7, dtype=torch.float64)

    def separable(conv: Any, x: Tensor) -> Tensor:
        x = F.conv2d(x, conv.depthwise.weight, padding=1, groups=x.shape[1])
        return F.conv2d(x, conv.pointwise.weight, conv.pointwise.bias)

    expected = block.norm2(separable(block.conv2, block.norm1(F.relu(separable(block.conv1, x)))))
    residual = F.conv2d(x, block.projection.weight, block.projection.bias)  # type: ignore[union-attr]
    if attention:
        pooled = block.attention.channel_path(expected.mean((2, 3)))[..., None, None]  # type: ignore[union-attr]
        both = torch.stack((expected.amax(1), expected.mean(1)), 1)
        expected = expected * pooled * torch.sigmoid(block.attention.spatial_path(both))  # type: ignore[union-attr]
    torch.testing.assert_close(block(x), F.relu(expected + residual))


def test_no_block_of_a_network_without_fusion_has_it() -> None:
    with_it, without = create_model(SMALL, 3), create_model(SMALL, 3, multi_scale=False)
    assert sum(isinstance(module, MultiScaleContextFusion) for module in with_it.modules()) == 5 + 4
    assert not [module for module in without.modules() if isinstance(module, MultiScaleContextFusion)]
    names = {name for name in with_it.state_dict() if ".multi_scale." not in name}
    assert names == set(without.state_dict())


def level(interaction: str, directions: str) -> DecoderLevel:
    config = BTINetConfig("none", 2, directions=directions, dropout=0.0)  # type: ignore[arg-type]
    torch.manual_seed(0)
    return randomised(DecoderLevel(6, 5, 6, 8, interaction, config))  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("interaction", ["fixed", "gated"])
def test_what_crosses_a_level(interaction: str, backend: str) -> None:
    """``source`` is where clf begins, the skip connection reaches seg alone."""
    x, skip, source = torch.randn(2, 6, 4, 4), torch.randn(2, 5, 8, 8), torch.randn(2, 6, 4, 4)
    changed = {
        "seg": lambda level: level(x, skip + torch.randn_like(skip), source),
        "clf": lambda level: level(x, skip, source + torch.rand_like(source)),
    }
    outputs = {}
    with use_backend(backend), torch.no_grad():
        for directions, seg_sees_clf, clf_sees_seg in (
            ("both", True, True),
            ("seg_to_clf", False, True),
            ("clf_to_seg", True, False),
        ):
            one = level(interaction, directions)
            outputs[directions] = seg, clf, gates, _ = one(x, skip, source)
            assert torch.equal(seg, changed["clf"](one)[0]) != seg_sees_clf
            assert torch.equal(clf, changed["seg"](one)[1]) != clf_sees_seg
            assert not torch.equal(seg, changed["seg"](one)[0])
            assert not torch.equal(clf, changed["clf"](one)[1])
            assert (gates is not None) == (interaction == "gated")
        alone = level("none", "both")
        alone.load_state_dict({k: v for k, v in one.state_dict().items() if not k.startswith("interaction.")})
        seg, clf, _, _ = alone(x, skip, source)
    assert torch.equal(outputs["seg_to_clf"][0], seg)
    assert torch.equal(outputs["seg_to_clf"][1], outputs["both"][1])
    assert torch.equal(outputs["clf_to_seg"][0], outputs["both"][0])
    assert torch.equal(outputs["clf_to_seg"][1], clf)


@pytest.mark.parametrize("interaction", ["fixed", "gated"])
@pytest.mark.parametrize("directions", ["both", "seg_to_clf", "clf_to_seg"])
def test_gradients_follow_the_direction(interaction: str, directions: str) -> None:
    model = create_model("btinet_resnet18", 2, interaction=interaction, directions=directions).train()
    output = model(torch.randn(2, 3, 64, 64))
    decoder = [level.block.conv1.pointwise.weight for level in model.levels.values()]  # type: ignore[union-attr]
    vector = [level.clf_features.weight for level in model.levels.values()]  # type: ignore[union-attr]

    def reaches(logits: Tensor, weights: list[Tensor]) -> bool:
        gradients = torch.autograd.grad(logits.square().sum(), weights, retain_graph=True, allow_unused=True)
        return any(gradient is not None and bool(gradient.any()) for gradient in gradients)

    assert reaches(output.seg_logits, decoder)
    assert reaches(output.cls_logits, vector)
    assert reaches(output.cls_logits, decoder) == (directions != "clf_to_seg")
    assert reaches(output.seg_logits, vector) == (directions != "seg_to_clf")


def test_a_network_for_one_task_is_that_part_of_the_whole() -> None:
    image = torch.randn(2, 3, 70, 64)
    whole: BTINet = randomised(create_model(SMALL, 3, interaction="none"))
    state = whole.state_dict()
    answers = whole(image)
    names = []
    for tasks in ("segmentation", "classification"):
        one = create_model(SMALL, 3, interaction="none", tasks=tasks)
        names.append(set(one.state_dict()))
        one.load_state_dict({name: state[name] for name in names[-1]})
        output = one.eval()(image)
        if tasks == "segmentation":
            assert torch.equal(output.seg_logits, answers.seg_logits)
            assert output.cls_logits.shape == (2, 0)
        else:
            assert torch.equal(output.cls_logits, answers.cls_logits)
            assert output.seg_logits.shape == (2, 0, 70, 64)
    segmentation, classification = names
    assert segmentation | classification == set(state)
    assert {name.split(".")[0] for name in segmentation & classification} == {"encoder", "refine"}
    assert not [name for name in segmentation if "clf" in name]
    assert not [name for name in classification if "seg_head" in name or "upsample" in name or "refine.0." in name]


@pytest.mark.parametrize("tasks", ["segmentation", "classification"])
def test_every_parameter_of_a_network_for_one_task_is_trained(tasks: str) -> None:
    model = create_model(SMALL, 3, interaction="none", tasks=tasks).train()
    output = model(torch.randn(2, 3, 64, 64))
    (output.seg_logits if tasks == "segmentation" else output.cls_logits).square().sum().backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert all(name.startswith("encoder.") for name in missing)  # the last, unused layers of the backbone


@pytest.mark.parametrize("switched", SWITCHED, ids=str)
def test_fused_and_saved(switched: dict[str, Any], tmp_path: Path) -> None:
    model: BTINet = randomised(create_model(SMALL, 3, **switched))
    save_checkpoint(tmp_path, model, ("a", "b", "c"), default_preprocessing((64, 64), 3))
    loaded = load_checkpoint(tmp_path).model
    assert loaded.config == model.config
    image = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected, again, fused = model(image), loaded(image), model.fuse()(image)
    for ours, same, exact in zip(fused[:2], again[:2], expected[:2], strict=True):
        assert torch.equal(same, exact)
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max() if exact.numel() else 1))
    with pytest.raises(UserError, match="no counterpart in Keras.*" + next(iter(switched))):
        export_keras(tmp_path, tmp_path / "variables.npz")


def test_checkpoints_without_the_switches_are_whole_networks(tmp_path: Path) -> None:
    model = create_model(SMALL, 3)
    save_checkpoint(tmp_path, model, ("a", "b", "c"), default_preprocessing((64, 64), 3))
    content = json.loads((tmp_path / "config.json").read_text())
    for name in ("multi_scale", "directions", "tasks"):
        del content["model"][name]
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert load_checkpoint(tmp_path).model.config == model.config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": "detection"}, "tasks 'detection': give one of both, segmentation, classification"),
        ({"directions": "up"}, "directions 'up': give one of both, seg_to_clf, clf_to_seg"),
        ({"tasks": "segmentation"}, "a single task has no other to interact with; make the interaction none"),
        ({"tasks": "classification", "interaction": ["none", "none", "none", "fixed"]}, "has no other"),
        ({"directions": "seg_to_clf", "interaction": "none"}, "without an interaction there is no direction"),
    ],
)
def test_contradictions_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        create_model(SMALL, 2, **options)
