"""The statistics of the segmentation loss on the CPU: thin callers of ``csrc/cpu/segmentation_loss.h``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from btinet_kernels.backends import native_module
from btinet_kernels.interaction.passes_op import accumulation_dtype
from btinet_kernels.losses.reference import EPSILON, MaskStatistics, curvature_kernel
from btinet_kernels.native_calls import call, dense, nowhere

_ROWS = curvature_kernel()
_CURVATURE = [_ROWS[2][3], _ROWS[2][4], _ROWS[3][4]]  # of the offsets (x, y) = (1, 0), (2, 0), (2, 1)


def statistics(logits: Tensor, target: Tensor, *, hard_boundary: bool, cross_entropy: bool) -> tuple[Tensor, Tensor]:
    """``MaskStatistics`` as ``[B, 8]``, and the mean of the Sobel response to the prediction, ``[B]``: float64."""
    result = logits.new_empty(len(logits), len(MaskStatistics._fields), dtype=torch.float64)
    sobel_mean = logits.new_empty(len(logits), dtype=torch.float64)
    call(
        "mask_statistics",
        logits,
        dense(logits),
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
    call(
        "mask_statistics_backward",
        logits,
        gradient.data_ptr(),
        dense(logits),
        *_target(target, accumulation_dtype(logits)),
        native_module.MaskFilter(_CURVATURE, EPSILON, hard_boundary, False),
        sobel_mean.data_ptr(),
        dense(out),
    )
    return out


def _target(target: Tensor, dtype: torch.dtype) -> tuple[Any, Any]:
    """The target as values and as bytes, one of them nowhere."""
    assert target.dtype in (dtype, torch.uint8, torch.bool)
    there, missing = dense(target), nowhere(target)
    return (there, missing) if target.dtype == dtype else (missing, there)
