"""BTI-Net-B4 at 224² end to end: a training step and inference, plain PyTorch and ours.

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
from variants import GateError

from btinet.models import create_model
from btinet.training.losses import LossOptions, classification_loss, segmentation_loss
from btinet_kernels import use_backend

MODEL, CLASSES, SIZE = "btinet_efficientnet_b4", 3, 224
TRAINING, INFERENCE = "training step", "inference"
VARIANTS = ("eager", "compile", "ours", "ours compiled")
TOLERANCE = 1e-3  # of the largest logit, in inference; two hundred layers of float32
LOSS_TOLERANCE = 1e-3  # of the loss after one step: training amplifies rounding


@dataclass(frozen=True)
class NetworkCase:
    """What one sample does: forward, losses, backward and PyTorch's fused Adam, or a forward in inference mode."""

    mode: str
    batch: int

    @property
    def name(self) -> str:
        optimizer = ", fused Adam" if self.mode == TRAINING else ""
        return f"{MODEL}, {self.mode}{optimizer}, B={self.batch}, {SIZE}x{SIZE}, float32, channels_last"


def network_cases() -> list[NetworkCase]:
    """Two of training and inference: B = 8 and one image."""
    return [NetworkCase(TRAINING, 8), NetworkCase(INFERENCE, 8), NetworkCase(INFERENCE, 1)]


class NetworkProblem:
    """A case with its variants. All start from the same weights and see the same batch."""

    def __init__(self, case: NetworkCase, names: tuple[str, ...] = VARIANTS) -> None:
        torch.manual_seed(0)
        self.case = case
        network = create_model(MODEL, CLASSES, dropout=0.0).to(memory_format=torch.channels_last)
        network.train(case.mode == TRAINING)
        images = torch.randn(case.batch, 3, SIZE, SIZE).contiguous(memory_format=torch.channels_last)
        self.images = images
        self.masks = (torch.rand(case.batch, 1, SIZE, SIZE) > 0.7).float()
        self.labels = torch.arange(case.batch) % CLASSES
        torch.compiler.reset()
        self._steps = {name: self._step_of(name, copy.deepcopy(network)) for name in names}

    def samples(self, direction: str) -> dict[str, Sample]:
        """What times each variant; raises ``GateError`` where one differs from eager PyTorch."""
        first = {name: self.run(name, direction) for name in self._steps}
        allowed = LOSS_TOLERANCE if self.case.mode == TRAINING else TOLERANCE
        for name, result in first.items():
            error = float((result - first["eager"]).abs().max() / first["eager"].abs().max())
            if not error <= allowed:
                raise GateError(f"{self.case.name}: {name} differs by {error:.1e} from eager ({allowed:.0e} allowed)")
        return {name: cpu_sample(lambda name=name: self.run(name, direction)) for name in self._steps}  # type: ignore[misc]

    def run(self, name: str, direction: str) -> Tensor:
        """One step; the loss, or the segmentation's logits."""
        return self._steps[name]()

    def _step_of(self, name: str, network: nn.Module) -> Callable[[], Tensor]:
        backend = "auto" if name.startswith("ours") else "reference"
        call: Any = torch.compile(network, dynamic=False) if name.endswith(("compile", "compiled")) else network
        if self.case.mode == INFERENCE:

            def infer() -> Tensor:
                with use_backend(backend), torch.inference_mode():
                    return call(self.images).seg_logits

            return infer
        optimizer = torch.optim.Adam(network.parameters(), 1e-5, fused=True)
        losses = LossOptions()

        def train() -> Tensor:
            with use_backend(backend):
                output = call(self.images)
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
