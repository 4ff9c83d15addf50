"""The Triton kernels of multi-scale fusion and dual-path attention against float64 mathematics, on a GPU or interpreted
as in test_triton.py."""

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from triton_support import (
    DEVICE,
    HALF,
    INTERPRETED,
    LAYOUTS,
    PROMISES,
    SERVED,
    VIEWS,
    dense,
    interpreted_when_slow,
    largest_error,
    on_device,
    on_hardware,
    run_interpreted,
    tolerance,
)

from btinet_kernels import BackendError, fused_position_gate, use_backend
from btinet_kernels.backends import choose
from btinet_kernels.gates.attention_op import position_gate, position_gate_gradient
from btinet_kernels.gates.dual_path_op import dual_path, dual_path_gradient
from btinet_kernels.gates.reference import DualPathSaved, DualPathWeights
from btinet_kernels.multi_scale import op as multi_scale_op
from btinet_kernels.nn import DualPathAttention, MultiScaleContextFusion

pytest.importorskip("triton")

if SERVED:
    from btinet_kernels.gates import triton as gates
    from btinet_kernels.multi_scale import triton as multi_scale
    from btinet_kernels.multi_scale import triton_depthwise

DECODER = [
    ((8, 144, 112, 112), torch.bfloat16, "rows"),
    ((8, 48, 112, 112), torch.float32, "planes"),
    ((8, 96, 56, 56), torch.float32, "rows"),
    ((8, 336, 28, 28), torch.float16, "planes"),
    ((4, 1792, 7, 7), torch.bfloat16, "rows"),
]


@interpreted_when_slow
def test_interpreted_in_a_process_of_its_own(part: str) -> None:
    run_interpreted(__file__, part)


def drawn(module: torch.nn.Module) -> torch.nn.Module:
    """The module in float64 with parameters far from zero, where errors could hide."""
    for parameter in module.double().to(DEVICE).parameters():
        torch.nn.init.normal_(parameter, std=0.4 if parameter.ndim < 2 else parameter[0].numel() ** -0.5)
    return module


