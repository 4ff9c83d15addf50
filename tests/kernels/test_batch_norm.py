"""Fused batch normalisation with an activation against float64 mathematics: values, gradients, layouts, edges."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.library import opcheck

from btinet_kernels import fused_batch_norm_act, use_backend
from btinet_kernels.normalization.op import SMALLEST, batch_norm, batch_norm_gradient, batch_norm_is_served
from btinet_kernels.normalization.reference import ACTIVATIONS

# Below, at and above vectors of 8 and 16 channels or positions; blocks of 16 rows; one pixel, one channel, no space.
SHAPES = [
    (3, 16, 8, 6),
    (2, 17, 9, 11),
    (3, 5, 8, 3, 4),
    (4, 33, 13),
    (5, 6, 1, 1),
    (1, 1, 5, 7),
    (9, 40),
    (2, 3, 50, 70),
]
LAYOUTS = ["rows", "planes"]
MODES = list(itertools.product(ACTIVATIONS, [True, False]))


def dense(shape: tuple[int, ...], layout: str, dtype: torch.dtype = torch.float64) -> Tensor:
    x = (torch.randn(shape, dtype=torch.float64) * 2 + 3).to(dtype)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "rows" else x


def vectors(channels: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Weight, bias, running mean and running variance."""
    torch.manual_seed(0)
    return [
        v.to(dtype)
        for v in (torch.randn(channels), torch.randn(channels), 3 + torch.randn(channels), 2 + torch.rand(channels))
    ]


def by_hand(x: Tensor, v: list[Tensor], act: str, training: bool) -> list[Tensor]:
    """Result and running statistics, in float64 and sharing no code with the reference."""
    weight, bias, mean, variance = (t.double() for t in v)
    count = x.numel() // x.shape[1]
    rows = x.double().movedim(1, -1).reshape(count, -1)
    if training:
        of_batch = rows.mean(0), ((rows - rows.mean(0)) ** 2).sum(0)
        running = [0.7 * mean + 0.3 * of_batch[0], 0.7 * variance + 0.3 * of_batch[1] / (count - 1)]
        mean, variance = of_batch[0], of_batch[1] / count
    else:
        running = [mean, variance]
    z = (rows - mean) / (variance + 1e-3).sqrt() * weight + bias
    out = {"identity": z, "relu": z.clamp_min(0), "silu": z / (1 + (-z).exp())}[act]
    return [out.reshape(x.movedim(1, -1).shape).movedim(-1, 1), *running]


def with_gradients(function, x: Tensor, v: list[Tensor], act: str, training: bool, upstream: Tensor) -> list[Tensor]:  # type: ignore[no-untyped-def]
    x, leaves = x.detach().requires_grad_(), [t.detach().requires_grad_() for t in v[:2]]
    out, *running = function(x, [*leaves, *(t.clone() for t in v[2:])], act, training)
    gradients = torch.autograd.grad(out, [x, *leaves], upstream.to(out.dtype))
    return [out, gradients[0], *gradients[1:], *running]


def fused(x: Tensor, v: list[Tensor], act: str, training: bool) -> list[Tensor]:
    out = fused_batch_norm_act(x, *v, training=training, momentum=0.3, eps=1e-3, act=act)  # type: ignore[arg-type]
    return [out, *v[2:]]


