"""Separable convolutions with ReLU and batch normalisation against float64 mathematics."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.library import opcheck

from btinet_kernels import BatchNormWeights, SeparableWeights, fused_separable_conv, use_backend
from btinet_kernels.nn import ResidualBlock, SeparableConv
from btinet_kernels.separable import native, op, reference

# (shape, outputs, dilation): odd sizes, one position, taps beyond the map, several bands, inner products in pieces.
CASES = [
    ((2, 3, 9), 5, 1),
    ((3, 16, 8, 6), 32, 2),
    ((1, 50, 20, 23), 7, 1),
    ((2, 5, 6, 7, 9), 6, 1),
    ((2, 33, 3, 4), 33, 4),
    ((2, 6, 1, 1), 4, 1),
    ((5, 4, 40, 1), 40, 3),
    ((1, 16, 3, 70, 12), 8, 2),
    ((2, 176, 130, 61), 8, 1),
    ((1, 1100, 3, 5), 20, 1),
    ((2, 130, 5, 6), 101, 2),
]
LAYOUTS = ["rows", "planes"]
FOLLOWED_BY = ["nothing", "relu", "norm", "relu, norm"]


class Problem:
    """Weights, an input and an upstream gradient in float64, and what to do with them."""

    def __init__(self, case: tuple[tuple[int, ...], int, int], layout: str, followed_by: str) -> None:
        shape, outputs, self.dilation = case
        torch.manual_seed(0)
        axes = len(shape) - 2
        self.x = dense(shape, layout)
        self.upstream = dense((shape[0], outputs, *shape[2:]), layout)
        self.weights = [
            torch.randn(shape[1], 1, *[3] * axes, dtype=torch.float64),
            torch.randn(outputs, shape[1], *[1] * axes, dtype=torch.float64) * shape[1] ** -0.5,
            torch.randn(outputs, dtype=torch.float64) + 1,
        ]
        self.relu = "relu" in followed_by
        draw = torch.rand(4, outputs, dtype=torch.float64) + 0.5
        self.norm = list(draw.unbind()) if "norm" in followed_by else []

    def run(self, backend: str, dtype: torch.dtype, *, training: bool = True) -> dict[str, Tensor]:
        """Output, gradients, running statistics, of copies in ``dtype``; the weights stay float32 under bfloat16."""
        of_weights = torch.float32 if dtype == torch.bfloat16 and backend != "reference" else dtype
        x = self.x.to(dtype, copy=True).requires_grad_()
        weights = [w.to(of_weights, copy=True).requires_grad_() for w in self.weights]
        norm = [w.to(of_weights, copy=True) for w in self.norm]
        for parameter in norm[:2]:
            parameter.requires_grad_()
        with use_backend(backend):
            out = fused_separable_conv(
                x,
                SeparableWeights(*weights),
                dilation=self.dilation,
                relu=self.relu,
                norm=BatchNormWeights(*norm) if norm else None,
                training=training,
                momentum=0.3,
                eps=1e-3,
            )
        inputs = [x, *weights, *norm[:2]]
        gradients = torch.autograd.grad(out, inputs, self.upstream.to(dtype))
        names = ["d_x", "d_depthwise", "d_pointwise", "d_bias", "d_norm_weight", "d_norm_bias"]
        results = {"out": out, **dict(zip(names, gradients, strict=False))}
        results |= dict(zip(["running_mean", "running_var"], norm[2:], strict=False))
        if self.norm and training and (not self.relu or x.shape[2:].numel() == 1):
            del results["d_bias"]  # zero but for rounding: the normalisation takes the mean away
        return results

    def spare_the_kinks(self, rounding: float) -> None:
        """No gradient arrives where rounding what the products take may change the sign that the ReLU sees."""
        value = reference.separable(self.x, SeparableWeights(*self.weights), self.dilation, False)
        self.upstream[value.abs() < rounding * value.abs().max()] = 0


def dense(shape: tuple[int, ...], layout: str) -> Tensor:
    x = torch.randn(shape, dtype=torch.float64)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "rows" else x


def errors(ours: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Relative to each tensor's largest magnitude."""
    assert ours.keys() == exact.keys()
    return {
        k: float((v.detach().double() - exact[k]).detach().abs().max() / exact[k].abs().max()) for k, v in ours.items()
    }


@pytest.mark.parametrize("followed_by", FOLLOWED_BY)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_native_in_float64(case: tuple[Any, ...], layout: str, followed_by: str) -> None:
    problem = Problem(case, layout, followed_by)
    ours, exact = problem.run("native", torch.float64), problem.run("reference", torch.float64)
    # One position of two images: the deviations are small beside the values whose difference they are.
    allowed = 1e-10 if problem.norm and case[0][2:] == (1, 1) else 1e-12
    assert max(errors(ours, exact).values()) < allowed, errors(ours, exact)
    assert ours["out"].stride() == problem.upstream.stride()
    assert ours["d_x"].stride() == problem.x.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("followed_by", FOLLOWED_BY)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [((2, 48, 60, 50), 24, 1), ((3, 37, 14, 14), 50, 2)])
