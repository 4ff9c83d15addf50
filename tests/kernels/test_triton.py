"""The Triton passes against float64 mathematics: on a GPU with ``pytest -m gpu``, interpreted on the CPU otherwise."""

import itertools

import pytest
import torch
from torch import Tensor
from triton_support import (
    DEVICE,
    HALF,
    LAYOUTS,
    SERVED,
    dense,
    in_double,
    interpreted_in_parts,
    largest_error,
    on_device,
    run_interpreted,
)
from triton_support import tolerance as tolerance_of_products

from btinet_kernels import use_backend
from btinet_kernels.interaction import reference
from btinet_kernels.interaction.passes_op import _statistics_backward_reference
from btinet_kernels.interaction.reference import Context, Statistics
from btinet_kernels.nn import TaskInteractionLevel

pytest.importorskip("triton")

if SERVED:
    from btinet_kernels.interaction import triton as passes

POOLS = [None, "gap", "softmax"]
# Tiles hold 16 to 128 positions and 16 or 32 channels: sizes below, at and above, in one to three dimensions.
SHAPES = [(2, 3, 9), (2, 16, 8, 6), (2, 6, 1, 1), (1, 1, 5, 7)]
SHAPES += [pytest.param(shape, marks=pytest.mark.slow) for shape in ((1, 33, 9, 7), (2, 5, 8, 3, 4), (1, 140, 3, 6))]


@interpreted_in_parts
def test_interpreted_in_a_process_of_its_own(part: str) -> None:
    run_interpreted(__file__, part)


