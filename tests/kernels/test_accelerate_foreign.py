"""accelerate() on networks of libraries that this package does not depend on; skipped where they are not installed."""

import copy

import pytest
import torch
from torch import Tensor, nn

from btinet_kernels import SqueezeExciteWeights, accelerate, accelerates, fused_squeeze_excite, restore, use_backend

pytestmark = pytest.mark.slow


def results(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Outputs, then the gradient of every parameter."""
    outputs = model(x)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    loss = sum(out.square().sum() for out in outputs)
    return [*outputs, *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)]  # type: ignore[arg-type]


def assert_same(ours: list[Tensor], exact: list[Tensor]) -> None:
    for a, b in zip(ours, exact, strict=True):
        if b is None:
            assert a is None
        else:
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8 * b.abs().max().clamp_min(1).item())


@pytest.mark.parametrize(
    ("encoder", "replaced"),
    # Its own efficientnet has squeeze-and-excitation written into the block, not as a module.
    [("efficientnet-b0", 0), ("timm-efficientnet-b0", 16), ("tu-efficientnet_b0", 16)],
)
def test_segmentation_models(encoder: str, replaced: int) -> None:
    library = pytest.importorskip("segmentation_models_pytorch")
    torch.manual_seed(0)
    model = library.Unet(encoder, encoder_weights=None, aux_params={"classes": 2}).double().eval()
    fast = copy.deepcopy(model)
    report = accelerate(fast)
    assert sum(str(module) == "replaced by fused_squeeze_excite" for module in report.modules) == replaced, str(report)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected = results(model, x)
    assert_same(results(fast, x), expected)
    with use_backend("native"):
        assert_same(results(fast, x), expected)
    assert all(torch.equal(a, b) for a, b in zip(restore(fast)(x), model(x), strict=True))


def test_monai() -> None:
    pytest.importorskip("monai")
    from monai.networks.blocks import ChannelSELayer
    from monai.networks.nets import AttentionUnet

    torch.manual_seed(0)
    network = AttentionUnet(spatial_dims=3, in_channels=1, out_channels=6, channels=(8, 16, 32), strides=(2, 2))
    model = nn.Sequential(network, ChannelSELayer(spatial_dims=3, in_channels=6)).double().eval()
    report = accelerate(copy.deepcopy(model))
    assert not report.modules
    assert report.unknown > 50

    def squeeze_excite(module):  # type: ignore[no-untyped-def]
        if module.add_residual:
            return "it adds its input"
        first, act, second, gate = module.fc
        if (type(act), type(gate)) != (nn.ReLU, nn.Sigmoid):
            return "its activations are not ReLU and Sigmoid"
        return lambda x: fused_squeeze_excite(
            x, SqueezeExciteWeights(first.weight, first.bias, second.weight, second.bias)
        )

    accelerates(ChannelSELayer, inputs=lambda m: (torch.randn(2, m.fc[0].in_features, 5, 4, 3),))(squeeze_excite)
    fast = copy.deepcopy(model)
    assert accelerate(fast).replaced == ["1"]
    x = torch.randn(2, 1, 16, 16, 16, dtype=torch.float64)
    with use_backend("native"):
        assert_same(results(fast, x), results(model, x))
    assert "left because it adds its input" in str(accelerate(ChannelSELayer(3, 6, add_residual=True)))
