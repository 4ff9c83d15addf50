"""Modules of other libraries that the operators compute, recognised by the full names of their classes.

No library is imported: a module of one can only be met where it has been.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from btinet_kernels.depthwise.op import depthwise_is_served, fused_depthwise_conv
from btinet_kernels.depthwise.reference import Geometry
from btinet_kernels.gates.squeeze_excite_op import fused_squeeze_excite, squeeze_excite_is_served
from btinet_kernels.gates.squeeze_excite_reference import Activation, Gate, SqueezeExciteWeights
from btinet_kernels.normalization.op import batch_norm_is_served, fused_batch_norm_act
from btinet_kernels.normalization.reference import Act

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


class Known(NamedTuple):
    """How modules of a class are accelerated."""

    build: Callable[[Any], Any]
    inputs: Callable[[Any], Any]
    name: str  # of what computes instead
    where: Callable[[Any], bool] | None = None  # which modules of the class are meant; all
    alike: bool = False  # what is written by ``repr`` decides what a module computes: one check is for all alike


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


def _squeeze_excite_inputs(module: nn.Module) -> tuple[Tensor]:
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
        if not squeeze_excite_is_served(x, weights):
            return NotImplemented
        return fused_squeeze_excite(x, weights, act=activation, gate=gating)

    return forward


def _timm_batch_norm(module: Any) -> Callable[[Tensor], Any] | str:
    if type(module.drop) is not nn.Identity:
        return f"it drops between the normalisation and the activation ({type(module.drop).__name__})"
    act = "identity" if type(module.act) is nn.Identity else _ACTIVATIONS.get(full_name(type(module.act)))
    if act is None:
        return f"its activation is {type(module.act).__name__}, not ReLU or SiLU"
    return _batch_norm(module, act)


def _batch_norm(module: Any, act: Act = "identity") -> Callable[[Tensor], Any]:
    def forward(x: Tensor) -> Any:
        if x.ndim != 4 or not x.is_floating_point() or not batch_norm_is_served(x, act):
            return NotImplemented
        momentum = module.momentum
        if module.training and module.track_running_stats and module.num_batches_tracked is not None:
            module.num_batches_tracked.add_(1)
            if momentum is None:  # the average over all batches
                momentum = 1.0 / float(module.num_batches_tracked)
        used = not module.training or module.track_running_stats
        return fused_batch_norm_act(
            x,
            module.weight,
            module.bias,
            module.running_mean if used else None,
            module.running_var if used else None,
            training=module.training or module.running_mean is None,
            momentum=momentum or 0.0,
            eps=module.eps,
            act=act,
        )

    return forward


def _batch_norm_inputs(module: Any) -> tuple[Tensor]:
    return (torch.randn(3, module.num_features, 3, 5) + torch.randn(3, module.num_features, 1, 1),)


def _is_depthwise(module: Any) -> bool:
    return module.groups == module.in_channels == module.out_channels > 1


def _depthwise(module: Any) -> Callable[[Tensor], Any] | str:
    if module.padding_mode != "zeros":
        return f"it pads by {module.padding_mode}"
    if isinstance(module.padding, str):
        return f"its padding is {module.padding!r}"

    def forward(x: Tensor) -> Any:
        geometry = Geometry(list(module.stride), list(module.padding), list(module.dilation))
        if x.ndim != 4 or not x.is_floating_point() or not depthwise_is_served(x, module.weight, geometry):
            return NotImplemented
        return fused_depthwise_conv(x, module.weight, module.bias, **geometry._asdict())

    return forward


def _depthwise_inputs(module: Any) -> tuple[Tensor]:
    size = [d * (k - 1) + s + 2 for k, s, d in zip(module.kernel_size, module.stride, module.dilation, strict=True)]
    return (torch.randn(2, module.in_channels, *size),)


_SQUEEZE_EXCITE = (_squeeze_excite_inputs, "fused_squeeze_excite", None, True)
_BATCH_NORM = (_batch_norm_inputs, "fused_batch_norm_act", None, True)
KNOWN = {
    "timm.layers.squeeze_excite.SEModule": Known(_timm, *_SQUEEZE_EXCITE),
    "timm.models._efficientnet_blocks.SqueezeExcite": Known(_timm_efficientnet, *_SQUEEZE_EXCITE),
    "torchvision.ops.misc.SqueezeExcitation": Known(_torchvision, *_SQUEEZE_EXCITE),
    "timm.layers.norm_act.BatchNormAct2d": Known(_timm_batch_norm, *_BATCH_NORM),
    "torch.nn.modules.batchnorm.BatchNorm2d": Known(_batch_norm, *_BATCH_NORM),
    "torch.nn.modules.conv.Conv2d": Known(_depthwise, _depthwise_inputs, "fused_depthwise_conv", _is_depthwise, True),
}
