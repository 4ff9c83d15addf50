"""Losses of batches whose images lack masks or classes: sums over sets, whatever divides them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from btinet import BTINetOutput
from btinet.data import Sample
from btinet.training.losses import LossOptions, classification_loss, gate_loss, segmentation_loss, soft_iou
from btinet.training.objective import GateLosses, KnownShares, TaskLosses, balanced_class_weights

OPTIONS = LossOptions()
PLAIN = TaskLosses(OPTIONS)


def answers(count: int, channels: int = 1) -> BTINetOutput:
    torch.manual_seed(0)
    seg = torch.randn(count, channels, 12, 10, requires_grad=True)
    gates = {level: torch.rand(count, 2) for level in ("d1", "d2")}
    return BTINetOutput(seg, torch.randn(count, 3, requires_grad=True), gates, {})


def batch(has_mask: list[bool], labels: list[int]) -> dict[str, Tensor]:
    masks = (torch.rand(len(labels), 1, 12, 10, generator=torch.Generator().manual_seed(1)) > 0.7).float()
    masks = masks * torch.tensor(has_mask).view(-1, 1, 1, 1)
    return {"mask": masks, "has_mask": torch.tensor(has_mask), "label": torch.tensor(labels)}


def part(output: BTINetOutput, data: dict[str, Tensor], chosen: slice) -> tuple[BTINetOutput, dict[str, Tensor]]:
    gates = {level: gate[chosen] for level, gate in output.gates.items()}
    return BTINetOutput(output.seg_logits[chosen], output.cls_logits[chosen], gates, {}), {
        name: value[chosen] for name, value in data.items()
    }


def test_shares_of_samples() -> None:
    image = Path("x.png")
    samples = [Sample("a", image, None, 0), Sample("b", image, (), -1), Sample("c", image, (image,), 1)]
    assert KnownShares.of(samples) == KnownShares(2 / 3, 2 / 3)


def test_with_every_answer_it_is_the_plain_mean() -> None:
    output, data = answers(4), batch([True] * 4, [0, 1, 2, 1])
    losses = PLAIN(output, data, KnownShares(1, 1))
    assert torch.equal(losses["seg"], segmentation_loss(output.seg_logits, data["mask"], OPTIONS))
    assert torch.equal(losses["clf"], classification_loss(output.cls_logits, data["label"], OPTIONS))


def test_batches_of_any_kind_add_up_to_the_mean_over_the_known() -> None:
    """Of eight images five have a class, in batches of 3, 1 and 4, of which one has none."""
    output, data = answers(8), batch([True] * 8, [0, 2, -1, -1, 1, -1, 1, 0])
    known = KnownShares(1, 5 / 8)
    parts = [part(output, data, chosen) for chosen in (slice(0, 3), slice(3, 4), slice(4, 8))]
    values = [PLAIN(*pair, known)["clf"] * len(pair[1]["label"]) / 8 for pair in parts]
    labelled = data["label"] >= 0
    wanted = classification_loss(output.cls_logits[labelled], data["label"][labelled], OPTIONS)
    assert torch.stack(values).sum().item() == pytest.approx(wanted.item(), rel=1e-6)
    assert values[1] == 0


def test_images_without_a_mask_neither_count_nor_get_a_gradient() -> None:
    output, data = answers(4), batch([True, False, True, False], [0, 1, 2, 0])
    loss = PLAIN(output, data, KnownShares(0.8, 1))["seg"]
    wanted = segmentation_loss(output.seg_logits[::2], data["mask"][::2], OPTIONS) * (2 / (4 * 0.8))
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, output.seg_logits)
    assert gradient[1::2].abs().max() == 0
    assert gradient[::2].abs().amin((1, 2, 3)).min() >= 0
    assert gradient[::2].abs().max() > 0


def test_a_batch_without_answers_gives_zero_and_a_gradient_of_zero() -> None:
    output, data = answers(2), batch([False, False], [-1, -1])
    losses = GateLosses(PLAIN)(output, data, KnownShares(0.5, 0.5))
    assert losses["seg"] == losses["clf"] == losses["seg_gates"] == 0
    for task, answer in (("seg", output.seg_logits), ("clf", output.cls_logits)):
        assert torch.autograd.grad(losses[task], answer)[0].abs().max() == 0


def test_gates_of_the_segmentation_need_a_mask_those_of_the_classification_no_label() -> None:
    output, data = answers(5), batch([True, True, False, True, False], [0, -1, -1, 1, 2])
    losses = GateLosses(PLAIN)(output, data, KnownShares(0.6, 0.6))
    gates = torch.stack(list(output.gates.values()))
    drawn = data["has_mask"]
    overlap = soft_iou(torch.sigmoid(output.seg_logits.detach()), data["mask"])
    confidence = output.cls_logits.detach().softmax(1).amax(1)
    assert losses["seg_gates"].item() == pytest.approx(gate_loss(gates[:, drawn, 0], overlap[drawn]).item(), rel=1e-6)
    assert losses["clf_gates"].item() == pytest.approx(gate_loss(gates[..., 1], confidence).item(), rel=1e-6)
    assert losses["seg"] == PLAIN(output, data, KnownShares(0.6, 0.6))["seg"]


def test_balanced_weights_are_those_of_scikit_learn() -> None:
    from sklearn.utils.class_weight import compute_class_weight

    labels = [0] * 7 + [1] * 2 + [2]
    wanted = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    assert balanced_class_weights(labels, 3) == pytest.approx(wanted.tolist(), rel=1e-12)
