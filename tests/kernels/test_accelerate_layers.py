"""accelerate() on single layers: batch normalisation and depthwise convolutions of timm and PyTorch."""

import copy
import re
import sys

import pytest
import torch
from torch import Tensor, nn

from btinet_kernels import accelerate, use_backend

timm = pytest.importorskip("timm")

from timm.layers import BatchNormAct2d, create_conv2d  # noqa: E402

NORMS = {
    "silu": lambda: BatchNormAct2d(24, act_layer=nn.SiLU),
    "relu": lambda: BatchNormAct2d(24),
    "identity": lambda: BatchNormAct2d(24, apply_act=False),
    "plain": lambda: nn.BatchNorm2d(24),
    "cumulative": lambda: BatchNormAct2d(24, momentum=None, act_layer=nn.SiLU),
    "untracked": lambda: BatchNormAct2d(24, track_running_stats=False, act_layer=nn.SiLU),
    "without weights": lambda: nn.BatchNorm2d(24, affine=False),
}


def trained(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Three steps in training and one in evaluation: outputs, gradients and buffers."""
    results = []
    for step in range(4):
        module.train(step < 3)
        leaf = (x + step).detach().requires_grad_()
        out = module(leaf * 1)
        results += [out, *torch.autograd.grad(out.sin().sum(), [leaf, *module.parameters()])]
    return [*results, *module.buffers()]


@pytest.mark.parametrize("backend", ["native", "auto", "reference"])
@pytest.mark.parametrize("name", NORMS)
def test_batch_norm(name: str, backend: str) -> None:
    torch.manual_seed(0)
    model = NORMS[name]().double()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    fast = copy.deepcopy(model)
    assert accelerate(fast).replaced == [""]
    x = torch.randn(2, 24, 60, 60, dtype=torch.float64)
    with use_backend(backend):
        ours = trained(fast, x)
    for a, b in zip(ours, trained(model, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ["native", "auto", "reference"])
@pytest.mark.parametrize(
    "options", [{"kernel_size": 5}, {"kernel_size": 3, "stride": 2}, {"kernel_size": 3, "dilation": 2}]
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_depthwise(channels_last: bool, options: dict[str, int], backend: str) -> None:
    torch.manual_seed(0)
    model = create_conv2d(20, 20, depthwise=True, **options).double()
    fast = copy.deepcopy(model)
    assert accelerate(fast).replaced == [""]
    x = torch.randn(2, 20, 31, 30, dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    with use_backend(backend):
        ours = trained(fast, x)
    for a, b in zip(ours, trained(model, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (lambda: BatchNormAct2d(8, act_layer=nn.GELU), "its activation is GELU, not ReLU or SiLU"),
        (lambda: BatchNormAct2d(8, drop_layer=nn.Dropout), r"it drops between .*\(Dropout\)"),
        (lambda: nn.Conv2d(8, 8, 3, groups=8, padding="same"), "its padding is 'same'"),
        (lambda: nn.Conv2d(8, 8, 3, groups=8, padding_mode="reflect"), "it pads by reflect"),
        (lambda: type("Mine", (nn.Conv2d,), {})(8, 8, 3, groups=8), "it is a subclass of Conv2d"),
    ],
)
def test_what_is_not_the_same_is_left(module, reason: str) -> None:  # type: ignore[no-untyped-def]
    report = accelerate(module())
    assert not report.replaced
    assert re.search(reason, str(report)), str(report)


def test_other_convolutions_are_not_mentioned() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(1, 1, 3))
    report = accelerate(model)
    assert not report.modules
    assert report.unknown == 4


def test_autocast_and_other_inputs_run_the_original() -> None:
    conv, norm = nn.Conv2d(8, 8, 5, groups=8, padding=2), nn.BatchNorm2d(8)
    x = torch.randn(2, 8, 40, 40)
    expected = conv(x)
    accelerate(conv)
    accelerate(norm)
    with torch.autocast("cpu"):
        assert conv(x).dtype == torch.bfloat16
    torch.testing.assert_close(conv(x), expected)
    with pytest.raises(ValueError, match="expected 4D input"):
        norm(x[0])
    with use_backend("native"), pytest.raises(ValueError, match=r"[Ee]xpected more than"):
        norm(x[:1, :, :1, :1])


def test_alike_modules_are_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module, checked = sys.modules["btinet_kernels.accelerate"], []
    monkeypatch.setattr(module, "_passed", set())
    monkeypatch.setattr(module, "check", lambda m, *_: checked.append(m))
    model = nn.Sequential(nn.BatchNorm2d(7), nn.BatchNorm2d(7), nn.BatchNorm2d(7, eps=1e-3), nn.BatchNorm2d(9))
    assert len(accelerate(model).replaced) == 4
    assert checked == [model[0], model[2], model[3]]
