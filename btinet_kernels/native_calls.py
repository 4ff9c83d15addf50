"""How the callers of native kernels hand over tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from btinet_kernels.backends import native_module
from btinet_kernels.interaction.pointers import sizes_and_strides


def dense(tensor: Tensor) -> Any:
    """A dense tensor as the kernels see it."""
    return native_module.Dense(tensor.data_ptr(), *sizes_and_strides(tensor))


def nowhere(like: Tensor) -> Any:
    """A dense tensor that is not there, of the shape and strides of ``like``."""
    return native_module.Dense(0, *sizes_and_strides(like))


def call(name: str, x: Tensor, *arguments: Any) -> None:
    """Run the kernel ``name`` for the dtype of ``x``."""
    kernel = getattr(native_module, f"{name}_{str(x.dtype).removeprefix('torch.')}")
    kernel(*arguments, torch.get_num_threads())
