"""Losses and schedules against the official numbers and by hand."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from btinet.training.losses import (
    LossOptions,
    boundary,
    classification_loss,
    focal_tversky,
    gate_losses,
    segmentation_loss,
    soft_iou,
    texture,
)
from btinet.training.options import RECIPES, TrainOptions, recipe_of
from btinet.training.schedule import CosinePlateau, EarlyStopping

OFFICIAL = LossOptions(hard_boundary=True, empty_masks="tversky", ceiling=10.0)


@pytest.fixture(scope="module")
def official() -> np.lib.npyio.NpzFile:
    return np.load(Path(__file__).parents[1] / "kernels" / "data" / "official_modules.npz")


def pair(official: np.lib.npyio.NpzFile, name: str) -> tuple[Tensor, Tensor]:
    """Prediction (requiring a gradient) and target, channels first, float64."""
    prediction, target = (
        torch.from_numpy(official[f"{name}/{kind}"]).double().permute(0, 3, 1, 2) for kind in ("prediction", "target")
    )
    return prediction.requires_grad_(), target


def check(official: np.lib.npyio.NpzFile, name: str, value: Tensor, prediction: Tensor) -> None:
    assert value.item() == pytest.approx(official[f"{name}/value"].item(), rel=2e-6)
    (gradient,) = torch.autograd.grad(value, prediction, allow_unused=True)
    wanted = torch.from_numpy(official[f"{name}/grad"]).double()
    wanted = wanted.permute(0, 3, 1, 2) if wanted.ndim == 4 else wanted
    gradient = torch.zeros_like(prediction) if gradient is None else gradient
    torch.testing.assert_close(gradient, wanted, rtol=2e-4, atol=2e-6 * wanted.abs().max().item() + 1e-12)


def test_focal_tversky(official: np.lib.npyio.NpzFile) -> None:
    prediction, target = pair(official, "loss_focal_tversky")
    check(official, "loss_focal_tversky", focal_tversky(prediction, target, OFFICIAL).mean(), prediction)


def test_boundary(official: np.lib.npyio.NpzFile) -> None:
    prediction, target = pair(official, "loss_boundary")
    hard = boundary(prediction, target, OFFICIAL)
    check(official, "loss_boundary", hard + 0 * prediction.sum(), prediction)
    soft = boundary(prediction, target, LossOptions())
    assert torch.autograd.grad(soft, prediction)[0].abs().max() > 0


def test_texture(official: np.lib.npyio.NpzFile) -> None:
    prediction, target = pair(official, "loss_texture")
    check(official, "loss_texture", texture(prediction, target), prediction)


def test_segmentation_loss(official: np.lib.npyio.NpzFile) -> None:
    prediction, target = pair(official, "loss_segmentation")
    logits = torch.logit(prediction.clamp(1e-7, 1 - 1e-7))
    # The loss works in float32; its value must be the official one.
    value = segmentation_loss(logits, target, OFFICIAL)
    assert value.item() == pytest.approx(official["loss_segmentation/value"].item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(value, prediction)
    wanted = torch.from_numpy(official["loss_segmentation/grad"]).double().permute(0, 3, 1, 2)
    inside = (prediction > 1e-3) & (prediction < 1 - 1e-3)  # further out sigmoid and logit lose digits in float32
    torch.testing.assert_close(gradient[inside], wanted[inside], rtol=1e-3, atol=1e-5 * wanted.abs().max().item())


def test_classification_loss(official: np.lib.npyio.NpzFile) -> None:
    probabilities = torch.from_numpy(official["loss_classification/prediction"]).double()
    labels = torch.from_numpy(official["loss_classification/target"]).long()
    value = classification_loss(probabilities.log(), labels, OFFICIAL)
    assert value.item() == pytest.approx(official["loss_classification/value"].item(), rel=1e-5)


def test_classification_loss_by_hand_and_without_labels() -> None:
    logits = torch.tensor([[0.0, 0.0], [3.0, -1.0]], requires_grad=True)
    one = classification_loss(logits, torch.tensor([1, -1]), LossOptions())
    assert one.item() == pytest.approx(0.25 * math.log(2), rel=1e-6)
    none = classification_loss(logits, torch.tensor([-1, -1]), LossOptions())
    assert none.item() == 0
    assert torch.autograd.grad(none, logits)[0].abs().max() == 0


def test_gate_losses(official: np.lib.npyio.NpzFile) -> None:
    """Official totals are task + 1.0 · gate term; ours is the gate term alone."""
    prediction, target = pair(official, "loss_segmentation")
    probabilities = torch.from_numpy(official["loss_classification/prediction"]).double()
    gates = torch.stack([torch.from_numpy(official[f"gate_loss/gate_{s}"]).double() for s in ("seg", "clf")], 1)
    torch.testing.assert_close(
        soft_iou(prediction, target).float(), torch.from_numpy(official["soft_iou"]), rtol=1e-5, atol=1e-6
    )
    seg, clf = gate_losses(torch.logit(prediction), probabilities.log(), target, {"d1": gates, "d2": gates})
    for ours, stream, task in ((seg, "seg", "segmentation"), (clf, "clf", "classification")):
        wanted = official[f"gate_loss/{stream}_total"].item() - official[f"loss_{task}/value"].item()
        assert ours.item() == pytest.approx(wanted, rel=2e-5)


def test_empty_masks_get_a_gradient_only_in_the_fixed_recipe() -> None:
    logits = torch.full((1, 1, 16, 16), 0.5, requires_grad=True)
    target = torch.zeros(1, 1, 16, 16)

    def slope(options: LossOptions) -> float:
        value = segmentation_loss(logits, target, options)
        return torch.autograd.grad(value, logits)[0].abs().sum().item()

    assert slope(LossOptions()) > 20 * slope(OFFICIAL)  # what is left is the texture term's


def test_cosine_and_plateau() -> None:
    schedule = CosinePlateau(3e-4, 50)
    assert schedule.rate(0) == pytest.approx(3e-4)
    assert schedule.rate(25) == pytest.approx(3e-4 * (0.03 + 0.97 * 0.5))
    assert schedule.rate(50) == pytest.approx(9e-6)
    schedule.observe(0.5)
    for _ in range(7):
        schedule.observe(0.5)  # not better: the seventh is one too many
    assert schedule.rate(25) == pytest.approx(0.55 * 3e-4 * (0.03 + 0.97 * 0.5))
    for _ in range(2 + 6):
        schedule.observe(0.4)  # two of cooldown, six of waiting
    assert schedule.rate(25) == pytest.approx(0.55 * 3e-4 * (0.03 + 0.97 * 0.5))
    schedule.observe(0.4)
    assert schedule.rate(25) == pytest.approx(0.55**2 * 3e-4 * (0.03 + 0.97 * 0.5))
    for _ in range(200):
        schedule.observe(0.4)
    assert schedule.rate(25) == 1.5e-6


def test_early_stopping() -> None:
    stopping = EarlyStopping(2, 0.1)
    assert stopping.observe(0.5)
    assert not stopping.observe(0.55)  # a rise, but not by more than the least
    assert not stopping.exhausted
    assert not stopping.observe(0.4)
    assert stopping.exhausted


def test_presets() -> None:
    assert recipe_of(TrainOptions(data="", out="", preset="parity", recipe={"seg_weight": 0.5})).seg_weight == 0.5
    assert RECIPES["parity"].hard_boundary
    assert not RECIPES["paper"].hard_boundary
    assert RECIPES["paper"].false_negative_weight == 0.7
    with pytest.raises(TypeError, match="seg_wait"):
        recipe_of(TrainOptions(data="", out="", recipe={"seg_wait": 0.5}))