def test_single_and_half_precision(case: tuple[Any, ...], layout: str, followed_by: str, dtype: torch.dtype) -> None:
    problem = Problem(case, layout, followed_by)
    for each in (problem.x, problem.upstream, *problem.weights, *problem.norm):
        each.copy_(each.to(dtype))  # the same numbers for both
    if dtype == torch.bfloat16 and problem.relu:
        problem.spare_the_kinks(4 * torch.finfo(dtype).eps)
    ours, exact = problem.run("native", dtype), problem.run("reference", torch.float64)
    positions = problem.x.shape[0] * problem.x.shape[2:].numel()
    # Sums over all positions; the normalised value is stored in dtype before it is normalised, and so is a ReLU's sign.
    allowed = 16 * positions**0.5 * 2.0**-24 + (0 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps)
    assert max(errors(ours, exact).values()) < allowed, errors(ours, exact)


@pytest.mark.slow
def test_every_instruction_set_in_bfloat16(in_every_instruction_set: Callable[[str], list[Tensor]]) -> None:
    """Products of an even and an odd number of channels, and of more than are summed at once."""
    program = (
        "import torch, btinet_kernels as k\n"
        "torch.manual_seed(0)\n"
        "for channels in (37, 64, 1100):\n"
        "    x = torch.randn(2, channels, 9, 7)\n"
        "    d, p = torch.randn(channels, 1, 3, 3), torch.randn(50, channels, 1, 1)\n"
        "    exact = k.fused_separable_conv(x.bfloat16().double(), k.SeparableWeights(d.double(), p.double(), None))\n"
        "    with k.use_backend('native'):\n"
        "        y = k.fused_separable_conv(x.bfloat16(), k.SeparableWeights(d, p, None))\n"
        "    print(float((y - exact).norm() / exact.norm()))\n"
    )
    with_pairs, *others = in_every_instruction_set(program)
    rounding = 2.0**-9  # at most, of the result; with pairs of both factors too, each in a direction of its own
    assert all(max(other) < rounding for other in others)
    assert max(with_pairs) < 3**0.5 * rounding
    if torch.cpu._is_avx512_bf16_supported():
        assert min(with_pairs) > 1.5 * max(others[0])  # they did run


@pytest.mark.parametrize("layout", LAYOUTS)
def test_evaluation_mode(layout: str) -> None:
    problem = Problem(((2, 20, 9, 11), 37, 2), layout, "relu, norm")
    ours, exact = (problem.run(b, torch.float64, training=False) for b in ("native", "reference"))
    assert max(errors(ours, exact).values()) < 1e-12
    assert torch.equal(ours["running_mean"], problem.norm[2])
    weights, norm = SeparableWeights(*problem.weights), BatchNormWeights(*problem.norm)
    with torch.no_grad(), use_backend("native"):  # in one pass
        out = fused_separable_conv(problem.x, weights, dilation=2, relu=True, norm=norm, eps=1e-3)
    assert float((out - exact["out"]).abs().max()) < 1e-12
    assert out.stride() == exact["out"].stride()


def test_statistics_of_values_far_from_zero() -> None:
    """A mean of 1000 deviations: squares in float32 would leave nothing of the variance."""
    problem = Problem(((4, 16, 50, 50), 16, 1), "rows", "norm")
    problem.weights[2] += 1000.0
    ours, exact = problem.run("native", torch.float32), problem.run("reference", torch.float64)
    kept = {"out", "running_mean", "running_var"}
    worst = max(v for k, v in errors(ours, exact).items() if k in kept)
    assert worst < 8 * 1000 * 2.0**-24  # what rounding the values themselves costs


@pytest.mark.parametrize("followed_by", FOLLOWED_BY)
@pytest.mark.parametrize("shape", [(3, 3, 7), (2, 4, 6, 5), (2, 3, 3, 2, 4)])
def test_gradcheck(shape: tuple[int, ...], followed_by: str) -> None:
    problem = Problem((shape, 4, 1), "rows", followed_by)

    def function(x: Tensor, *weights: Tensor) -> Tensor:
        norm = BatchNormWeights(*weights[3:], *(t.clone() for t in problem.norm[2:])) if problem.norm else None
        conv = SeparableWeights(*weights[:3])
        return fused_separable_conv(x, conv, relu=problem.relu, norm=norm, training=True)

    inputs = [t.requires_grad_() for t in (problem.x, *problem.weights, *problem.norm[:2])]
    with use_backend("native"):
        assert gradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("followed_by", ["relu", "relu, norm"])
