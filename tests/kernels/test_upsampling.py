"""The upsampling convolution against float64 mathematics: values, gradients, layouts, edges, repeats."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.library import opcheck

from btinet_kernels import fused_upsample_twice, use_backend
from btinet_kernels.upsampling import native as upsampling_native
from btinet_kernels.upsampling.op import upsample_twice, upsample_twice_gradient

# [B, C, H, W] and O. Tiles have 96 positions of any images, vectors 16 channels, panels 48 columns, the register block
# 8 rows; one product sums over at most 1024 channels times taps, or over 256 positions; large batches have several
# bands.
SHAPES = [
    ((2, 3, 1, 1), 5),
    ((1, 1, 1, 9), 1),
    ((1, 7, 13, 1), 50),
    ((9, 5, 7, 7), 16),
    ((2, 48, 30, 29), 24),
    ((1, 300, 9, 11), 130),
    ((3, 17, 70, 70), 33),
]
LAYOUTS = ["rows", "planes"]


def dense(shape: tuple[int, ...], layout: str, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "rows" else x


def textbook(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Every tap spreads the whole map, written without a convolution."""
    (batch, _, height, width), outputs = x.shape, weight.shape[1]
    out = x.new_zeros(batch, outputs, 2 * height + 2, 2 * width + 2)
    for ky in range(3):
        for kx in range(3):
            spread = torch.einsum("bchw,co->bohw", x, weight[:, :, ky, kx])
            out[:, :, ky : ky + 2 * height : 2, kx : kx + 2 * width : 2] += spread
    return out[:, :, : 2 * height, : 2 * width] + bias.reshape(-1, 1, 1)


def weights(channels: int, outputs: int, layout: str = "planes", dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [dense((channels, outputs, 3, 3), layout, dtype), torch.randn(outputs, dtype=torch.float64).to(dtype)]


def run(function, x: Tensor, of: list[Tensor], upstream: Tensor) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """The result, then the gradients of x, weight and bias."""
    inputs = [t.detach().requires_grad_() for t in (x, *of)]
    y = function(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, upstream)]


def native(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    with use_backend("native"):
        return fused_upsample_twice(x, weight, bias)


def assert_close(ours: list[Tensor], exact: list[Tensor], x: Tensor, outputs: int) -> None:
    """Relative to each tensor's largest magnitude, or 1: sums of n terms err by about sqrt(n) roundings, 8 for sums
    that follow one another; what is stored in x's dtype is rounded once more."""
    wide = torch.promote_types(x.dtype, torch.float32)
    positions = 4 * x.numel() // x.shape[1]
    for tensor, terms in zip(range(4), (4 * x.shape[1], 9 * outputs, positions, positions), strict=True):
        a, b = ours[tensor], exact[tensor]
        assert a.shape == b.shape
        if b.numel():
            bound = 8 * max(terms, 1) ** 0.5 * torch.finfo(wide).eps
            bound += torch.finfo(x.dtype).eps * (a.dtype != wide)
            error = (a.double() - b).abs().max() / b.abs().max().clamp_min(1)
            assert error <= bound, (tensor, error, bound)  # a NaN is not below a bound


@pytest.mark.parametrize("of_weight", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "outputs"), SHAPES)
def test_native_in_float64(shape: tuple[int, ...], outputs: int, layout: str, of_weight: str) -> None:
    x, of = dense(shape, layout), weights(shape[1], outputs, of_weight)
    upstream = dense((shape[0], outputs, 2 * shape[2], 2 * shape[3]), layout)
    ours = run(native, x, of, upstream)
    assert_close(ours, run(textbook, x, of, upstream), x, outputs)
    assert ours[1].stride() == x.stride()
    assert ours[2].stride() == of[0].stride()
    rows = layout == "rows" and not x.is_contiguous()
    assert ours[0].is_contiguous(memory_format=torch.channels_last if rows else torch.contiguous_format)


def test_the_reference_is_the_textbook() -> None:
    x, of, upstream = dense((2, 5, 4, 6), "rows"), weights(5, 7), dense((2, 7, 8, 12), "rows")
    with use_backend("reference"):
        ours = run(fused_upsample_twice, x, of, upstream)
    assert_close(ours, run(textbook, x, of, upstream), x, 7)


def test_auto_leaves_bfloat16_to_pytorch() -> None:
    """There, ATen is the faster one."""
    x, of = dense((2, 5, 4, 6), "rows", torch.bfloat16), weights(5, 7, dtype=torch.float32)
    with use_backend("reference"):
        plain = fused_upsample_twice(x, *of)
    assert torch.equal(fused_upsample_twice(x, *of), plain)
    assert not plain.is_contiguous(memory_format=torch.channels_last)  # PyTorch's crop is a view
    assert native(x, *of).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "outputs"), SHAPES)
