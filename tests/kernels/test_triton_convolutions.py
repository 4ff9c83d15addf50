"""The Triton kernels of separable convolutions and of batch normalisation against float64 mathematics, on a GPU or
interpreted as in test_triton.py."""

import os
import subprocess
import sys
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from btinet_kernels import BackendError, BatchNormWeights, SeparableWeights, fused_batch_norm_act, use_backend
from btinet_kernels.backends import choose
from btinet_kernels.normalization.op import SMALLEST, batch_norm, batch_norm_gradient, batch_norm_is_served
from btinet_kernels.separable import op as separable_op
from btinet_kernels.separable.op import fused_separable_conv

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
SERVED = INTERPRETED or torch.cuda.is_available()
if SERVED:
    from btinet_kernels.normalization import triton as normalization
    from btinet_kernels.separable import triton as separable

on_device = [
    pytest.mark.usefixtures("seeded"),
    pytest.mark.skipif(not SERVED, reason="there is no GPU; the kernels ran in a process that interprets them"),
    pytest.mark.gpu,
]
# Interpreting the network's sizes would take hours.
on_hardware = pytest.mark.skipif(INTERPRETED, reason="too large to be interpreted")
HALF = [torch.float16, torch.bfloat16]
LAYOUTS = ["rows", "planes"]
PROMISES = ("test_schema", "test_faketensor")
VIEWS = [
    lambda x: x[:, ::2],
    lambda x: x[..., 1:-1],
    lambda x: x.transpose(2, 3),
    lambda x: x[:1].expand(3, -1, -1, -1),
    lambda x: x.flip(0).transpose(1, 3),
]


@pytest.fixture
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that torch hands out is full of NaN, so that what a kernel leaves unwritten shows."""
    like, new = torch.empty_like, Tensor.new_empty
    monkeypatch.setattr(torch, "empty_like", lambda *args, **options: like(*args, **options).fill_(torch.nan))
    monkeypatch.setattr(Tensor, "new_empty", lambda *args, **options: new(*args, **options).fill_(torch.nan))


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="these tests run here directly")
@pytest.mark.parametrize("part", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_interpreted_in_a_process_of_its_own(part: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "BTINET_BACKEND": "auto"}
    options = ["-q", "-p", "no:cacheprovider", "--import-mode=importlib", "-m", part]
    command = [sys.executable, "-m", "pytest", __file__, *options]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=os.path.dirname(__file__))
    print("interpreted Triton kernels:", result.stdout.splitlines()[-1])
    assert result.returncode == 0, result.stdout[-5000:]
    assert " passed" in result.stdout


def dense(shape: tuple[int, ...], layout: str, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(shape).to(DEVICE, dtype)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "rows" else x


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape).to(DEVICE)


def errors(ours: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Relative to each tensor's largest magnitude, or to 1 where that is below 1."""
    assert ours.keys() == exact.keys()
    found = {}
    for name, right in exact.items():
        assert ours[name].shape == right.shape
        assert ours[name].isfinite().all(), name
        found[name] = ((ours[name].double() - right).abs().max() / right.abs().max().clamp_min(1)).item()
    return found


def tolerance(dtype: torch.dtype, terms: int, roundings: int = 4) -> float:
    """Sums of ``terms`` in float32 err by about sqrt(terms) half-ulps, and a few follow one another.

    In half precision operands and results of the products are rounded, four times between x and a gradient.
    """
    computed = 8 * terms**0.5 * 2.0**-24
    return computed if dtype == torch.float32 else computed + roundings * torch.finfo(dtype).eps


