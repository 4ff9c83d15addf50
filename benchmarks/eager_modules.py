"""TIM and its gate as one writes them in plain PyTorch: the baseline, also of ``torch.compile``.

One module per sentence of the papers, on full tensors, without algebra that saves memory traffic. Submodules are named
as in ``btinet_kernels.nn.TaskInteractionLevel``, and the parameters are the same.

Source: arXiv 2603.01295, equations (1)-(5) and (8), and arXiv 2606.29102 for the gate.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from btinet_kernels.nn import NORM_EPSILON, NORM_MOMENTUM, TaskInteractionLevel


class EagerTaskInteraction(nn.Module):
    """``(seg [B, C, H, W], clf [B, K])`` → both, enhanced."""

    def __init__(self, seg_channels: int, clf_channels: int, strength: float = 0.7) -> None:
        super().__init__()
        width = max(1, seg_channels // 2)
        self.strength = strength
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.context = nn.Conv2d(seg_channels, width, 1)
        self.dense = nn.Linear(width, clf_channels)
        self.norm = nn.BatchNorm1d(clf_channels, eps=NORM_EPSILON, momentum=NORM_MOMENTUM)
        self.clf_gate = nn.Linear(clf_channels, clf_channels)
        self.seg_gate = nn.Linear(seg_channels, seg_channels)
        self.clf_to_seg = nn.Linear(clf_channels, seg_channels)

    def forward(self, seg: Tensor, clf: Tensor) -> tuple[Tensor, Tensor]:
        pooled = self.pool(F.relu(self.context(seg))).flatten(1)
        context = self.norm(F.relu(self.dense(pooled)))
        clf_enhanced = clf + torch.sigmoid(self.clf_gate(context)) * context
        seg_gate = torch.sigmoid(self.seg_gate(self.pool(seg).flatten(1)))
        modulation = 1 + self.strength * seg_gate * torch.sigmoid(self.clf_to_seg(clf))
        return seg * modulation[:, :, None, None], clf_enhanced


class EagerProxyAttention(nn.Module):
    """Per-image gate between base and enhanced features of both streams."""

    def __init__(self, seg_channels: int, clf_channels: int, projection: int = 64, hidden: int = 32) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.seg_projection = nn.Linear(seg_channels, projection, bias=False)
        self.clf_projection = nn.Linear(clf_channels, projection, bias=False)
        self.hidden = nn.Linear(3, hidden)
        self.output = nn.Linear(hidden, 2)

    def forward(self, seg: Tensor, seg_enhanced: Tensor, clf: Tensor, clf_enhanced: Tensor) -> tuple[Tensor, Tensor]:
        seg_change = self.seg_projection(self.pool(seg_enhanced - seg).flatten(1))
        clf_change = self.clf_projection(clf_enhanced - clf)
        # The bound of 1e-6 on the norm is TensorFlow's 1e-12 on its square.
        alignment = (F.normalize(seg_change, eps=1e-6) * F.normalize(clf_change, eps=1e-6)).sum(1)
        vertical = (seg[:, :, 1:] - seg[:, :, :-1]).abs().sum((1, 2, 3))
        horizontal = (seg[:, :, :, 1:] - seg[:, :, :, :-1]).abs().sum((1, 2, 3))
        seg_energy = (vertical + horizontal) / seg[0].numel()
        clf_energy = torch.log1p(clf_enhanced.var(1, unbiased=False))
        signals = torch.stack((alignment, seg_energy, clf_energy), 1)
        gates = torch.sigmoid(self.output(F.relu(self.hidden(signals))))
        seg_gate, clf_gate = gates[:, :1], gates[:, 1:]
        seg_out = seg + seg_gate[:, :, None, None] * (seg_enhanced - seg)
        return seg_out, clf + clf_gate * (clf_enhanced - clf)


class EagerLevel(nn.Module):
    """One decoder level: ``(seg, clf)`` → both, after TIM and its gate."""

    def __init__(self, seg_channels: int, clf_channels: int) -> None:
        super().__init__()
        self.tim = EagerTaskInteraction(seg_channels, clf_channels)
        self.upa = EagerProxyAttention(seg_channels, clf_channels)

    def forward(self, seg: Tensor, clf: Tensor) -> tuple[Tensor, Tensor]:
        seg_enhanced, clf_enhanced = self.tim(seg, clf)
        return self.upa(seg, seg_enhanced, clf, clf_enhanced)


def eager_twin(level: TaskInteractionLevel) -> EagerLevel:
    """The eager modules with the parameters, buffers, dtype, device and mode of ``level``."""
    state = dict(level.state_dict())
    width, seg_channels = state["tim.context.weight"].shape
    state["tim.context.weight"] = state["tim.context.weight"].reshape(width, seg_channels, 1, 1)
    twin = EagerLevel(seg_channels, level.tim.dense.out_features)
    twin.to(level.tim.context.weight)
    twin.load_state_dict(state)
    return twin.train(level.training)
