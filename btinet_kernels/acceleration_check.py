"""Compares an accelerated module with the original on random inputs, before it may take its place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from btinet_kernels.accelerated import Recipe, Refused, build, install
from btinet_kernels.backends import serving, use_backend

# Relative to a tensor's largest magnitude, or to a thousandth of the largest gradient where that is more.
TOLERANCE = 1e-4
# Where terms cancel, as in front of a BatchNorm, the original in float32 is itself further than that from float64: the
# replacement may then be this many times as far. Originals further off than MOST are no measure.
OWN_ERRORS, MOST = 4, 0.1

Inputs = Callable[[Any], Sequence[Any]]


def check(module: nn.Module, recipe: Recipe, inputs: Inputs) -> None:
    """Run copies of ``module`` as it is and accelerated, in float32, in training and in evaluation.

    Compares outputs, gradients of the inputs and of every parameter, and buffers, with those of the original in
    float64 (in float32 where it cannot be run in float64).

    Raises:
        Refused: they differ, or one of them cannot be run.
    """
    device = next((t.device for t in module.parameters()), torch.device("cpu"))
    kernels = serving(torch.empty(1, 1, 1, device=device))[0]  # which `auto` might spare at the size of a check
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        torch.manual_seed(0)
        given = tree_map(lambda x: _prepared(x, device), tuple(inputs(module)))
        for training in (True, False):
            plain = _copy(module, training)
            fast = copy.deepcopy(plain)
            install(fast, build(fast, recipe))
            exact = _exact_results(plain, given)
            expected = _results(plain, given)
            with use_backend(kernels):
                ours = _results(fast, given)
            _compare(ours, expected, exact or expected, "in training" if training else "in evaluation")


def _copy(module: nn.Module, training: bool) -> nn.Module:
    copied = copy.deepcopy(module).float().requires_grad_(True).train(training)
    for part in copied.modules():
        for hooks in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks):
            hooks.clear()  # the user's hooks are not ours to run
    return copied


def _prepared(x: Any, device: torch.device) -> Any:
    if not isinstance(x, Tensor):
        return x
    return x.to(device, torch.float32 if x.is_floating_point() else x.dtype)


def _results(module: nn.Module, given: tuple[Any, ...]) -> dict[str, Tensor]:
    leaves = []

    def leaf(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        leaves.append(x.detach().clone().requires_grad_())
        # What a convolution hands on may be changed in place, a leaf may not.
        return leaves[-1] * 1

    torch.manual_seed(1)  # of dropout, if there is any
    outputs = [x for x in tree_leaves(module(*tree_map(leaf, given))) if isinstance(x, Tensor)]
    torch.manual_seed(2)
    differentiable = [x for x in outputs if x.requires_grad]
    wanted = {f"input {n}": x for n, x in enumerate(leaves)} | dict(module.named_parameters())
    upstream = [torch.randn(x.shape, dtype=torch.float64).to(x) for x in differentiable]
    gradients = torch.autograd.grad(differentiable, list(wanted.values()), upstream, allow_unused=True)
    zeros = (torch.zeros_like(x) if d is None else d for d, x in zip(gradients, wanted.values(), strict=True))
    results = {f"output {n}": x.detach() for n, x in enumerate(outputs)}
    results |= {f"gradient of {name}": d for name, d in zip(wanted, zeros, strict=True)}
    return results | {f"buffer {name}": b.clone() for name, b in module.named_buffers()}


def _exact_results(module: nn.Module, given: tuple[Any, ...]) -> dict[str, Tensor] | None:
    def exact(x: Any) -> Any:
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    try:
        return _results(copy.deepcopy(module).double(), tree_map(exact, given))
    except (RuntimeError, TypeError):  # a device or a line of the module that knows no float64
        return None


def _compare(ours: dict[str, Tensor], expected: dict[str, Tensor], exact: dict[str, Tensor], mode: str) -> None:
    if ours.keys() != expected.keys():
        returned, originally = (sum(name.startswith("output") for name in x) for x in (ours, expected))
        raise Refused(f"it returned {returned} tensors {mode}, the original {originally}")
    largest = max((_magnitude(t) for name, t in exact.items() if name.startswith("gradient")), default=0.0)
    for name, truth in exact.items():
        if ours[name].shape != truth.shape:
            raise Refused(f"{name} is {list(ours[name].shape)} {mode}, the original's {list(truth.shape)}")
        scale = max(_magnitude(truth), largest / 1000 if name.startswith("gradient") else 0.0, 1e-30)
        own, error = (_magnitude(x[name].double() - truth.double()) / scale for x in (expected, ours))
        if own > MOST:  # other random numbers in float64
            own, error = 0.0, _magnitude(ours[name].double() - expected[name].double()) / scale
        allowed = max(TOLERANCE, OWN_ERRORS * own)
        if not error <= allowed:  # also for NaN
            raise Refused(f"{name} is off by {error:.1e} {mode} ({allowed:.0e} allowed)")


def _magnitude(tensor: Tensor) -> float:
    return float(tensor.double().abs().max()) if tensor.numel() else 0.0
