"""The Triton kernels of separable convolutions against float64 mathematics, on a GPU or interpreted as in
test_triton.py."""

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from triton_support import (
    HALF,
    INTERPRETED,
    LAYOUTS,
    PROMISES,
    SERVED,
    VIEWS,
    dense,
    drawn,
    errors,
    gradients,
    interpreted_when_slow,
    on_device,
    on_hardware,
    run_interpreted,
    tolerance,
)

from btinet_kernels import BackendError, BatchNormWeights, SeparableWeights, use_backend
from btinet_kernels.backends import choose
from btinet_kernels.separable import op as separable_op
from btinet_kernels.separable.op import fused_separable_conv

pytest.importorskip("triton")

if SERVED:
    from btinet_kernels.normalization import triton as normalization
    from btinet_kernels.separable import triton as separable


@interpreted_when_slow
def test_interpreted_in_a_process_of_its_own(part: str) -> None:
    run_interpreted(__file__, part)


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