def context_of(channels: int, pool: str | None) -> Context | None:
    if pool is None:
        return None
    hidden = max(1, channels // 2)
    weight = torch.randn(hidden, channels, device=DEVICE) / channels**0.5
    return Context(
        weight, torch.randn(hidden, device=DEVICE), torch.randn(hidden, device=DEVICE) if pool == "softmax" else None
    )


def run_passes(
    seg: Tensor, grad: Tensor, context: Context | None, *, variance: bool, edges: bool
) -> list[list[Tensor]]:
    """Every pass on the same numbers: what the kernels return, and what float64 does."""
    scale = torch.randn(seg.shape[:2], device=DEVICE)
    stats = passes.statistics(seg, context, variance=variance, edges=edges, active=True)
    upstream = Statistics(*(torch.randn_like(s) if s.is_floating_point() else s for s in stats))
    out, weights = passes.statistics_backward(seg, grad, scale, context, stats, upstream)
    assert out.stride() == torch.empty_like(seg).stride()
    assert out.dtype == seg.dtype
    ours = [*stats[:5], out, *weights, passes.channel_dot(grad, seg)]
    ours += [passes.scale_channels(seg, scale), passes.interpolate(seg, grad, scale[:, 0])]
    seg, grad, context, scale = seg.double(), grad.double(), in_double(context), scale.double()
    exact_stats = reference.statistics(seg, context, variance=variance, edges=edges, active=True)
    out, weights = _statistics_backward_reference(seg, grad, scale, context, exact_stats, in_double(upstream))
    exact = [*exact_stats[:5], out, *weights, reference.channel_dot(grad, seg)]
    exact += [reference.scale_channels(seg, scale), reference.interpolate(seg, grad, scale[:, 0])]
    if stats.active.numel():
        assert torch.equal(stats.active, exact_stats.active)
    return [ours, exact]


def tolerance(dtype: torch.dtype, terms: int) -> float:
    """Stored results are rounded once (the interpreter truncates: a whole ulp); bf16 products hold 14 bits or more."""
    return tolerance_of_products(dtype, terms, roundings=1) + (2.0**-14 if dtype == torch.bfloat16 else 0)


class TestPasses:
    pytestmark = on_device

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("pool", POOLS)
    @pytest.mark.parametrize("shape", SHAPES)
    def test_shapes(self, shape: tuple[int, ...], pool: str | None, layout: str) -> None:
        seg, grad = dense(shape, layout), dense(shape, "planes" if layout == "rows" else "rows")
        ours, exact = run_passes(seg, grad, context_of(shape[1], pool), variance=True, edges=True)
        assert largest_error(ours, exact) < tolerance(torch.float32, seg.numel())

    @pytest.mark.slow
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("pool", POOLS)
    @pytest.mark.parametrize("dtype", HALF)
    def test_half_precision(self, dtype: torch.dtype, pool: str | None, layout: str) -> None:
        seg, grad = dense((2, 17, 9, 4), layout, dtype), dense((2, 17, 9, 4), layout, dtype)
        ours, exact = run_passes(seg, grad, context_of(17, pool), variance=False, edges=True)
        assert largest_error(ours[:5], exact[:5]) < tolerance(torch.float32, seg.numel()) + 2.0**-14
        assert largest_error(ours, exact) < tolerance(dtype, seg.numel())

    @pytest.mark.slow
    @pytest.mark.parametrize("pool", ["gap", "softmax"])
    @pytest.mark.parametrize(
        "view",
        [
            lambda x: x[:, ::2],
            lambda x: x[..., 1:-1],
            lambda x: x.transpose(2, 3),
            lambda x: x[:, :, ::2],
            lambda x: x[:1].expand(3, -1, -1, -1),
            lambda x: x[..., :1].expand(-1, -1, -1, 9),
            lambda x: x.flip(0).transpose(1, 3),
        ],
    )
    def test_strides_are_honoured(self, view, pool: str) -> None:  # type: ignore[no-untyped-def]
        seg, grad = (view(torch.randn(3, 9, 9, 8)).to(DEVICE) for _ in range(2))
        ours, exact = run_passes(seg, grad, context_of(seg.shape[1], pool), variance=False, edges=True)
        assert largest_error(ours, exact) < tolerance(torch.float32, seg.numel())

    def test_upstream_gradients_may_be_expanded(self) -> None:
        seg, grad = dense((2, 5, 9, 4), "rows"), torch.randn(2, 1, 1, 1).to(DEVICE).expand(2, 5, 9, 4)
        ours, exact = run_passes(seg, grad, context_of(5, "gap"), variance=True, edges=True)
        assert largest_error(ours, exact) < tolerance(torch.float32, seg.numel())

    @pytest.mark.slow
    @pytest.mark.parametrize("pool", ["gap", "softmax"])
    @pytest.mark.parametrize("shape", [(5, 20, 1, 1), (3, 20, 9, 5), (2, 140, 9, 4)])
    def test_programs_that_take_several_tiles_or_samples(
        self, shape: tuple[int, ...], pool: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(passes, "ENOUGH_PROGRAMS", 2)
        seg, grad = dense(shape, "planes"), dense(shape, "rows")
        ours, exact = run_passes(seg, grad, context_of(shape[1], pool), variance=True, edges=True)
        assert largest_error(ours, exact) < tolerance(torch.float32, seg.numel())

    def test_ties_have_zero_slope(self) -> None:
        seg = torch.randint(-1, 2, (2, 4, 9, 7)).float().to(DEVICE)
        ours, exact = run_passes(seg, dense((2, 4, 9, 7), "rows"), None, variance=False, edges=True)
        assert largest_error(ours, exact) < tolerance(torch.float32, seg.numel())

    def test_variance_far_from_zero(self) -> None:
        seg = dense((2, 4, 9, 9), "planes") + 1e4
        seg[..., 0, 0] = 0  # a first pixel unlike all others
        exact = seg[1:].double().flatten(2).var(2, unbiased=False)
        stats = passes.statistics(seg[1:], None, variance=True, edges=False)
        torch.testing.assert_close(stats.variance.double(), exact, rtol=1e-5, atol=0)

    def test_large_logits(self) -> None:
        seg, context = dense((2, 6, 9, 5), "rows"), context_of(6, "softmax")
        context = context._replace(pool_weight=context.pool_weight * 1e4)
        stats = passes.statistics(seg, context, variance=False, edges=False)
        exact = reference.statistics(seg.double(), in_double(context), variance=False, edges=False)
        torch.testing.assert_close(stats.log_sum_exp.double(), exact.log_sum_exp, rtol=1e-5, atol=0)
        torch.testing.assert_close(stats.pooled.double(), exact.pooled, rtol=1e-3, atol=1e-5)

    @pytest.mark.parametrize("pool", ["gap", "softmax"])
    def test_nan_is_not_hidden(self, pool: str) -> None:
        seg = dense((2, 4, 9, 5), "rows")
        seg[0, 1, 3, 3] = torch.nan
        broken, sound = passes.statistics(seg, context_of(4, pool), variance=True, edges=True).pooled
        assert broken.isnan().all()
        assert sound.isfinite().all()

    @pytest.mark.parametrize("pool", POOLS)
    def test_empty_batch(self, pool: str | None) -> None:
        seg = dense((0, 5, 9, 4), "planes")
        ours, exact = run_passes(seg, seg, context_of(5, pool), variance=True, edges=True)
        assert largest_error(ours, exact) == 0

    @pytest.mark.parametrize("pool", ["gap", "softmax"])
    @pytest.mark.usefixtures("poisoned")
    def test_every_output_is_written(self, pool: str) -> None:
        for shape in ((2, 19, 9, 5), (1, 140, 2, 3)):
            seg = dense(shape, "rows")
            ours, exact = run_passes(seg, dense(shape, "planes"), context_of(shape[1], pool), variance=True, edges=True)
            assert largest_error(ours, exact) < tolerance(torch.float32, seg.numel())

    @pytest.mark.slow
    def test_a_context_too_wide_for_a_softmax_is_served_by_the_reference(self) -> None:
        seg = dense((1, 514, 1, 2), "rows", torch.bfloat16)
        ours, exact = run_passes(seg, seg, context_of(514, "softmax"), variance=True, edges=False)
        assert largest_error(ours, exact) < tolerance(torch.bfloat16, seg.numel())

    def test_lost_bits_are_recomputed(self) -> None:
        seg, context = dense((2, 6, 9, 5), "rows"), context_of(6, "gap")
        stats = passes.statistics(seg, context, variance=False, edges=True, active=True)
        kept = passes.statistics_backward(seg, seg, stats.mean, context, stats, stats)
        lost = stats._replace(active=stats.active.new_empty(0))
        again = passes.statistics_backward(seg, seg, stats.mean, context, lost, stats)
        assert torch.equal(kept[0], again[0])
        assert all(torch.equal(a, b) for a, b in zip(kept[1], again[1], strict=True))

    @pytest.mark.slow
    def test_repeats_are_bit_identical(self) -> None:
        seg, grad, context = dense((2, 24, 9, 7), "rows"), dense((2, 24, 9, 7), "planes"), context_of(24, "softmax")
        runs = []
        for _ in range(2):
            torch.manual_seed(1)
            runs.append(run_passes(seg, grad, context, variance=True, edges=True)[0])
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))

    @pytest.mark.parametrize("pool", ["gap", "softmax"])
    def test_a_wrong_coefficient_is_noticed(self, pool: str) -> None:
        seg, context = dense((2, 6, 9, 5), "rows"), context_of(6, pool)
        stats = passes.statistics(seg, context, variance=True, edges=True, active=True)
        exact = _statistics_backward_reference(
            seg.double(), seg.double(), stats.mean.double(), in_double(context), in_double(stats), in_double(stats)
        )
        for field in ("mean", "variance", "edges", "pooled"):
            wrong = stats._replace(**{field: getattr(stats, field) * 1.01})
            out, weights = passes.statistics_backward(seg, seg, stats.mean, context, stats, wrong)
            error = largest_error([out, *weights], [exact[0], *exact[1]])
            assert error > tolerance(torch.float32, seg.numel()), field


