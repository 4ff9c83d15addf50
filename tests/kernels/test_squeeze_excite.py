"""Fused squeeze-and-excitation against float64 mathematics: values, gradients, layouts, edges, compilers."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.library import opcheck
from torch.nn import functional as F

from btinet_kernels import SqueezeExciteWeights, fused_squeeze_excite, use_backend
from btinet_kernels.gates.squeeze_excite_op import (
    SMALLEST_CONTIGUOUS_ON_CPU,
    SMALLEST_ON_CPU,
    squeeze_excite,
    squeeze_excite_gradient,
)
from btinet_kernels.nn import SqueezeExcite

BACKENDS = ["reference", "native"]
VARIANTS = list(itertools.product(["relu", "silu"], ["sigmoid", "hardsigmoid"]))
# One, two and three dimensions; below, at and above vectors of 8 and 16; one pixel; one channel.
SHAPES = [
    (2, 3, 9),
    (3, 16, 8, 6),
    (2, 17, 9, 11),
    (3, 5, 8, 3, 4),
    (2, 33, 13, 7),
    (2, 6, 1, 1),
    (1, 1, 5, 7),
    (1, 8, 7),
]


def weights(channels: int, reduced: int = 4, dtype: torch.dtype = torch.float64) -> SqueezeExciteWeights:
    torch.manual_seed(0)
    shapes = (reduced, channels), (reduced,), (channels, reduced), (channels,)
    # Wide enough to reach both flat ends of a hardsigmoid.
    return SqueezeExciteWeights(*(torch.randn(s, dtype=torch.float64).mul(2).to(dtype) for s in shapes))


def dense(shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x


def by_hand(x: Tensor, w: SqueezeExciteWeights, act: str, gate: str) -> Tensor:
    """Written as host libraries write it, to share no code with the reference."""
    ones = (1,) * (x.ndim - 2)
    squeezed = x.mean(tuple(range(2, x.ndim)))
    hidden = squeezed @ w.reduce_weight.T + (0 if w.reduce_bias is None else w.reduce_bias)
    hidden = hidden * torch.sigmoid(hidden) if act == "silu" else hidden.clamp_min(0)
    expanded = hidden @ w.expand_weight.T + (0 if w.expand_bias is None else w.expand_bias)
    gates = torch.sigmoid(expanded) if gate == "sigmoid" else F.relu6(expanded + 3) / 6
    return x * gates.reshape(*gates.shape, *ones)


def with_gradients(function, x: Tensor, w: SqueezeExciteWeights, act: str, gate: str) -> list[Tensor]:  # type: ignore[no-untyped-def]
    x = x.detach().requires_grad_()
    leaves = [None if t is None else t.detach().requires_grad_() for t in w]
    out = function(x, SqueezeExciteWeights(*leaves), act, gate)
    torch.manual_seed(1)
    upstream = torch.randn(out.shape, dtype=torch.float64).to(out.dtype)
    return [out, *torch.autograd.grad(out, [x, *(t for t in leaves if t is not None)], upstream)]


def fused(x: Tensor, w: SqueezeExciteWeights, act: str, gate: str) -> Tensor:
    return fused_squeeze_excite(x, w, act=act, gate=gate)  # type: ignore[arg-type]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_formula_in_float64(backend: str, shape: tuple[int, ...], channels_last: bool) -> None:
    x = dense(shape, channels_last)
    for act, gate in VARIANTS:
        exact = with_gradients(by_hand, x, weights(shape[1]), act, gate)
        with use_backend(backend):
            ours = with_gradients(fused, x, weights(shape[1]), act, gate)
        for a, b in zip(ours, exact, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        assert ours[0].stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("missing", ["reduce_bias", "expand_bias"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_without_biases(backend: str, missing: str) -> None:
    w, x = weights(6)._replace(**{missing: None}), dense((2, 6, 5, 4), True)
    with use_backend(backend):
        ours = with_gradients(fused, x, w, "relu", "sigmoid")
    for a, b in zip(ours, with_gradients(by_hand, x, w, "relu", "sigmoid"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("act", "gate"), VARIANTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str, act: str, gate: str) -> None:
    inputs = [dense((2, 4, 3, 3), True).requires_grad_(), *(t.requires_grad_() for t in weights(4, 3))]

    def function(x: Tensor, *w: Tensor) -> Tensor:
        return fused(x, SqueezeExciteWeights(*w), act, gate)

    with use_backend(backend):
        assert gradcheck(function, inputs)


@pytest.mark.parametrize("view", [lambda x: x[:, ::2], lambda x: x[..., 1:-1], lambda x: x[:1].expand(3, -1, -1, -1)])
def test_strides_are_honoured(view) -> None:  # type: ignore[no-untyped-def]
    x = view(torch.randn(3, 10, 9, 8, dtype=torch.float64))
    with use_backend("native"):
        ours = with_gradients(fused, x, weights(x.shape[1]), "silu", "sigmoid")
    for a, b in zip(ours, with_gradients(by_hand, x, weights(x.shape[1]), "silu", "sigmoid"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_precision_of_each_dtype(dtype: torch.dtype, channels_last: bool) -> None:
    x = dense((3, 24, 20, 20), channels_last, dtype)
    w = weights(24, dtype=torch.float32)
    exact = with_gradients(by_hand, x.double(), SqueezeExciteWeights(*(t.double() for t in w)), "silu", "sigmoid")
    ours = with_gradients(fused, x, w, "silu", "sigmoid")
    assert ours[0].dtype == ours[1].dtype == dtype
    assert all(d.dtype == torch.float32 for d in ours[2:])
    # The upstream gradient is rounded to dtype too, and the weights' gradients are sums of 1200 such terms.
    tolerance = 8 * torch.finfo(dtype).eps
    for a, b in zip(ours, exact, strict=True):
        assert ((a.double() - b).abs().max() / b.abs().max()).item() < tolerance


def test_autocast_leaves_the_mathematics_in_float32() -> None:
    x, w = dense((2, 8, 6, 6), True, torch.float32), weights(8, dtype=torch.float32)
    with use_backend("native"):
        plain = with_gradients(fused, x, w, "silu", "sigmoid")
    with use_backend("native"), torch.autocast("cpu", torch.bfloat16):
        for a, b in zip(with_gradients(fused, x, w, "silu", "sigmoid"), plain, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend: str) -> None:
    with use_backend(backend):
        out, d_x, *d_weights = with_gradients(fused, torch.randn(0, 4, 5, 5).double(), weights(4), "relu", "sigmoid")
    assert out.shape == d_x.shape == (0, 4, 5, 5)
    assert all((d == 0).all() for d in d_weights)


def test_repeats_are_bit_identical() -> None:
    x, w = dense((5, 24, 31, 17), True, torch.float32), weights(24, dtype=torch.float32)
    with use_backend("native"):
        first, second = (with_gradients(fused, x, w, "silu", "hardsigmoid") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_nothing_that_goes_in_is_changed_and_changes_are_noticed() -> None:
    x, w = dense((2, 6, 5, 4), True), weights(6)
    before = [x.clone(), *(t.clone() for t in w)]
    with use_backend("native"):
        out = with_gradients(fused, x, w, "relu", "sigmoid")[0]
        assert all(torch.equal(a, b) for a, b in zip([x, *w], before, strict=True))
        assert out.data_ptr() != x.data_ptr()
        y = x.clone().requires_grad_() * 1
        result = fused(y, w, "relu", "sigmoid")
        result.mul_(2)  # the result itself is not needed for the backward
        result.sum().backward(retain_graph=True)
        y.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            result.sum().backward()


@pytest.mark.parametrize(
    ("dtype", "act", "gate"),
    [(torch.float64, "relu", "sigmoid"), (torch.float32, "silu", "hardsigmoid"), (torch.bfloat16, "silu", "sigmoid")],
)
def test_opcheck(dtype: torch.dtype, act: str, gate: str) -> None:
    x = dense((2, 6, 5, 4), True, dtype).requires_grad_()
    w = [t.requires_grad_() for t in weights(6, dtype=torch.float64 if dtype == torch.float64 else torch.float32)]
    opcheck(squeeze_excite, (x, *w, act, gate))
    opcheck(squeeze_excite, (x, w[0], None, w[2], None, act, gate))
    with torch.no_grad():
        out, gates, mean = squeeze_excite(x, *w, act, gate)
        opcheck(squeeze_excite_gradient, (torch.randn_like(out), x, gates, mean, *w, act, gate))


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_as_one_graph_for_any_batch(backend: str) -> None:
    module = SqueezeExcite(16, 4, "silu")
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    with use_backend(backend), torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (4, 7):
            x = dense((batch, 16, 9, 10), True, torch.float32).requires_grad_()
            inputs = [x, *module.parameters()]
            eager = torch.autograd.grad(module(x).square().sum(), inputs)
            for a, b in zip(torch.autograd.grad(compiled(x).square().sum(), inputs), eager, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS)
def test_exports(backend: str) -> None:
    module, x = SqueezeExcite(6, 3).eval(), dense((2, 6, 9, 4), True, torch.float32)
    with use_backend(backend):
        program = torch.export.export(module, (x,))
    torch.testing.assert_close(program.module()(x), module(x))


@pytest.mark.slow
def test_through_the_triton_passes() -> None:
    """Interpreted, in a process of its own: the interpreter is chosen before Triton is imported."""
    pytest.importorskip("triton")
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_squeeze_excite import *
shapes = [(2, 17, 9, 11), (2, 3, 9), (2, 5, 4, 3, 4), (2, 6, 1, 1)]
for shape, channels_last in itertools.product(shapes, [False, True]):
    x, w = dense(shape, channels_last, torch.float32), weights(shape[1], dtype=torch.float32)
    exact = with_gradients(by_hand, x.double(), SqueezeExciteWeights(*(t.double() for t in w)), "silu", "hardsigmoid")
    with use_backend("triton"):
        ours = with_gradients(fused, x, w, "silu", "hardsigmoid")
    assert "_SqueezeExcite" in str(ours[0].grad_fn)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5 * b.abs().max().item())
"""
    environment = os.environ | {"TRITON_INTERPRET": "1", "BTINET_BACKEND": "auto"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr[-3000:]


def test_auto_takes_the_operator_where_it_is_faster() -> None:
    """docs/squeeze_excite.md: where there is a backward of a large tensor."""
    w = weights(16, dtype=torch.float32)
    large = torch.randn(2, 16, 96, 96).contiguous(memory_format=torch.channels_last).requires_grad_()
    assert SMALLEST_ON_CPU <= large.numel() < SMALLEST_CONTIGUOUS_ON_CPU
    contiguous = large.detach().contiguous().requires_grad_()
    small = torch.randn(1, 16, 8, 8, requires_grad=True)
    assert "_SqueezeExcite" in str(fused(large, w, "silu", "sigmoid").grad_fn)
    assert "_SqueezeExcite" not in str(fused(contiguous, w, "silu", "sigmoid").grad_fn)
    assert "_SqueezeExcite" not in str(fused(small, w, "silu", "sigmoid").grad_fn)
    with use_backend("native"):
        assert "_SqueezeExcite" in str(fused(small, w, "silu", "sigmoid").grad_fn)
    with torch.profiler.profile() as profile, torch.no_grad():
        fused(large, w, "silu", "sigmoid")
    assert not any("squeeze_excite" in event.key for event in profile.key_averages())


def test_double_backward_is_served_by_the_reference_only() -> None:
    x, w = dense((2, 4, 8, 3), False).requires_grad_(), weights(4)

    def twice() -> Tensor:
        first = torch.autograd.grad(fused(x, w, "silu", "sigmoid").square().sum(), x, create_graph=True)[0]
        return torch.autograd.grad(first.square().sum(), x)[0]

    with use_backend("native"), pytest.raises(RuntimeError, match=r"use_backend\('reference'\)"):
        twice()
    with use_backend("reference"):
        assert twice().isfinite().all()


def test_wrong_arguments_are_explained() -> None:
    x, w = torch.randn(2, 4, 3, 3), weights(4, dtype=torch.float32)
    with pytest.raises(ValueError, match="act must be 'relu' or 'silu', got 'gelu'"):
        fused(x, w, "gelu", "sigmoid")
    with pytest.raises(ValueError, match="gate must be 'sigmoid' or 'hardsigmoid', got 'tanh'"):
        fused(x, w, "relu", "tanh")
    with pytest.raises(ValueError, match="one to three spatial dimensions"):
        fused(x[..., 0, 0], w, "relu", "sigmoid")
    with pytest.raises(ValueError, match=r"expand_weight must be \[4, 4\] for 4 channels, got \[5, 4\]"):
        fused(x, w._replace(expand_weight=torch.randn(5, 4)), "relu", "sigmoid")
