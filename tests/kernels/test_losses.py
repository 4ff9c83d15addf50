"""The segmentation loss against the official numbers and float64 mathematics: values, gradients, kinks, edges, repeats;
and red when a coefficient is off."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.library import opcheck

from btinet_kernels import SegmentationLossOptions, backends, fused_segmentation_loss, use_backend
from btinet_kernels.losses import native, reference
from btinet_kernels.losses.op import mask_statistics, mask_statistics_gradient
from btinet_kernels.losses.reference import MaskStatistics

BACKENDS = ["native", "reference"]
OFFICIAL = SegmentationLossOptions(hard_boundary=True, empty_masks="tversky", ceiling=10.0)
OPTIONS = {
    "default": SegmentationLossOptions(),
    "asymmetric": SegmentationLossOptions(0.3, 0.7, empty_masks="tversky"),
    "official": OFFICIAL,
    "ceiling": SegmentationLossOptions(ceiling=1.6),  # cuts off some of the images
}
# A vector has 16 positions in float32, a thread takes 16 rows at least, sums leave the vectors after 1024 positions;
# the filters reach two rows and columns beyond the smallest maps.
SHAPES = [(3, 30, 37), (2, 1, 1), (1, 1, 7), (2, 9, 1), (2, 2, 3), (4, 4, 16), (2, 5, 2050), (5, 113, 31), (40, 3, 5)]


def problem(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0, spread: float = 3.0
) -> tuple[Tensor, Tensor]:
    """Logits and a mask; the first image shows no lesion, the last, where there are three, nothing else."""
    torch.manual_seed(seed)
    batch, height, width = shape
    logits = torch.randn(batch, 1, height, width, dtype=torch.float64) * spread
    target = (torch.rand(batch, 1, height, width) > 0.6).to(torch.promote_types(dtype, torch.float32))
    target[:1] = 0
    target[2:][-1:] = 1
    return logits.to(dtype), target


def run(
    backend: str, logits: Tensor, target: Tensor, options: SegmentationLossOptions = OPTIONS["default"]
) -> tuple[Tensor, Tensor]:
    """The loss and its gradient."""
    logits = logits.detach().requires_grad_()
    with use_backend(backend):
        value = fused_segmentation_loss(logits, target, options)
        (gradient,) = torch.autograd.grad(value, logits)
    return value.detach(), gradient


def assert_close(ours: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor], allowed: float, stored: float = 0) -> None:
    """Relative to each tensor's largest magnitude; ``stored``: what the gradient loses in its dtype."""
    for a, b, bound in zip(ours, exact, (allowed, allowed + stored), strict=True):
        assert a.shape == b.shape
        error = (a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-12)
        assert error <= bound, (error, bound)  # a NaN is not below a bound


@pytest.fixture(scope="module")
def official() -> np.lib.npyio.NpzFile:
    return np.load(Path(__file__).parent / "data" / "official_modules.npz")


def pair(official: np.lib.npyio.NpzFile, name: str) -> tuple[Tensor, Tensor]:
    """Prediction (requiring a gradient) and target, channels first, float64."""
    prediction, target = (
        torch.from_numpy(official[f"{name}/{kind}"]).double().permute(0, 3, 1, 2) for kind in ("prediction", "target")
    )
    return prediction.requires_grad_(), target


def check(official: np.lib.npyio.NpzFile, name: str, value: Tensor, prediction: Tensor) -> None:
    assert value.item() == pytest.approx(official[f"{name}/value"].item(), rel=2e-6)
    (gradient,) = torch.autograd.grad(value + 0 * prediction.sum(), prediction)  # a hard boundary has none
    wanted = torch.from_numpy(official[f"{name}/grad"]).double().reshape(prediction.movedim(1, -1).shape)
    torch.testing.assert_close(
        gradient, wanted.movedim(-1, 1), rtol=2e-4, atol=2e-6 * wanted.abs().max().item() + 1e-12
    )


