"""The Triton kernels of a level's vectors against float64 mathematics, on a GPU or interpreted as in test_triton.py."""

import itertools

import pytest
import torch
from torch import Tensor
from triton_support import DEVICE, INTERPRETED, SERVED, in_double, interpreted_when_slow, on_device, run_interpreted
from triton_support import largest_error as largest_error_of

from btinet_kernels.interaction import level_op, reference, vectors_backward
from btinet_kernels.interaction.passes_op import LevelOptions
from btinet_kernels.interaction.reference import NORMALISE_EPSILON, GateWeights, InteractionWeights, Statistics

pytest.importorskip("triton")

if SERVED:
    from btinet_kernels.interaction import triton as passes
    from btinet_kernels.interaction import triton_vectors as vectors

SIGNALS = ["none", "proxies", "variance"]
WIDTH = {"none": 0, "proxies": 3, "variance": 2}
# Samples, channels, features, context, projection, hidden width of the gate. Products take 16 to 64 of each at a time.
LARGE = [(17, 33, 16, 65, 1, 32), (70, 40, 35, 67, 70, 70)]
SIZES = [(1, 1, 1, 1, 1, 1), (3, 5, 7, 2, 3, 4), *(pytest.param(size, marks=pytest.mark.slow) for size in LARGE)]
MIDDLE = (5, 35, 18, 9, 6, 7)


@interpreted_when_slow
def test_interpreted_in_a_process_of_its_own(part: str) -> None:
    run_interpreted(__file__, part)


class Case:
    """Random vectors, weights and upstream gradients of one level."""

    def __init__(self, signals: str, training: bool, size: tuple[int, ...], seed: int = 0) -> None:
        batch, channels, features, hidden, projection, gate_hidden = size
        torch.manual_seed(seed)

        def weight(rows: int, columns: int) -> Tensor:
            return (torch.randn(rows, columns) / columns**0.5).to(DEVICE)

        def vector(*shape: int) -> Tensor:
            return torch.randn(*shape).to(DEVICE)

        width, none = WIDTH[signals], torch.empty(0, device=DEVICE)
        proxies, variance = signals == "proxies", signals == "variance"
        self.options = LevelOptions(signals, 0.7, training, 1e-3)
        self.weights = InteractionWeights(
            *(weight(hidden, channels), vector(hidden), None),
            *(weight(features, hidden), vector(features), vector(features), vector(features)),
            *(vector(features), vector(features).square() + 0.5),
            *(weight(features, features), vector(features), weight(channels, channels), vector(channels)),
            *(weight(channels, features), vector(channels)),
        )
        projections = (weight(projection, channels), weight(projection, features)) if proxies else (None, None)
        network = (weight(gate_hidden, width), vector(gate_hidden), weight(2, gate_hidden), vector(2)) if width else ()
        self.gate = GateWeights(*projections, *network) if width else None
        self.stats = Statistics(
            vector(batch, channels),
            vector(batch, channels).square() if variance else none,
            vector(batch).abs() if proxies else none,
            vector(batch, hidden).abs(),
            none,
            none.to(torch.uint8),
        )
        self.clf = vector(batch, features)
        self.upstream = {
            "d_scale": vector(batch, channels),
            "d_clf_out": vector(batch, features),
            "d_gates": vector(batch, 2) if width else none,
            "d_proxies": vector(batch, width) if width else none,
        }
        # Sums are as long as the largest of these; four or five follow one another in the backward.
        self.tolerance = 8 * (max(size) + 8) ** 0.5 * 2.0**-24

    def forward(self) -> list[Tensor]:
        return list(passes.level_vectors(self.stats, self.clf, self.weights, self.gate, self.options))

    def exact_forward(self) -> list[Tensor]:
        return list(level_op.level_vectors(*self.doubles(), self.options))

    def backward(self) -> list[Tensor]:
        gradient = passes.level_backward(self.stats, self.clf, self.weights, self.gate, self.options, **self.upstream)
        return flat(gradient)

    def exact_backward(self) -> list[Tensor]:
        upstream = {name: d.double() for name, d in self.upstream.items()}
        return flat(vectors_backward.level_backward(*self.doubles(), self.options, **upstream))

    def doubles(self):  # type: ignore[no-untyped-def]
        return in_double(self.stats), self.clf.double(), in_double(self.weights), in_double(self.gate)


def flat(gradient: vectors_backward.LevelGradient) -> list[Tensor]:
    return [*gradient.stats, gradient.clf, *gradient.weights, *gradient.gate]


def largest_error(ours: list[Tensor], exact: list[Tensor]) -> float:
    assert all(a.is_contiguous() and a.dtype == torch.float32 for a in ours)
    return largest_error_of(ours, exact)


