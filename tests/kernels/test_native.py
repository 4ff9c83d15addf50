"""What only the native kernels can get wrong: storage in bfloat16, memory they do not write, tiles and chunks that do
not come out even, and each of them red when a coefficient is off."""

import itertools

import pytest
import torch
from torch import Tensor

from btinet_kernels import use_backend
from btinet_kernels.interaction import native, reference
from btinet_kernels.interaction.passes_op import statistics_backward_of
from btinet_kernels.interaction.reference import Context, Statistics
from btinet_kernels.nn import TaskInteractionLevel

LAYOUTS = ["rows", "planes"]
# A tile has 48 positions, long ones of planes 192, a chunk 48 channels in float32 and 24 in float64 (AVX-512).
SHAPES = [(2, 96, 15, 17), (1, 51, 29, 13), (3, 24, 5, 9, 7), (2, 1, 40, 3), (2, 130, 1, 1), (1, 7, 211)]


def dense(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> Tensor:
    x = torch.randn(shape).to(dtype)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "rows" else x


def context(channels: int, softmax: bool, dtype: torch.dtype) -> Context:
    hidden = max(1, channels // 2)
    weight = torch.randn(hidden, channels, dtype=dtype) / channels**0.5
    return Context(weight, torch.randn(hidden, dtype=dtype), torch.randn(hidden, dtype=dtype) if softmax else None)


def exact(context: Context) -> Context:
    return Context(*(None if w is None else w.double() for w in context))


def gradient_of(stats: Statistics) -> Statistics:
    """Upstream gradients of the four statistics that have one."""
    none = stats.mean.new_empty(0)
    return Statistics(*(torch.randn_like(s) for s in stats[:4]), none, none)


def compare(ours: Tensor, truth: Tensor, epsilon: float, terms: int) -> None:
    """Sums of ``terms`` values err by about the square root of that many roundings; 8 for the few sums in a row.

    Relative to the largest magnitude, or to 1 where that is smaller: gradients may vanish exactly."""
    bound = 8 * epsilon * terms**0.5 * truth.abs().max().clamp_min(1)
    assert (ours.double() - truth).abs().max() <= bound


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that torch hands out is full of NaN (or ones, for bits), so that what a kernel leaves unwritten shows."""

    def poison(make):  # type: ignore[no-untyped-def]
        def empty(*args, **kwargs):  # type: ignore[no-untyped-def]
            made = make(*args, **kwargs)
            return made.fill_(torch.nan if made.is_floating_point() else 255)

        return empty

    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", poison(Tensor.new_empty))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("softmax", [False, True], ids=["gap", "softmax"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_pass_against_float64(shape: tuple[int, ...], softmax: bool, layout: str, dtype: torch.dtype) -> None:
    seg, grad = dense(shape, layout, dtype), dense(shape, layout, dtype)
    vectors = torch.promote_types(dtype, torch.float32)
    of = context(shape[1], softmax, vectors)
    epsilon, count = torch.finfo(vectors).eps, seg[0, 0].numel()

    stats = native.statistics(seg, of, variance=True, edges=True, active=True)
    truth = reference.statistics(seg.double(), exact(of), variance=True, edges=True, active=True)
    for ours, expected in zip(stats[:5], truth[:5], strict=True):
        if expected.numel():
            compare(ours, expected, epsilon, count * shape[1])
    if not softmax:  # the bit of a value next to zero may fall either way
        assert (stats.active != truth.active).double().mean() < (1e-9 if vectors is torch.float64 else 1e-4)

    scale = torch.randn(shape[:2], dtype=vectors)
    stored = torch.finfo(dtype).eps
    compare(native.scale_channels(seg, scale), reference.scale_channels(seg.double(), scale.double()), stored, 1)
    share = torch.rand(shape[0], dtype=vectors)
    compare(
        native.interpolate(seg, grad, share),
        reference.interpolate(seg.double(), grad.double(), share.double()),
        stored,
        1,
    )
    compare(
        native.channel_dot(grad, seg), reference.channel_dot(grad.double(), seg.double()), epsilon, count * shape[1]
    )

    upstream = gradient_of(stats)
    out, weights = native.statistics_backward(seg, grad, scale, of, stats, upstream)
    wide = Statistics(*(t.double() for t in upstream))
    truth_out, truth_weights = statistics_backward_of(reference)(
        seg.double(), grad.double(), scale.double(), exact(of), truth, wide
    )
    assert out.dtype == dtype
    compare(out, truth_out, stored, shape[1])
    for ours, expected in zip(weights, truth_weights, strict=True):
        compare(ours, expected, epsilon, count * shape[0] * shape[1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_active_positions_than_a_byte_counts(layout: str) -> None:
    seg = dense((1, 5, 150, 120), layout, torch.float64)  # 562 positions in each of the 32 ranges
    of = context(5, False, torch.float64)
    of = of._replace(bias=of.bias + 100)  # all of them active
    stats = native.statistics(seg, of, variance=False, edges=False, active=True)
    upstream = gradient_of(stats)
    _, (_, d_bias, *_) = native.statistics_backward(seg, seg, torch.ones(1, 5).double(), of, stats, upstream)
    torch.testing.assert_close(d_bias, upstream.pooled[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_variance_of_values_far_from_zero(layout: str) -> None:
    seg = dense((2, 20, 13, 17), layout, torch.float32) * 1e-2 + 1e3
    ours = native.statistics(seg, None, variance=True, edges=False).variance
    truth = seg.double().var((2, 3), unbiased=False)
    # float32 holds the values themselves to 6e-5; squares of the values would be off by more than the variance
    assert (ours.double() - truth).abs().max() < 1e-3 * truth.max()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("other", ["rows", "planes", "expanded", "transposed"])
def test_upstream_gradients_of_any_layout(layout: str, other: str) -> None:
    shape = (2, 50, 14, 15)
    seg = dense(shape, layout, torch.float32)
    if other == "expanded":
        grad = torch.randn(1, 50, 1, 1).expand(shape)
    elif other == "transposed":
        grad = torch.randn(2, 50, 15, 14).transpose(2, 3)
    else:
        grad = dense(shape, other, torch.float32)
    of, scale = context(50, False, torch.float32), torch.randn(2, 50)
    stats = native.statistics(seg, of, variance=True, edges=True, active=True)
    upstream = gradient_of(stats)
    ours = native.statistics_backward(seg, grad, scale, of, stats, upstream)
    same = native.statistics_backward(seg, dense(shape, layout, torch.float32).copy_(grad), scale, of, stats, upstream)
    assert torch.equal(ours[0], same[0])
    compare(native.channel_dot(grad, seg), (grad.double() * seg.double()).sum((2, 3)), 2.0**-23, 210)


def test_bfloat16_rounds_to_even_and_keeps_nan_and_infinity() -> None:
    values = torch.tensor([1.0, 1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, torch.nan, torch.inf, -torch.inf, 3e38, 0.0])
    seg = torch.ones(1, 1, len(values), 1, dtype=torch.bfloat16).expand(1, len(values), len(values), 1).contiguous()
    for layout in LAYOUTS:
        x = seg.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "rows" else seg
        ours = native.scale_channels(x, values[None])[0, :, 0, 0]
        assert torch.equal(ours.view(torch.int16)[:4], values.bfloat16().view(torch.int16)[:4])
        assert ours[4].isnan()
        assert torch.equal(ours[5:], values.bfloat16()[5:])


@pytest.mark.parametrize("signals", ["proxies", "variance"])
@pytest.mark.parametrize("training", [False, True])
def test_bfloat16_trains_like_float64(signals: str, training: bool) -> None:
    torch.manual_seed(0)
    module = TaskInteractionLevel(48, 32, signals=signals).train(training)
    for seed, layout in itertools.product(range(2), LAYOUTS):
        torch.manual_seed(seed)
        seg, clf = dense((4, 48, 16, 16), layout, torch.bfloat16), torch.randn(4, 32).bfloat16()
        upstream = [torch.randn(seg.shape).bfloat16(), torch.randn(clf.shape).bfloat16()]
        results = []
        for backend, dtype in (("native", torch.bfloat16), ("reference", torch.float64)):
            inputs = [seg.detach().to(dtype).requires_grad_(), clf.detach().to(dtype).requires_grad_()]
            module.to(torch.float32 if backend == "native" else torch.float64)
            with use_backend(backend):
                out = module(*inputs)
            parameters = list(module.tim.parameters())
            grads = torch.autograd.grad([out.seg, out.clf], [*inputs, *parameters], [u.to(dtype) for u in upstream])
            results.append([out.seg, out.clf, *grads])
        for ours, truth in zip(*results, strict=True):
            half = ours.dtype == torch.bfloat16  # one rounding to bfloat16, else float32 sums over 1024 positions
            compare(ours, truth.double(), torch.finfo(ours.dtype).eps, 1 if half else 1024 * 48)


MUTATIONS = {
    "statistics": lambda seg, grad, of, scale, stats, up: (
        native.statistics(seg, of._replace(weight=of.weight * 1.001), variance=True, edges=True).pooled
    ),
    "scale_channels": lambda seg, grad, of, scale, stats, up: native.scale_channels(seg, scale * 1.001),
    "interpolate": lambda seg, grad, of, scale, stats, up: native.interpolate(seg, grad, scale[:, 0] * 1.001),
    "channel_dot": lambda seg, grad, of, scale, stats, up: native.channel_dot(grad * 1.001, seg),
    "statistics_backward": lambda seg, grad, of, scale, stats, up: native.statistics_backward(
        seg, grad, scale, of, stats, up._replace(edges=up.edges * 1.01)
    )[0],
    "bits": lambda seg, grad, of, scale, stats, up: native.statistics_backward(
        seg, grad, scale, of, stats._replace(active=stats.active ^ 1), up
    )[0],
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_coefficient_that_is_off_is_seen(name: str) -> None:
    shape = (2, 48, 14, 14)
    seg, grad = dense(shape, "rows", torch.float64), dense(shape, "rows", torch.float64)
    of, scale = context(48, False, torch.float64), torch.randn(2, 48).double()
    stats = native.statistics(seg, of, variance=True, edges=True, active=True)
    up = gradient_of(stats)
    truth = {
        "statistics": stats.pooled,
        "scale_channels": seg * scale[..., None, None],
        "interpolate": reference.interpolate(seg, grad, scale[:, 0]),
        "channel_dot": reference.channel_dot(grad, seg),
    }.get(name)
    if truth is None:
        truth, _ = statistics_backward_of(reference)(seg, grad, scale, of, stats, up)
    with pytest.raises(AssertionError):
        compare(MUTATIONS[name](seg, grad, of, scale, stats, up), truth, 2.0**-52, 48 * 196)
