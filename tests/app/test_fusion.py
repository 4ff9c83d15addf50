"""BTINet.fuse(): the same outputs with fewer BatchNorms, and nothing else of the original touched."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from btinet import BTINet, UserError, create_model
from btinet.data.preprocessing import Preprocessing
from btinet.models import save_checkpoint
from btinet.models.fusion import fold_batchnorms

# tf_efficientnet pads as TensorFlow does.
BACKBONES = ["efficientnet_b0", "tf_efficientnet_b0", "resnet18", "mobilenetv3_small_050"]
# One norm in each residual block is in front of a padded convolution, and one in each of four interactions.
LEFT = 5 + 4 + 4


def network(backbone: str) -> BTINet:
    torch.manual_seed(0)
    model = create_model(f"btinet_{backbone}", 3).eval()
    randomise(model)
    return model


def randomise(model: nn.Module) -> None:
    for norm in model.modules():
        if isinstance(norm, _BatchNorm):
            nn.init.normal_(norm.running_mean, std=0.3)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            if norm.affine:
                nn.init.uniform_(norm.weight, 0.5, 1.5)
                nn.init.normal_(norm.bias, std=0.3)


def norms(model: nn.Module) -> dict[str, nn.Module]:
    return {path: part for path, part in model.named_modules() if isinstance(part, _BatchNorm)}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_outputs_are_the_same(backbone: str) -> None:
    model = network(backbone)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fused = model.fuse()
    image = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        exact, ours = model(image), fused(image)
    for a, b in ((ours.seg_logits, exact.seg_logits), (ours.cls_logits, exact.cls_logits)):
        assert ((a - b).abs().max() / b.abs().max()).item() < 1e-5
    for level in exact.gates:
        torch.testing.assert_close(ours.gates[level], exact.gates[level], rtol=1e-4, atol=1e-5)
    assert len(norms(fused)) == LEFT
    assert fused.batchnorms_left is not None
    assert fused.batchnorms_left.keys() == norms(fused).keys()
    for path, reason in fused.batchnorms_left.items():
        assert reason == (
            "computed inside a fused operator"
            if ".interaction." in path
            else "an activation before it, and padding after it: zeros beside it would be shifted"
        )
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert model.batchnorms_left is None
    assert fused.fuse() is fused


def test_wide_products_of_few_positions_use_what_was_prepared() -> None:
    fused = network("resnet18").fuse()
    block, x = fused.refine[-1], torch.randn(1, 512, 2, 2)
    with torch.no_grad():
        block(x)
    assert all(conv.pointwise._packed is not None for conv in (block.conv1, block.conv2))
    assert block.multi_scale._cache._merged.shape == (512, 3, 512)


class Toy(nn.Module):
    """Every way a BatchNorm can be connected, under its own name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.after_conv = nn.BatchNorm2d(4)
        self.branching = nn.Conv2d(4, 4, 1)
        self.of_branch = nn.BatchNorm2d(4)
        self.before_grouped = nn.BatchNorm2d(4)
        self.grouped = nn.Conv2d(4, 6, (2, 1), groups=2, bias=False)
        self.without_affine = nn.BatchNorm2d(6, affine=False)
        self.padded = nn.Conv2d(6, 6, 3, padding=1)
        self.twice = nn.BatchNorm2d(6)
        self.shared = nn.Conv2d(6, 6, 1)
        self.of_shared = nn.BatchNorm2d(6)
        self.linear = nn.Linear(6, 5, bias=False)
        self.after_linear = nn.BatchNorm1d(5)
        self.two_users = nn.BatchNorm1d(5)
        self.last = nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.after_conv(self.conv(x)))
        y = self.branching(x)
        x = torch.relu(self.of_branch(y) + y)
        x = torch.relu(self.grouped(self.before_grouped(x)))
        x = torch.relu(self.padded(self.without_affine(x)))
        x = self.twice(torch.relu(self.twice(x)))
        x = self.of_shared(self.shared(torch.relu(self.shared(x))))
        x = torch.relu(self.after_linear(self.linear(x.mean((2, 3)))))
        x = self.two_users(x)
        return self.last(x) + x.sum(1, keepdim=True)


def test_every_way_to_be_connected() -> None:
    torch.manual_seed(0)
    model = Toy().eval()
    randomise(model)
    x = torch.randn(2, 3, 9, 8)
    expected = model(x)
    left = fold_batchnorms(model, torch.randn(1, 3, 6, 6))
    assert left.keys() == norms(model).keys() == {"of_branch", "without_affine", "twice", "of_shared", "two_users"}
    assert left["twice"] == "used more than once"
    assert left["two_users"] == "neither a layer before nor one after it alone"
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_training_and_saving_are_refused(tmp_path: Path) -> None:
    model = network("mobilenetv3_small_050")
    with pytest.raises(UserError, match=r"fuse\(\) takes a network in evaluation mode.*call eval\(\) first"):
        model.train().fuse()
    fused = model.eval().fuse()
    with pytest.raises(UserError, match="a fused network is no checkpoint; save the one"):
        save_checkpoint(
            tmp_path / "run", fused, ("a", "b", "c"), Preprocessing((32, 32), 3, 255.0, (0.0,) * 3, (1.0,) * 3)
        )
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="a fused network cannot be trained"):
        fused.train()
    assert not fused.eval().training
