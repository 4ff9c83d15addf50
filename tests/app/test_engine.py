"""How a training computes: batches that make one step, averaged and frozen weights, determinism, event files."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric
from safetensors.torch import load_file
from torch import Tensor, nn

from btinet import BTINetOutput, UserError, create_model, load_checkpoint
from btinet.data import SegmentationDataset, read_collection, read_split
from btinet.training import engine
from btinet.training.averaging import WeightAverage
from btinet.training.epochs import CLIP_NORM, Loaders, Objective, train_epoch
from btinet.training.objective import KnownShares
from btinet.training.options import TrainOptions
from btinet.training.train import train
from btinet.training.weighting import Weighting

SMALL = {"model": "btinet_mobilenetv3_small_050", "image_size": 32, "epochs": 1, "stage2_epochs": 1, "device": "cpu"}


def options(data: Path, out: Path, **changes: Any) -> TrainOptions:
    return replace(TrainOptions(data=str(data), out=str(out), dataset="busi", lr=1e-3), **{**SMALL, **changes})


def rows(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "model.safetensors")


class Linear(nn.Module):
    """Two outputs of a linear layer, and a third that nobody needs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 2, dtype=torch.float64)

    def forward(self, image: Tensor) -> BTINetOutput:
        return BTINetOutput(image, self.layer(image.flatten(1)), {}, {})


def squared(output: BTINetOutput, batch: dict[str, Tensor], known: KnownShares) -> dict[str, Tensor]:
    return {"clf": (output.cls_logits - batch["target"]).square().mean()}


def batches(sizes: list[int]) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [{"image": draw(n, 1, 2, 2), "target": draw(n, 2), "label": torch.zeros(n)} for n in sizes]


def test_accumulated_batches_are_one_large_batch() -> None:
    """Also when the last step has fewer and smaller ones; the reference takes its steps by hand."""
    sizes, accumulate = [4, 2, 4, 4, 3], 2
    data = batches(sizes)
    fabric = Fabric(accelerator="cpu", devices=1)
    module = Linear()
    wrapped = engine.wrap(fabric, module, compiled=False)
    optimizer = fabric.setup_optimizers(torch.optim.SGD(module.parameters(), 0.1))
    everything = KnownShares(1, 1)
    loaders = Loaders(data, None, data, torch.contiguous_format, everything, everything)  # type: ignore[arg-type]
    steps: list[None] = []
    means = train_epoch(
        fabric,
        wrapped,
        optimizer,  # type: ignore[arg-type]
        loaders,
        Objective(squared, Weighting({"clf": 0.5})),
        accumulate=accumulate,
        average=None,
        advance=lambda: steps.append(None),
    )
    weight, bias = (t.detach().numpy() for t in Linear().layer.parameters())
    losses = []
    for first in range(0, len(data), accumulate):
        group = data[first : first + accumulate]
        x = np.concatenate([b["image"].flatten(1).numpy() for b in group])
        error = x @ weight.T + bias - np.concatenate([b["target"].numpy() for b in group])
        losses.append((error**2).mean() * len(x))
        gradients = [error.T @ x / error.size, error.sum(0) / error.size]
        norm = math.sqrt(sum((g**2).sum() for g in gradients))
        scale = min(1, CLIP_NORM / (norm + 1e-6))
        weight, bias = weight - 0.1 * scale * gradients[0], bias - 0.1 * scale * gradients[1]
    assert len(steps) == len(data)
    assert means["train_clf_loss"] == pytest.approx(sum(losses) / sum(sizes), rel=1e-12)
    assert means["train_loss"] == pytest.approx(means["train_clf_loss"] / 2, rel=1e-12)
    np.testing.assert_allclose(module.layer.weight.detach(), weight, rtol=1e-12)
    np.testing.assert_allclose(module.layer.bias.detach(), bias, rtol=1e-12)


