"""Batch normalisation and an activation in plain PyTorch: the oracle every backend is compared with.

Source: arXiv 1502.03167.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

Act = Literal["identity", "relu", "silu"]
ACTIVATIONS: tuple[Act, ...] = ("identity", "relu", "silu")


def activation(z: Tensor, act: str) -> Tensor:
    """The activation of this name."""
    if act == "identity":
        return z
    return F.relu(z) if act == "relu" else F.silu(z)


def batch_norm_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    act: str,
) -> Tensor:
    """See ``fused_batch_norm_act``."""
    return activation(F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps), act)