class Norm:
    """A batch normalisation's vectors, and what to do with them."""

    def __init__(self, channels: int, act: str = "silu", training: bool = True) -> None:
        self.act, self.training = act, training
        vectors = drawn(channels), drawn(channels), drawn(channels), 1 + drawn(channels).abs()
        self.vectors = dict(zip(("weight", "bias", "running_mean", "running_var"), vectors, strict=True))

    def fused(self, x: Tensor, upstream: Tensor, backend: str = "triton") -> dict[str, Tensor]:
        x = x.detach().requires_grad_()
        given = {name: v.clone().requires_grad_(name in ("weight", "bias")) for name, v in self.vectors.items()}
        with use_backend(backend):
            out = fused_batch_norm_act(
                x,
                *(given.get(name) for name in ("weight", "bias", "running_mean", "running_var")),
                training=self.training,
                momentum=0.3,
                eps=1e-3,
                act=self.act,  # type: ignore[arg-type]
            )
            assert out.dtype == x.dtype
            assert out.stride() == torch.empty_like(x).stride()
            return gradients(out, upstream, {"x": x, **given})

    def by_hand(self, x: Tensor, upstream: Tensor) -> dict[str, Tensor]:
        """In float64, sharing no code with the reference."""
        x = x.detach().double().requires_grad_()
        given = {name: v.double().requires_grad_(name in ("weight", "bias")) for name, v in self.vectors.items()}
        count, shape = x.numel() // x.shape[1], [1, -1, *[1] * (x.ndim - 2)]
        mean, variance = (given.get(name) for name in ("running_mean", "running_var"))
        if self.training:
            over = [axis for axis in range(x.ndim) if axis != 1]
            of_batch = x.mean(over), (x - x.mean(over, keepdim=True)).square().sum(over)
            if mean is not None and variance is not None:
                given["running_mean"] = 0.7 * mean + 0.3 * of_batch[0].detach()
                given["running_var"] = 0.7 * variance + 0.3 * of_batch[1].detach() / (count - 1)
            mean, variance = of_batch[0], of_batch[1] / count
        z = (x - mean.view(shape)) / (variance.view(shape) + 1e-3).sqrt()  # type: ignore[union-attr]
        z = z * given["weight"].view(shape) if "weight" in given else z
        z = z + given["bias"].view(shape) if "bias" in given else z
        out = {"identity": z, "relu": z.clamp_min(0), "silu": z / (1 + (-z).exp())}[self.act]
        return gradients(out, upstream.double(), {"x": x, **given})


