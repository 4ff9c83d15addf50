"""The Triton kernels of the segmentation loss against float64 mathematics, on a GPU or interpreted as in
test_triton.py."""

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.nn import functional as F
from triton_support import (
    DEVICE,
    HALF,
    PROMISES,
    SERVED,
    interpreted_when_slow,
    on_device,
    on_hardware,
    run_interpreted,
)

from btinet_kernels import SegmentationLossOptions, fused_segmentation_loss, use_backend
from btinet_kernels.losses import reference
from btinet_kernels.losses.op import mask_statistics, mask_statistics_gradient
from btinet_kernels.losses.reference import MaskStatistics

pytest.importorskip("triton")

if SERVED:
    from btinet_kernels.losses import triton as passes

SOFT = SegmentationLossOptions()
HARD = SegmentationLossOptions(hard_boundary=True, empty_masks="tversky")
# Filters reach two positions; tiles hold 256 and their sums are added 128 at a time.
SHAPES = [(3, 6, 9), (1, 1, 1), (1, 1, 7), (2, 9, 1), pytest.param((3, 30, 37), marks=pytest.mark.slow)]
ROUNDED = 2.0**-24
CROSS_ENTROPY, CURVATURE = map(MaskStatistics._fields.index, ("cross_entropy", "curvature"))


@interpreted_when_slow
def test_interpreted_in_a_process_of_its_own(part: str) -> None:
    run_interpreted(__file__, part)


