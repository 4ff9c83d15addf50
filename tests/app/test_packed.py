"""Packed convolutions are the plain ones with their activation, whatever happens to their weights."""

import copy

import pytest
import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn

from btinet.models.packed import ACTIVATIONS, PackedConv2d, pack
from btinet_kernels import use_backend

GEOMETRIES = {
    "1x1": {"kernel_size": 1},
    "3x3": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 1},
    "dilated": {"kernel_size": 3, "dilation": 2, "padding": (2, 1)},
    "grouped": {"kernel_size": (1, 3), "groups": 4, "bias": False},
    "depthwise": {"kernel_size": 5, "groups": 16, "padding": 2},
}


def pair(geometry: str = "3x3", activation: type[nn.Module] = nn.SiLU) -> tuple[nn.Conv2d, nn.Sequential]:
    """A packed convolution and plain ones."""
    torch.manual_seed(0)
    plain = nn.Conv2d(16, 32, **GEOMETRIES[geometry]).requires_grad_(False)  # type: ignore[arg-type]
    packed = copy.deepcopy(plain)
    pack(packed, activation())
    return packed, nn.Sequential(plain, activation())


def image(batch: int = 2, size: int = 13, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, 16, size, size + 2).to(dtype).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_it_is_the_convolution_and_its_activation(
    geometry: str, activation: type[nn.Module], dtype: torch.dtype
) -> None:
    packed, plain = pair(geometry, activation)
    packed.to(dtype)
    plain.to(dtype)
    x = image(dtype=dtype)
    exact = copy.deepcopy(plain).double()(x.double())
    # Sums of at most 16·9 products in float32; in bfloat16 the result is rounded, after the activation alone or twice.
    allowed = 2.0**-8 if dtype == torch.bfloat16 else 16 * 9 * 2.0**-24
    for each in (x, x.contiguous()):
        ours = packed(each)
        assert ours.dtype == dtype
        assert (ours.double() - exact).abs().max() <= allowed * exact.abs().max()
    assert packed._packed is not None


@pytest.mark.parametrize("size", [7, 8, 12])
@pytest.mark.parametrize("stride", [1, 2])
def test_padding_as_in_tensorflow(stride: int, size: int) -> None:
    torch.manual_seed(0)
    plain = Conv2dSame(16, 8, 3, stride=stride).requires_grad_(False)
    packed = copy.deepcopy(plain)
    pack(packed)
    torch.testing.assert_close(packed(image(size=size)), plain(image(size=size)), rtol=1e-5, atol=1e-5)


def test_changed_weights_and_sizes_are_followed() -> None:
    packed, plain = pair()
    for change in (
        lambda conv: conv.weight.mul_(2),
        lambda conv: conv.bias.add_(1),
        lambda conv: conv.load_state_dict({k: v + 1 for k, v in conv.state_dict().items()}),
        lambda conv: setattr(conv, "weight", nn.Parameter(conv.weight - 3, requires_grad=False)),
        lambda conv: conv.double().float(),
    ):
        for each in (image(), image(size=9), image(batch=5), image()):  # the size after a change is that before it
            torch.testing.assert_close(packed(each), plain(each), rtol=1e-5, atol=1e-5)
        for conv in (packed, plain[0]):
            change(conv)
    torch.testing.assert_close(packed(image()), plain(image()), rtol=1e-5, atol=1e-5)


def test_copies_and_pickles_pack_for_themselves() -> None:
    packed, plain = pair()
    packed(image())
    twin = copy.deepcopy(packed)
    assert isinstance(twin, PackedConv2d)
    assert twin._packed is None
    packed.weight.zero_()
    torch.testing.assert_close(twin(image()), plain(image()), rtol=1e-5, atol=1e-5)


def test_where_onednn_cannot_serve_it_is_plain() -> None:
    packed, plain = pair()
    with use_backend("reference"):
        assert torch.equal(packed(image()), plain(image()))
    assert torch.equal(packed(image().requires_grad_()), plain(image()))
    torch.testing.assert_close(packed(image(batch=0)), plain(image(batch=0)))
    torch.testing.assert_close(packed(image()[0]), plain(image()[0]))
    with pytest.raises(RuntimeError, match="channels"):
        packed(image()[:, :1])
    packed.double()
    torch.testing.assert_close(packed(image().double()), plain.double()(image().double()))
    assert packed._packed is None
    program = torch.export.export(packed.float(), (image(),))
    torch.testing.assert_close(program.module()(image()), plain.float()(image()), rtol=1e-5, atol=1e-5)


def test_weights_made_in_inference_mode() -> None:
    with torch.inference_mode():
        packed, plain = pair()
        torch.testing.assert_close(packed(image()), plain(image()), rtol=1e-5, atol=1e-5)