def run(module: torch.nn.Module, inputs: list[Tensor], upstream: Tensor, backend: str) -> list[Tensor]:
    """The result, then the gradients of the inputs and of the parameters."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    with use_backend(backend):
        out = module(*inputs)
        return [out.detach(), *torch.autograd.grad(out, [*inputs, *module.parameters()], upstream)]


def both(module: torch.nn.Module, inputs: list[Tensor], upstream: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """What the kernels return, with float32 parameters, and what float64 does."""
    exact = run(module.double(), [t.double() for t in inputs], upstream.double(), "reference")
    ours = run(module.float(), inputs, upstream, "triton")
    for t, like in zip(ours[: 1 + len(inputs)], [inputs[0], *inputs], strict=True):
        assert t.dtype == like.dtype
        assert t.stride() == torch.empty_like(like).stride()
    return ours, exact


class TestMultiScale:
    pytestmark = on_device

    # Tiles hold 64 positions of 16 channels or 32 of 32; the dilations reach beyond a map, or across several tiles.
    # Few positions are not worth the merging of the weights.
    SHAPES = ((2, 17, 9, 8), (1, 32, 3, 13), (2, 6, 1, 1), (1, 1, 12, 1))

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.usefixtures("poisoned")
    def test_shapes(self, shape: tuple[int, ...], layout: str) -> None:
        x, upstream = dense(shape, layout), dense(shape, layout)
        ours, exact = both(drawn(MultiScaleContextFusion(shape[1])), [x], upstream)
        assert largest_error(ours, exact) < tolerance(torch.float32, max(3 * shape[1], x.numel()))

    @pytest.mark.slow
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dtype", HALF)
    @pytest.mark.parametrize("shape", [(2, 5, 6, 7), (1, 48, 3, 3)])
    def test_half_precision(self, shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
        x, upstream = dense(shape, layout, dtype), dense(shape, layout, dtype)
        ours, exact = both(drawn(MultiScaleContextFusion(shape[1])), [x], upstream)
        assert largest_error(ours, exact) < tolerance(dtype, x.numel())

    @pytest.mark.slow
    @pytest.mark.parametrize("view", VIEWS)
    def test_strides_are_honoured(self, view) -> None:  # type: ignore[no-untyped-def]
        x, upstream = view(dense((3, 6, 5, 6), "planes")), view(dense((3, 6, 5, 6), "rows"))
        ours, exact = both(drawn(MultiScaleContextFusion(x.shape[1])), [x], upstream)
        assert largest_error(ours, exact) < tolerance(torch.float32, x.numel())

    def test_upstream_gradients_may_be_expanded(self) -> None:
        x, upstream = dense((2, 5, 6, 7), "rows"), torch.randn(2, 5, 1, 1).to(DEVICE).expand(2, 5, 6, 7)
        ours, exact = both(drawn(MultiScaleContextFusion(5)), [x], upstream)
        assert largest_error(ours, exact) < tolerance(torch.float32, x.numel())

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_programs_that_take_several_tiles(self, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(triton_depthwise, "ENOUGH_PROGRAMS", 3)
        x, upstream = dense((2, 3, 13, 11), layout), dense((2, 3, 13, 11), layout)
        ours, exact = both(drawn(MultiScaleContextFusion(3)), [x], upstream)
        assert largest_error(ours, exact) < tolerance(torch.float32, x.numel())

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_empty_batch(self, layout: str) -> None:
        x = dense((0, 5, 6, 7), layout)
        ours, exact = both(drawn(MultiScaleContextFusion(5)), [x], x)
        assert largest_error(ours, exact) == 0

    def test_nan_reaches_what_its_taps_reach(self) -> None:
        x, fusion = dense((1, 6, 12, 12), "rows"), drawn(MultiScaleContextFusion(6)).float()
        x[0, 3, 7, 6] = torch.nan
        with use_backend("reference"):
            hit = fusion(x).isnan()
        with use_backend("triton"):
            assert torch.equal(fusion(x).isnan(), hit)

    def test_inference_keeps_the_merged_weight(self) -> None:
        x, fusion = dense((2, 6, 8, 7), "rows"), drawn(MultiScaleContextFusion(6)).float().eval()
        with torch.no_grad():
            with use_backend("triton"):
                ours = [fusion(x), fusion(x)]
            with use_backend("reference"):
                exact = fusion.double()(x.double())
        assert torch.equal(ours[0], ours[1])
        assert largest_error(ours[:1], [exact]) < tolerance(torch.float32, x.numel())

    def test_autocast_leaves_the_products_in_the_dtype_of_x(self) -> None:
        x, fusion = dense((1, 6, 8, 7), "rows"), drawn(MultiScaleContextFusion(6)).float()
        with use_backend("triton"):
            plain = fusion(x)
            with torch.autocast(DEVICE, torch.bfloat16):
                assert torch.equal(fusion(x), plain)

    @pytest.mark.slow
    def test_repeats_are_bit_identical(self) -> None:
        x, upstream, fusion = dense((2, 5, 9, 8), "rows"), dense((2, 5, 9, 8), "rows"), MultiScaleContextFusion(5)
        first, second = (run(fusion.to(DEVICE), [x], upstream, "triton") for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("shape", [(2, 3, 2, 3), (1, 5, 1, 2)])  # that merges its weights, this does not
    def test_opcheck(self, shape: tuple[int, ...], layout: str) -> None:
        x, fusion = dense(shape, layout, torch.bfloat16), drawn(MultiScaleContextFusion(shape[1])).float()
        weights = [w.detach() for w in fusion.weights()]
        with use_backend("triton"):
            opcheck(multi_scale_op.multi_scale, (x, *weights), test_utils=PROMISES)
            _, *saved = multi_scale_op.multi_scale(x, *weights)
            opcheck(multi_scale_op.multi_scale_gradient, (x, x, *saved, *weights), test_utils=PROMISES)

    def test_other_dimensions_are_left_to_the_reference(self) -> None:
        x, fusion = torch.randn(2, 4, 3, 4, 5, device=DEVICE), MultiScaleContextFusion(4, spatial_dims=3).to(DEVICE)
        with use_backend("triton"), pytest.raises(BackendError, match=r"serves \[B, C, height, width\] only"):
            fusion(x)
        if not INTERPRETED:
            assert choose("fused_multi_scale", x) == "reference"
            fusion(x)

    @pytest.mark.parametrize("which", multi_scale.Kernels._fields if SERVED else [])
    @pytest.mark.parametrize("fused", [False, True])
    def test_a_wrong_coefficient_is_noticed(self, which: str, fused: bool) -> None:
        x, channels = dense((2, 6, 7, 6), "rows"), 6
        right = multi_scale.Kernels(
            list(torch.randn(3, channels, 1, 3, 3, device=DEVICE)),
            torch.randn(channels, 3, channels, device=DEVICE).unbind(1),
            torch.randn(2, 3, device=DEVICE),
            torch.randn(2, channels, device=DEVICE),
            torch.randn(channels, channels, device=DEVICE) if fused else None,
            torch.randn(channels, device=DEVICE) if fused else None,
        )
        field = getattr(right, which)
        if field is None:
            return
        off = field * 1.01 if isinstance(field, Tensor) else [field[0] * 1.01, *field[1:]]
        wrong = right._replace(**{which: off})
        (out, between), (wrong_out, _) = (multi_scale.multi_scale(x, k, keep_between=True) for k in (right, wrong))
        assert largest_error([wrong_out], [out.double()]) > tolerance(torch.float32, x.numel())
        if "bias" not in which:
            ours, exact = (multi_scale.multi_scale_backward(x, x, between, k)[0] for k in (wrong, right))
            assert largest_error([ours], [exact.double()]) > tolerance(torch.float32, x.numel())

    @on_hardware
    @pytest.mark.parametrize(("shape", "dtype", "layout"), DECODER)
    def test_the_decoders_shapes(self, shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
        x, upstream = dense(shape, layout, dtype), dense(shape, layout, dtype)
        ours, exact = both(drawn(MultiScaleContextFusion(shape[1])), [x], upstream)
        assert largest_error(ours, exact) < tolerance(dtype, x.numel())


def with_ties(shape: tuple[int, ...], layout: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values of which many are equal, so that channels tie for the maximum."""
    return dense(shape, layout, dtype).mul(2).round().div(2)


