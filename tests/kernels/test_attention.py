"""The two ends of an attention gate against float64 mathematics: values, gradients, layouts, edges, repeats."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.library import opcheck

from btinet_kernels import JointWeights, fused_joint_projection, fused_position_gate, use_backend
from btinet_kernels.gates import attention_native, attention_op
from btinet_kernels.nn import AttentionGate

# Sizes [B, *spatial]; channels C of x, G or K of the other. A tile has 48 positions (4096 in planes), a vector 16
# channels in float32, the register block 8 rows and 48 columns; a large batch has several bands, wide ones several
# pieces of the inner product.
SIZES = [
    ((2, 9), (3, 5, 4)),
    ((1, 1, 1), (1, 1, 1)),
    ((2, 2, 2), (9, 4, 17)),
    ((3, 8, 6), (16, 16, 8)),
    ((2, 9, 11), (33, 17, 50)),
    ((1, 9001), (7, 3, 24)),
    ((9, 37, 31), (30, 70, 24)),
    ((1, 6, 5), (900, 200, 130)),
    ((3, 8, 3, 4), (5, 20, 3)),
]
LAYOUTS = ["rows", "planes", "mixed"]


def dense(shape: tuple[int, ...], layout: str, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "rows" else x


def pair(
    size: tuple[int, ...], channels: tuple[int, ...], layout: str, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    other = {"mixed": "planes"}.get(layout, layout)
    return [
        dense((size[0], count, *size[1:]), of, dtype)
        for count, of in zip(channels, ("rows" if layout == "mixed" else layout, other), strict=False)
    ]


def joint_weights(channels: tuple[int, ...], dims: int) -> list[Tensor]:
    c, g, k = channels
    ones = [1] * dims
    return [torch.randn(s, dtype=torch.float64) for s in ((k, c, *ones), (k,), (k, g, *ones), (k,))]


def gate_weights(channels: tuple[int, ...], dims: int) -> list[Tensor]:
    return [torch.randn(1, channels[1], *[1] * dims, dtype=torch.float64) / channels[1] ** 0.5, torch.randn(1).double()]


def textbook_joint(x: Tensor, g: Tensor, *of: Tensor) -> Tensor:
    x_weight, x_bias, g_weight, g_bias = of
    y = torch.einsum("bc...,kc->bk...", x, x_weight.flatten(1)) + torch.einsum(
        "bc...,kc->bk...", g, g_weight.flatten(1)
    )
    return torch.relu(y + (x_bias + g_bias).reshape(-1, *[1] * (x.ndim - 2)))


def textbook_gate(x: Tensor, h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x * torch.sigmoid(torch.einsum("bk...,k->b...", h, weight.flatten()) + bias).unsqueeze(1)


PUBLIC: dict[str, Callable[..., Tensor]] = {
    "joint": lambda x, g, *of: fused_joint_projection(x, g, JointWeights(*of)),
    "gate": fused_position_gate,
}


def joint(*inputs: Tensor) -> Tensor:
    with use_backend("native"):
        return PUBLIC["joint"](*inputs)


def gate(*inputs: Tensor) -> Tensor:
    with use_backend("native"):
        return PUBLIC["gate"](*inputs)


OPERATORS: dict[str, tuple[Callable[..., Any], ...]] = {
    "joint": (joint, textbook_joint, joint_weights),
    "gate": (gate, textbook_gate, gate_weights),
}
operators = pytest.mark.parametrize("name", OPERATORS)


def run(function: Callable[..., Tensor], inputs: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """The result, then the gradients of all inputs."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    y = function(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, upstream)]


