"""One workload and everything that can serve it: our backends, the eager modules, and ``torch.compile`` of them."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from cases import BOTH, FORWARD, VECTOR, Workload, directions
from eager_modules import EagerLevel, eager_twin
from timing import CudaSampler, Sample, captured, cpu_sample
from torch import Tensor, nn

from btinet_kernels import use_backend
from btinet_kernels.backends import serving, unsuitable
from btinet_kernels.nn import TaskInteractionLevel

FAST = {"cpu": ("native",), "cuda": ("triton", "cuda")}
GRAPH = " graph"  # ends the names of variants that replay a CUDA graph
MAX_SETS = 16  # of inputs that a sweep on a GPU visits
# Baselines round every intermediate. Their gradients of parameters cancel, so that in bfloat16 some are off by half;
# these are not held against them: that they compute the same formula is tested in float64.
BASELINE_SLACK = 16
BASELINE_RESULTS = ("seg", "clf", "d seg", "d clf")

Call = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Inputs(NamedTuple):
    """Leaves and the gradients that arrive from above."""

    seg: Tensor
    clf: Tensor
    upstream: list[Tensor]


@dataclass(frozen=True)
class Variant:
    """Something that computes a level. ``backend`` is None for the baselines."""

    name: str
    call: Call
    module: nn.Module
    backend: str | None = None


class Truth(NamedTuple):
    """A level, its inputs, and its outputs and gradients, in float64."""

    level: TaskInteractionLevel
    inputs: Inputs
    results: dict[str, Tensor]


class GateError(AssertionError):
    """A variant does not compute what it should; it is not timed."""


@lru_cache(maxsize=1)
def truth(channels: int, size: int, batch: int, device: str) -> Truth:
    """Drawn once for all dtypes and layouts: every number is representable in bfloat16.

    The images differ in their channels' means, as features do; without that, BatchNorm would divide by the difference
    between nearly equal numbers.
    """
    torch.manual_seed(0)
    level = TaskInteractionLevel(channels, VECTOR).to(device)
    for name, tensor in level.state_dict().items():
        if tensor.ndim == 1:  # biases start at zero, where errors could hide
            tensor.uniform_(0.5, 1.5) if "running_var" in name else tensor.normal_(std=0.1)
    norm_weight = level.tim.norm.weight
    norm_weight.data.add_(1)
    for tensor in level.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.bfloat16())
    seg = torch.randn(batch, channels, size, size, device=device) + torch.randn(batch, channels, 1, 1, device=device)
    drawn = [seg, torch.randn(batch, VECTOR, device=device), torch.randn_like(seg)]
    drawn.append(torch.randn(batch, VECTOR, device=device))
    seg, clf, *upstream = (tensor.bfloat16().double() for tensor in drawn)
    inputs = Inputs(seg, clf, upstream)
    level = level.double().train(batch > 1)
    state = {name: value.clone() for name, value in level.state_dict().items()}
    reference = Variant("reference", _ours(level), level, "reference")
    results = named_results(reference, _with_gradients(inputs), BOTH, inference=False)
    level.load_state_dict(state)
    return Truth(level, inputs, {name: tensor.detach() for name, tensor in results.items()})


class Problem:
    """A workload on a device: its inputs and variants, each compared with float64 before it may be timed."""

    def __init__(self, workload: Workload, device: str) -> None:
        self.workload, self.device = workload, device
        self.truth = truth(workload.channels, workload.size, workload.batch, device)
        self.level = copy.deepcopy(self.truth.level).to(workload.dtype)
        self.inputs = [self._copy_of_inputs() for _ in range(self._input_sets())]
        self.automatic = serving(self.inputs[0].seg)[0]
        self.unavailable: dict[str, str] = {}
        self._checked: set[str] = set()
        self.variants = [*self._ours(), *self._baselines()]
        self._sampler = CudaSampler() if device == "cuda" else None

    def samples(self, direction: str) -> dict[str, Sample]:
        """What times each variant; raises ``GateError`` if one of them is wrong."""
        samples = {}
        for variant in list(self.variants):
            try:
                self._check(variant)
                samples |= self._samples_of(variant, direction)
            except GateError:
                raise
            except Exception as error:
                if variant.backend is not None:
                    raise
                # A baseline that does not run here (no compiler, no memory) costs its own column only.
                self.variants.remove(variant)
                self.unavailable[variant.name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        return samples

    def run(self, name: str, direction: str) -> None:
        """One call of a variant, finished on return."""
        variant = next(v for v in self.variants if v.name == name)
        step(variant, self.inputs[0], direction, inference=self.workload.inference)
        if self.device == "cuda":
            torch.cuda.synchronize()

    def state_of_caches(self) -> str:
        """What a reader has to know about where the inputs come from."""
        if self.device == "cpu":
            return "one set of inputs, in the caches as far as the other variants' samples leave it there"
        visited = len(self.inputs) * 2 * self.workload.dense_bytes
        l2 = torch.cuda.get_device_properties(0).L2_cache_size
        return f"{len(self.inputs)} sets of inputs in turn, {visited / l2:.1f} times the L2 with the outputs"

    def _check(self, variant: Variant) -> None:
        if variant.name in self._checked:
            return
        for direction in directions(self.workload, self.device):
            results = named_results(variant, self.inputs[0], direction, inference=self.workload.inference)
            compare(variant, results, self.truth.results, self.workload, self.device)
        self._checked.add(variant.name)

    def _samples_of(self, variant: Variant, direction: str) -> dict[str, Sample]:
        if self._sampler is None:
            return {variant.name: cpu_sample(lambda: self._step(variant, self.inputs[0], direction))}
        sampler, visits = self._sampler, len(self.inputs)

        def sweep() -> list[Tensor]:
            first = self._step(variant, self.inputs[0], direction)
            for inputs in self.inputs[1:]:
                self._step(variant, inputs, direction)
            return first

        samples = {variant.name: sampler(sweep, visits)}
        try:
            replay, results = captured(sweep)
        except Exception as error:
            if variant.backend is not None:
                raise
            self.unavailable[variant.name + GRAPH] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            return samples
        replay()
        torch.cuda.synchronize()
        compare(variant, _named(variant, results), self.truth.results, self.workload, self.device)
        return samples | {variant.name + GRAPH: sampler(replay, visits)}

    def _step(self, variant: Variant, inputs: Inputs, direction: str) -> list[Tensor]:
        return step(variant, inputs, direction, inference=self.workload.inference)

    def _ours(self) -> list[Variant]:
        """Every fast backend of this device that serves here, and the reference where ``auto`` has nothing better."""
        names = []
        for backend in FAST[self.device]:
            reason = unsuitable(backend, self.inputs[0].seg)
            if reason is None:
                names.append(backend)
            else:
                self.unavailable[backend] = reason
        if self.automatic not in names:
            names.append(self.automatic)
        return [Variant(name, _ours(self.level), self.level, name) for name in names]

    def _baselines(self) -> list[Variant]:
        twin: EagerLevel = eager_twin(self.level)
        torch.compiler.reset()
        if self.workload.max_autotune:
            # Its own CUDA graphs would copy the inputs; captured like the others it is faster.
            compiled = torch.compile(twin, mode="max-autotune-no-cudagraphs", dynamic=False)
            return [Variant("max-autotune", compiled, twin)]
        return [Variant("eager", twin, twin), Variant("compile", torch.compile(twin, dynamic=False), twin)]

    def _copy_of_inputs(self) -> Inputs:
        seg, clf, (grad_seg, grad_clf) = self.truth.inputs
        layout = torch.channels_last if self.workload.channels_last else torch.contiguous_format
        dense = [x.to(self.workload.dtype, memory_format=layout, copy=True) for x in (seg, grad_seg)]
        vectors = [x.to(self.workload.dtype, copy=True) for x in (clf, grad_clf)]
        return _with_gradients(Inputs(dense[0], vectors[0], [dense[1], vectors[1]]))

    def _input_sets(self) -> int:
        if self.device == "cpu":
            return 1
        l2 = torch.cuda.get_device_properties(0).L2_cache_size
        return int(min(MAX_SETS, max(1, -(-2 * l2 // self.workload.dense_bytes))))


def step(variant: Variant, inputs: Inputs, direction: str, *, inference: bool) -> list[Tensor]:
    """What is timed: seg and clf, and with the backward the gradients of both inputs and all parameters.

    A forward in training records for its backward; inference is under ``no_grad``.
    """
    records = direction == BOTH or not inference
    backend = contextlib.nullcontext() if variant.backend is None else use_backend(variant.backend)
    with backend, torch.set_grad_enabled(records):
        outputs = list(variant.call(inputs.seg, inputs.clf))
        if direction == FORWARD:
            return outputs
        leaves = [inputs.seg, inputs.clf, *variant.module.parameters()]
        return [*outputs, *torch.autograd.grad(outputs, leaves, inputs.upstream)]


def named_results(variant: Variant, inputs: Inputs, direction: str, *, inference: bool) -> dict[str, Tensor]:
    """``step`` with names for what it returns."""
    return _named(variant, step(variant, inputs, direction, inference=inference))


def compare(
    variant: Variant, results: dict[str, Tensor], exact: dict[str, Tensor], workload: Workload, device: str
) -> None:
    """Raise ``GateError`` where a result is further from float64 than rounding explains."""
    __tracebackhide__ = True
    baseline = variant.backend is None
    for name, result in results.items():
        if baseline and name not in BASELINE_RESULTS:
            continue
        expected = exact[name]
        error = (result.detach().double().reshape(expected.shape) - expected).abs().max()
        relative = float(error / expected.abs().max())
        allowed = tolerance(workload, device) * (BASELINE_SLACK if baseline else 1)
        if not relative <= allowed:  # also for NaN
            raise GateError(
                f"{workload.name}: {variant.name} is off by {relative:.1e} in {name} ({allowed:.1e} allowed)"
            )


def tolerance(workload: Workload, device: str) -> float:
    """Relative to a tensor's largest magnitude: roundings of what is stored, and of float32 sums over B·N terms.

    Where PyTorch lets convolutions round float32 operands to TF32, products may.
    """
    stored = torch.finfo(workload.dtype).eps / 2
    if device == "cuda" and workload.dtype == torch.float32 and torch.backends.cudnn.allow_tf32:
        stored = 2.0**-11
    summed = torch.finfo(torch.float32).eps / 2 * (workload.batch * workload.positions) ** 0.5
    return 4 * (stored + summed)


def _named(variant: Variant, results: object) -> dict[str, Tensor]:
    assert isinstance(results, list)
    names = ["seg", "clf", "d seg", "d clf", *(name for name, _ in variant.module.named_parameters())]
    return dict(zip(names, results, strict=False))


def _ours(level: TaskInteractionLevel) -> Call:
    def call(seg: Tensor, clf: Tensor) -> tuple[Tensor, Tensor]:
        result = level(seg, clf)
        return result.seg, result.clf

    return call


def _with_gradients(inputs: Inputs) -> Inputs:
    return Inputs(inputs.seg.requires_grad_(), inputs.clf.requires_grad_(), inputs.upstream)