def residual_of(module: DualPathAttention, x: Tensor) -> Tensor:
    """A residual that leaves no sum where a rounding would decide what the ReLU lets through."""
    residual = dense(tuple(x.shape), "rows", x.dtype)
    with use_backend("reference"):
        gated = module.double()(x.double())
    return torch.where((gated + residual.double()).abs() < 2e-2, residual + 1, residual)


class TestDualPath:
    pytestmark = on_device

    # Tiles hold 16 to 64 positions of 16 or 32 channels, which several programs share; in one to three dimensions.
    SHAPES = ((2, 35, 9, 8), (1, 3, 70), (3, 6, 1, 1), (1, 5, 2, 3, 4))

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("with_residual", [False, True])
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.usefixtures("poisoned")
    def test_shapes(self, shape: tuple[int, ...], with_residual: bool, layout: str) -> None:
        module, x = drawn(DualPathAttention(shape[1], len(shape) - 2)), with_ties(shape, layout)
        inputs = [x, residual_of(module, x)] if with_residual else [x]
        ours, exact = both(module, inputs, dense(shape, layout))
        assert largest_error(ours, exact) < tolerance(torch.float32, x.numel())

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("with_residual", [False, True])
    @pytest.mark.parametrize("dtype", HALF)
    def test_half_precision(self, dtype: torch.dtype, with_residual: bool, layout: str) -> None:
        module, x = drawn(DualPathAttention(17)), with_ties((2, 17, 9, 4), layout, dtype)
        inputs = [x, residual_of(module, x)] if with_residual else [x]
        ours, exact = both(module, inputs, dense((2, 17, 9, 4), layout, dtype))
        assert largest_error(ours, exact) < tolerance(dtype, x.numel())

    @pytest.mark.parametrize("programs", [1, 10_000])
    def test_any_split_of_the_channels(self, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gates, "ENOUGH_PROGRAMS", programs)
        module, x = drawn(DualPathAttention(70)), with_ties((1, 70, 7, 3), "rows")
        ours, exact = both(module, [x, residual_of(module, x)], dense((1, 70, 7, 3), "rows"))
        assert largest_error(ours, exact) < tolerance(torch.float32, x.numel())

    @pytest.mark.parametrize("view", VIEWS)
    def test_strides_are_honoured(self, view) -> None:  # type: ignore[no-untyped-def]
        x, upstream = view(with_ties((3, 6, 5, 6), "planes")), view(dense((3, 6, 5, 6), "rows"))
        module = drawn(DualPathAttention(x.shape[1]))
        ours, exact = both(module, [x, residual_of(module, x)], upstream)
        assert largest_error(ours, exact) < tolerance(torch.float32, x.numel())

    def test_upstream_gradients_may_be_expanded(self) -> None:
        x, upstream = dense((2, 5, 6, 7), "rows"), torch.randn(2, 5, 1, 1).to(DEVICE).expand(2, 5, 6, 7)
        ours, exact = both(drawn(DualPathAttention(5)), [x], upstream)
        assert largest_error(ours, exact) < tolerance(torch.float32, x.numel())

    @pytest.mark.parametrize("with_residual", [False, True])
    def test_empty_batch(self, with_residual: bool) -> None:
        x = dense((0, 5, 6, 7), "rows")
        ours, exact = both(drawn(DualPathAttention(5)), [x, x] if with_residual else [x], x)
        assert largest_error(ours, exact) == 0

    @pytest.mark.parametrize("with_residual", [False, True])
    def test_nan_reaches_what_it_reaches_in_pytorch(self, with_residual: bool) -> None:
        module, inputs = drawn(DualPathAttention(20)).float(), [dense((2, 20, 9, 8), "rows")]
        if with_residual:
            inputs.append(dense((2, 20, 9, 8), "rows"))
            inputs[1][1, 2, 3, 4] = torch.nan
        inputs[0][0, 3, 5, 6] = torch.nan
        ours, exact = (run(module, inputs, torch.ones_like(inputs[0]), backend) for backend in ("triton", "reference"))
        assert all(torch.equal(a.isnan(), b.isnan()) for a, b in zip(ours, exact, strict=True))

    def test_repeats_are_bit_identical(self) -> None:
        module, x = drawn(DualPathAttention(17)).float(), dense((2, 17, 9, 4), "rows")
        first, second = (run(module, [x, x], x, "triton") for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("with_residual", [False, True])
    def test_opcheck(self, with_residual: bool, layout: str) -> None:
        x, module = dense((2, 5, 4, 3), layout, torch.bfloat16), drawn(DualPathAttention(5)).float()
        residual, weights = x + 1 if with_residual else None, [w.detach() for w in module.weights()]
        with use_backend("triton"):
            opcheck(dual_path, (x, residual, *weights), test_utils=PROMISES)
            out, *saved = dual_path(x, residual, *weights)
            arguments = (x, x, out if with_residual else None, *saved, *weights)
            opcheck(dual_path_gradient, arguments, test_utils=PROMISES)

    @pytest.mark.parametrize("which", DualPathSaved._fields)
    def test_a_wrong_coefficient_is_noticed(self, which: str) -> None:
        module, shape = drawn(DualPathAttention(17)).float(), (2, 17, 9, 4)
        x, upstream = with_ties(shape, "rows"), dense(shape, "rows")
        weights = DualPathWeights(*(w.detach() for w in module.weights()))
        out, saved = gates.dual_path(x, x, weights)
        d_x, d_residual, d_weights = gates.dual_path_backward(upstream, x, out, saved, weights)
        wrong = gates.dual_path_backward(
            upstream, x, out, saved._replace(**{which: getattr(saved, which) * 1.01}), weights
        )
        ours, right = [wrong[0], wrong[1], *wrong[2]], [t.double() for t in (d_x, d_residual, *d_weights)]
        with pytest.raises(AssertionError):
            assert largest_error(ours, right) < tolerance(torch.float32, x.numel())

    @on_hardware
    @pytest.mark.parametrize(("shape", "dtype", "layout"), DECODER)
    def test_the_decoders_shapes(self, shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
        module, x = drawn(DualPathAttention(shape[1])), dense(shape, layout, dtype)
        ours, exact = both(module, [x, residual_of(module, x)], dense(shape, layout, dtype))
        assert largest_error(ours, exact) < tolerance(dtype, x.numel())


class TestPositionGate:
    pytestmark = on_device

    # Tiles hold 16 to 128 positions; channels come 16 or 32 at a time. Channels of x, of h; one to three dimensions.
    SHAPES = (((2, 9, 8), 35, 17), ((1, 70), 3, 33), ((3, 1, 1), 6, 1), ((1, 2, 3, 4), 5, 4))

    @staticmethod
    def problem(
        size: tuple[int, ...], channels: int, hidden: int, layout: str, dtype: torch.dtype = torch.float32
    ) -> list[Tensor]:
        """x, h, an upstream gradient, weight and bias; h lies otherwise than x."""
        other = "planes" if layout == "rows" else "rows"
        batch, *positions = size
        weight = torch.randn(1, hidden, *[1] * len(positions), device=DEVICE) * hidden**-0.5
        x, upstream = (dense((batch, channels, *positions), layout, dtype) for _ in range(2))
        return [x, dense((batch, hidden, *positions), other, dtype), upstream, weight, torch.randn(1, device=DEVICE)]

    @staticmethod
    def run(backend: str, x: Tensor, h: Tensor, upstream: Tensor, *weights: Tensor) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (x, h, *weights)]
        with use_backend(backend):
            out = fused_position_gate(*leaves)
            found = [out.detach(), *torch.autograd.grad(out, leaves, upstream)]
        for t, like in zip(found[:3], (x, x, h), strict=True):
            assert t.dtype == like.dtype
            assert backend != "triton" or t.stride() == torch.empty_like(like).stride()
        return found

    def check(self, *problem: Tensor) -> None:
        exact = self.run("reference", *(t.double() for t in problem))
        terms = max(16, problem[0].numel())
        assert largest_error(self.run("triton", *problem), exact) < tolerance(problem[0].dtype, terms, roundings=1)

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize(("size", "channels", "hidden"), SHAPES)
    @pytest.mark.usefixtures("poisoned")
    def test_shapes(self, size: tuple[int, ...], channels: int, hidden: int, layout: str) -> None:
        self.check(*self.problem(size, channels, hidden, layout))

    @pytest.mark.parametrize("dtype", HALF)
    def test_half_precision(self, dtype: torch.dtype) -> None:
        self.check(*self.problem((2, 9, 8), 17, 6, "rows", dtype))

    @pytest.mark.parametrize("view", VIEWS)
    def test_strides_are_honoured(self, view) -> None:  # type: ignore[no-untyped-def]
        x, h, upstream = (view(dense((3, 6, 5, 6), layout)) for layout in ("planes", "rows", "planes"))
        _, _, _, *weights = self.problem((1, 1, 1), 1, x.shape[1], "rows")
        self.check(x, h, upstream[:1].expand_as(x), *weights)

    def test_nan_reaches_its_position(self) -> None:
        x, h, upstream, *weights = self.problem((2, 9, 8), 5, 4, "rows")
        h[1, 2, 3, 4] = torch.nan
        out, d_x, d_h, *d_weights = self.run("triton", x, h, upstream, *weights)
        for t in (out, d_x, d_h):
            assert t[1, :, 3, 4].isnan().all()
            assert t.isnan().sum() == t.shape[1]
        assert all(d.isnan().all() for d in d_weights)

    def test_empty_batch(self) -> None:
        self.check(*self.problem((0, 3, 4), 5, 4, "rows"))

    def test_repeats_are_bit_identical(self) -> None:
        problem = self.problem((2, 9, 8), 35, 17, "rows")
        first, second = (self.run("triton", *problem) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_opcheck(self, layout: str) -> None:
        x, h, upstream, *weights = self.problem((2, 4, 3), 5, 4, layout, torch.bfloat16)
        with use_backend("triton"):
            opcheck(position_gate, (x, h, *weights), test_utils=PROMISES)
            gate = position_gate(x, h, *weights)[1]
            opcheck(position_gate_gradient, (upstream, x, h, gate, weights[0]), test_utils=PROMISES)