def test_single_and_half_precision(shape: tuple[int, ...], outputs: int, layout: str, dtype: torch.dtype) -> None:
    x, of = dense(shape, layout, dtype), weights(shape[1], outputs, layout, torch.float32)
    upstream = dense((shape[0], outputs, 2 * shape[2], 2 * shape[3]), layout, dtype)
    exact = run(textbook, x.double(), [w.double() for w in of], upstream.double())
    ours = run(native, x, of, upstream)
    assert [t.dtype for t in ours] == [dtype, dtype, torch.float32, torch.float32]
    assert_close(ours, exact, x, outputs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(layout: str) -> None:
    inputs = [t.requires_grad_() for t in (dense((2, 3, 3, 2), layout), *weights(3, 4))]
    assert gradcheck(native, inputs, fast_mode=True)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, ::2],
        lambda x: x[:, :16],
        lambda x: x[..., 1:-1],
        lambda x: x.transpose(2, 3),
        lambda x: x[:1].expand(3, -1, -1, -1),
        lambda x: x[..., :1].expand(-1, -1, -1, 9),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_are_honoured(view, layout: str) -> None:  # type: ignore[no-untyped-def]
    x = view(dense((3, 32, 9, 11), layout))
    upstream = dense((3, 20, 2 * x.shape[2], 2 * x.shape[3]), layout)[:, ::2]
    of = [dense((x.shape[1], 3, 3, 10), "planes").transpose(1, 3), weights(1, 10)[1]]
    assert_close(run(native, x, of, upstream), run(textbook, x, of, upstream), x, 10)


def test_expanded_upstream_gradient() -> None:
    x, of = dense((2, 16, 5, 6), "rows"), weights(16, 8)
    upstream = torch.ones((), dtype=torch.float64).expand(2, 8, 10, 12)
    assert_close(run(native, x, of, upstream), run(textbook, x, of, upstream), x, 8)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_empty_batch(layout: str) -> None:
    x, of = dense((0, 16, 9, 5), layout), weights(16, 3)
    ours = run(native, x, of, torch.empty(0, 3, 18, 10, dtype=torch.float64))
    assert [t.shape for t in ours] == [(0, 3, 18, 10), x.shape, of[0].shape, of[1].shape]
    assert all((t == 0).all() for t in ours)


def test_nan_reaches_what_its_taps_reach() -> None:
    x, of = dense((1, 16, 6, 6), "rows", torch.float32), weights(16, 4, dtype=torch.float32)
    x[0, 3, 2, 3] = torch.nan
    hit = torch.zeros(1, 4, 12, 12, dtype=torch.bool)
    hit[..., 4:7, 6:9] = True
    assert torch.equal(native(x, *of).isnan(), hit)


def test_every_output_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(make):  # type: ignore[no-untyped-def]
        return lambda *args, **options: make(*args, **options).fill_(torch.nan)

    for layout in LAYOUTS:
        x, of, upstream = dense((2, 19, 5, 7), layout), weights(19, 9, layout), dense((2, 9, 10, 14), layout)
        exact = run(textbook, x, of, upstream)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", poisoned(torch.empty))
            patch.setattr(torch, "empty_like", poisoned(torch.empty_like))
            patch.setattr(Tensor, "new_empty", poisoned(Tensor.new_empty))
            ours = run(native, x, of, upstream)
        assert_close(ours, exact, x, 9)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_repeats_are_bit_identical_for_any_number_of_threads(layout: str) -> None:
    x, of = dense((3, 40, 60, 57), layout, torch.float32), weights(40, 40, layout, torch.float32)
    upstream = dense((3, 40, 120, 114), layout, torch.float32)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5, 2):
            torch.set_num_threads(threads)
            runs.append(run(native, x, of, upstream))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout: str) -> None:
    inputs = [t.requires_grad_() for t in (dense((2, 5, 4, 3), layout), *weights(5, 6, layout))]
    opcheck(upsample_twice, inputs)
    x, weight, _ = (t.detach() for t in inputs)
    upstream = dense((2, 6, 8, 6), layout)
    opcheck(upsample_twice_gradient, (upstream, x, weight), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.slow
def test_compiles_whole_and_for_any_batch() -> None:
    of = [w.requires_grad_() for w in weights(8, 6)]
    compiled = torch.compile(fused_upsample_twice, fullgraph=True, dynamic=True)
    with use_backend("native"):
        for batch in (2, 3, 5):
            x = dense((batch, 8, 9, 10), "rows").requires_grad_()
            out, expected = compiled(x, *of), fused_upsample_twice(x, *of)
            torch.testing.assert_close(out, expected)
            ours, plain = (torch.autograd.grad(y.square().sum(), [x, *of]) for y in (out, expected))
            for a, b in zip(ours, plain, strict=True):
                torch.testing.assert_close(a, b)


def test_a_second_derivative_raises() -> None:
    x = dense((2, 4, 3, 3), "rows").requires_grad_()
    (gradient,) = torch.autograd.grad(native(x, *weights(4, 2)).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"use_backend\('reference'\)"):
        gradient.sum().backward()


def test_wrong_shapes_are_named() -> None:
    weight, bias = weights(4, 2)
    with pytest.raises(ValueError, match=r"x must be \[B, C, H, W\]"):
        fused_upsample_twice(torch.randn(2, 4, 9), weight, bias)
    with pytest.raises(ValueError, match=r"weight is \[4, 2, 3, 3\], but for x"):
        fused_upsample_twice(dense((2, 5, 9, 9), "rows"), weight, bias)
    with pytest.raises(ValueError, match=r"bias is \[3\]"):
        fused_upsample_twice(dense((2, 4, 9, 9), "rows"), weight, bias.new_zeros(3))


@pytest.mark.parametrize(("outputs", "gradient", "ours"), [(7, True, True), (7, False, False), (40, False, True)])
def test_auto_leaves_narrow_forwards_to_pytorch(
    outputs: int, gradient: bool, ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, call = [], upsampling_native.call
    monkeypatch.setattr(upsampling_native, "call", lambda *args: calls.append(args[0]) or call(*args))
    x, of = dense((2, 5, 4, 6), "rows", torch.float32), weights(5, outputs, dtype=torch.float32)
    fused_upsample_twice(x, *(w.requires_grad_(gradient) for w in of))
    assert len(calls) == ours
