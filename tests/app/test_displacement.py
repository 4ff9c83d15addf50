"""The displacement of each level is that of the tensors the network computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from btinet import create_model
from btinet.evaluation.analysis.displacement import displacement, interactions, recorded_displacements
from btinet.models import BTINet
from btinet_kernels.interaction import reference
from btinet_kernels.interaction.level_op import level_forward
from btinet_kernels.interaction.passes_op import LevelOptions, pack
from btinet_kernels.nn import TaskInteractionModule

MIXED = ["none", "fixed", "gated", "gated"]


def network(interaction: Any = MIXED, **options: Any) -> BTINet:
    """In float64, with running statistics that do something."""
    torch.manual_seed(1)
    model = create_model("btinet_mobilenetv3_small_050", 3, interaction=interaction, **options).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.normal_()  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return model


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(2)).double()


def bases(model: BTINet, images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """The tensors that reach each level's interaction."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, level in model.levels.items():
        if level.interaction is not None:
            level.interaction.register_forward_pre_hook(lambda _, args, name=name: found.update({name: args}))
    with torch.inference_mode():
        model(images)
    return found


def norm_ratio(change: np.ndarray, base: np.ndarray) -> np.ndarray:
    axes = tuple(range(1, base.ndim))
    return np.sqrt((change**2).sum(axis=axes) / (base**2).sum(axis=axes))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def enhanced_by_hand(tim: TaskInteractionModule, seg: Tensor, clf: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Equations (1) to (5) of arXiv 2603.01295 in numpy."""
    w = {name: value.detach().numpy() for name, value in tim.state_dict().items()}
    d, f = seg.numpy(), clf.numpy()
    hidden = np.einsum("jc,bchw->bjhw", w["context.weight"], d) + w["context.bias"][:, None, None]
    pooled = np.maximum(hidden, 0).mean(axis=(2, 3))
    context = np.maximum(pooled @ w["dense.weight"].T + w["dense.bias"], 0)
    context = (context - w["norm.running_mean"]) / np.sqrt(w["norm.running_var"] + tim.norm.eps)
    context = context * w["norm.weight"] + w["norm.bias"]
    enhanced_clf = f + sigmoid(context @ w["clf_gate.weight"].T + w["clf_gate.bias"]) * context
    from_clf = sigmoid(f @ w["clf_to_seg.weight"].T + w["clf_to_seg.bias"])
    seg_gate = sigmoid(d.mean(axis=(2, 3)) @ w["seg_gate.weight"].T + w["seg_gate.bias"])
    return d * (1 + tim.strength * seg_gate * from_clf)[:, :, None, None], enhanced_clf


def test_displacement_by_hand() -> None:
    base = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 0.0], [-2.0, 0.0]]).reshape(4, 2, 1, 1)
    moved = torch.tensor([[3.0, 9.0], [1.0, 0.0], [0.0, 0.0], [-2.0, 0.0]]).reshape(4, 2, 1, 1)
    found = displacement(base, moved)
    assert found.dtype == torch.float64
    np.testing.assert_array_equal(found.numpy(), [1, np.nan, np.nan, 0])
    np.testing.assert_array_equal(displacement(base.flatten(1), moved.flatten(1)).numpy(), found.numpy())


def test_norms_are_added_up_in_float64() -> None:
    base = torch.full((1, 8, 300, 300), 0.1)
    expected = float(np.float32(0.17) - np.float32(0.1)) / float(np.float32(0.1))
    assert displacement(base, torch.full_like(base, 0.17)).item() == pytest.approx(expected, rel=1e-9)


def test_recorded_displacements_follow_the_equations(images: Tensor) -> None:
    model = network()
    with torch.inference_mode(), recorded_displacements(model) as columns:
        output = model(images)
    assert interactions(model) == dict(zip(("d1", "d2", "d3", "d4"), MIXED, strict=True))
    directions = ("clf_to_seg", "seg_to_clf")
    expected_names = {f"displacement_{direction}_d{level}" for direction in directions for level in (2, 3, 4)}
    expected_names |= {f"displacement_gated_{direction}_d{level}" for direction in directions for level in (3, 4)}
    assert set(columns) == expected_names
    for name, (seg, clf) in bases(model, images).items():
        interaction = model.levels[name].interaction
        tim = interaction if isinstance(interaction, TaskInteractionModule) else interaction.tim  # type: ignore[union-attr]
        for i, (base, after) in enumerate(zip((seg, clf), enhanced_by_hand(tim, seg, clf), strict=True)):  # type: ignore[arg-type]
            expected = norm_ratio(after - base.numpy(), base.numpy())
            assert expected.min() > 1e-3
            assert expected.std() > 1e-6
            np.testing.assert_allclose(columns[f"displacement_{directions[i]}_{name}"], expected, rtol=1e-9)
            if name in output.gates:
                gated = expected * output.gates[name][:, i].numpy()
                np.testing.assert_allclose(columns[f"displacement_gated_{directions[i]}_{name}"], gated, rtol=1e-9)


def test_recorded_displacements_are_those_of_the_operators_own_scale(images: Tensor) -> None:
    """The operator scales seg's channels; what it returns beside the tensors says how far that moves them."""
    model = network("gated")
    with torch.inference_mode(), recorded_displacements(model) as columns:
        model(images)
    for name, (seg, clf) in bases(model, images).items():
        level: Any = model.levels[name].interaction
        options = LevelOptions("proxies", level.tim.strength, False, level.tim.norm.eps)
        packed = pack(level.tim.weights(), level.upa.weights())
        with torch.no_grad():
            outputs = level_forward(reference, seg, clf, packed, options)
        scale = outputs[6]
        change = ((scale - 1).square() * seg.square().sum((2, 3))).sum(1)
        expected = (change / seg.square().sum((1, 2, 3))).sqrt()
        np.testing.assert_allclose(columns[f"displacement_gated_clf_to_seg_{name}"], expected.numpy(), rtol=1e-9)
        assert max(columns[f"displacement_clf_to_seg_{name}"]) <= 0.7  # τ


def test_recording_changes_nothing_and_ends(images: Tensor) -> None:
    model = network()
    with torch.inference_mode():
        before = model(images)
        with recorded_displacements(model) as columns:
            during = model(images)
            model(images[:1])
        lengths = {len(values) for values in columns.values()}
        after = model(images)
    assert lengths == {4}
    assert {len(values) for values in columns.values()} == {4}
    for name, values in columns.items():
        assert values[3] == pytest.approx(values[0], rel=1e-9), name
    for output in (during, after):
        assert torch.equal(output.seg_logits, before.seg_logits)
        assert torch.equal(output.cls_logits, before.cls_logits)
    assert not any(module._forward_hooks for module in model.modules())


def test_recording_ends_with_an_error() -> None:
    model = network()
    with pytest.raises(ValueError, match="at least 32×32"), recorded_displacements(model):
        model(torch.zeros(1, 3, 8, 8).double())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_fused_network_is_recorded_too(images: Tensor) -> None:
    model = network()
    fused = model.fuse()
    with torch.inference_mode(), recorded_displacements(model) as columns, recorded_displacements(fused) as of_fused:
        model(images)
        fused(images)
    assert set(columns) == set(of_fused)
    for name, values in columns.items():
        np.testing.assert_allclose(of_fused[name], values, rtol=1e-6, err_msg=name)
