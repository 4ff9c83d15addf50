"""BTI-Net (B4 unless said otherwise) at 224² end to end: a training step and inference, plain PyTorch and ours.

As a script it prints the peak memory of one variant in a process of its own:
``python benchmarks/network.py training 8 ours``.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from btinet.allocator import keep_pages

if __name__ == "__main__":
    keep_pages()  # before anything is allocated

import torch
from timing import Sample, cpu_sample
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from variants import GateError

from btinet.models import BTINet, create_model
from btinet.models.network import BTINetConfig
from btinet.training.losses import LossOptions, classification_loss, segmentation_loss
from btinet_kernels import use_backend

MODEL, CLASSES, SIZE = "btinet_efficientnet_b4", 3, 224
TRAINING, INFERENCE = "training step", "inference"
VARIANTS = ("eager", "compile", "ours", "ours compiled")
FUSED, HALF, FUSED_HALF = "ours, fuse()", "eager, bfloat16", "ours, fuse(), bfloat16"
IN_INFERENCE = (FUSED, HALF, FUSED_HALF)
TOLERANCE = 1e-3  # of the largest logit, in inference; two hundred layers of float32
HALF_TOLERANCE = 0.1  # of the same in bfloat16, which rounds every layer to 8 bits
LOSS_TOLERANCE = 1e-3  # of the loss after one step: training amplifies rounding


@dataclass(frozen=True)
class NetworkCase:
    """What one sample does: forward, losses, backward and PyTorch's fused Adam, or a forward in inference mode."""

    mode: str
    batch: int
    dropout: float = 0.0
    model: str = MODEL

    @property
    def name(self) -> str:
        details = ", fused Adam" * (self.mode == TRAINING) + f", dropout {self.dropout}" * (self.dropout > 0)
        return f"{self.model}, {self.mode}{details}, B={self.batch}, {SIZE}x{SIZE}, float32, channels_last"

    @property
    def variants(self) -> tuple[str, ...]:
        """With dropout, every variant draws numbers of its own, and only the first two are compared without."""
        if self.dropout:
            return "eager", "ours"
        return VARIANTS + IN_INFERENCE * (self.mode == INFERENCE)


def network_cases() -> list[NetworkCase]:
    """Training without dropout and as ``btinet train`` does it, and inference of a batch and of one image."""
    default = BTINetConfig.dropout
    return [
        NetworkCase(TRAINING, 8),
        NetworkCase(TRAINING, 8, default),
        NetworkCase(INFERENCE, 8),
        NetworkCase(INFERENCE, 1),
    ]


class NetworkProblem:
    """A case with its variants. All start from the same weights and see the same batch."""

    def __init__(self, case: NetworkCase, names: tuple[str, ...] = VARIANTS) -> None:
        torch.manual_seed(0)
        self.case = case
        network = create_model(case.model, CLASSES, dropout=0.0).to(memory_format=torch.channels_last)
        network.train(case.mode == TRAINING)
        images = torch.randn(case.batch, 3, SIZE, SIZE).contiguous(memory_format=torch.channels_last)
        self.images = images
        self.masks = (torch.rand(case.batch, 1, SIZE, SIZE) > 0.7).float()
        self.labels = torch.arange(case.batch) % CLASSES
        torch.compiler.reset()
        self._networks = {name: copy.deepcopy(network) for name in names}
        self._steps = {name: self._step_of(name, each) for name, each in self._networks.items()}

    def samples(self, direction: str) -> dict[str, Sample]:
        """What times each variant; raises ``GateError`` where one differs from eager PyTorch."""
        first = {name: self.run(name, direction) for name in self._steps}
        for name, result in first.items():
            allowed = LOSS_TOLERANCE if self.case.mode == TRAINING else TOLERANCE
            if "bfloat16" in name:
                allowed = HALF_TOLERANCE
            error = float((result - first["eager"]).abs().max() / first["eager"].abs().max())
            if not error <= allowed:
                raise GateError(f"{self.case.name}: {name} differs by {error:.1e} from eager ({allowed:.0e} allowed)")
        self.set_dropout()
        return {name: cpu_sample(lambda name=name: self.run(name, direction)) for name in self._steps}  # type: ignore[misc]

    def flops(self, name: str) -> int:
        """Of a training step's convolutions and products: three times the forward's.

        Those of the backward are not counted: FlopCounterMode takes grouped convolutions for full ones there.
        """
        with FlopCounterMode(display=False) as counter, use_backend("reference"), torch.no_grad():
            self._networks[name](self.images)
        return 3 * counter.get_total_flops()

    def set_dropout(self) -> None:
        """That of the case; without it until then, so that variants can be compared."""
        for module in (m for network in self._networks.values() for m in network.modules()):
            if isinstance(module, nn.Dropout):
                module.p = self.case.dropout

    def run(self, name: str, direction: str) -> Tensor:
        """One step; the loss, or the segmentation's logits."""
        return self._steps[name]()

    def _step_of(self, name: str, network: BTINet) -> Callable[[], Tensor]:
        backend = "auto" if name.startswith("ours") else "reference"
        if "fuse()" in name:
            network = network.fuse(SIZE)
        images = self.images
        if "bfloat16" in name:
            network, images = network.bfloat16(), images.bfloat16()
        call: Any = torch.compile(network, dynamic=False) if name.endswith(("compile", "compiled")) else network
        if self.case.mode == INFERENCE:

            def infer() -> Tensor:
                with use_backend(backend), torch.inference_mode():
                    return call(images).seg_logits.float()

            return infer
        optimizer = torch.optim.Adam(network.parameters(), 1e-5, fused=True)
        losses = LossOptions()

        def train() -> Tensor:
            with use_backend(backend):
                output = call(images)
                loss = segmentation_loss(output.seg_logits, self.masks, losses)
                loss = loss + classification_loss(output.cls_logits, self.labels, losses)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
            return loss.detach()

        return train


def peak_memory_mib(case: NetworkCase, variant: str) -> float:
    """Peak resident memory of a process that does nothing but three steps of a variant."""
    command = [sys.executable, str(Path(__file__)), case.mode, str(case.batch), variant]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def _print_peak(mode: str, batch: str, variant: str) -> None:
    problem = NetworkProblem(NetworkCase(mode, int(batch)), (variant,))
    before = _peak_mib()
    for _ in range(3):
        problem.run(variant, "")
    print(f"before the first step {before:.0f}, peak MiB: {_peak_mib():.0f}")


def _peak_mib() -> float:
    # not ru_maxrss, which a process inherits from the one that started it
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


if __name__ == "__main__":
    _print_peak(*sys.argv[1:])