def gradients(out: Tensor, upstream: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The result, the gradients of what has one, and what there is else: the running statistics."""
    leaves = {name: t for name, t in given.items() if t.requires_grad}
    of_leaves = torch.autograd.grad(out, list(leaves.values()), upstream)
    others = {name: t for name, t in given.items() if not t.requires_grad}
    return {"out": out.detach(), **dict(zip((f"d_{n}" for n in leaves), of_leaves, strict=True)), **others}


class TestBatchNorm:
    pytestmark = on_device

    MODES = tuple(product(["identity", "relu", "silu"], [True, False]))
    # Tiles hold 16 to 128 positions of 16 or 32 channels; one position, no axes of space, three of them.
    SHAPES = ((1, 32, 3, 13), (3, 33, 1, 1), (9, 40), (2, 3, 2, 3, 4), (2, 5, 140))

    def check(self, norm: Norm, x: Tensor, upstream: Tensor, terms: int | None = None) -> None:
        found = errors(norm.fused(x, upstream), norm.by_hand(x, upstream))
        assert max(found.values()) < tolerance(x.dtype, terms or max(16, x.numel() // x.shape[1])), found

    @pytest.mark.parametrize(("act", "training"), MODES)
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.usefixtures("poisoned")
    def test_equals_the_formula(self, layout: str, act: str, training: bool) -> None:
        shape = (2, 17, 9, 8)
        self.check(Norm(17, act, training), dense(shape, layout) * 2 + 3, dense(shape, layout))

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.usefixtures("poisoned")
    def test_shapes(self, layout: str, shape: tuple[int, ...]) -> None:
        self.check(Norm(shape[1]), dense(shape, layout) * 2 + 3, dense(shape, layout))

    @pytest.mark.parametrize("dtype", HALF)
    @pytest.mark.parametrize("act", ["relu", pytest.param("silu", marks=pytest.mark.slow)])
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_half_precision(self, layout: str, act: str, dtype: torch.dtype) -> None:
        shape = (2, 21, 6, 7)
        self.check(Norm(21, act), dense(shape, layout, dtype) * 2 + 3, dense(shape, layout, dtype))

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("programs", [1, 10**6])
    def test_few_programs_and_many(self, layout: str, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Several tiles a part, the last of them incomplete; more parts than are combined at once."""
        monkeypatch.setattr(normalization, "ENOUGH_PROGRAMS", programs)
        monkeypatch.setattr(normalization, "TILE", 256)
        monkeypatch.setattr(normalization, "ROWS", 4)
        shape = (3, 5, 13, 11)
        self.check(Norm(5), dense(shape, layout) + 3, dense(shape, layout))

    @pytest.mark.parametrize("programs", [1, 10**6])
    def test_values_far_from_zero(self, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """A mean of 1000 deviations: squares in float32 would leave nothing of the variance."""
        monkeypatch.setattr(normalization, "ENOUGH_PROGRAMS", programs)
        norm, x = Norm(3, "identity"), dense((2, 3, 20, 30), "rows") + 1000
        found = errors(norm.fused(x, x), norm.by_hand(x, x))
        # Means are rounded as values of 1000 are; over 1200 positions it averages out.
        assert found["running_mean"] < 4 * 2.0**-24
        assert found["running_var"] < 4 * 1000 * 2.0**-24 / 1200**0.5
        assert found["out"] < 4 * 1000 * 2.0**-24

    @pytest.mark.parametrize("missing", [["weight"], ["bias"], ["weight", "bias"], ["running_mean", "running_var"]])
    def test_without_some_vectors(self, missing: list[str]) -> None:
        norm, shape = Norm(6), (3, 6, 5, 4)
        for name in missing:
            del norm.vectors[name]
        self.check(norm, dense(shape, "rows"), dense(shape, "rows"))

    @pytest.mark.slow
    @pytest.mark.parametrize("view", VIEWS)
    def test_strides_are_honoured(self, view) -> None:  # type: ignore[no-untyped-def]
        x, upstream = view(dense((3, 6, 5, 6), "planes")), view(dense((3, 6, 5, 6), "rows"))
        self.check(Norm(x.shape[1]), x, upstream, x.numel())

    def test_upstream_gradients_may_be_expanded(self) -> None:
        self.check(Norm(5), dense((2, 5, 6, 7), "rows"), drawn(2, 5, 1, 1).expand(2, 5, 6, 7))

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    @pytest.mark.parametrize(("act", "training"), MODES)
    def test_what_is_not_finite_reaches_what_it_reaches_in_pytorch(
        self, act: str, training: bool, value: float
    ) -> None:
        norm, x = Norm(5, act, training), dense((2, 5, 6, 4), "rows")
        norm.vectors["weight"].abs_()
        x[1, 2, 3, 1] = value
        ours, exact = (norm.fused(x, torch.ones_like(x), backend) for backend in ("triton", "reference"))
        assert all(torch.equal(ours[name].isfinite(), right.isfinite()) for name, right in exact.items())

    def test_nothing_passes_a_relu_at_zero(self) -> None:
        norm, x = Norm(4, "relu"), dense((2, 4, 3, 5), "rows")
        for name in ("weight", "bias"):
            norm.vectors[name].zero_()
        found = norm.fused(x, x)
        assert not found["d_weight"].any()
        assert not found["d_bias"].any()

    def test_repeats_are_bit_identical(self) -> None:
        norm, x = Norm(17), dense((2, 17, 9, 4), "rows")
        first, second = (norm.fused(x, x) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_empty_batch(self) -> None:
        norm, x = Norm(4, training=False), dense((0, 4, 3, 3), "rows")
        assert norm.fused(x, x)["d_x"].shape == x.shape

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("training", [True, False])
    def test_opcheck(self, training: bool, layout: str) -> None:
        x, norm = dense((2, 5, 4, 3), layout, torch.bfloat16), Norm(5)
        weights, moments = list(norm.vectors.values())[:2], list(norm.vectors.values())[2:]
        with use_backend("triton"):
            found = [None, None] if training else moments
            opcheck(batch_norm, (x, *weights, *found, 1e-3, "silu"), test_utils=PROMISES)
            opcheck(batch_norm_gradient, (x, x, *weights, *moments, training, 1e-3, "silu"), test_utils=PROMISES)

    @on_hardware
    def test_what_auto_takes(self) -> None:
        rows = torch.empty(1, 8, 128, SMALLEST // 1024, device=DEVICE).to(memory_format=torch.channels_last)
        assert batch_norm_is_served(rows, "identity")
        assert not batch_norm_is_served(rows[..., :-1], "silu")

    @on_hardware
    @pytest.mark.parametrize("dtype", [torch.float32, *HALF])
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("shape", [(8, 144, 112, 112), (8, 960, 14, 14), (4, 1792, 7, 7)])
    def test_the_networks_shapes(self, shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
        self.check(Norm(shape[1]), dense(shape, layout, dtype), dense(shape, layout, dtype))


class Problem:
    """Weights of a separable convolution, an input and an upstream gradient, and what to do with them."""

    def __init__(
        self,
        case: tuple[tuple[int, ...], int, int],
        layout: str,
        followed_by: str = "relu, norm",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape, outputs, self.dilation = case
        channels = shape[1]
        self.x, self.upstream = dense(shape, layout, dtype), dense((shape[0], outputs, *shape[2:]), layout, dtype)
        bias = drawn(outputs)
        self.relu = "relu" in followed_by
        self.roundings = 4
        if dtype != torch.float32 and self.relu:  # so far from zero that rounding cannot decide what passes
            bias += 6 * bias.sign()
            self.roundings += 5  # of values of up to ten deviations
        self.weights = [drawn(channels, 1, 3, 3) / 3, drawn(outputs, channels, 1, 1) * channels**-0.5, bias]
        of_norm = [drawn(outputs), drawn(outputs), drawn(outputs), 1 + drawn(outputs).abs()]
        self.norm = of_norm if "norm" in followed_by else []

    def run(
        self, backend: str = "triton", dtype: torch.dtype | None = None, training: bool = True
    ) -> dict[str, Tensor]:
        """Results and gradients; in ``dtype``, or x as it is and the weights in float32."""
        x = self.x.detach().to(dtype or self.x.dtype).requires_grad_()
        weights = [w.to(dtype or w.dtype, copy=True).requires_grad_() for w in self.weights]
        norm = [w.to(dtype or w.dtype, copy=True) for w in self.norm]
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
                eps=1e-2,
            )
            names = ["x", "depthwise", "pointwise", "bias", "norm_weight", "norm_bias", "running_mean", "running_var"]
            found = gradients(out, self.upstream.to(out.dtype), dict(zip(names, [x, *weights, *norm], strict=False)))
        if backend == "triton":
            assert out.dtype == x.dtype
            assert out.stride() == separable_op.new_in_format_of(x, len(self.weights[2]), x.shape[2:]).stride()
            assert found["d_x"].stride() == torch.empty_like(x).stride()
        return found

    def check(self, terms: int | None = None, *, training: bool = True) -> None:
        exact = self.run("reference", torch.float64, training)
        found = errors(self.run(training=training), exact)
        positions = self.x.shape[0] * self.x.shape[2:].numel()
        allowed = tolerance(self.x.dtype, terms or max(16, positions, 9 * self.x.shape[1]), self.roundings)
        assert max(found.values()) < allowed, found


class TestSeparable:
    pytestmark = on_device

    # (shape, outputs, dilation). Products have blocks of 16 to 128 rows and 16 to 64 columns, and sum 16 at a time;
    # taps reach beyond the map, or across several tiles of the depthwise kernels.
    CASES = (((2, 17, 9, 8), 5, 1), ((1, 32, 3, 13), 70, 2), ((1, 66, 5, 5), 18, 4), ((3, 6, 1, 2), 4, 3))
    FOLLOWED_BY = ("nothing", "relu", "norm", "relu, norm")

    @pytest.mark.parametrize("case", CASES)
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.usefixtures("poisoned")
    def test_shapes(self, layout: str, case: tuple[tuple[int, ...], int, int]) -> None:
        Problem(case, layout).check()

    @pytest.mark.parametrize("followed_by", FOLLOWED_BY)
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.usefixtures("poisoned")
    def test_what_follows(self, layout: str, followed_by: str) -> None:
        # Under a normalisation alone the bias's gradient is zero but for equal roundings at 84 positions.
        Problem(((2, 5, 7, 6), 20, 2), layout, followed_by).check(84**2 if followed_by == "norm" else None)

    @pytest.mark.slow
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("channels", [144, 192, 336])
    def test_many_channels(self, channels: int, layout: str) -> None:
        Problem(((1, channels, 5, 5), channels // 2, 1), layout).check()

    @pytest.mark.parametrize("dtype", HALF)
    @pytest.mark.parametrize(
        "followed_by", ["relu, norm", *(pytest.param(f, marks=pytest.mark.slow) for f in FOLLOWED_BY[:3])]
    )
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_half_precision(self, layout: str, followed_by: str, dtype: torch.dtype) -> None:
        Problem(((2, 18, 6, 5), 20, 1), layout, followed_by, dtype).check()

    @pytest.mark.parametrize("followed_by", ["nothing", "relu, norm"])
    def test_evaluation_mode(self, followed_by: str) -> None:
        problem = Problem(((2, 18, 6, 5), 20, 2), "rows", followed_by)
        problem.check(training=False)
        with torch.no_grad(), use_backend("triton"):  # in one pass
            norm = BatchNormWeights(*problem.norm) if problem.norm else None
            weights = SeparableWeights(*problem.weights)
            out = fused_separable_conv(problem.x, weights, dilation=2, relu=problem.relu, norm=norm, eps=1e-2)
        exact = problem.run("reference", torch.float64, training=False)["out"]
        assert errors({"out": out}, {"out": exact})["out"] < tolerance(torch.float32, 9 * 18)

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("programs", [1, 10**4])
    def test_few_programs_and_many(self, layout: str, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whole tiles and small ones, several a part; parts of the sums are combined two at a time."""
        monkeypatch.setattr(separable, "ENOUGH_PROGRAMS", programs)
        monkeypatch.setattr(normalization, "ROWS", 2)
        Problem(((3, 3, 13, 11), 5, 1), layout).check()

    def test_statistics_of_values_far_from_zero(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(normalization, "ROWS", 4)
        problem = Problem(((2, 2, 30, 20), 5, 1), "rows", "norm")
        problem.weights[2] += 1000
        found = errors(problem.run(), problem.run("reference", torch.float64))
        # What rounding the values themselves costs.
        assert max(found[name] for name in ("out", "running_mean", "running_var")) < 8 * 1000 * 2.0**-24

    @pytest.mark.slow
    @pytest.mark.parametrize("view", VIEWS)
    def test_strides_are_honoured(self, view) -> None:  # type: ignore[no-untyped-def]
        x = view(dense((3, 6, 5, 6), "planes"))
        problem = Problem((tuple(x.shape), 6, 1), "rows")
        problem.x = x
        problem.check()

    @pytest.mark.parametrize("upstream", ["expanded", "planes", "transposed"])
    def test_upstream_gradients_of_any_layout(self, upstream: str) -> None:
        problem = Problem(((2, 5, 6, 7), 4, 1), "rows")
        problem.upstream = {
            "expanded": drawn(2, 4, 1, 1).expand(2, 4, 6, 7),
            "planes": dense((2, 4, 6, 7), "planes"),
            "transposed": dense((2, 4, 7, 6), "planes").transpose(2, 3),
        }[upstream]
        problem.check(84**2)  # under equal gradients the error of a mean adds up over the positions

    @pytest.mark.parametrize("followed_by", ["relu", "norm"])
    def test_nan_reaches_what_it_reaches_in_pytorch(self, followed_by: str) -> None:
        problem = Problem(((2, 5, 7, 6), 4, 1), "rows", followed_by)
        problem.x[0, 3, 2, 2] = torch.nan
        ours, exact = problem.run(), problem.run("reference", torch.float64)
        assert all(torch.equal(ours[name].isnan(), right.isnan()) for name, right in exact.items())

    def test_without_a_bias(self) -> None:
        problem, found = Problem(((2, 5, 6, 6), 4, 1), "rows", "relu"), []
        for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
            weights = [w.to(dtype).requires_grad_() for w in problem.weights[:2]]
            with use_backend(backend):
                out = fused_separable_conv(problem.x.to(dtype), SeparableWeights(*weights, None), relu=True)
                leaves = dict(zip(("depthwise", "pointwise"), weights, strict=True))
                found.append(gradients(out, problem.upstream.to(dtype), leaves))
        assert max(errors(*found).values()) < tolerance(torch.float32, 72)

    def test_repeats_are_bit_identical(self) -> None:
        problem = Problem(((2, 5, 9, 8), 18, 1), "rows")
        first, second = (problem.run() for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("normed", [True, False])
    def test_opcheck(self, normed: bool, layout: str) -> None:
        problem = Problem(((2, 3, 4, 3), 5, 1), layout, dtype=torch.bfloat16)
        norm, running = (problem.norm[:2], problem.norm[2:]) if normed else ([None, None], [None, None])
        given, options = (*problem.weights, *norm), (1, True, 1e-3)
        with use_backend("triton"):
            opcheck(separable_op.separable, (problem.x, *given, *options), test_utils=PROMISES)
            opcheck(separable_op.separable_inference, (problem.x, *given, *running, *options), test_utils=PROMISES)
            out, *saved = separable_op.separable(problem.x, *given, *options)
            value = saved[0] if normed else out
            arguments = (problem.upstream, problem.x, value, *saved[1:], *given, *options)
            opcheck(separable_op.separable_gradient, arguments, test_utils=PROMISES)

    def test_other_dimensions_are_left_to_the_reference(self) -> None:
        x, weights = drawn(2, 4, 3, 4, 5), SeparableWeights(drawn(4, 1, 3, 3, 3), drawn(6, 4, 1, 1, 1), drawn(6))
        with use_backend("triton"), pytest.raises(BackendError, match=r"serves \[B, C, height, width\] only"):
            fused_separable_conv(x, weights)
        if not INTERPRETED:
            assert choose("fused_separable_conv", x) == "reference"
            fused_separable_conv(x, weights)

    @on_hardware
    @pytest.mark.parametrize("dtype", [torch.float32, *HALF])
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize(
        "case",
        [
            ((8, 144, 112, 112), 144, 1),
            ((8, 192, 112, 112), 48, 1),
            ((8, 960, 14, 14), 960, 2),
            ((4, 1792, 7, 7), 1792, 4),
        ],
    )
    def test_the_networks_shapes(self, case: tuple[tuple[int, ...], int, int], layout: str, dtype: torch.dtype) -> None:
        problem = Problem(case, layout, "norm", dtype)  # a ReLU's gradient jumps where rounding changes a sign
        problem.check(problem.x.numel())