def clear_of_zero(inputs: list[Tensor], channels: tuple[int, ...]) -> list[Tensor]:
    """The inputs of the joint projection with a bias for which no rounding decides what the ReLU lets through."""
    x, g, x_weight, x_bias, g_weight, g_bias = inputs
    near = torch.ones((), dtype=torch.bool)
    while near.any():
        exact = [t.double() for t in (x, g, x_weight, torch.zeros_like(x_bias), g_weight, torch.zeros_like(g_bias))]
        both = textbook_joint(*exact) - textbook_joint(exact[0], exact[1], -exact[2], exact[3], -exact[4], exact[5])
        distance = (both + (x_bias + g_bias).double().reshape(-1, *[1] * (x.ndim - 2))).abs()
        near = distance.movedim(1, 0).flatten(1).amin(1) < 1e-5
        x_bias = torch.where(near, x_bias + 1e-3 * torch.rand_like(x_bias), x_bias)
    return [x, g, x_weight, x_bias, g_weight, g_bias]


def assert_close(ours: list[Tensor], exact: list[Tensor], channels: tuple[int, ...]) -> None:
    """Relative to each tensor's largest magnitude, or 1: sums of n terms err by about sqrt(n) roundings, 8 for sums
    that follow one another; what is stored in half precision is rounded once more."""
    positions = ours[0].numel() // max(1, ours[0].shape[1])
    for number, (a, b) in enumerate(zip(ours, exact, strict=True)):
        assert a.shape == b.shape
        wide = torch.promote_types(ours[0].dtype, torch.float32)
        terms = sum(channels) + (positions if number > 2 else 0)
        bound = 8 * max(1, terms) ** 0.5 * torch.finfo(wide).eps + torch.finfo(a.dtype).eps * (a.dtype != wide)
        if ours[0].dtype != wide and number > 0:
            bound += torch.finfo(ours[0].dtype).eps  # of the result that the ReLU's gradient looks at
        if b.numel():
            error = (a.double() - b).abs().max() / b.abs().max().clamp_min(1)
            assert error <= bound, (number, error, bound)  # a NaN is not below a bound


def upstream_of(name: str, size: tuple[int, ...], channels: tuple[int, ...], layout: str) -> Tensor:
    return dense((size[0], channels[2 if name == "joint" else 0], *size[1:]), layout)


@operators
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("size", "channels"), SIZES)
def test_native_in_float64(name: str, size: tuple[int, ...], channels: tuple[int, ...], layout: str) -> None:
    function, textbook, weights = OPERATORS[name]
    inputs = [*pair(size, channels, layout), *weights(channels, len(size) - 1)]
    upstream = upstream_of(name, size, channels, layout)
    ours = run(function, inputs, upstream)
    assert_close(ours, run(textbook, inputs, upstream), channels)
    assert [t.stride() for t in ours[1:3]] == [t.stride() for t in inputs[:2]]
    assert ours[0].movedim(1, -1).is_contiguous() or not (inputs[0].stride(1) == 1 and not inputs[0].is_contiguous())


@operators
def test_the_reference_is_the_textbook(name: str) -> None:
    _, textbook, weights = OPERATORS[name]
    for dims in (1, 2, 3):
        size, channels = (2, *(4, 5, 3)[:dims]), (5, 7, 4)
        inputs = [*pair(size, channels, "rows"), *weights(channels, dims)]
        upstream = upstream_of(name, size, channels, "rows")
        with use_backend("reference"):
            ours = run(PUBLIC[name], inputs, upstream)
        assert_close(ours, run(textbook, inputs, upstream), channels)


@operators
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("size", "channels"), SIZES)
def test_single_and_half_precision(
    name: str, size: tuple[int, ...], channels: tuple[int, ...], layout: str, dtype: torch.dtype
) -> None:
    function, textbook, weights = OPERATORS[name]
    of = [w.float() for w in weights(channels, len(size) - 1)]
    inputs = [*pair(size, channels, layout, dtype), *of]
    if name == "joint":
        inputs = clear_of_zero(inputs, channels)
    upstream = upstream_of(name, size, channels, layout).to(dtype)
    ours = run(function, inputs, upstream)
    assert [t.dtype for t in ours] == [dtype] * 3 + [torch.float32] * (len(ours) - 3)
    assert_close(ours, run(textbook, [t.double() for t in inputs], upstream.double()), channels)


