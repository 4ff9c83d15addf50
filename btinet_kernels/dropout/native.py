"""Dropout on the CPU, in C++: a thin caller of ``csrc``."""

from __future__ import annotations

import torch
from torch import Tensor

from btinet_kernels.dropout.reference import factor, threshold
from btinet_kernels.native_calls import call


def dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """See ``reference.dropout``."""
    out = torch.empty_like(x)
    if out.stride() != x.stride():  # x is not dense
        x = out.copy_(x)
    call("dropout", x, x.data_ptr(), x.numel(), int(seed), threshold(p), factor(p), out.data_ptr())
    return out
