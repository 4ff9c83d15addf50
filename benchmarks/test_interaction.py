"""One interaction level, forward and forward + backward, at the shapes of BTI-Net's decoder: plain PyTorch and native.

Run it with ``pytest benchmarks/ --benchmark-only``. Nothing is timed before it has been compared with float64.
"""

import pytest
import torch
from torch import Tensor

from btinet_kernels import use_backend
from btinet_kernels.nn import TaskInteractionLevel

BATCH, VECTOR = 8, 256
SHAPES = [(384, 14), (192, 28), (96, 56), (48, 112)]
TOLERANCE = 1e-4  # relative to the largest magnitude; float32 sums over up to 100 000 positions


class Case:
    def __init__(self, channels: int, size: int, channels_last: bool) -> None:
        self.module = TaskInteractionLevel(channels, VECTOR).train()
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.seg = torch.randn(BATCH, channels, size, size).to(memory_format=layout).requires_grad_()
        self.clf = torch.randn(BATCH, VECTOR, requires_grad=True)
        self.upstream = [torch.randn_like(self.seg), torch.randn(BATCH, VECTOR)]

    def forward(self) -> list[Tensor]:
        result = self.module(self.seg, self.clf)
        return [result.seg, result.clf]

    def both(self) -> list[Tensor]:
        outputs = self.forward()
        inputs = [self.seg, self.clf, *self.module.tim.parameters()]
        return [*outputs, *torch.autograd.grad(outputs, inputs, self.upstream)]

    def exact(self) -> list[Tensor]:
        """``both`` in float64 by the reference."""
        state = {name: value.clone() for name, value in self.module.state_dict().items()}
        self.module.double()
        seg, clf = (x.detach().double().requires_grad_() for x in (self.seg, self.clf))
        with use_backend("reference"):
            result = self.module(seg, clf)
            outputs = [result.seg, result.clf]
            inputs = [seg, clf, *self.module.tim.parameters()]
            gradients = torch.autograd.grad(outputs, inputs, [u.double() for u in self.upstream])
        self.module.float().load_state_dict(state)
        return [*outputs, *gradients]


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize(("channels", "size"), SHAPES, ids=[f"{c}x{s}" for c, s in SHAPES])
def test_level(benchmark, channels: int, size: int, channels_last: bool, direction: str, backend: str) -> None:  # type: ignore[no-untyped-def]
    case = Case(channels, size, channels_last)
    with use_backend(backend):
        for ours, exact in zip(case.both(), case.exact(), strict=True):
            assert (ours.double() - exact).abs().max() <= TOLERANCE * exact.abs().max()
        benchmark.group = f"{channels}x{size} {'channels_last' if channels_last else 'contiguous'} {direction}"
        benchmark.pedantic(case.forward if direction == "forward" else case.both, rounds=20, warmup_rounds=3)
