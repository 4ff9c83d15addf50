"""The statistics of the segmentation loss on the CPU: thin callers of ``csrc/cpu/segmentation_loss.h``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from btinet_kernels.backends import native_module
from btinet_kernels.interaction.passes_op import accumulation_dtype
from btinet_kernels.interaction.pointers import sizes_and_strides
from btinet_kernels.losses.reference import EPSILON, MaskStatistics, curvature_kernel

_ROWS = curvature_kernel()
_CURVATURE = [_ROWS[2][3], _ROWS[2][4], _ROWS[3][4]]  # of the offsets (x, y) = (1, 0), (2, 0), (2, 1)


def statistics(logits: Tensor, target: Tensor, *, hard_boundary: bool, cross_entropy: bool) -> tuple[Tensor, Tensor]:
    """``MaskStatistics`` as ``[B, 8]``, and the mean of the Sobel response to the prediction, ``[B]``: float64."""
    result = logits.new_empty(len(logits), len(MaskStatistics._fields), dtype=torch.float64)
    sobel_mean = logits.new_empty(len(logits), dtype=torch.float64)
    _call(
        "mask_statistics",
        logits,
        _dense(logits),
        *_target(target, accumulation_dtype(logits)),
        native_module.MaskFilter(_CURVATURE, EPSILON, hard_boundary, cross_entropy),
        result.data_ptr(),
        sobel_mean.data_ptr(),
    )
    return result, sobel_mean


def statistics_backward(
    d_statistics: Tensor, logits: Tensor, target: Tensor, sobel_mean: Tensor, *, hard_boundary: bool
) -> Tensor:
    """The gradient of the logits."""
    out = torch.empty_like(logits)
    gradient = d_statistics.contiguous()
    _call(
        "mask_statistics_backward",
        logits,
        gradient.data_ptr(),
        _dense(logits),
        *_target(target, accumulation_dtype(logits)),
        native_module.MaskFilter(_CURVATURE, EPSILON, hard_boundary, False),
        sobel_mean.data_ptr(),
        _dense(out),
    )
    return out


def _target(target: Tensor, dtype: torch.dtype) -> tuple[Any, Any]:
    """The target as values and as bytes, one of them nowhere."""
    assert target.dtype in (dtype, torch.uint8, torch.bool)
    there, nowhere = _dense(target), native_module.Dense(0, *sizes_and_strides(target))
    return (there, nowhere) if target.dtype == dtype else (nowhere, there)


def _dense(tensor: Tensor) -> Any:
    return native_module.Dense(tensor.data_ptr(), *sizes_and_strides(tensor))


def _call(name: str, logits: Tensor, *arguments: Any) -> None:
    kernel = getattr(native_module, f"{name}_{str(logits.dtype).removeprefix('torch.')}")
    kernel(*arguments, torch.get_num_threads())