class TestOperators:
    pytestmark = on_device

    @pytest.mark.parametrize("dtype", [torch.float32, *HALF])
    @pytest.mark.parametrize(("pool", "signals"), list(itertools.product(["gap", "softmax"], ["proxies", "variance"])))
    def test_level_and_its_gradients(self, pool: str, signals: str, dtype: torch.dtype) -> None:
        module = TaskInteractionLevel(6, 7, pool=pool, signals=signals).double().to(DEVICE).train()
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
        seg, clf = dense((3, 6, 9, 5), "rows", dtype), torch.randn(3, 7).to(DEVICE, dtype)
        results = []
        for backend, working in (("reference", torch.float64), ("triton", torch.float32)):
            cast = torch.float64 if backend == "reference" else dtype
            inputs = [seg.to(cast).detach().requires_grad_(), clf.to(cast).detach().requires_grad_()]
            with use_backend(backend):
                outputs = list(module.to(working)(*inputs))
                torch.manual_seed(1)
                cotangents = [torch.randn(o.shape).to(DEVICE, dtype).to(o.dtype) for o in outputs]
                results.append([*outputs, *torch.autograd.grad(outputs, [*inputs, *module.parameters()], cotangents)])
        terms = seg.numel()
        assert largest_error(results[1], results[0]) < 4 * tolerance(dtype, terms)

    @pytest.mark.parametrize("signals", ["proxies", "variance"])
    def test_gate_between_given_tensors(self, signals: str) -> None:
        gate = TaskInteractionLevel(5, 7, signals=signals).upa.double().to(DEVICE)
        tensors = [dense((3, 5, 9, 4), "rows"), dense((3, 5, 9, 4), "planes"), *torch.randn(2, 3, 7).to(DEVICE)]
        results = []
        for backend, working in (("reference", torch.float64), ("triton", torch.float32)):
            inputs = [t.to(working).detach().requires_grad_() for t in tensors]
            with use_backend(backend):
                out = gate.to(working)(*inputs)
                loss = out.seg.square().sum() + out.clf.sum() + out.gates.square().sum() + out.proxies.sum()
                results.append([*out, *torch.autograd.grad(loss, [*inputs, *gate.parameters()])])
        assert largest_error(results[1], results[0]) < 4 * tolerance(torch.float32, tensors[0].numel())
