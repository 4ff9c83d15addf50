"""The optimizer of both stages: the numbers of PyTorch's plain Adam, whatever Fabric does around it."""

from pathlib import Path

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision
from torch import Tensor, nn

from btinet.training.epochs import CLIP_NORM
from btinet.training.stages import _adam


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 37, 3), nn.ReLU(), nn.Conv2d(37, 5, 3))
    return layers.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def steps(fabric: Fabric, module: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
    module, optimizer = fabric.setup(module, optimizer)
    for step in numbers:
        torch.manual_seed(step)
        optimizer.zero_grad(set_to_none=True)
        fabric.backward(module(torch.randn(2, 3, 12, 12)).square().mean())
        fabric.clip_gradients(module, optimizer, max_norm=CLIP_NORM, error_if_nonfinite=False)
        optimizer.step()


def weights(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def half_precision_with_a_scaler() -> Fabric:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    return Fabric(accelerator="cpu", plugins=MixedPrecision("16-mixed", "cpu", scaler=scaler))


@pytest.mark.parametrize("make", [lambda: Fabric(accelerator="cpu"), half_precision_with_a_scaler])
def test_adam_is_that_of_pytorch(make) -> None:  # type: ignore[no-untyped-def]
    ours, plain = network(), network()
    steps(fabric := make(), ours, _adam(fabric, list(ours.parameters()), 1e-2, beta1=0.91), range(5))
    steps(make(), plain, torch.optim.Adam(plain.parameters(), 1e-2, betas=(0.91, 0.999), eps=1e-7), range(5))
    for a, b, start in zip(weights(ours), weights(plain), weights(network()), strict=True):
        assert (b - start).abs().max() > 1e-2
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_adam_is_fused_where_no_scaler_keeps_it_from_clipping() -> None:
    parameters = list(network().parameters())
    assert _adam(Fabric(accelerator="cpu", precision="bf16-mixed"), parameters, 1e-3).defaults["fused"]
    assert not _adam(half_precision_with_a_scaler(), parameters, 1e-3).defaults["fused"]


def test_adam_resumes_bit_for_bit(tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cpu")
    whole, resumed = network(), network()
    optimizer = _adam(fabric, list(whole.parameters()), 1e-2)
    steps(fabric, whole, optimizer, range(2))
    torch.save({"network": whole.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    steps(fabric, whole, optimizer, range(2, 4))
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    resumed.load_state_dict(saved["network"])
    optimizer = _adam(fabric, list(resumed.parameters()), 1e-2)
    optimizer.load_state_dict(saved["optimizer"])
    steps(fabric, resumed, optimizer, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))
