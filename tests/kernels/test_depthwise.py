"""Depthwise convolution against PyTorch's in float64: values, gradients, layouts, edges, strides and dilation."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.library import opcheck
from torch.nn import functional as F

from btinet_kernels import fused_depthwise_conv, use_backend
from btinet_kernels.depthwise import op
from btinet_kernels.depthwise.op import depthwise, depthwise_gradient, depthwise_is_served
from btinet_kernels.depthwise.reference import Geometry

LAYOUTS = ["rows", "planes"]
# Channels below, at and above vectors and blocks of 64; images of several bands, of one row, of one pixel.
SHAPES = [(2, 3, 7, 9), (1, 16, 14, 5), (3, 21, 6, 6), (2, 70, 9, 8), (2, 5, 1, 30), (2, 6, 1, 1), (1, 3, 90, 70)]
# kernel, stride, padding, dilation
GEOMETRIES = [
    (3, 1, 1, 1),
    (5, 1, 2, 1),
    (3, 2, 1, 1),
    (5, 2, 2, 1),
    (3, 1, 4, 4),
    (7, 3, 3, 1),
    (1, 1, 0, 1),
    (1, 2, 0, 1),
    (3, 1, 3, 1),
    (3, 2, 2, 2),
    (2, 1, 1, 1),
    ((3, 5), (1, 2), (1, 2), (2, 1)),
]


def dense(shape: tuple[int, ...], layout: str, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if layout == "rows" else x


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def weights(channels: int, kernel: int | tuple[int, int], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(s, dtype=torch.float64).to(dtype) for s in ((channels, 1, *pair(kernel)), (channels,))]


def run(function, x: Tensor, w: list[Tensor], upstream: Tensor, **options) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """The result, then the gradients of x, weight and bias."""
    leaves = [t.detach().requires_grad_() for t in (x, *w)]
    out = function(*leaves, **options)
    return [out, *torch.autograd.grad(out, leaves, upstream[..., : out.shape[2], : out.shape[3]].to(out.dtype))]


def by_pytorch(x: Tensor, weight: Tensor, bias: Tensor | None = None, **options) -> Tensor:  # type: ignore[no-untyped-def]
    return F.conv2d(x, weight, bias, groups=x.shape[1], **options)


def exactly(x: Tensor, w: list[Tensor], upstream: Tensor, **options) -> list[Tensor]:  # type: ignore[no-untyped-def]
    return run(by_pytorch, x.double().contiguous(), [t.double() for t in w], upstream.double(), **options)


def error(ours: list[Tensor], exact: list[Tensor]) -> float:
    """Relative to each tensor's largest magnitude."""
    return max(
        ((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-30)).item() for a, b in zip(ours, exact, strict=True)
    )


def fits(shape: tuple[int, ...], kernel: int | tuple[int, int], **options: int | tuple[int, int]) -> bool:
    geometry = Geometry(*(list(pair(options[name])) for name in Geometry._fields))
    return min(geometry.output_size(shape[2:], pair(kernel))) >= 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_native_in_float64(geometry: tuple, shape: tuple[int, ...], layout: str) -> None:  # type: ignore[type-arg]
    kernel, stride, padding, dilation = geometry
    options = {"stride": stride, "padding": padding, "dilation": dilation}
    if not fits(shape, kernel, **options):
        return
    x, w = dense(shape, layout), weights(shape[1], kernel)
    upstream = dense((*shape[:2], 100, 100), layout)
    with use_backend("native"):
        ours = run(fused_depthwise_conv, x, w, upstream, **options)
    assert error(ours, exactly(x, w, upstream, **options)) < 1e-12
    rows = layout == "rows" and not x.is_contiguous()  # of one pixel or one channel is both
    assert ours[0].is_contiguous(memory_format=torch.channels_last if rows else torch.contiguous_format)
    assert ours[1].stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (5, 2)])
