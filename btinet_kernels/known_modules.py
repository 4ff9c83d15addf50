"""Modules of other libraries that the operators compute, recognised by the full names of their classes.

No library is imported: a module of one can only be met where it has been.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from btinet_kernels.gates.squeeze_excite_op import fused_squeeze_excite
from btinet_kernels.gates.squeeze_excite_reference import Activation, Gate, SqueezeExciteWeights

OURS = {
    f"btinet_kernels.nn.{name}"
    for name in ("TaskInteractionModule", "UncertaintyProxyAttention", "TaskInteractionLevel", "SqueezeExcite")
}
_ACTIVATIONS: dict[str, Activation] = {
    "torch.nn.modules.activation.ReLU": "relu",
    "torch.nn.modules.activation.SiLU": "silu",
    "timm.layers.activations.Swish": "silu",
}
_GATES: dict[str, Gate] = {
    "torch.nn.modules.activation.Sigmoid": "sigmoid",
    "timm.layers.activations.Sigmoid": "sigmoid",
    "torch.nn.modules.activation.Hardsigmoid": "hardsigmoid",
}


def full_name(cls: type) -> str:
    """Module and qualified name of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def _timm_efficientnet(module: Any) -> Callable[[Tensor], Any] | str:
    return _squeeze_excite(module, "conv_reduce", "act1", "conv_expand", "gate")


def _timm(module: Any) -> Callable[[Tensor], Any] | str:
    if module.add_maxpool:
        return "it adds the maximum to the mean (add_maxpool)"
    if type(module.bn) is not nn.Identity:
        return f"it normalises between its layers ({type(module.bn).__name__})"
    return _squeeze_excite(module, "fc1", "act", "fc2", "gate")


def _torchvision(module: Any) -> Callable[[Tensor], Any] | str:
    if type(module.avgpool) is not nn.AdaptiveAvgPool2d or module.avgpool.output_size not in (1, (1, 1)):
        return f"it pools by {module.avgpool}"
    return _squeeze_excite(module, "fc1", "activation", "fc2", "scale_activation")


SQUEEZE_EXCITE: dict[str, Callable[[Any], Callable[[Tensor], Any] | str]] = {
    "timm.layers.squeeze_excite.SEModule": _timm,
    "timm.models._efficientnet_blocks.SqueezeExcite": _timm_efficientnet,
    "torchvision.ops.misc.SqueezeExcitation": _torchvision,
}


def squeeze_excite_inputs(module: nn.Module) -> tuple[Tensor]:
    """One small random map for any of them."""
    first = next(part for part in module.modules() if isinstance(part, nn.Conv2d))
    return (torch.randn(2, first.in_channels, 5, 7),)


def _squeeze_excite(module: Any, reduce: str, act: str, expand: str, gate: str) -> Callable[[Tensor], Any] | str:
    """A forward for a module with two 1×1 convolutions, an activation and a gate of these names."""
    for name in (reduce, expand):
        convolution = getattr(module, name)
        if type(convolution) is not nn.Conv2d:
            return f"{name} is a {type(convolution).__name__}, not a Conv2d"
        if (convolution.kernel_size, convolution.stride, convolution.groups) != ((1, 1), (1, 1), 1) or (
            convolution.padding not in ((0, 0), "valid", "same")
        ):
            return f"{name} is not a plain 1×1 convolution"
    activation = _ACTIVATIONS.get(full_name(type(getattr(module, act))))
    if activation is None:
        return f"its activation is {type(getattr(module, act)).__name__}, not ReLU or SiLU"
    gating = _GATES.get(full_name(type(getattr(module, gate))))
    if gating is None:
        return f"its gate is {type(getattr(module, gate)).__name__}, not Sigmoid or Hardsigmoid"

    def forward(x: Tensor) -> Any:
        if x.ndim != 4 or not x.is_floating_point():
            return NotImplemented
        first, second = getattr(module, reduce), getattr(module, expand)
        weights = SqueezeExciteWeights(first.weight.flatten(1), first.bias, second.weight.flatten(1), second.bias)
        return fused_squeeze_excite(x, weights, act=activation, gate=gating)

    return forward