def test_opcheck(followed_by: str) -> None:
    problem = Problem(((2, 18, 5, 4), 20, 1), "rows", followed_by)
    norm = [p.float().requires_grad_() for p in problem.norm[:2]] or [None, None]
    weights = [w.float().requires_grad_() for w in problem.weights]
    x = problem.x.float().requires_grad_()
    opcheck(op.separable, (x, *weights, *norm, 1, problem.relu, 1e-3))
    running = [t.float() for t in problem.norm[2:]] or [None, None]
    opcheck(
        op.separable_inference,
        (x, *weights, *norm, *running, 1, problem.relu, 1e-3),
        test_utils=["test_schema", "test_faketensor"],
    )
    out, *saved = op.separable(x, *weights, *norm, 1, problem.relu, 1e-3)
    value = saved[0] if problem.norm else out
    arguments = (torch.randn_like(out), x, value, *saved[1:], *weights, *norm, 1, problem.relu, 1e-3)
    detached = [a.detach() if isinstance(a, Tensor) else a for a in arguments]
    opcheck(op.separable_gradient, tuple(detached), test_utils=["test_schema", "test_faketensor"])


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_compile(training: bool) -> None:
    torch.manual_seed(0)
    block = ResidualBlock(20, 24).train(training)
    compiled = torch.compile(copy.deepcopy(block), fullgraph=True)
    x = dense((2, 20, 9, 8), "rows").float().requires_grad_()
    results = []
    for model in (block, compiled):
        out = model(x)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, *model.parameters()]), *model.buffers()])
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_repeats_are_identical_for_any_number_of_threads(layout: str) -> None:
    problem = Problem(((3, 40, 33, 29), 24, 2), layout, "relu")
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            results.append(problem.run("native", torch.float32))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(other[name], value) for name, value in results[0].items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_positions_have_the_sums_of_many(dtype: torch.dtype) -> None:
    """Their products go through the weights in another order, but add up the same."""
    torch.manual_seed(0)
    x = torch.randn(4, 1100, 13, 11).to(dtype).to(memory_format=torch.channels_last)
    weights = SeparableWeights(torch.randn(1100, 1, 3, 3), torch.randn(210, 1100, 1, 1), torch.randn(210))
    with torch.no_grad(), use_backend("native"):
        one, all_of_them = (fused_separable_conv(part, weights, relu=True) for part in (x[:1], x))
    assert x[:1].shape[2:].numel() <= 512 < x.numel() // x.shape[1]
    assert torch.equal(one, all_of_them[:1])


def test_a_gradient_of_another_layout() -> None:
    problem = Problem(((2, 20, 9, 11), 37, 2), "rows", "relu, norm")
    problem.upstream = problem.upstream.contiguous()
    ours, exact = (problem.run(backend, torch.float64) for backend in ("native", "reference"))
    assert max(errors(ours, exact).values()) < 1e-12