def test_average_of_weights_is_the_formula() -> None:
    """float64, one value after the other, with the warm-up; BatchNorm statistics too."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    average = WeightAverage(network, 0.5)
    expected = {name: tensor.numpy().copy() for name, tensor in network.state_dict().items()}
    for step in range(12):
        network(torch.randn(5, 3, dtype=torch.float64))
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update()
        decay = min(0.5, (1 + step) / (10 + step))
        for name, tensor in network.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * tensor.numpy()
    own = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with average.applied():
        for name, tensor in network.state_dict().items():
            wanted = own[name] if name.endswith("num_batches_tracked") else torch.from_numpy(expected[name])
            torch.testing.assert_close(tensor, wanted, rtol=1e-12, atol=1e-14)
    assert all(torch.equal(tensor, own[name]) for name, tensor in network.state_dict().items())


def test_the_averaged_weights_are_validated_and_saved(ultrasound: Path, tmp_path: Path) -> None:
    run = train(options(ultrasound, tmp_path / "run", ema=0.99, stage2_epochs=0))
    state = torch.load(run / "stage1.pt", weights_only=True)
    saved, average = weights(run), state["average"]["average"]
    assert all(torch.equal(saved[name], average[name]) for name in average)
    assert any(not torch.equal(saved[name], state["network"][name]) for name in average)
    checkpoint = load_checkpoint(run)
    split = read_split(run / "split.csv", collection := read_collection(ultrasound, "busi"))
    data = SegmentationDataset([s for s in collection.samples if split[s.id] == "val"], checkpoint.preprocessing)
    with torch.no_grad():
        output = checkpoint.model(torch.stack([data[i]["image"] for i in range(len(data))]))
    predicted, mask = output.seg_logits > 0, torch.stack([data[i]["mask"] for i in range(len(data))]) > 0
    both, either = (predicted & mask).sum((1, 2, 3)), (predicted | mask).sum((1, 2, 3))
    iou = (both / either)[mask.any(3).any(2).any(1)].mean().item()
    assert rows(run)[0]["val_iou"] == pytest.approx(iou, rel=1e-5)


@pytest.mark.parametrize(
    "model", ["btinet_mobilenetv3_small_050", pytest.param("btinet_mobilenetv2_050", marks=pytest.mark.slow)]
)
def test_frozen_stages_stay_as_they_are(ultrasound: Path, tmp_path: Path, model: str) -> None:
    """Weights and statistics of the stem and the stages up to stride 8; every later BatchNorm moves."""
    run = train(options(ultrasound, tmp_path / "run", model=model, freeze_stages=2, stage2_epochs=0))
    after = {name: t for name, t in weights(run).items() if name.startswith("encoder.")}
    torch.manual_seed(42)
    before = create_model(model, 3).state_dict()
    still = {name for name in after if torch.equal(after[name], before[name])}
    net = "encoder.net" if "v3" in model else "encoder"
    early = (f"{net}.conv_stem", f"{net}.bn1", *(f"{net}.blocks.{i}." for i in range(2 if "v3" in model else 3)))
    assert {name for name in after if name.startswith(early)} <= still
    late = {name for name in after if name.endswith("running_mean") and not name.startswith(early)}
    assert late
    assert not late & still


def test_two_deterministic_runs_are_the_same(ultrasound: Path, tmp_path: Path) -> None:
    runs = [train(options(ultrasound, tmp_path / name, deterministic=True)) for name in "ab"]
    assert rows(runs[0]) == rows(runs[1])
    first, second = map(weights, runs)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.are_deterministic_algorithms_enabled()


def test_an_operation_without_a_deterministic_form_is_named() -> None:
    with pytest.raises(UserError, match=r"--deterministic: put_ does not have"), engine.determinism(True):
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
    with pytest.raises(RuntimeError, match="shape"), engine.determinism(True):
        torch.zeros(3).view(2)


@pytest.mark.slow
def test_compiled_and_plain_training_agree(ultrasound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced and differentiated ahead of time, but not translated to C++, which takes minutes."""
    compile_fully, compiled = torch.compile, []

    def compile_plainly(network: nn.Module, **settings: Any) -> Any:
        compiled.append(network)
        return compile_fully(network, **{**settings, "backend": "aot_eager"})

    monkeypatch.setattr(engine.torch, "compile", compile_plainly)
    plain = train(options(ultrasound, tmp_path / "plain"))
    traced = train(options(ultrasound, tmp_path / "traced", compile=True))
    assert compiled
    assert weights(plain).keys() == weights(traced).keys()
    for ours, theirs in zip(rows(plain), rows(traced), strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-3)


def test_events_for_tensorboard(ultrasound: Path, tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = train(options(ultrasound, tmp_path / "run", epochs=2, tensorboard=True))
    events = reader.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    for name in ("train_loss", "val_iou", "learning_rate"):
        found = [event for stage in (1, 2) for event in events.Scalars(f"stage{stage}/{name}")]
        assert [event.step for event in found] == [1, 2, 3]
        assert [event.value for event in found] == pytest.approx([row[name] for row in rows(run)], rel=1e-6)


def test_missing_tensorboard_is_said_before_anything_is_written(
    ultrasound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"pip install 'btinet-kernels\[tensorboard\]'"):
        train(options(ultrasound, tmp_path / "run", tensorboard=True))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"accumulate": 0}, "--accumulate 0: must be at least 1"),
        ({"extend_epochs": -1}, "--extend-epochs -1: must be at least 0"),
        ({"ema": 1.0}, "--ema 1.0: must lie between 0 and 1"),
        ({"freeze_stages": 5}, "--freeze-stages 5: .* has 4 stages"),
        ({"freeze_stages": -1}, "--freeze-stages -1"),
        ({"precision": "16-mixed"}, "--precision 16-mixed: needs a GPU"),
    ],
    ids=str,
)
def test_wrong_options(ultrasound: Path, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        train(options(ultrasound, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes", [{}, {"interaction": "none"}, {"interaction": "fixed"}, {"signals": "variance"}])
def test_every_weight_gets_a_gradient(changes: dict[str, str]) -> None:
    """Processes that share a training wait for every gradient."""
    model = create_model("btinet_mobilenetv3_small_050", 2, **changes)
    output = model(torch.randn(2, 3, 32, 32))
    (output.seg_logits.sum() + output.cls_logits.sum()).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
