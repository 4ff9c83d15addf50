"""The mathematics of the upsampling convolution in plain PyTorch: the oracle every backend is compared with."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def upsample_twice(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Transposed 3×3 convolution of stride 2, without its last row and column: ``[B, C, H, W]`` → ``[B, O, 2H, 2W]``.

    Position (i, j) spreads over (2i … 2i + 2, 2j … 2j + 2), as with TensorFlow's padding ``same``.
    """
    return F.conv_transpose2d(x, weight, bias, stride=2)[..., :-1, :-1]