def test_single_and_half_precision(kernel: int, stride: int, layout: str, dtype: torch.dtype) -> None:
    shape = (2, 37, 40, 50)
    x, upstream, w = dense(shape, layout, dtype), dense(shape, layout, dtype), weights(37, kernel, torch.float32)
    options = {"stride": stride, "padding": kernel // 2}
    with use_backend("native"):
        ours = run(fused_depthwise_conv, x, w, upstream, **options)
    exact = exactly(x, w, upstream, **options)
    # The longest sums in float32 run over a band: rows of sums of up to 50 terms.
    in_float32 = 8 * 50**0.5 * 2.0**-24
    assert error(ours[2:], exact[2:]) < in_float32
    assert error(ours[:2], exact[:2]) < in_float32 + (torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, ::2],
        lambda x: x[..., 1:-1],
        lambda x: x[:, :, ::2],
        lambda x: x.transpose(2, 3),
        lambda x: x[:1].expand(3, -1, -1, -1),
        lambda x: x.permute(0, 2, 1, 3),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_are_honoured(view, layout: str) -> None:  # type: ignore[no-untyped-def]
    x = view(dense((3, 32, 9, 11), layout))
    upstream, w = view(dense((3, 32, 9, 11), "rows")), weights(x.shape[1], 5)
    with use_backend("native"):
        ours = run(fused_depthwise_conv, x, w, upstream, padding=2)
    assert error(ours, exactly(x, w, upstream, padding=2)) < 1e-12


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("kernel", "size"), [(3, 12), (5, 12), (3, 30), (3, 60)])
def test_every_choice_computes_the_same(kernel: int, size: int, backend: str, layout: str) -> None:
    shape = (2, 18, size, size)
    x, upstream, w = dense(shape, layout), dense(shape, layout), weights(18, kernel)
    with use_backend(backend):
        ours = run(fused_depthwise_conv, x, w, upstream, padding=kernel // 2)
    assert error(ours, exactly(x, w, upstream, padding=kernel // 2)) < 1e-12


def test_what_auto_takes() -> None:
    plain = Geometry([1, 1], [1, 1], [1, 1])
    small, large = torch.randn(1, 4, 12, 12), torch.randn(1, 4, 60, 60)
    three, five = torch.randn(4, 1, 3, 3, requires_grad=True), torch.randn(4, 1, 5, 5, requires_grad=True)
    rows = large.to(memory_format=torch.channels_last)
    assert not depthwise_is_served(small, three, plain)
    assert depthwise_is_served(small, five, plain)
    assert depthwise_is_served(small, three, plain._replace(dilation=[2, 2]))
    assert depthwise_is_served(large, three, plain)
    assert depthwise_is_served(rows, three, plain)
    with torch.no_grad():
        assert depthwise_is_served(large, three, plain)
        assert not depthwise_is_served(rows, five, plain)
    with torch.autocast("cpu"):
        assert not depthwise_is_served(large, five, plain)
    with use_backend("native"):
        assert depthwise_is_served(small, three, plain)
    with use_backend("reference"):
        assert not depthwise_is_served(large, five, plain)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("geometry", [(3, 1, 1, 1), (5, 2, 2, 1), (3, 1, 2, 2)])
def test_gradcheck(geometry: tuple[int, ...], layout: str) -> None:
    kernel, stride, padding, dilation = geometry
    x, w = dense((2, 3, 6, 5), layout).requires_grad_(), [t.requires_grad_() for t in weights(3, kernel)]

    def function(*inputs: Tensor) -> Tensor:
        return fused_depthwise_conv(*inputs, stride=stride, padding=padding, dilation=dilation)

    with use_backend("native"):
        assert gradcheck(function, (x, *w))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["native", "auto"])
def test_opcheck(backend: str, layout: str) -> None:
    x, w = dense((2, 5, 7, 6), layout, torch.float32), weights(5, 5, torch.float32)
    geometry = ([2, 1], [2, 2], [1, 1])
    with use_backend(backend):
        opcheck(depthwise, (x.requires_grad_(), *(t.requires_grad_() for t in w), *geometry))
        upstream = torch.randn(2, 5, 4, 6)
        opcheck(depthwise_gradient, (upstream, x.detach(), w[0].detach(), *geometry))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compile(layout: str) -> None:
    x, w = dense((2, 20, 13, 12), layout, torch.float32), weights(20, 5, torch.float32)
    upstream = dense((2, 20, 13, 12), layout, torch.float32)
    compiled = torch.compile(fused_depthwise_conv, fullgraph=True)
    for backend in ("native", "auto"):
        torch._dynamo.reset()
        with use_backend(backend):
            ours = run(compiled, x, w, upstream, padding=2)
        assert error(ours, exactly(x, w, upstream, padding=2)) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_repeats_and_threads_are_bit_identical(layout: str) -> None:
    x, w = dense((3, 70, 40, 41), layout, torch.float32), weights(70, 5, torch.float32)
    upstream, threads = dense((3, 70, 40, 41), layout, torch.float32), torch.get_num_threads()
    results = []
    try:
        for count in (1, 1, 2, 3):
            torch.set_num_threads(count)
            with use_backend("native"):
                results.append(run(fused_depthwise_conv, x, [w[0]], upstream, padding=2))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(other, results[0], strict=True))


@pytest.mark.slow
def test_every_instruction_set(in_every_instruction_set: Callable[[str], list[Tensor]]) -> None:
    program = (
        "import torch, btinet_kernels as k\n"
        "torch.manual_seed(0)\n"
        "for last in (False, True):\n"
        "    x = torch.randn(2, 21, 19, 10, requires_grad=True)\n"
        "    z = x.to(memory_format=torch.channels_last) if last else x\n"
        "    w, b = torch.randn(21, 1, 5, 5, requires_grad=True), torch.randn(21)\n"
        "    with k.use_backend('native'):\n"
        "        y = k.fused_depthwise_conv(z, w, b, stride=2, padding=2)\n"
        "        d = torch.autograd.grad(y.sin().sum(), [x, w])\n"
        "    print(*(float(t.detach().abs().sum()) for t in (y, *d)))\n"
    )
    first, *others = in_every_instruction_set(program)
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-5, atol=0)


