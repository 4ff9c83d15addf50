"""A network of segmentation_models_pytorch, as it is and after ``btinet_kernels.accelerate``."""

from __future__ import annotations

import copy
from functools import partial

import torch
from timing import Sample, cpu_sample
from torch import Tensor
from torch.nn import functional as F
from variants import GateError

from btinet_kernels import accelerate

TOLERANCE = 1e-3  # of the loss after one step: training amplifies rounding


class ForeignProblem:
    """A training step of its Unet with a classification head: both losses, backward, fused Adam."""

    batch = 8
    name = f"segmentation_models_pytorch Unet (timm-efficientnet-b0, aux_params), training step, B={batch}, 224x224"

    def __init__(self) -> None:
        import segmentation_models_pytorch as library

        torch.manual_seed(0)
        model = library.Unet("timm-efficientnet-b0", encoder_weights=None, aux_params={"classes": 3})
        model = model.to(memory_format=torch.channels_last).train()
        self.images = torch.randn(self.batch, 3, 224, 224).contiguous(memory_format=torch.channels_last)
        self.masks = (torch.rand(self.batch, 1, 224, 224) > 0.7).float()
        self.labels = torch.arange(self.batch) % 3
        self._models = {"eager": model, "ours": copy.deepcopy(model)}
        self.report = accelerate(self._models["ours"])
        self._optimizers = {n: torch.optim.Adam(m.parameters(), 1e-5, fused=True) for n, m in self._models.items()}

    def samples(self) -> dict[str, Sample]:
        """What times each variant; raises ``GateError`` where they differ."""
        losses = {}
        for name in self._models:
            torch.manual_seed(1)  # the same samples skip the same blocks
            losses[name] = float(self.run(name))
        error = abs(losses["ours"] - losses["eager"]) / abs(losses["eager"])
        if not error <= TOLERANCE:
            raise GateError(f"{self.name}: ours differs by {error:.1e} from eager")
        return {name: cpu_sample(partial(self.run, name)) for name in self._models}

    def run(self, name: str) -> Tensor:
        """One step; the loss."""
        masks, labels = self._models[name](self.images)
        loss = F.binary_cross_entropy_with_logits(masks, self.masks) + F.cross_entropy(labels, self.labels)
        self._optimizers[name].zero_grad(set_to_none=True)
        loss.backward()
        self._optimizers[name].step()
        return loss.detach()