def test_every_value_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory full of NaN shows what a kernel leaves alone or reads beyond its input."""
    problem = Problem(((2, 21, 7, 10), 13, 1), "rows", "relu, norm")
    exact = problem.run("reference", torch.float64)
    empty_like, new_empty = torch.empty_like, Tensor.new_empty
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(float("nan")))
    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(float("nan")))
    assert max(errors(problem.run("native", torch.float64), exact).values()) < 1e-12


def test_strides_are_honoured() -> None:
    problem = Problem(((2, 18, 8, 9), 16, 1), "planes", "relu")
    exact = problem.run("reference", torch.float64)
    wide = torch.full((2, 18, 8, 18), float("nan"), dtype=torch.float64)
    wide[..., ::2] = problem.x
    problem.x = wide[..., ::2]
    weights = SeparableWeights(*problem.weights)
    with use_backend("native"):
        assert float((fused_separable_conv(problem.x, weights, relu=True) - exact["out"]).abs().max()) < 1e-12
    d_x, _ = native.separable_backward(problem.x, problem.upstream, exact["out"], weights, 1, True)
    assert float((d_x - exact["d_x"]).abs().max()) < 1e-11


def test_nan_passes_the_relu() -> None:
    problem = Problem(((1, 16, 6, 6), 16, 1), "rows", "relu")
    problem.x[0, 3, 2, 2] = float("nan")
    ours, exact = problem.run("native", torch.float64), problem.run("reference", torch.float64)
    for name, value in exact.items():
        assert torch.equal(ours[name].isnan(), value.isnan()), name


def test_without_a_bias() -> None:
    problem = Problem(((2, 16, 6, 6), 16, 1), "rows", "nothing")
    results = []
    for backend in ("native", "reference"):
        weights = [w.clone().requires_grad_() for w in problem.weights[:2]]
        with use_backend(backend):
            out = fused_separable_conv(problem.x, SeparableWeights(*weights, None))
        results.append([out, *torch.autograd.grad(out, weights, problem.upstream)])
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-11, atol=1e-11)


def test_an_empty_batch() -> None:
    weights = SeparableWeights(torch.randn(4, 1, 3, 3), torch.randn(6, 4, 1, 1), torch.randn(6))
    assert fused_separable_conv(torch.randn(0, 4, 5, 5), weights).shape == (0, 6, 5, 5)


def test_one_value_a_channel_cannot_be_normalised() -> None:
    weights = SeparableWeights(torch.randn(4, 1, 3, 3), torch.randn(6, 4, 1, 1), torch.randn(6))
    norm = BatchNormWeights(*torch.ones(4, 6).unbind())
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        fused_separable_conv(torch.randn(1, 4, 1, 1), weights, norm=norm, training=True)


def test_bad_input() -> None:
    weights = SeparableWeights(torch.randn(4, 1, 3, 3), torch.randn(6, 4, 1, 1), torch.randn(6))
    with pytest.raises(ValueError, match="one to three spatial dimensions"):
        fused_separable_conv(torch.randn(2, 4), weights)
    with pytest.raises(ValueError, match="dilation must be positive"):
        fused_separable_conv(torch.randn(2, 4, 5, 5), weights, dilation=0)
    with pytest.raises(ValueError, match=r"depthwise is \[4, 1, 3, 3\], but for x \[2, 5, 5, 5\]"):
        fused_separable_conv(torch.randn(2, 5, 5, 5), weights)
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    (grad,) = torch.autograd.grad(fused_separable_conv(x, weights).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        grad.sum().backward()


class Watched(nn.BatchNorm2d):
    """Of another class: may compute anything."""


@pytest.mark.parametrize("kind", ["momentum", "statistics", "affine", "hook", "class"])
def test_a_norm_that_is_not_plain_is_called(kind: str) -> None:
    torch.manual_seed(0)
    conv = SeparableConv(6, 8)
    norm: nn.BatchNorm2d = {
        "momentum": lambda: nn.BatchNorm2d(8, momentum=None),
        "statistics": lambda: nn.BatchNorm2d(8, track_running_stats=False),
        "affine": lambda: nn.BatchNorm2d(8, affine=False),
        "hook": lambda: nn.BatchNorm2d(8),
        "class": lambda: Watched(8),
    }[kind]()
    called = []
    if kind == "hook":
        norm.register_forward_hook(lambda *_: called.append(True))
    x, twin = torch.randn(2, 6, 5, 5), copy.deepcopy(norm)
    out = conv(x, relu=True, norm=norm)
    torch.testing.assert_close(out, twin(torch.relu(conv(x))))
    assert bool(called) == (kind == "hook")


def test_the_module_counts_batches_and_keeps_running_statistics() -> None:
    torch.manual_seed(0)
    conv, norm = SeparableConv(6, 8), nn.BatchNorm2d(8, momentum=0.2)
    twin, x = copy.deepcopy(norm), torch.randn(3, 6, 5, 5)
    for _ in range(2):
        torch.testing.assert_close(conv(x, relu=True, norm=norm), twin(torch.relu(conv(x))))
    for (name, ours), plain in zip(norm.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, plain, msg=name)
    norm.eval(), twin.eval()
    with torch.no_grad():
        torch.testing.assert_close(conv(x, relu=True, norm=norm), twin(torch.relu(conv(x))))
    assert int(norm.num_batches_tracked) == 2


def test_auto_leaves_large_products_of_few_positions_to_the_library() -> None:
    def conv(positions: int) -> Tensor:
        weights = SeparableWeights(torch.randn(64, 1, 3), torch.randn(64, 64, 1), torch.randn(64))
        return fused_separable_conv(torch.randn(1, 64, positions), weights)

    with torch.profiler.profile() as few:
        conv(31)
    with torch.profiler.profile() as many:
        conv(32)
    names = [{event.key for event in each.key_averages()} for each in (few, many)]
    assert ["btinet_kernels::separable_inference" in found for found in names] == [False, True]


def test_what_is_left_to_the_library_goes_through_the_modules_own_convolutions() -> None:
    """There, a fused network has others in their place."""
    conv, called = SeparableConv(64, 64, spatial_dims=1), []
    conv.pointwise.register_forward_hook(lambda *_: called.append(1))
    conv(torch.randn(1, 64, 32))
    assert not called
    conv(torch.randn(1, 64, 31))
    assert called
    with pytest.raises(ValueError, match="x must be"):
        conv(torch.randn(64, 31))
