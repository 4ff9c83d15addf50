"""Modules of the network at their shapes in BTI-Net-B4 at 224², and everything that can serve them.

*eager* and *compile* are the plain PyTorch modules (``use_backend("reference")``) in eager mode and under
``torch.compile``; *ours* is what ``auto`` takes, and *ours compiled* the same under ``torch.compile``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from cases import BOTH, FORWARD
from timing import Sample, cpu_sample
from torch import Tensor, nn
from variants import GateError

from btinet.models.network import UpsampleTwice
from btinet_kernels import fused_batch_norm_act, fused_depthwise_conv, fused_segmentation_loss, use_backend
from btinet_kernels.nn import AttentionGate, DualPathAttention, MultiScaleContextFusion, SeparableConv, SqueezeExcite

ENCODER = ((144, 112), (192, 56), (336, 28), (960, 14), (1792, 7))  # C, height = width
DECODER = ((384, 14), (192, 28), (96, 56), (48, 112))
# C, outputs, size: those whose inputs differ from their outputs are in the decoder
SEPARABLE = (
    (144, 144, 112),
    (192, 48, 112),
    (192, 192, 56),
    (288, 96, 56),
    (336, 336, 28),
    (528, 192, 28),
    (960, 960, 14),
    (1344, 384, 14),
    (1792, 1792, 7),
)
# Skip connection's and decoder's channels, size
ATTENTION_GATES = ((144, 48, 112), (192, 96, 56), (336, 192, 28), (960, 384, 14))
# C, outputs, size
UPSAMPLING = ((1792, 384, 7), (384, 192, 14), (192, 96, 28), (96, 48, 56), (48, 24, 112))
# C, size, kernel of a stage's depthwise convolutions of stride 1; BatchNorm with SiLU and squeeze-and-excitation follow
EXPANDED = ((24, 112, 3), (192, 56, 3), (336, 28, 5), (672, 14, 3), (960, 14, 5), (1632, 7, 5))
AT_KINKS = 5e-4  # a gradient is there or not where a ReLU's input is zero but for rounding, in plain PyTorch as well
TOLERANCE = 1e-4  # of a result's norm: float32 sums over 100 000 positions, a few of them in a row


@dataclass(frozen=True)
class ModuleCase:
    """A module on inputs of one shape, float32, channels_last."""

    operator: str
    channels: int
    size: int
    make: Callable[[int], nn.Module]
    batch: int = 8
    outputs: int | None = None  # channels, where they are not those of the input
    tolerance: float = TOLERANCE

    @property
    def name(self) -> str:
        channels = self.channels if self.outputs is None else f"{self.channels}->{self.outputs}"
        return f"{self.operator} {channels}x{self.size}x{self.size}, B={self.batch}"


class GatedResidual(nn.Module):
    """Dual-path attention as it ends a residual block: ``ReLU(attention(x) + x)``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attention = DualPathAttention(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x)


class SegmentationLoss(nn.Module):
    """The loss of logits and a random mask."""

    def __init__(self, channels: int, batch: int = 8, size: int = 224) -> None:
        super().__init__()
        self.register_buffer("target", (torch.rand(batch, channels, size, size) > 0.7).float())

    def forward(self, x: Tensor) -> Tensor:
        return fused_segmentation_loss(x, self.target)


class NormedConv(nn.Module):
    """A residual block's first separable convolution, with the ReLU and the BatchNorm behind it, in training."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.conv = SeparableConv(channels, outputs)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x, relu=True, norm=self.norm)


class Gate(nn.Module):
    """The attention gate of a skip connection; what it is gated by is learned, so that its gradient is computed."""

    def __init__(self, channels: int, gating: int, size: int, batch: int = 8) -> None:
        super().__init__()
        self.gate = AttentionGate(channels, gating, gating // 2)
        self.by = nn.Parameter(torch.randn(batch, gating, size, size))

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x, self.by)


class NormedSiLU(nn.Module):
    """Batch normalisation in training and the SiLU behind it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        vectors = norm.weight, norm.bias, norm.running_mean, norm.running_var
        return fused_batch_norm_act(x, *vectors, training=True, act="silu")


