"""Depthwise convolution in plain PyTorch: the oracle every backend is compared with.

Source: arXiv 1610.02357.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Geometry(NamedTuple):
    """How a kernel is laid over an image; each along y and x."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]

    def output_size(self, size: Sequence[int], kernel: Sequence[int]) -> list[int]:
        """``[H, W]`` of the result for images and kernels of these sizes."""
        return [
            (n + 2 * padding - dilation * (k - 1) - 1) // stride + 1
            for n, k, stride, padding, dilation in zip(size, kernel, *self, strict=True)
        ]

    @staticmethod
    def format_of(x: Tensor) -> torch.memory_format:
        """The memory format of the result."""
        return torch.channels_last if x.stride(1) == 1 and not x.is_contiguous() else torch.contiguous_format

    def new_result(self, x: Tensor, weight: Tensor) -> Tensor:
        """An uninitialised result of the convolution of ``x`` with ``weight``."""
        size = [*x.shape[:2], *self.output_size(x.shape[2:], weight.shape[2:])]
        return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=self.format_of(x))


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """See ``fused_depthwise_conv``."""
    return F.conv2d(x, weight, bias, *geometry, groups=x.shape[1])