@operators
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(name: str, layout: str) -> None:
    function, _, weights = OPERATORS[name]
    inputs = [*pair((2, 3, 4), (3, 5, 4), layout), *weights((3, 5, 4), 2)]
    assert gradcheck(function, [t.requires_grad_() for t in inputs], fast_mode=True)


@operators
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, ::2],
        lambda x: x[:, :16],
        lambda x: x[..., 1:-1],
        lambda x: x.transpose(2, 3),
        lambda x: x[:1].expand(3, -1, -1, -1),
        lambda x: x[..., :1].expand(-1, -1, -1, 9),
    ],
)
def test_strides_are_honoured(name: str, view: Callable[[Tensor], Tensor]) -> None:
    function, textbook, weights = OPERATORS[name]
    x, other = (view(t) for t in pair((3, 9, 11), (32, 32), "mixed"))
    channels = (x.shape[1], x.shape[1], 6)
    inputs = [x, other, *weights(channels, 2)]
    upstream = upstream_of(name, (3, *x.shape[2:]), (2 * x.shape[1], 0, 12), "planes")[:, ::2]
    assert_close(run(function, inputs, upstream), run(textbook, inputs, upstream), channels)
    upstream = torch.ones((), dtype=torch.float64).expand_as(upstream)
    assert_close(run(function, inputs, upstream), run(textbook, inputs, upstream), channels)


@operators
@pytest.mark.parametrize("layout", LAYOUTS)
def test_empty_batch(name: str, layout: str) -> None:
    function, _, weights = OPERATORS[name]
    inputs = [*pair((0, 9, 5), (16, 3, 4), layout), *weights((16, 3, 4), 2)]
    ours = run(function, inputs, upstream_of(name, (0, 9, 5), (16, 3, 4), "rows"))
    assert [t.shape for t in ours[1:]] == [t.shape for t in inputs]
    assert all((t == 0).all() for t in ours)


@operators
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_stays_at_its_position(name: str, layout: str) -> None:
    function, _, weights = OPERATORS[name]
    inputs = [t.float() for t in (*pair((2, 6, 9), (16, 20, 4), layout), *weights((16, 20, 4), 2))]
    inputs[1][1, 3, 2, 5] = torch.nan
    out = function(*inputs)
    assert out[1, :, 2, 5].isnan().all()
    assert out.isnan().sum() == out.shape[1]


@operators
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_output_is_written(name: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **options: make(*args, **options).fill_(torch.nan)

    function, textbook, weights = OPERATORS[name]
    inputs = [*pair((2, 13, 11), (19, 5, 7), layout), *weights((19, 5, 7), 2)]
    upstream = upstream_of(name, (2, 13, 11), (19, 5, 7), layout)
    exact = run(textbook, inputs, upstream)
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", poisoned(Tensor.new_empty))
    assert_close(run(function, inputs, upstream), exact, (19, 5, 7))


@operators
@pytest.mark.parametrize("layout", LAYOUTS)
def test_repeats_are_bit_identical_for_any_number_of_threads(name: str, layout: str) -> None:
    function, _, weights = OPERATORS[name]
    size, channels = (5, 70, 61), (40, 30, 24)
    inputs = [t.float() for t in (*pair(size, channels, layout), *weights(channels, 2))]
    upstream = upstream_of(name, size, channels, layout).float()
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5, 2):
            torch.set_num_threads(threads)
            runs.append(run(function, inputs, upstream))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_too_large_for_the_caches(layout: str) -> None:
    """They are written past the caches."""
    inputs = [t.float() for t in (*pair((2, 290, 301), (50, 3), layout), *gate_weights((50, 3), 2))]
    upstream = torch.randn_like(inputs[0])
    exact = run(textbook_gate, [t.double() for t in inputs], upstream.double())
    assert_close(run(gate, inputs, upstream), exact, (50, 3))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout: str) -> None:
    size, channels = (2, 4, 3), (5, 6, 7)
    partial = ("test_schema", "test_faketensor")
    inputs = [t.requires_grad_() for t in (*pair(size, channels, layout), *joint_weights(channels, 2))]
    opcheck(attention_op.joint_projection, inputs)
    x, g, x_weight, _, g_weight, _ = (t.detach() for t in inputs)
    out = joint(*(t.detach() for t in inputs))
    opcheck(
        attention_op.joint_projection_gradient,
        (torch.randn_like(out), out, x, g, x_weight, g_weight),
        test_utils=partial,
    )
    inputs = [t.requires_grad_() for t in (*pair(size, channels, layout), *gate_weights(channels, 2))]
    opcheck(attention_op.position_gate, inputs)
    x, h, weight, bias = (t.detach() for t in inputs)
    _, gates = attention_op.position_gate(x, h, weight, bias)
    opcheck(attention_op.position_gate_gradient, (torch.randn_like(x), x, h, gates, weight), test_utils=partial)