class DepthwiseConv(nn.Module):
    """One kernel for each channel, stride 1."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels, 1, width, width) / width)

    def forward(self, x: Tensor) -> Tensor:
        return fused_depthwise_conv(x, self.weight, padding=self.weight.shape[-1] // 2)


def module_cases() -> list[ModuleCase]:
    """All of them, those that take most of a training step first."""
    fusions = [ModuleCase("multi-scale fusion", c, s, MultiScaleContextFusion) for c, s in ENCODER + DECODER]
    attention = [ModuleCase("dual-path attention", c, s, GatedResidual) for c, s in ENCODER]
    convolutions = [
        ModuleCase("separable convolution", c, s, partial(NormedConv, outputs=o), outputs=o, tolerance=AT_KINKS)
        for c, o, s in SEPARABLE
    ]
    gates = [
        ModuleCase("attention gate", c, s, partial(Gate, gating=g, size=s), tolerance=AT_KINKS)
        for c, g, s in ATTENTION_GATES
    ]
    upsampling = [ModuleCase("upsampling", c, s, partial(UpsampleTwice, out_channels=o)) for c, o, s in UPSAMPLING]
    encoder = [
        case
        for c, s, width in EXPANDED
        for case in (
            ModuleCase(f"depthwise {width}x{width}", c, s, partial(DepthwiseConv, width=width)),
            ModuleCase("BatchNorm and SiLU", c, s, NormedSiLU),
            ModuleCase("squeeze-and-excitation", c, s, partial(SqueezeExcite, reduced=c // 24, act="silu")),
        )
    ]
    loss = ModuleCase("segmentation loss", 1, 224, SegmentationLoss)
    return [*fusions, *convolutions, *attention, loss, *gates, *upsampling, *encoder]


class ModuleProblem:
    """A case with its variants, each compared with float64 before it may be timed."""

    def __init__(self, case: ModuleCase) -> None:
        torch.manual_seed(0)
        self.case = case
        self.module = case.make(case.channels).to(memory_format=torch.channels_last)
        shape = (case.batch, case.channels, case.size, case.size)
        self.x = torch.randn(shape).to(memory_format=torch.channels_last).requires_grad_()
        with torch.no_grad():
            self.upstream = torch.randn_like(self.module(self.x))
        torch.compiler.reset()
        self.variants: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
            "eager": ("reference", self.module),
            "compile": ("reference", torch.compile(self.module, dynamic=False)),
            "ours": ("auto", self.module),
            "ours compiled": ("auto", torch.compile(copy.deepcopy(self.module), dynamic=False)),
        }
        self._parameters = {name: list(self.module.parameters()) for name in self.variants}
        self._parameters["ours compiled"] = list(self.variants["ours compiled"][1].parameters())  # type: ignore[attr-defined]

    def samples(self, direction: str) -> dict[str, Sample]:
        """What times each variant; raises ``GateError`` if one of them is wrong."""
        exact = self._exact()
        for name in self.variants:
            for what, (result, expected) in enumerate(zip(self.run(name, BOTH), exact, strict=True)):
                error = float((result.double() - expected).norm() / expected.norm())
                if not error <= self.case.tolerance:  # also for NaN
                    raise GateError(f"{self.case.name}: {name} is off by {error:.1e} in result {what}")
        return {name: cpu_sample(lambda name=name: self.run(name, direction)) for name in self.variants}  # type: ignore[misc]

    def run(self, name: str, direction: str) -> list[Tensor]:
        """One call: the output without recording, or the output and the gradients of the input and all parameters."""
        backend, call = self.variants[name]
        with use_backend(backend), torch.set_grad_enabled(direction == BOTH):
            out = call(self.x)
            if direction == FORWARD:
                return [out]
            return [out.detach(), *torch.autograd.grad(out, [self.x, *self._parameters[name]], self.upstream)]

    def _exact(self) -> list[Tensor]:
        module, x = copy.deepcopy(self.module).double(), self.x.detach().double().requires_grad_()
        with use_backend("reference"):
            out = module(x)
            return [out.detach(), *torch.autograd.grad(out, [x, *module.parameters()], self.upstream.double())]


def recorded(case: ModuleCase, direction: str, summaries: dict[str, Any]) -> dict[str, Any]:
    """A case as it is written."""
    return {
        "name": case.name,
        "operator": case.operator,
        "channels": case.channels,
        "size": case.size,
        "batch": case.batch,
        "dtype": "float32",
        "layout": "channels_last",
        "direction": direction,
        "variants": {name: summary.as_dict() for name, summary in summaries.items()},
    }
