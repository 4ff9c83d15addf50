"""Folds BatchNorms of a network in evaluation mode into the layers around them, where that is exact.

Who follows whom is observed while an image passes, not guessed from names: it holds for every timm encoder.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from btinet.models.packed import ACTIVATIONS, PACKABLE, pack
from btinet_kernels import use_backend

# Exactly these: a subclass may do something to its weights before it uses them.
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv2dSame)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNormAct2d)


def fold_batchnorms(model: nn.Module, image: Tensor) -> dict[str, str]:
    """Fold in place what can be folded, and return the paths of the BatchNorms that are left, with the reason.

    Args:
        model: in evaluation mode.
        image: anything that ``model`` takes; its values do not matter.
    """
    flow = _Flow(model, image)
    left = {}
    for path, norm in list(model.named_modules()):
        if isinstance(norm, _BatchNorm):
            reason = _fold(model, path, norm, flow)
            if reason is not None:
                left[path] = reason
    _pack_convolutions(model, flow, left)
    return left


def _pack_convolutions(model: nn.Module, flow: _Flow, left: Mapping[str, str]) -> None:
    """With the activations that timm's BatchNorms have inside, where it was the convolution's alone to go there."""
    for norm in flow.inputs:
        path = flow.paths[norm]
        convolution = flow.producer(norm) if isinstance(norm, _BatchNorm) and path not in left else None
        activation = model.get_submodule(path)
        if type(convolution) in PACKABLE and type(activation) in ACTIVATIONS:
            pack(convolution, activation)  # type: ignore[arg-type]
            _replace(model, path, nn.Identity())
    for layer in model.modules():
        if type(layer) in PACKABLE:
            pack(layer)  # type: ignore[arg-type]


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    setattr(model.get_submodule(owner), name, module)


class _Flow(TorchDispatchMode):
    """Which module made a tensor, and inside which modules it was used, while one image passed."""

    def __init__(self, model: nn.Module, image: Tensor) -> None:
        super().__init__()
        self.paths = {module: path for path, module in model.named_modules()}
        self.inputs: dict[nn.Module, list[int]] = defaultdict(list)  # one entry per call
        self.outputs: dict[nn.Module, list[int]] = defaultdict(list)
        self.users: dict[int, set[nn.Module | None]] = defaultdict(set)
        self._inside: nn.Module | None = None
        self._alive: list[Any] = []  # so that no identity is given out twice
        with _observed(model, self._enter, self._leave), use_backend("reference"), torch.no_grad(), self:
            self._alive.append(model(image))

    def producer(self, norm: nn.Module) -> nn.Module | None:
        """The module whose output goes into ``norm`` and nowhere else."""
        (tensor,) = self.inputs[norm]
        makers = [module for module, made in self.outputs.items() if module is not norm and tensor in made]
        alone = len(makers) == 1 and len(self.outputs[makers[0]]) == 1 and self.users[tensor] == {norm}
        return makers[0] if alone else None

    def consumer(self, norm: nn.Module) -> nn.Module | None:
        """The module into which the output of ``norm`` goes, and nowhere else."""
        users = self.users[self.outputs[norm][0]]
        (user,) = users if len(users) == 1 else (None,)
        return user if user is not None and len(self.inputs[user]) == 1 else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self.users[id(tensor)].add(self._inside)
        result = func(*args, **(kwargs or {}))
        self._alive.append(result)
        return result

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._inside = module
        self.inputs[module].append(id(args[0]))
        self._alive.append(args)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._inside = None
        self.outputs[module].append(id(output))


@contextmanager
def _observed(model: nn.Module, enter: Callable[..., None], leave: Callable[..., None]) -> Iterator[None]:
    handles = []
    for module in model.modules():
        if isinstance(module, (_BatchNorm, nn.Linear, *CONVOLUTIONS)):
            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _fold(model: nn.Module, path: str, norm: _BatchNorm, flow: _Flow) -> str | None:
    """Fold one BatchNorm, or say why not."""
    if type(norm) not in NORMS or norm.running_mean is None:
        return f"a {type(norm).__name__} without fixed statistics, or of another kind"
    if len(flow.inputs[norm]) != 1:
        return "computed inside a fused operator" if not flow.inputs[norm] else "used more than once"
    before = flow.producer(norm)
    if type(before) in (*CONVOLUTIONS, nn.Linear):
        _fold_backward(before, norm)
    else:
        after = flow.consumer(norm)
        reason = _why_not_forward(norm, after)
        if reason is not None:
            return reason
        _fold_forward(norm, after)
    _replace(model, path, _rest_of(norm))
    return None


def _why_not_forward(norm: _BatchNorm, after: nn.Module | None) -> str | None:
    if isinstance(norm, BatchNormAct2d):
        return "no layer before it alone, and an activation after it"
    if type(after) is nn.Linear:
        return None
    if type(after) not in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        return "neither a layer before nor one after it alone"
    assert isinstance(after, nn.modules.conv._ConvNd)
    if isinstance(after.padding, str) or any(after.padding):
        return "an activation before it, and padding after it: zeros beside it would be shifted"
    return None


def _rest_of(norm: _BatchNorm) -> nn.Module:
    """What a BatchNorm does besides normalising: timm's has the activation inside."""
    if not isinstance(norm, BatchNormAct2d):
        return nn.Identity()
    return norm.act if type(norm.drop) is nn.Identity else nn.Sequential(norm.drop, norm.act)


def _affine(norm: _BatchNorm) -> list[Tensor]:
    """Running mean and variance, weight and bias, in float64."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean = norm.running_mean.double()
    weight = torch.ones_like(mean) if norm.weight is None else norm.weight.double()
    bias = torch.zeros_like(mean) if norm.bias is None else norm.bias.double()
    return [mean, norm.running_var.double(), weight, bias]


def _fold_backward(layer: Any, norm: _BatchNorm) -> None:
    mean, variance, weight, bias = _affine(norm)
    fuse = fuse_linear_bn_weights if type(layer) is nn.Linear else fuse_conv_bn_weights
    own = None if layer.bias is None else layer.bias.double()
    _assign(layer, *fuse(layer.weight.double(), own, mean, variance, norm.eps, weight, bias))


def _fold_forward(norm: _BatchNorm, layer: Any) -> None:
    mean, variance, weight, bias = _affine(norm)
    scale = weight * torch.rsqrt(variance + norm.eps)
    shift = bias - mean * scale
    rows = layer.weight.double().flatten(2).sum(2) if layer.weight.ndim > 2 else layer.weight.double()
    groups = getattr(layer, "groups", 1)
    per_row = [v.reshape(groups, 1, -1).expand(-1, len(rows) // groups, -1).flatten(0, 1) for v in (scale, shift)]
    scaled = layer.weight.double() * per_row[0].reshape(*rows.shape, *[1] * (layer.weight.ndim - 2))
    own = 0 if layer.bias is None else layer.bias.double()
    _assign(layer, scaled, (rows * per_row[1]).sum(1) + own)


def _assign(layer: Any, weight: Tensor, bias: Tensor) -> None:
    like = torch.empty_like(layer.weight, requires_grad=False)  # keeps the memory format
    layer.bias = nn.Parameter(bias.detach().to(like.dtype), requires_grad=False)
    layer.weight = nn.Parameter(like.copy_(weight.detach()), requires_grad=False)