def problem(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    """Logits and a mask; the first image shows no lesion, the last, where there are three, nothing else."""
    batch, height, width = shape
    logits = (torch.randn(batch, 1, height, width) * spread).to(dtype)
    target = (torch.rand(batch, 1, height, width) > 0.6).float()
    target[:1] = 0
    target[2:][-1:] = 1
    return logits.to(DEVICE), target.to(DEVICE)


def exactly(
    logits: Tensor, target: Tensor, upstream: Tensor, options: SegmentationLossOptions
) -> tuple[Tensor, Tensor]:
    """The statistics in float64, and what arrives at the logits."""
    logits = logits.detach().double().requires_grad_()
    statistics = torch.stack(reference.statistics(logits, target.double(), options), 1)
    return statistics.detach(), torch.autograd.grad(statistics, logits, upstream)[0]


def ours(logits: Tensor, target: Tensor, upstream: Tensor, options: SegmentationLossOptions) -> tuple[Tensor, Tensor]:
    hard, cross_entropy = options.hard_boundary, options.empty_masks == "cross_entropy"
    statistics, sobel_mean = passes.statistics(logits, target, hard_boundary=hard, cross_entropy=cross_entropy)
    gradient = passes.statistics_backward(upstream, logits, target, sobel_mean, hard_boundary=hard)
    assert statistics.dtype == sobel_mean.dtype == torch.float64
    assert gradient.dtype == logits.dtype
    assert gradient.stride() == torch.empty_like(logits).stride()
    return statistics, gradient


def upstream_of(logits: Tensor) -> Tensor:
    """Gradients that matter alike: sums are N times as large as means."""
    count = logits.shape[2:].numel()
    return torch.randn(len(logits), len(MaskStatistics._fields)).double().to(DEVICE) * torch.tensor(
        [1, 1, 1, count, count, count, count, count], device=DEVICE
    )


def compare(logits: Tensor, target: Tensor, options: SegmentationLossOptions = SOFT) -> None:
    """Sums of float32 tiles, and a sigmoid and two filters whose terms nearly cancel."""
    upstream = upstream_of(logits)
    upstream[:, CROSS_ENTROPY] *= options.empty_masks == "cross_entropy"
    (statistics, gradient), (exact, exact_gradient) = (f(logits, target, upstream, options) for f in (ours, exactly))
    assert ((statistics - exact).abs() <= 64 * ROUNDED * exact.abs().amax(0).clamp_min(1e-6)).all()
    error = (gradient.double() - exact_gradient).abs() / exact_gradient.abs().max().clamp_min(1e-12)
    assert error.max() <= 256 * ROUNDED + (torch.finfo(logits.dtype).eps if logits.dtype in HALF else 0)


class TestStatistics:
    pytestmark = on_device

    @pytest.mark.parametrize("options", [SOFT, HARD], ids=["soft", "hard"])
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.usefixtures("poisoned")
    def test_shapes(self, shape: tuple[int, ...], options: SegmentationLossOptions) -> None:
        compare(*problem(shape), options)

    @pytest.mark.parametrize("dtype", HALF)
    def test_half_precision(self, dtype: torch.dtype) -> None:
        compare(*problem((1, 7, 40), dtype))

    @pytest.mark.parametrize("shape", [(1, 4, 9), pytest.param((2, 50, 45), marks=pytest.mark.slow)])
    def test_several_tiles(self, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
        """The larger images have more than are added at a time."""
        monkeypatch.setattr(passes, "TILE", 16)
        compare(*problem(shape))

    def test_sums_of_tiles_are_added_in_float64(self) -> None:
        parts = torch.rand(2, 10, 300, device=DEVICE)
        found, mean = (torch.full(shape, torch.nan, dtype=torch.float64, device=DEVICE) for shape in ((2, 8), (2,)))
        passes.mask_statistics_of_images[(2,)](parts, found, mean, 70, 300, BLOCK_T=128)
        total = parts.double().sum(2)
        means = total / 70
        exact = [
            *total[:, :3].unbind(1),
            *means[:, 3:6].unbind(1),
            *(means[:, k + 1] - means[:, k] ** 2 for k in (6, 8)),
        ]
        torch.testing.assert_close(found, torch.stack(exact, 1), rtol=1e-13, atol=0)
        torch.testing.assert_close(mean, means[:, 8], rtol=1e-13, atol=0)

    def test_each_statistic_has_its_own_gradient(self) -> None:
        """One in each image."""
        logits, target = problem((len(MaskStatistics._fields), 4, 5))
        upstream = upstream_of(logits).diag().diag()
        (_, found), (_, exact) = (f(logits, target, upstream, SOFT) for f in (ours, exactly))
        within = 256 * ROUNDED * exact.abs().flatten(1).amax(1)
        assert ((found - exact).abs().flatten(1).amax(1) <= within).all()

    @pytest.mark.parametrize(
        "view",
        [
            lambda t: t.transpose(2, 3),
            lambda t: torch.cat([t, t + 1], 1)[:, 1:, ::2, ::3],
            lambda t: t[:1, :, :1].expand(3, -1, 9, -1),
        ],
    )
    def test_strides_are_honoured(self, view) -> None:  # type: ignore[no-untyped-def]
        logits, target = (view(t) for t in problem((2, 8, 12)))
        compare(logits, target)

    def test_masks_of_bytes_and_of_bits(self) -> None:
        logits, target = (t.transpose(2, 3) for t in problem((1, 5, 9)))
        upstream = upstream_of(logits)
        of_bytes, of_bits = (ours(logits, t, upstream, SOFT) for t in (target.to(torch.uint8), target > 0))
        assert all(torch.equal(a, b) for a, b in zip(of_bytes, of_bits, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(of_bytes, ours(logits, target, upstream, SOFT), strict=True))

    def test_soft_masks(self) -> None:
        logits, target = problem((1, 6, 9))
        compare(logits, torch.rand_like(target))

    def test_saturated_logits(self) -> None:
        logits, target = problem((2, 6, 11))
        logits[torch.rand_like(logits) < 0.3] = 17
        logits[torch.rand_like(logits) < 0.3] = -17
        compare(logits, target)
        upstream = upstream_of(logits)
        upstream[:, CROSS_ENTROPY] = 0
        assert (ours(logits, target, upstream, SOFT)[1][logits.abs() == 17] == 0).all()

    def test_cross_entropy_of_every_size_of_logits(self) -> None:
        """Relative errors, also where the prediction is right and hardly anything is left."""
        sizes = torch.tensor([-30, -5, -0.1, 0.2, 9, 40], device=DEVICE)
        logits = sizes[:, None, None, None].expand(-1, -1, 1, 3)
        found, _ = passes.statistics(logits, torch.zeros_like(logits), hard_boundary=False, cross_entropy=True)
        exact = sizes.double().exp().log1p()
        torch.testing.assert_close(found[:, CROSS_ENTROPY], exact, rtol=16 * ROUNDED, atol=0)

    def test_a_constant_prediction_has_no_boundary_inside(self) -> None:
        """There the response is exactly zero, and so is its slope; only at the edges of the image it is not."""
        logits = torch.full((1, 1, 12, 14), 0.3, device=DEVICE)
        upstream = torch.zeros(1, len(MaskStatistics._fields), dtype=torch.float64, device=DEVICE)
        upstream[0, CURVATURE] = logits.numel()
        gradient = ours(logits, torch.zeros_like(logits), upstream, SOFT)[1]
        p, kernel = (
            logits.double().sigmoid(),
            torch.tensor(reference.curvature_kernel(), device=DEVICE)[None, None].double(),
        )
        response = F.conv2d(-p, kernel, padding=2)
        response[..., 2:-2, 2:-2] = 0
        exact = -F.conv2d(response.sign(), kernel, padding=2) * p * (1 - p)
        torch.testing.assert_close(gradient.double(), exact, rtol=1e-5, atol=1e-6)

    def test_repeats_are_bit_identical(self) -> None:
        logits, target = problem((1, 5, 60))
        upstream = upstream_of(logits)
        first, second = (ours(logits, target, upstream, SOFT) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class TestLoss:
    pytestmark = on_device

    @staticmethod
    def run(backend: str, logits: Tensor, target: Tensor, options: SegmentationLossOptions) -> list[Tensor]:
        logits = logits.detach().requires_grad_()
        with use_backend(backend):
            value = fused_segmentation_loss(logits, target, options)
            return [value.detach(), *torch.autograd.grad(value, logits)]

    @pytest.mark.parametrize("options", [SOFT, SegmentationLossOptions(0.3, 0.7, True, "tversky", 1.6)])
    def test_loss_and_gradient(self, options: SegmentationLossOptions) -> None:
        logits, target = problem((2, 6, 7))
        found = self.run("triton", logits, target, options)
        exact = self.run("reference", logits.double(), target.double(), options)
        assert found[0].dtype == torch.float32
        for a, b in zip(found, exact, strict=True):
            assert (a.double() - b).abs().max() <= 256 * ROUNDED * b.abs().max()

    @pytest.mark.parametrize(
        "value", [torch.nan, *(pytest.param(sign * torch.inf, marks=pytest.mark.slow) for sign in (1, -1))]
    )
    def test_what_is_not_finite(self, value: float) -> None:
        logits, target = problem((2, 5, 9))  # the first has no lesion
        logits[:, 0, 3, 5] = value
        (found, gradient), (exact, _) = (self.run(b, logits, target, SOFT) for b in ("triton", "reference"))
        torch.testing.assert_close(found, exact, equal_nan=True)
        if value != value:
            assert gradient.isnan().any()

    @pytest.mark.filterwarnings("ignore:var")
    def test_empty_batch(self) -> None:
        empty = torch.zeros(0, 1, 8, 9, device=DEVICE)
        value, gradient = self.run("triton", empty, empty, SOFT)
        assert value.isnan()  # a mean of nothing
        assert gradient.shape == empty.shape

    def test_opcheck(self) -> None:
        logits, target = problem((1, 2, 3), torch.bfloat16)
        with use_backend("triton"):
            for mask in (target, target.bool()):
                opcheck(mask_statistics, (logits, mask, False, True), test_utils=PROMISES)
                upstream, mean = upstream_of(logits), torch.zeros(1, dtype=torch.float64, device=DEVICE)
                opcheck(mask_statistics_gradient, (upstream, logits, mask, mean, False), test_utils=PROMISES)

    @on_hardware
    @pytest.mark.parametrize("dtype", [torch.float32, *HALF])
    def test_the_networks_shape(self, dtype: torch.dtype) -> None:
        compare(*problem((8, 224, 224), dtype))