def statistics(backend: str, prediction: Tensor, target: Tensor) -> MaskStatistics:
    logits = torch.logit(prediction, 1e-7)
    if backend == "reference":
        return reference.statistics(logits, target, OFFICIAL)
    return MaskStatistics(*mask_statistics(logits, target, True, False)[0].unbind(1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "term"),
    [
        ("focal_tversky", lambda of: reference.focal_tversky(of, OFFICIAL).mean()),
        ("boundary", reference.boundary),
        ("texture", reference.texture),
        ("segmentation", lambda of: reference.loss_of(of, OFFICIAL)),
    ],
)
def test_official_numbers(official: np.lib.npyio.NpzFile, name: str, term, backend: str) -> None:  # type: ignore[no-untyped-def]
    prediction, target = pair(official, f"loss_{name}")
    check(official, f"loss_{name}", term(statistics(backend, prediction, target)), prediction)


@pytest.mark.parametrize("backend", BACKENDS)
def test_official_loss_through_the_operator(official: np.lib.npyio.NpzFile, backend: str) -> None:
    prediction, target = pair(official, "loss_segmentation")
    with use_backend(backend):
        value = fused_segmentation_loss(torch.logit(prediction, 1e-7), target, OFFICIAL)
        check(official, "loss_segmentation", value, prediction)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_native_in_float64(shape: tuple[int, ...], options: SegmentationLossOptions) -> None:
    logits, target = problem(shape)
    assert_close(run("native", logits, target, options), run("reference", logits, target, options), 1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_single_and_half_precision(
    shape: tuple[int, ...], options: SegmentationLossOptions, dtype: torch.dtype
) -> None:
    logits, target = problem(shape, dtype)
    value, gradient = run("native", logits, target, options)
    assert value.dtype == torch.float32
    assert gradient.dtype == dtype
    # Up to 64 roundings follow one another in a lane of the sums, and about as many in a filter and the sigmoid.
    allowed = 64 * torch.finfo(torch.float32).eps
    exact = run("reference", logits.double(), target.double(), options)
    assert_close((value, gradient), exact, allowed, torch.finfo(dtype).eps * (dtype == torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cross_entropy_of_every_size_of_logits(dtype: torch.dtype) -> None:
    """Relative errors, also where the prediction is right and hardly anything is left."""
    for logit in (-30, -15, -5, -1.3, -0.1, 0, 0.2, 2, 9, 40):
        logits = torch.full((1, 1, 3, 5), logit, dtype=dtype)
        ours = native.statistics(logits, torch.zeros_like(logits), hard_boundary=False, cross_entropy=True)[0]
        exact = torch.tensor(logit, dtype=torch.float64).exp().log1p()
        torch.testing.assert_close(ours[0, 4], exact, rtol=8 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", ["default", "asymmetric", "official"])
def test_gradcheck(options: str, backend: str) -> None:
    logits, target = problem((3, 5, 6), spread=1)
    with use_backend(backend):
        assert gradcheck(lambda x: fused_segmentation_loss(x, target, OPTIONS[options]), logits.requires_grad_())


@pytest.mark.parametrize("filled", [0.0, 1.0])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_masks_that_are_all_alike(options: SegmentationLossOptions, filled: float) -> None:
    logits, target = problem((2, 20, 19))
    target = target.fill_(filled)
    assert_close(run("native", logits, target, options), run("reference", logits, target, options), 1e-12)


def test_soft_masks() -> None:
    logits, target = problem((3, 20, 19))
    target = torch.rand_like(target)
    assert_close(run("native", logits, target), run("reference", logits, target), 1e-13)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_saturated_logits(options: SegmentationLossOptions) -> None:
    logits, target = problem((3, 24, 21))
    logits[torch.rand_like(logits) < 0.3] = 100
    logits[torch.rand_like(logits) < 0.3] = -100
    ours, exact = (run(backend, logits, target, options) for backend in BACKENDS)
    assert_close(ours, exact, 1e-13)
    if options.empty_masks == "tversky":
        assert (ours[1][logits.abs() == 100] == 0).all()
    hopeless = torch.where(target > 0, -100.0, 100.0).double()
    assert_close(*(run(backend, hopeless, target, options) for backend in BACKENDS), 1e-13)


def test_there_is_no_gradient_where_the_prediction_is_cut_off_nor_at_that_end() -> None:
    """In float32 logits from 15.6 to 16.6 have exactly the largest probability that is let through."""
    logits, spread = torch.linspace(15, 17, 1001).reshape(1, 1, 1, -1), MaskStatistics._fields.index("false_positive")
    d_statistics = torch.zeros(1, len(MaskStatistics._fields), dtype=torch.float64)
    d_statistics[0, spread] = 1
    for sign in (1, -1):
        x, mean = sign * logits, torch.zeros(1, dtype=torch.float64)
        d = native.statistics_backward(d_statistics, x, torch.zeros_like(x), mean, hard_boundary=False)
        inside = torch.sigmoid(logits.double()) < 1 - 1.8e-7 if sign > 0 else torch.sigmoid(x.double()) > 1.01e-7
        outside = torch.sigmoid(logits.double()) > 1 - 1.6e-7 if sign > 0 else torch.sigmoid(x.double()) < 0.99e-7
        assert (d[inside] != 0).all()
        assert (d[outside] == 0).all()
        assert min(inside.sum(), outside.sum()) > 100


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite(value: float, empty: bool) -> None:
    logits, target = problem((2, 20, 30), torch.float32)
    logits[0 if empty else 1, 0, 7, 5] = value  # the first image has no lesion
    (ours, gradient), (exact, _) = (run(backend, logits, target) for backend in BACKENDS)
    torch.testing.assert_close(ours, exact, equal_nan=True)
    if value != value:
        assert ours.isnan()
        assert gradient.isnan().any()


def test_a_constant_prediction_has_no_boundary_inside() -> None:
    """The filter's response is then zero and so is its sign; in the reference roundings decide what it is."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        logits = torch.full((1, 1, 40, 40), 0.3, dtype=dtype)
        target = torch.zeros_like(logits, dtype=torch.promote_types(dtype, torch.float32))
        d_statistics = torch.zeros(1, len(MaskStatistics._fields), dtype=torch.float64)
        d_statistics[0, MaskStatistics._fields.index("curvature")] = 1
        d = native.statistics_backward(d_statistics, logits, target, torch.zeros(1).double(), hard_boundary=False)
        assert d[..., :3, :].abs().max() > 0
        assert (d[..., 4:-4, 4:-4] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_of_any_dtype(dtype: torch.dtype, backend: str) -> None:
    logits, target = problem((3, 17, 21), torch.float32)
    for a, b in zip(run(backend, logits, target.to(dtype)), run(backend, logits, target), strict=True):
        assert torch.equal(a, b)


VIEWS = {
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(2, 3),
    "every other": lambda t: t[..., ::2, ::3],
    "a class of several": lambda t: torch.cat([t, t + 1], 1)[:, 1:],
    "expanded": lambda t: t[:1, :, :1].expand(3, -1, 9, -1),
}


@pytest.mark.parametrize("mask", [torch.float64, torch.uint8])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_strides_are_honoured(view, mask: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    logits, target = problem((3, 19, 23))
    exact = run("reference", view(logits), view(target).clamp(max=1))
    for of_logits, of_target in ((view(logits), view(target).clone()), (view(logits).clone(), view(target))):
        ours = run("native", of_logits, of_target.to(mask).clamp(max=1))
        assert_close(ours, exact, 1e-13)
        assert ours[1].stride() == torch.empty_like(of_logits).stride()


def test_strides_of_bytes_are_honoured() -> None:
    logits, target = problem((3, 19, 23))
    for view in VIEWS.values():
        mask = view((target > 0).repeat(1, 1, 1, 1))
        assert_close(run("native", view(logits), mask), run("reference", view(logits), mask), 1e-13)


@pytest.mark.filterwarnings("ignore:var")
def test_empty_batch() -> None:
    for value, gradient in (run(backend, torch.zeros(0, 1, 8, 9), torch.zeros(0, 1, 8, 9)) for backend in BACKENDS):
        assert value.isnan()  # a mean of nothing
        assert gradient.shape == (0, 1, 8, 9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeats_are_bit_identical_for_any_number_of_threads(dtype: torch.dtype) -> None:
    logits, target = problem((3, 150, 37), dtype)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5, 2):
            torch.set_num_threads(threads)
            runs.append(run("native", logits, target))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_opcheck() -> None:
    logits, target = problem((2, 6, 7))
    for mask in (target, target.bool()):
        opcheck(mask_statistics, (logits.requires_grad_(), mask, False, True))
        d_statistics, mean = torch.randn(2, len(MaskStatistics._fields)).double(), torch.randn(2).double()
        opcheck(
            mask_statistics_gradient,
            (d_statistics, logits.detach(), mask, mean, False),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.slow
def test_compiles_whole_and_for_any_batch() -> None:
    compiled = torch.compile(fused_segmentation_loss, fullgraph=True, dynamic=True)
    with use_backend("native"):
        for batch in (2, 3, 5):
            logits, target = problem((batch, 20, 17), torch.float32)
            results = []
            for function in (compiled, fused_segmentation_loss):
                x = copy.deepcopy(logits).requires_grad_()
                value = function(x, target, OPTIONS["ceiling"])
                results.append((value.detach(), *torch.autograd.grad(value, x)))
            assert_close(*results, 1e-6)


def test_float16_and_autocast() -> None:
    logits, target = problem((2, 20, 21), torch.float16)
    value, gradient = run("auto", logits, target)
    assert value.dtype == torch.float32
    assert gradient.dtype == torch.float16
    assert backends(verbose=False)["fused_segmentation_loss"]["native"].startswith("serves")
    for backend in BACKENDS:
        plain = run(backend, logits.float(), target)
        assert_close((value, gradient), plain, 1e-5, torch.finfo(torch.float16).eps)
        with torch.autocast("cpu", torch.bfloat16):
            assert all(torch.equal(a, b) for a, b in zip(run(backend, logits.float(), target), plain, strict=True))


def test_a_second_derivative_raises() -> None:
    logits, target = problem((2, 6, 7))
    logits.requires_grad_()
    with use_backend("native"):
        (gradient,) = torch.autograd.grad(fused_segmentation_loss(logits, target), logits, create_graph=True)
        with pytest.raises(RuntimeError, match=r"use_backend\('reference'\)"):
            gradient.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_target_gets_no_gradient(backend: str) -> None:
    logits, target = problem((2, 6, 7))
    with use_backend(backend):
        value = fused_segmentation_loss(logits.requires_grad_(), target.requires_grad_())
        assert torch.autograd.grad(value, target, allow_unused=True) == (None,)


def test_empty_masks_get_a_gradient_only_by_cross_entropy() -> None:
    logits, target = torch.full((1, 1, 16, 16), 0.5), torch.zeros(1, 1, 16, 16)
    ours, theirs = (run("native", logits, target, options)[1].abs().sum() for options in (OPTIONS["default"], OFFICIAL))
    assert ours > 20 * theirs  # what is left is the texture term's


def test_inputs_that_do_not_fit_are_named() -> None:
    logits, target = problem((2, 6, 7))
    with pytest.raises(ValueError, match=r"logits must be \[B, 1, H, W\].* got \[2, 6, 7\]"):
        fused_segmentation_loss(logits[:, 0], target)
    with pytest.raises(ValueError, match=r"got \[2, 3, 6, 7\]"):
        fused_segmentation_loss(logits.expand(-1, 3, -1, -1), target)
    with pytest.raises(ValueError, match=r"at least one position, got \[2, 1, 0, 7\]"):
        fused_segmentation_loss(logits[:, :, :0], target)
    with pytest.raises(ValueError, match=r"in torch.int64"):
        fused_segmentation_loss(logits.long(), target)
    with pytest.raises(ValueError, match=r"target is \[1, 1, 6, 7\] on cpu"):
        fused_segmentation_loss(logits, target[:1])
    with pytest.raises(ValueError, match="empty_masks is 'dice'"):
        fused_segmentation_loss(logits, target, SegmentationLossOptions(empty_masks="dice"))  # type: ignore[arg-type]


@pytest.mark.parametrize("which", ["curvature", "floor"])
def test_a_constant_that_is_off_is_seen(monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    logits, target = problem((2, 20, 21))
    logits[0, 0, 3] = 40
    right = run("native", logits, target)
    monkeypatch.setattr(
        native,
        *{"curvature": ("_CURVATURE", [w * 1.001 for w in native._CURVATURE]), "floor": ("EPSILON", 1e-4)}[which],
    )
    wrong = run("native", logits, target)
    assert all((a - b).abs().max() > 1e-7 * b.abs().max() for a, b in zip(wrong, right, strict=True))