def test_what_a_kernel_leaves_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs that no tap meets have a gradient of zero, whatever was in memory."""
    real = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: real(*a, **k).fill_(float("nan")))
    x, w = dense((2, 18, 9, 9), "rows"), weights(18, 1)
    upstream = dense((2, 18, 9, 9), "rows")
    with use_backend("native"):
        ours = run(fused_depthwise_conv, x, w, upstream, stride=3)
    monkeypatch.undo()
    assert error(ours, exactly(x, w, upstream, stride=3)) < 1e-12


def test_empty_batch() -> None:
    x, w = torch.empty(0, 4, 6, 6), weights(4, 3, torch.float32)
    with use_backend("native"):
        assert fused_depthwise_conv(x, *w, padding=1).shape == x.shape


def test_double_backward_says_what_to_do() -> None:
    x, w = dense((2, 4, 6, 6), "rows").requires_grad_(), weights(4, 3)
    with use_backend("native"):
        out = fused_depthwise_conv(x, w[0].requires_grad_(), padding=1)
        (d_x,) = torch.autograd.grad(out.square().sum(), [x], create_graph=True)
        with pytest.raises(RuntimeError, match="differentiated twice"):
            d_x.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(4, 6, 6)}, r"x must be \[B, C, H, W\]"),
        ({"weight": torch.ones(4, 2, 3, 3)}, r"weight must be \[4, 1, height, width\]"),
        ({"bias": torch.ones(3)}, r"bias must be \[4\], got \[3\]"),
        ({"stride": 0}, "stride and dilation must be at least 1"),
        ({"padding": -1}, "padding at least 0"),
        ({"dilation": 9}, "does not fit into x"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:  # type: ignore[type-arg]
    given = {"x": torch.ones(2, 4, 6, 6), "weight": torch.ones(4, 1, 3, 3), **change}
    with pytest.raises(ValueError, match=message):
        fused_depthwise_conv(**given)


def test_weights_may_stay_single_under_half_precision() -> None:
    x, w = dense((2, 6, 9, 9), "rows", torch.bfloat16), weights(6, 5, torch.float32)
    assert not op._forward_by_kernels(x, w[0], Geometry([1, 1], [2, 2], [1, 1]))  # the library's forward
    out = fused_depthwise_conv(x, w[0].requires_grad_(), w[1], padding=2)
    assert out.dtype == torch.bfloat16
    assert torch.autograd.grad(out.sum(), [w[0]])[0].dtype == torch.float32