def errors(ours: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Relative to each tensor's largest magnitude."""
    return [
        ((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-30)).item() for a, b in zip(ours, exact, strict=True)
    ]


@pytest.mark.parametrize(("act", "training"), MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_equals_the_formula_in_float64(
    backend: str, shape: tuple[int, ...], layout: str, act: str, training: bool
) -> None:
    x, v, upstream = dense(shape, layout), vectors(shape[1]), dense(shape, layout)
    with use_backend(backend):
        ours = with_gradients(fused, x, v, act, training, upstream)
    assert max(errors(ours, with_gradients(by_hand, x, v, act, training, upstream))) < 1e-11
    assert backend == "reference" or all(t.stride() == torch.empty_like(x).stride() for t in ours[:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act", ["identity", "silu"])  # a ReLU's gradient jumps where rounding changes a sign
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_single_and_half_precision(layout: str, training: bool, act: str, dtype: torch.dtype) -> None:
    shape = (3, 37, 30, 40)
    x, upstream = dense(shape, layout, dtype), dense(shape, layout, dtype) - 3
    v = vectors(37, torch.float32)
    with use_backend("native"):
        ours = with_gradients(fused, x, v, act, training, upstream)
    exact = with_gradients(by_hand, x, v, act, training, upstream)
    # Sums are kept in double after 32 terms; the rest is a handful of roundings of values a few times as large.
    of = errors(ours, exact)
    assert max(of[2:]) < 32 * 2.0**-24
    assert max(of[:2]) < 32 * 2.0**-24 + (torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_rows_far_from_zero(layout: str) -> None:
    x = (torch.randn(2, 3, 250, 200, dtype=torch.float64) + 1000).float()
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "rows" else x
    v = [torch.ones(3), torch.zeros(3), torch.zeros(3), torch.zeros(3)]
    with use_backend("native"):
        ours = fused(x, v, "identity", True)
    assert max(errors(ours[1:], by_hand(x, [torch.zeros(3)] * 4, "identity", True)[1:])) < 4 * 2.0**-24


def test_silu_at_every_magnitude() -> None:
    z = torch.cat([torch.linspace(-120, 120, 100_001), torch.logspace(-30, 1, 500), -torch.logspace(-30, 1, 500)])
    x = z.reshape(-1, 1, 1, 1).clone().requires_grad_()
    ones, zeros = torch.ones(1), torch.zeros(1)
    with use_backend("native"):
        y = fused_batch_norm_act(x, ones, zeros, zeros, ones, eps=0.0, act="silu")
        (d_x,) = torch.autograd.grad(y.sum(), [x])
    exact = x.detach().double().requires_grad_()
    (d_exact,) = torch.autograd.grad((value := exact / (1 + (-exact).exp())).sum(), [exact])
    # e^z is off by 2e-7 of itself; beyond -87 it is held, where the result is below 1e-35.
    assert ((y - value).abs() <= 6e-7 * value.abs() + 1e-35).all()
    assert ((d_x - d_exact).abs() <= 1e-6 * d_exact.abs().clamp_min(1e-1)).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_what_is_not_finite_is_seen(act: str, value: float) -> None:
    x = torch.randn(2, 5, 6, 6)
    x[1, 2, 3, 4] = value
    with use_backend("native"):
        out = fused(x, vectors(5, torch.float32), act, True)[0]
    assert out[:, 2].isnan().all()
    assert out[:, [0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("missing", [[0], [1], [0, 1], [2, 3]])
def test_without_some_vectors(missing: list[int]) -> None:
    x, v = dense((3, 6, 5, 4), "rows"), vectors(6)
    given = [None if n in missing else t for n, t in enumerate(v)]
    results = []
    for backend in ("native", "reference"):
        leaf = x.detach().requires_grad_()
        weights = [None if t is None else t.detach().requires_grad_() for t in given[:2]]
        with use_backend(backend):
            out = fused_batch_norm_act(
                leaf, *weights, *(None if t is None else t.clone() for t in given[2:]), training=True, act="silu"
            )
            leaves = [leaf, *(w for w in weights if w is not None)]
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert max(errors(*results)) < 1e-12


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, ::2],
        lambda x: x[..., 1:-1],
        lambda x: x.transpose(2, 3),
        lambda x: x[:1].expand(3, -1, -1, -1),
        lambda x: x.permute(0, 2, 1, 3),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("act", "training"), MODES)
def test_strides_are_honoured(view, layout: str, act: str, training: bool) -> None:  # type: ignore[no-untyped-def]
    x, upstream = view(dense((3, 20, 9, 11), layout)), view(dense((3, 20, 9, 11), "rows"))
    v = vectors(x.shape[1])
    with use_backend("native"):
        ours = with_gradients(fused, x, v, act, training, upstream)
    assert max(errors(ours, with_gradients(by_hand, x, v, act, training, upstream))) < 1e-11


@pytest.mark.parametrize("upstream", ["expanded", "planes", "transposed"])
def test_upstream_gradients_of_any_layout(upstream: str) -> None:
    x, v = dense((2, 16, 12, 13), "rows"), vectors(16)
    gradient = {
        "expanded": torch.randn(2, 16, 1, 1, dtype=torch.float64).expand_as(x),
        "planes": dense((2, 16, 12, 13), "planes"),
        "transposed": dense((2, 16, 13, 12), "planes").transpose(2, 3),
    }[upstream]
    with use_backend("native"):
        ours = with_gradients(fused, x, v, "silu", True, gradient)
    assert max(errors(ours, with_gradients(by_hand, x, v, "silu", True, gradient))) < 1e-11


@pytest.mark.parametrize(("act", "training"), [("identity", True), ("silu", True), ("silu", False)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(layout: str, act: str, training: bool) -> None:
    x, v = dense((2, 4, 3, 3), layout).requires_grad_(), vectors(4)

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return fused(x, [weight, bias, *(t.clone() for t in v[2:])], act, training)[0]

    with use_backend("native"):
        assert gradcheck(function, (x, *(t.requires_grad_() for t in v[:2])))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
def test_opcheck(training: bool, layout: str) -> None:
    x, v = dense((2, 5, 4, 3), layout, torch.float32), vectors(5, torch.float32)
    leaves = [t.requires_grad_() for t in v[:2]]
    moments = (None, None) if training else tuple(v[2:])
    with use_backend("native"):
        opcheck(batch_norm, (x.requires_grad_(), *leaves, *moments, 1e-3, "silu"))
        detached = [t.detach() for t in (x, *leaves)]
        opcheck(batch_norm_gradient, (torch.randn_like(x), *detached, *v[2:], training, 1e-3, "silu"))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["native", "auto"])
def test_compile(backend: str) -> None:
    x, v = dense((2, 16, 40, 41), "rows", torch.float32), vectors(16, torch.float32)

    def function(x: Tensor, *v: Tensor) -> Tensor:
        return fused_batch_norm_act(x, *v, training=True, act="silu")

    results = []
    for run in (function, torch.compile(function, fullgraph=True)):
        leaf, running = x.detach().requires_grad_(), [t.clone() for t in v[2:]]
        with use_backend(backend):
            out = run(leaf, *v[:2], *running)
            results.append([out, *torch.autograd.grad(out.square().sum(), [leaf]), *running])
    assert max(errors(results[0], [t.double() for t in results[1]])) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_repeats_and_threads_are_bit_identical(layout: str) -> None:
    x, v = dense((3, 50, 31, 30), layout, torch.float32), vectors(50, torch.float32)
    upstream, threads = dense((3, 50, 31, 30), layout, torch.float32), torch.get_num_threads()
    results = []
    try:
        for count in (1, 1, 2, 3):
            torch.set_num_threads(count)
            with use_backend("native"):
                results.append(with_gradients(fused, x, v, "silu", True, upstream))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(other, results[0], strict=True))


@pytest.mark.slow
def test_every_instruction_set(in_every_instruction_set: Callable[[str], list[Tensor]]) -> None:
    program = (
        "import torch, btinet_kernels as k\n"
        "torch.manual_seed(0)\n"
        "for last in (False, True):\n"
        "    x = torch.randn(3, 21, 9, 10, requires_grad=True)\n"
        "    z = x.to(memory_format=torch.channels_last) if last else x\n"
        "    w, b, m, v = torch.randn(21), torch.randn(21), torch.zeros(21), torch.ones(21)\n"
        "    with k.use_backend('native'):\n"
        "        y = k.fused_batch_norm_act(z, w, b, m, v, training=True, act='silu')\n"
        "        d, = torch.autograd.grad(y.sin().sum(), [x])\n"
        "    print(*(float(t.detach().abs().sum()) for t in (y, d, m, v)))\n"
    )
    first, *others = in_every_instruction_set(program)
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-5, atol=0)


def test_what_auto_takes() -> None:
    large = torch.empty(1, 8, 128, SMALLEST // 1024)
    rows = large.to(memory_format=torch.channels_last)
    assert batch_norm_is_served(large, "identity")
    assert batch_norm_is_served(rows, "silu")
    assert not batch_norm_is_served(rows, "identity")
    assert not batch_norm_is_served(large[..., :-1], "silu")
    with use_backend("reference"):
        assert not batch_norm_is_served(rows, "silu")
    with use_backend("native"):
        assert batch_norm_is_served(rows[..., :2], "identity")


def test_empty_batch() -> None:
    x, v = torch.empty(0, 4, 3, 3), vectors(4, torch.float32)
    with use_backend("native"):
        assert fused(x, v, "relu", False)[0].shape == x.shape


def test_double_backward_says_what_to_do() -> None:
    x, v = dense((2, 4, 3, 3), "rows").requires_grad_(), vectors(4)
    with use_backend("native"):
        out = fused(x, v, "silu", True)[0]
        (d_x,) = torch.autograd.grad(out.square().sum(), [x], create_graph=True)
        with pytest.raises(RuntimeError, match="differentiated twice"):
            d_x.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act": "gelu"}, "act must be 'identity', 'relu' or 'silu'"),
        ({"weight": torch.ones(3)}, r"weight must be \[4\] for x \[2, 4, 3, 3\], got \[3\]"),
        ({"x": torch.ones(4)}, "up to three spatial dimensions"),
        ({"x": torch.ones(1, 4, 1, 1)}, "more than one value per channel"),
        ({"training": False, "running_var": None}, "needed in evaluation"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:  # type: ignore[type-arg]
    v = dict(zip(("weight", "bias", "running_mean", "running_var"), vectors(4, torch.float32), strict=True))
    given = {"x": torch.ones(2, 4, 3, 3), **v, "training": True, **change}
    with pytest.raises(ValueError, match=message):
        fused_batch_norm_act(**given)