def check(case: Case) -> None:
    exact = case.exact_forward()
    if not case.options.training:  # what the operator returns
        exact[4:] = [exact[4].new_empty(0), exact[5].new_empty(0)]
    assert largest_error(case.forward(), exact) < case.tolerance
    assert largest_error(case.backward(), case.exact_backward()) < 4 * case.tolerance


class TestVectors:
    pytestmark = on_device

    @pytest.mark.parametrize(("signals", "training"), list(itertools.product(SIGNALS, [True, False])))
    @pytest.mark.parametrize("size", SIZES)
    def test_sizes(self, size: tuple[int, ...], signals: str, training: bool) -> None:
        check(Case(signals, training, size))

    @pytest.mark.slow
    @pytest.mark.parametrize("signals", SIGNALS)
    def test_several_blocks_in_every_loop(self, signals: str, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in {"PARTS": 2, "WIDE": 16, "TILE": 16, "COLUMNS_OF_A_GRADIENT": 16}.items():
            monkeypatch.setattr(vectors, name, value)
        monkeypatch.setattr(vectors, "power_of_two", lambda size, least, most: 16)
        check(Case(signals, True, (35, 100, 81, 33, 40, 20)))

    @pytest.mark.slow
    @pytest.mark.parametrize("signals", SIGNALS)
    def test_a_large_batch(self, signals: str) -> None:
        batch = 140 if INTERPRETED and signals != "none" else 515  # the interpreter takes one sample after the other
        check(Case(signals, True, (batch, 20, 18, 5, 6, 7)))

    @pytest.mark.slow
    @pytest.mark.parametrize(("signals", "training"), list(itertools.product(SIGNALS, [True, False])))
    def test_gradient_is_that_of_the_reference(self, signals: str, training: bool) -> None:
        case = Case(signals, training, MIDDLE)
        stats, clf, weights, gate = case.doubles()
        leaves = [*(s for s in stats[:4] if s.numel()), clf, *weights[3:7], *weights[9:]]
        leaves += [w for w in gate or () if w is not None]
        for leaf in leaves:
            leaf.requires_grad_()
        outputs = [o for o in level_op.level_vectors(stats, clf, weights, gate, case.options)[:4] if o.numel()]
        upstream = [d.double() for d in case.upstream.values() if d.numel()]
        exact = torch.autograd.grad(outputs, leaves, upstream, materialize_grads=True)
        ours = [d for d in case.backward() if d.numel()]
        assert largest_error(ours, list(exact)) < 4 * case.tolerance

    @pytest.mark.parametrize("side", ["seg_projection", "clf_projection"])
    def test_projections_too_short_to_be_normalised(self, side: str) -> None:
        case = Case("proxies", True, MIDDLE)
        stats, clf, weights, gate = case.doubles()
        enhanced = reference.enhance(stats, clf, weights, strength=0.7, training=True, eps=1e-3)
        vector = (enhanced.modulation - 1) * stats.mean if side == "seg_projection" else enhanced.clf - clf
        squared = (vector @ getattr(gate, side).t()).square().sum(1)
        # Only just too short: the longest one's gradient along itself would show.
        shorter = (0.5 * NORMALISE_EPSILON / squared.max()).sqrt().float()
        case.gate = case.gate._replace(**{side: getattr(case.gate, side) * shorter})
        assert largest_error(case.forward(), case.exact_forward()) < case.tolerance
        ours, exact = case.backward(), case.exact_backward()
        # A clipped norm divides by 1e-6: the projection's gradient is that much larger than the others.
        assert max(b.abs().max() for b in exact if b.numel()) > 1e2
        assert largest_error(ours, exact) < 4 * case.tolerance

    @pytest.mark.slow
    @pytest.mark.parametrize(("signals", "training"), list(itertools.product(SIGNALS, [True, False])))
    @pytest.mark.usefixtures("poisoned")
    def test_every_output_is_written(self, signals: str, training: bool) -> None:
        check(Case(signals, training, MIDDLE))

    @pytest.mark.slow
    @pytest.mark.parametrize("signals", SIGNALS)
    def test_strides_are_honoured(self, signals: str) -> None:
        case = Case(signals, True, MIDDLE)

        def spread(tensor: Tensor) -> Tensor:
            return tensor.repeat_interleave(2, -1)[..., ::2]

        case.weights = InteractionWeights(*(w if w is None else spread(w) for w in case.weights))
        case.gate = case.gate and GateWeights(*(w if w is None else spread(w) for w in case.gate))
        case.stats, case.clf = Statistics(*map(spread, case.stats)), spread(case.clf)
        case.upstream = {name: d[:1].expand_as(d) for name, d in case.upstream.items()}
        check(case)

    @pytest.mark.parametrize(("signals", "training"), list(itertools.product(SIGNALS, [True, False])))
    def test_empty_batch(self, signals: str, training: bool) -> None:
        case = Case(signals, training, (0, *MIDDLE[1:]))
        *results, mean, variance = case.forward()
        *exact, exact_mean, _ = case.exact_forward()
        assert largest_error(results, exact) == 0
        assert mean.shape == variance.shape == (exact_mean.shape if training else (0,))
        assert mean.isnan().all()
        assert largest_error(case.backward(), case.exact_backward()) == 0

    @pytest.mark.slow
    @pytest.mark.parametrize("signals", SIGNALS)
    def test_nan_is_not_hidden(self, signals: str) -> None:
        case = Case(signals, False, MIDDLE)
        case.clf[0, 3] = torch.nan
        scale, clf, *_ = case.forward()
        assert scale[0].isnan().all()
        assert clf[0, 3].isnan()
        assert scale[1:].isnan().all() == (signals == "variance")  # there the samples share a denominator
        case = Case(signals, True, MIDDLE)
        case.stats.pooled[1, 2] = torch.nan
        scale, clf, _, _, mean, variance = case.forward()
        assert all(x.isnan().all() for x in (clf, mean, variance))
        d_pooled = case.backward()[3]
        assert d_pooled.isnan().all()

    def test_batch_variance_far_from_zero(self) -> None:
        case = Case("none", True, (70, 3, 18, 5, 1, 1))
        case.weights.dense_bias.copy_(1e4 + case.weights.dense_bias)
        hidden = torch.addmm(case.weights.dense_bias, case.stats.pooled, case.weights.dense_weight.t())
        exact = hidden.double().var(0, unbiased=False)
        torch.testing.assert_close(case.forward()[5].double(), exact, rtol=3e-3, atol=0)

    @pytest.mark.parametrize("spread", [2.0**-16, 2.0**-10])
    def test_energy_of_features_that_hardly_differ(self, spread: float) -> None:
        case = Case("proxies", False, MIDDLE)
        case.weights.norm_weight.zero_()
        case.weights.norm_bias.zero_()
        case.clf.copy_(torch.randn_like(case.clf) * spread)
        exact = case.exact_forward()[3][:, 2]
        assert exact.max() < 4 * spread**2
        torch.testing.assert_close(case.forward()[3][:, 2].double(), exact, rtol=1e-5, atol=0)

    @pytest.mark.slow
    @pytest.mark.parametrize("signals", SIGNALS)
    def test_repeats_are_bit_identical(self, signals: str) -> None:
        case = Case(signals, True, MIDDLE)
        for run in (case.forward, case.backward):
            assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))

    @pytest.mark.parametrize("signals", ["none", *(pytest.param(s, marks=pytest.mark.slow) for s in SIGNALS[1:])])
    def test_a_wrong_coefficient_is_noticed(self, signals: str) -> None:
        exact = Case(signals, False, MIDDLE)
        forward, backward = exact.exact_forward()[:4], exact.exact_backward()
        for owner, field in wrong_fields(exact):
            case = Case(signals, False, MIDDLE)
            tensors = getattr(case, owner)
            tensor = tensors[field] if owner == "upstream" else getattr(tensors, field)
            tensor.view(-1)[::2] *= 1.01  # not all: projections and variances are relative
            assert largest_error(case.backward(), backward) > 4 * case.tolerance, field
            if owner != "upstream":
                assert largest_error(case.forward()[:4], forward) > case.tolerance, field

    @pytest.mark.parametrize("signals", SIGNALS)
    def test_few_launches_of_many_programs(self, signals: str, monkeypatch: pytest.MonkeyPatch) -> None:
        case, launches = Case(signals, True, (8, 384, 256, 192, 64, 32)), []
        monkeypatch.setattr(vectors, "launch", lambda kernel, programs, *_, **__: launches.append((kernel, programs)))
        case.forward()
        assert len(launches) == 3
        forward = len(launches)
        case.backward()
        assert len(launches) - forward == (4 if signals == "none" else 5)
        for kernel, programs in launches:
            by_samples = kernel in (vectors.results_of_samples, vectors.gate_gradient)
            assert programs >= (8 if by_samples else 16)


def wrong_fields(case: Case) -> list[tuple[str, str]]:
    """Everything that a result depends on in inference."""
    fields = [("weights", name) for name in InteractionWeights._fields[3:]]
    fields += [("gate", name) for name, w in zip(GateWeights._fields, case.gate or (), strict=False) if w is not None]
    fields += [("stats", name) for name, s in zip(Statistics._fields, case.stats, strict=True) if s.numel()]
    return fields + [("upstream", name) for name, d in case.upstream.items() if d.numel()]