@pytest.mark.slow
def test_the_module_compiles_whole_and_for_any_batch() -> None:
    module = AttentionGate(8, 6, 4).double()
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    with use_backend("native"):
        for batch in (2, 3, 5):
            x, g = (t.requires_grad_() for t in pair((batch, 9, 10), (8, 6), "rows"))
            out, expected = compiled(x, g), module(x, g)
            torch.testing.assert_close(out, expected)
            leaves = [x, g, *module.parameters()]
            ours, plain = (torch.autograd.grad(y.square().sum(), leaves) for y in (out, expected))
            for a, b in zip(ours, plain, strict=True):
                torch.testing.assert_close(a, b)


def test_activations_of_two_dtypes_promote() -> None:
    x, other = dense((2, 5, 4, 3), "rows", torch.float32), dense((2, 6, 4, 3), "rows", torch.bfloat16)
    assert gate(x, other, *gate_weights((5, 6), 2)).dtype == torch.float32
    assert joint(other, x, *joint_weights((6, 5, 4), 2)).dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "layout", "dtype", "gradient", "fused"),
    [
        ("joint", "rows", torch.float32, True, True),
        ("joint", "rows", torch.float32, False, False),
        ("joint", "planes", torch.float32, True, False),
        ("joint", "rows", torch.bfloat16, True, False),
        ("gate", "planes", torch.float32, True, True),
        ("gate", "rows", torch.float32, False, False),
        ("gate", "rows", torch.bfloat16, True, False),
    ],
)
def test_auto_takes_what_is_faster(
    name: str, layout: str, dtype: torch.dtype, gradient: bool, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = [*pair((2, 6, 5), (4, 3), layout, dtype), *(w.float() for w in OPERATORS[name][2]((4, 3, 8), 2))]
    calls, call = [], attention_native.call
    monkeypatch.setattr(attention_native, "call", lambda *args: calls.append(args[0]) or call(*args))
    PUBLIC[name](*(t.requires_grad_(gradient) for t in inputs))
    assert len(calls) == fused


@operators
def test_a_second_derivative_raises(name: str) -> None:
    function, _, weights = OPERATORS[name]
    inputs = [t.requires_grad_() for t in (*pair((2, 3, 3), (4, 4, 4), "rows"), *weights((4, 4, 4), 2))]
    (gradient,) = torch.autograd.grad(function(*inputs).square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"use_backend\('reference'\)"):
        gradient.sum().backward()


def test_wrong_shapes_are_named() -> None:
    x, g = pair((2, 6, 5), (4, 3), "rows")
    of, single = joint_weights((4, 3, 2), 2), gate_weights((4, 3), 2)
    with pytest.raises(ValueError, match=r"g is \[2, 3, 6, 4\], but x is"):
        joint(x, g[..., :4], *of)
    with pytest.raises(ValueError, match=r"g_weight is \[2, 3, 1, 1\], but it must be \[2, 4, 1, 1\]"):
        joint(x, x, *of)
    with pytest.raises(ValueError, match="one to three spatial dimensions"):
        gate(x[..., 0, 0], g[..., 0, 0], *single)
    with pytest.raises(ValueError, match=r"weight is \[1, 3, 1, 1\], but it must be \[1, 4, 1, 1\]"):
        gate(x, x, *single)
