"""Losses and schedules against the official numbers and by hand; tests/kernels/test_losses.py has segmentation's."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from btinet.training.losses import LossOptions, classification_loss, gate_loss, segmentation_loss, soft_iou
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


def test_classification_loss(official: np.lib.npyio.NpzFile) -> None:
    probabilities = torch.from_numpy(official["loss_classification/prediction"]).double()
    labels = torch.from_numpy(official["loss_classification/target"]).long()
    value = classification_loss(probabilities.log(), labels, OFFICIAL)
    assert value.item() == pytest.approx(official["loss_classification/value"].item(), rel=1e-5)


def test_classification_loss_by_hand_and_with_class_weights() -> None:
    logits = torch.tensor([[0.0, 0.0], [0.0, math.log(3)]])
    labels = torch.tensor([1, 0])
    each = 0.25 * math.log(2), 0.75**2 * math.log(4)
    assert classification_loss(logits, labels, LossOptions()).item() == pytest.approx(sum(each) / 2, rel=1e-6)
    weighted = classification_loss(logits, labels, LossOptions(), torch.tensor([2.0, 0.5]))
    assert weighted.item() == pytest.approx((0.5 * each[0] + 2 * each[1]) / 2, rel=1e-6)


def test_segmentation_of_several_classes_is_the_mean_of_each_against_the_rest() -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(3, 4, 12, 10), (torch.rand(3, 4, 12, 10) > 0.6).float()
    each = [segmentation_loss(logits[:, k : k + 1], target[:, k : k + 1], LossOptions()) for k in range(4)]
    whole = segmentation_loss(logits, target, LossOptions())
    assert whole.item() == pytest.approx(float(sum(each)) / 4, rel=1e-5)


def test_gate_loss(official: np.lib.npyio.NpzFile) -> None:
    """Official totals are task + 1.0 · gate term; ours is the gate term alone."""
    prediction, target = pair(official, "loss_segmentation")
    probabilities = torch.from_numpy(official["loss_classification/prediction"]).double()
    gates = torch.stack([torch.from_numpy(official[f"gate_loss/gate_{s}"]).double() for s in ("seg", "clf")], 1)
    torch.testing.assert_close(
        soft_iou(prediction, target).float(), torch.from_numpy(official["soft_iou"]), rtol=1e-5, atol=1e-6
    )
    both_levels = torch.stack([gates, gates])
    seg = gate_loss(both_levels[..., 0], soft_iou(prediction.detach(), target).float())
    clf = gate_loss(both_levels[..., 1], probabilities.amax(1).float())
    for ours, stream, task in ((seg, "seg", "segmentation"), (clf, "clf", "classification")):
        wanted = official[f"gate_loss/{stream}_total"].item() - official[f"loss_{task}/value"].item()
        assert ours.item() == pytest.approx(wanted, rel=2e-5)


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
