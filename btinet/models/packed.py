"""Convolutions of a fused network on the CPU: their weights lie as oneDNN wants them, their activation is in the pass.

PyTorch turns the weights around in every call, which costs small batches more than the arithmetic of wide layers, and
reads every result once more for its activation. torch.compile uses the same operators where weights are frozen.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Conv2dSame, pad_same
from torch import Tensor, nn

from btinet_kernels.backends import requested_backend

ACTIVATIONS: dict[type[nn.Module], str] = {nn.Identity: "none", nn.ReLU: "relu", nn.SiLU: "swish"}  # oneDNN's names
PACKABLE = (nn.Conv2d, Conv2dSame)  # exactly these: a subclass may do something to its weights before it uses them


class PackedConv2d(nn.Conv2d):
    """A convolution for inference, and the activation behind it. ``pack`` makes one out of a plain convolution.

    It is the plain convolution and the activation wherever oneDNN's operators cannot serve: gradients, other devices
    and dtypes, inside torch.compile and torch.export, and under ``use_backend("reference")``.
    """

    activation: nn.Module
    pads_same: bool
    _packed: Tensor | None = None
    _packed_for: tuple[Any, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C_in, H, W]`` → ``[B, C_out, H', W']``."""
        if self.pads_same:
            x = pad_same(x, list(self.kernel_size), list(self.stride), list(self.dilation))
        if not self._served(x):
            return self.activation(super().forward(x))
        geometry = list(self.padding), list(self.stride), list(self.dilation), self.groups
        name = ACTIVATIONS[type(self.activation)]
        return torch.ops.mkldnn._convolution_pointwise(x, self._weight_for(x), self.bias, *geometry, name, [], "")

    def _served(self, x: Tensor) -> bool:
        return (
            _AVAILABLE
            and not torch.compiler.is_compiling()
            and requested_backend() != "reference"
            and x.device.type == self.weight.device.type == "cpu"
            and x.dtype == self.weight.dtype
            and x.dtype in (torch.float32, torch.bfloat16)
            and x.numel() > 0
            and (x.ndim, x.shape[1]) == (4, self.in_channels)  # else PyTorch says what is wrong
            and not isinstance(self.padding, str)
            and not (torch.is_grad_enabled() and any(t.requires_grad for t in (x, *self.parameters())))
            and not torch.is_autocast_enabled("cpu")
        )

    def _weight_for(self, x: Tensor) -> Tensor:
        """Turned around once for each size of the input, and again when the weight changes."""
        weight = self.weight
        version = 0 if weight.is_inference() else weight._version
        wanted = (weight.data_ptr(), version, weight.dtype, x.shape)
        if self._packed is None or self._packed_for != wanted:
            reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight  # whose stub lacks the size of the input
            geometry = list(self.padding), list(self.stride), list(self.dilation), self.groups
            self._packed = reorder(weight.detach().to_mkldnn(), *geometry, list(x.shape))
            self._packed_for = wanted
        return self._packed

    def __getstate__(self) -> dict[str, Any]:
        """Without the packed weight, which neither copies nor pickles need."""
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_packed")}


def pack(convolution: nn.Conv2d, activation: nn.Module | None = None) -> None:
    """Make a plain convolution a ``PackedConv2d`` with an activation behind it, in place."""
    assert type(convolution) in PACKABLE
    pads_same = type(convolution) is Conv2dSame
    convolution.__class__ = PackedConv2d
    packed: Any = convolution
    packed.pads_same, packed.activation = pads_same, activation or nn.Identity()


def _available() -> bool:
    """Whether this PyTorch has oneDNN, and the operators that torch.compile uses it through."""
    try:
        return torch.backends.mkldnn.is_available() and bool(
            torch.ops.mkldnn._convolution_pointwise.default and torch._C._nn.mkldnn_reorder_conv2d_weight
        )
    except AttributeError:
        return False


_AVAILABLE = _available()
