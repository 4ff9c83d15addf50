"""The modules beyond what the official numbers cover: other dimensions, options, state."""

import copy

import pytest
import torch

from btinet_kernels import InteractionResult
from btinet_kernels.nn import (
    AttentionGate,
    DualPathAttention,
    MultiScaleContextFusion,
    ResidualBlock,
    TaskInteractionLevel,
    TaskInteractionModule,
    UncertaintyProxyAttention,
)

SPATIAL = {1: (11,), 2: (11, 9), 3: (9, 5, 6)}


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutional_modules_in_one_to_three_dimensions(dims: int) -> None:
    """A map that is constant along added axes gives the same result as in one dimension fewer, away from borders."""
    x = torch.randn(2, 8, *SPATIAL[dims])
    for module in (
        MultiScaleContextFusion(8, spatial_dims=dims),
        DualPathAttention(8, spatial_dims=dims),
        ResidualBlock(8, 8, spatial_dims=dims),
    ):
        assert module(x).shape == x.shape
    assert ResidualBlock(8, 5, spatial_dims=dims)(x).shape == (2, 5, *SPATIAL[dims])
    half = tuple(size // 2 for size in SPATIAL[dims])
    assert AttentionGate(8, 6, 4, spatial_dims=dims)(x, torch.randn(2, 6, *half)).shape == x.shape


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_interaction_in_one_to_three_dimensions(dims: int) -> None:
    result = TaskInteractionLevel(8, 5)(torch.randn(2, 8, *SPATIAL[dims]), torch.randn(2, 5))
    assert isinstance(result, InteractionResult)
    assert result._fields == ("seg", "clf", "gates", "proxies")
    assert result.gates.shape == (2, 2)
    assert result.proxies.shape == (2, 3)


def test_amplification_is_bounded_by_the_strength() -> None:
    module = TaskInteractionModule(8, 5, strength=0.3)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=3)
    seg = torch.rand(4, 8, 9, 9) + 0.1
    ratio = module(seg, torch.randn(4, 5))[0] / seg
    assert ratio.min() >= 1
    assert ratio.max() <= 1.3 + 1e-6
    assert ratio.max() > 1.2


def test_variance_gates_compete() -> None:
    gates = TaskInteractionLevel(8, 5, signals="variance")(torch.randn(4, 8, 9, 9), torch.randn(4, 5)).gates
    torch.testing.assert_close(gates.sum(1), torch.ones(4))


def test_state_survives_saving_and_copying() -> None:
    module = TaskInteractionLevel(8, 5, pool="softmax").train()
    seg, clf = torch.randn(3, 8, 9, 9), torch.randn(3, 5)
    module(seg, clf)
    twin = TaskInteractionLevel(8, 5, pool="softmax")
    twin.load_state_dict(module.state_dict())
    for other in (twin, copy.deepcopy(module)):
        for a, b in zip(other.eval()(seg, clf), module.eval()(seg, clf), strict=True):
            assert torch.equal(a, b)
        module.train()


def test_frozen_norm_keeps_its_statistics() -> None:
    module = TaskInteractionModule(8, 5).train()
    module.norm.eval()
    before = copy.deepcopy(module.norm.state_dict())
    module(torch.randn(3, 8, 9, 9), torch.randn(3, 5))
    assert all(torch.equal(a, b) for a, b in zip(module.norm.state_dict().values(), before.values(), strict=True))


def test_unknown_options_are_refused() -> None:
    with pytest.raises(ValueError, match="'gap' or 'softmax'"):
        TaskInteractionModule(8, 5, pool="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'proxies' or 'variance'"):
        UncertaintyProxyAttention(8, 5, signals="entropy")  # type: ignore[arg-type]
