"""Dual-path attention against float64 mathematics: values, gradients, layouts, ties, edges, repeats; and red when a
coefficient is off."""

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.library import opcheck
from torch.nn import functional as F

from btinet_kernels import DualPathWeights, fused_dual_path_attention, use_backend
from btinet_kernels.gates import native, reference
from btinet_kernels.gates.dual_path_op import dual_path, dual_path_gradient
from btinet_kernels.nn import DualPathAttention, ResidualBlock

LAYOUTS = ["rows", "planes"]
BACKENDS = ["native", "reference"]
# A tile has 48 positions (4096 in planes), a vector 16 channels in float32; below, at and above both, in 1, 2 and 3
# dimensions; and the convolution's padding wider than the map.
SHAPES = [(2, 3, 9), (1, 7, 9001), (3, 16, 8, 6), (2, 17, 9, 11), (9, 33, 37, 31), (2, 6, 1, 1), (3, 5, 8, 3, 4)]


def dense(shape: tuple[int, ...], layout: str, dtype: torch.dtype = torch.float64) -> Tensor:
    """Values of which many are equal, so that channels tie for the maximum."""
    x = (torch.randn(shape, dtype=torch.float64) * 2).round().div(2).to(dtype)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "rows" else x


def weights(channels: int, dims: int, dtype: torch.dtype = torch.float64) -> DualPathWeights:
    hidden = max(8, channels // 16)
    shapes = [(hidden, channels), (hidden,), (channels, hidden), (channels,), (1, 2, *[7] * dims), (1,)]
    return DualPathWeights(*(torch.randn(s, dtype=torch.float64).mul(0.3).to(dtype) for s in shapes))


def exact(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().double() for t in tensors]


def textbook(x: Tensor, of: DualPathWeights, residual: Tensor | None) -> Tensor:
    """What the official network computes, written once more without anything of the package."""
    ones = [1] * (x.ndim - 2)
    gate = F.relu(x.flatten(2).mean(2) @ of.hidden_weight.t() + of.hidden_bias) @ of.gate_weight.t() + of.gate_bias
    summary = torch.cat((x.amax(1, keepdim=True), x.mean(1, keepdim=True)), 1)
    logit = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[x.ndim - 2](summary, of.spatial_weight, of.spatial_bias, padding=3)
    y = x * torch.sigmoid(gate).reshape(*gate.shape, *ones) * torch.sigmoid(logit)
    return y if residual is None else F.relu(y + residual)


def clear_of_zero(x: Tensor, of: DualPathWeights, residual: Tensor) -> Tensor:
    """The residual, moved where a rounding would decide what the ReLU lets through."""
    y = textbook(x.double(), DualPathWeights(*exact(of)), None)
    return torch.where((y + residual.double()).abs() < 1e-2, residual + 1, residual)


def run(function, x: Tensor, of: DualPathWeights, residual: Tensor | None, upstream: Tensor) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """The result, then the gradients of x, of the weights and of the residual if there is one."""
    inputs = [t.detach().requires_grad_() for t in (x, *of, *([] if residual is None else [residual]))]
    y = function(inputs[0], DualPathWeights(*inputs[1:7]), None if residual is None else inputs[7])
    return [y.detach(), *torch.autograd.grad(y, inputs, upstream)]


def bounds(x: Tensor) -> list[float]:
    """Allowed errors, relative to each tensor's largest magnitude or 1: sums of n terms err by about sqrt(n) roundings,
    8 for the sums that follow one another; what is stored in x's dtype is rounded once more."""
    batch, channels, positions = x.shape[0], x.shape[1], x[0, 0].numel()
    wide = torch.promote_types(x.dtype, torch.float32)
    sums = 8 * torch.finfo(wide).eps
    stored = torch.finfo(x.dtype).eps * (x.dtype != wide)
    of_values = sums * (channels + positions) ** 0.5 + stored
    of_weights = sums * (batch * channels * positions) ** 0.5 + stored
    return [of_values, of_values, *[of_weights] * 6, of_values]


def assert_close(ours: list[Tensor], truth: list[Tensor], allowed: list[float]) -> None:
    for n, (a, b, bound) in enumerate(zip(ours, truth, allowed, strict=False)):
        assert len(ours) == len(truth)
        if b.numel():
            assert a.shape == b.shape
            error = (a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1)
            assert error <= bound, (n, error, bound)  # a NaN is not below a bound


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that torch hands out is full of NaN, so that what a kernel leaves unwritten shows."""

    def poison(make):  # type: ignore[no-untyped-def]
        return lambda *args, **kwargs: make(*args, **kwargs).fill_(torch.nan)

    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", poison(Tensor.new_empty))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_native_against_float64(shape: tuple[int, ...], with_residual: bool, layout: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    vectors = torch.promote_types(dtype, torch.float32)
    x, of = dense(shape, layout, dtype), weights(shape[1], len(shape) - 2, vectors)
    residual = clear_of_zero(x, of, dense(shape, layout, dtype)) if with_residual else None
    upstream = dense(shape, layout, dtype)
    with use_backend("native"):
        ours = run(fused_dual_path_attention, x, of, residual, upstream)
    wide = [None if t is None else t.double() for t in (x, residual, upstream)]
    truth = run(textbook, wide[0], DualPathWeights(*exact(of)), wide[1], wide[2])
    assert_close(ours, truth, bounds(x))
    for of_x in [ours[0], ours[1], *ours[8:]]:
        assert of_x.dtype == dtype
        assert of_x.stride() == x.stride()


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_backward_of_the_reference(shape: tuple[int, ...], with_residual: bool) -> None:
    x, upstream, of = dense(shape, "rows"), dense(shape, "planes"), weights(shape[1], len(shape) - 2)
    residual = dense(shape, "planes") if with_residual else None
    out, saved = reference.dual_path(x, residual, of)
    d_x, d_residual, d_weights = reference.dual_path_backward(upstream, x, out if with_residual else None, saved, of)
    ours = [out, d_x, *d_weights, *([] if d_residual is None else [d_residual])]
    assert_close(ours, run(textbook, x, of, residual, upstream), bounds(x))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 3, 4, 2), (1, 2, 2, 3, 2)])
def test_gradcheck(shape: tuple[int, ...], with_residual: bool, backend: str) -> None:
    torch.manual_seed(1)
    inputs = [torch.randn(shape, dtype=torch.float64), *weights(shape[1], len(shape) - 2)]
    inputs += [torch.randn(shape, dtype=torch.float64)] * with_residual
    inputs = [t.clone().requires_grad_() for t in inputs]
    with use_backend(backend):
        assert gradcheck(
            lambda x, *rest: fused_dual_path_attention(x, DualPathWeights(*rest[:6]), *rest[6:]), inputs, fast_mode=True
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ties_share_the_gradient_of_the_maximum_evenly(layout: str, backend: str) -> None:
    x = torch.zeros(1, 5, 6, 7, dtype=torch.float64)
    x[:, 1], x[:, 3], x[:, 4, 2] = 2, 2, 2
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "rows" else x
    of = weights(5, 2)
    upstream = torch.randn_like(x)
    with use_backend(backend):
        ours = run(fused_dual_path_attention, x, of, None, upstream)
    assert_close(ours, run(textbook, x, of, None, upstream), bounds(x))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_relu_passes_nothing_where_the_result_is_zero(layout: str) -> None:
    x, of = dense((2, 6, 5, 4), layout), weights(6, 2)
    y = textbook(x, of, None)
    residual = torch.where(torch.rand_like(y) < 0.5, -y, 1.0)  # the sum is exactly zero, up to one rounding, or not
    with use_backend("native"):
        gated = fused_dual_path_attention(x, of)
        residual = torch.where(residual == 1, residual, -gated)
        ours = run(fused_dual_path_attention, x, of, residual, torch.ones_like(x))
    assert ((ours[0] == 0) == (ours[8] == 0)).all()
    assert (ours[0] == 0).any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("other", ["rows", "planes", "expanded", "transposed"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_upstream_gradients_of_any_layout(with_residual: bool, other: str, layout: str) -> None:
    shape = (2, 50, 14, 15)
    x, of = dense(shape, layout), weights(50, 2)
    residual = dense(shape, layout) if with_residual else None
    if other == "expanded":
        upstream = torch.randn(1, 50, 1, 1).double().expand(shape)
    elif other == "transposed":
        upstream = torch.randn(2, 50, 15, 14).double().transpose(2, 3)
    else:
        upstream = dense(shape, other)
    with use_backend("native"):
        ours = run(fused_dual_path_attention, x, of, residual, upstream)
    assert_close(ours, run(textbook, x, of, residual, upstream), bounds(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("residual_layout", LAYOUTS)
@pytest.mark.parametrize("make", ["every second", "transposed", "expanded", "a slice of channels"])
def test_inputs_of_any_strides(make: str, residual_layout: str, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    x = {
        "every second": lambda: dense((2, 10, 26, 7), "rows", dtype)[:, :, ::2],
        "transposed": lambda: dense((2, 10, 7, 13), "planes", dtype).transpose(2, 3),
        "expanded": lambda: dense((1, 10, 13, 1), "planes", dtype).expand(2, 10, 13, 7),
        "a slice of channels": lambda: dense((2, 14, 13, 7), "rows", dtype)[:, 3:13],
    }[make]()
    of = weights(10, 2, torch.promote_types(dtype, torch.float32))
    residual, upstream = dense(x.shape, residual_layout, dtype) + 1, dense(x.shape, "rows", dtype)
    with use_backend("native"):
        ours = run(fused_dual_path_attention, x, of, residual, upstream)
        like = run(fused_dual_path_attention, x.clone(), of, residual, upstream)
    assert ours[0].stride() == torch.empty_like(x).stride()
    truth = run(textbook, x.double(), DualPathWeights(*exact(of)), residual.double(), upstream.double())
    assert_close(ours, like, bounds(x))
    assert_close(ours, truth, bounds(x))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("with_residual", [False, True])
def test_empty_batch(with_residual: bool, layout: str) -> None:
    x, of = dense((0, 6, 5, 4), layout), weights(6, 2)
    with use_backend("native"):
        ours = run(fused_dual_path_attention, x, of, x if with_residual else None, x)
    assert ours[0].shape == x.shape
    assert all(not g.any() for g in ours[1:])
    assert [g.shape for g in ours[2:8]] == [w.shape for w in of]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("with_residual", [False, True])
def test_nan_reaches_what_it_reaches_in_pytorch(with_residual: bool, layout: str) -> None:
    x, of = dense((2, 20, 12, 13), layout), weights(20, 2)
    x[0, 3, 5, 6] = torch.nan
    residual = dense(x.shape, layout) if with_residual else None
    if residual is not None:
        residual[1, 2, 3, 4] = torch.nan
    with use_backend("native"):
        ours = run(fused_dual_path_attention, x, of, residual, torch.ones_like(x))
    truth = run(textbook, x, of, residual, torch.ones_like(x))
    for a, b in zip(ours, truth, strict=True):
        assert torch.equal(a.isnan(), b.isnan())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 33, 40, 41), (5, 48, 7, 7)])
def test_repeats_and_thread_counts_are_bit_identical(shape: tuple[int, ...], layout: str) -> None:
    x, residual, upstream = (dense(shape, layout, torch.float32) for _ in range(3))
    of = weights(shape[1], 2, torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 2, 7):
            torch.set_num_threads(count)
            with use_backend("native"):
                results.append(run(fused_dual_path_attention, x, of, residual, upstream))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("batch", "channels", "dtype"), [(5, 16, torch.float32), (9, 17, torch.bfloat16)])
def test_results_that_go_past_the_caches(batch: int, channels: int, dtype: torch.dtype, layout: str) -> None:
    shape = (batch, channels, 380, 380)  # more than 32 MiB; a sample alone is less, and is stored as usual
    x, residual, upstream = (torch.randn(shape).to(dtype) for _ in range(3))
    if layout == "rows":
        x, residual, upstream = (t.contiguous(memory_format=torch.channels_last) for t in (x, residual, upstream))
    of = weights(channels, 2, torch.float32)
    with use_backend("native"):
        together = run(fused_dual_path_attention, x, of, residual, upstream)
        for b in range(batch):
            alone = run(fused_dual_path_attention, x[b : b + 1], of, residual[b : b + 1], upstream[b : b + 1])
            for n in (0, 1, 8):
                assert torch.equal(together[n][b : b + 1], alone[n])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])  # the last by the reference
def test_opcheck(dtype: torch.dtype, with_residual: bool, layout: str) -> None:
    x = dense((2, 6, 5, 4), layout, dtype).requires_grad_()
    of = [w.requires_grad_() for w in weights(6, 2, torch.promote_types(dtype, torch.float32))]
    residual = dense(x.shape, layout, dtype).requires_grad_() if with_residual else None
    opcheck(dual_path, (x, residual, *of))
    with torch.no_grad():
        out, *saved = dual_path(x, residual, *of)
    arguments = (dense(x.shape, layout, dtype), x.detach(), out if with_residual else None, *saved)
    opcheck(dual_path_gradient, (*arguments, *(w.detach() for w in of)))


@pytest.mark.parametrize("with_residual", [False, True])
def test_second_derivatives_are_refused_with_advice(with_residual: bool) -> None:
    x, of = dense((2, 6, 5, 4), "rows").requires_grad_(), weights(6, 2)
    with use_backend("native"):
        y = fused_dual_path_attention(x, of, dense(x.shape, "rows") if with_residual else None)
        (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="use_backend\\('reference'\\)"):
            gradient.sum().backward()


@pytest.mark.parametrize("with_residual", [pytest.param(False, marks=pytest.mark.slow), True])
def test_compiles_without_graph_breaks_for_any_batch(with_residual: bool) -> None:
    module = DualPathAttention(6).double()
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for batch in (3, 2, 5):
        x, residual = dense((batch, 6, 9, 8), "rows"), dense((batch, 6, 9, 8), "rows") if with_residual else None
        results = []
        for function in (module, compiled):
            leaf = x.detach().requires_grad_()
            y = function(leaf, residual)
            results.append([y, *torch.autograd.grad(y.square().sum(), [leaf, *module.parameters()])])
        assert_close(results[0], results[1], bounds(x))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(("attention", "in_channels"), [(True, 5), (True, 4), (False, 4)])
def test_residual_block(attention: bool, in_channels: int, dims: int, layout: str) -> None:
    torch.manual_seed(3)
    block = ResidualBlock(in_channels, 5, attention, dims).double()
    x = dense((2, in_channels, *[6, 5, 4][:dims]), layout)
    results = []
    for backend in BACKENDS:
        leaf = x.detach().requires_grad_()
        with use_backend(backend):
            y = block(leaf)
        upstream = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
        results.append([y, *torch.autograd.grad(y, [leaf, *block.parameters()], upstream)])
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10)


def test_residual_of_another_dtype_and_autocast() -> None:
    x, of = dense((2, 6, 9, 8), "rows", torch.bfloat16), weights(6, 2, torch.float32)
    residual = dense(x.shape, "planes", torch.float32)
    y = fused_dual_path_attention(x, of, residual)
    assert y.dtype == torch.float32
    assert torch.equal(y, fused_dual_path_attention(x.float(), of, residual))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(y, fused_dual_path_attention(x, of, residual))


def test_inputs_that_do_not_fit_are_named() -> None:
    x, of = dense((2, 6, 9, 8), "rows"), weights(6, 2)
    with pytest.raises(ValueError, match="one to three spatial dimensions"):
        fused_dual_path_attention(x[:, :, 0, 0], of)
    with pytest.raises(ValueError, match=r"residual is \[1, 6, 9, 8\]"):
        fused_dual_path_attention(x, of, x[:1])
    with pytest.raises(ValueError, match=r"spatial_weight is \[1, 2, 7\]"):
        fused_dual_path_attention(x, of._replace(spatial_weight=of.spatial_weight[..., 0]))


def test_state_dict_is_that_of_plain_modules() -> None:
    assert {name: tuple(p.shape) for name, p in DualPathAttention(32, 1).state_dict().items()} == {
        "channel_path.0.weight": (8, 32),
        "channel_path.0.bias": (8,),
        "channel_path.2.weight": (32, 8),
        "channel_path.2.bias": (32,),
        "spatial_path.weight": (1, 2, 7),
        "spatial_path.bias": (1,),
    }
    assert isinstance(DualPathAttention(32).channel_path, nn.Sequential)


def _backward(x: Tensor, of: DualPathWeights, out: Tensor, saved: reference.DualPathSaved) -> list[Tensor]:
    d_x, d_residual, d_weights = native.dual_path_backward(torch.ones_like(x), x, out, saved, of)
    assert d_residual is not None
    return [d_x, d_residual, *d_weights]


# Where a coefficient is off → which of the results must show it.
MUTATIONS = {
    "channel sums": lambda x, r, of, out, saved: (native.dual_path(x * 1.0001, r, of)[1].mean, saved.mean),
    "maps": lambda x, r, of, out, saved: (native.dual_path(x * 1.0001, r, of)[1].maps, saved.maps),
    "write": lambda x, r, of, out, saved: (native.dual_path(x, r * 1.0001, of)[0], out),
    "channel path": lambda x, r, of, out, saved: (
        native.dual_path(x, r, of._replace(gate_bias=of.gate_bias + 1e-4))[0],
        out,
    ),
    "spatial path": lambda x, r, of, out, saved: (
        native.dual_path(x, r, of._replace(spatial_weight=of.spatial_weight * 1.0001))[0],
        out,
    ),
    "reduce": lambda x, r, of, out, saved: (
        _backward(x, of, out, saved._replace(spatial_gate=saved.spatial_gate * 1.0001))[4],
        _backward(x, of, out, saved)[4],
    ),
    "backward of the channel path": lambda x, r, of, out, saved: (
        _backward(x, of._replace(gate_weight=of.gate_weight * 1.0001), out, saved)[2],
        _backward(x, of, out, saved)[2],
    ),
    "backward of the spatial path": lambda x, r, of, out, saved: (
        _backward(x, of, out, saved._replace(maps=saved.maps * 1.0001))[6],
        _backward(x, of, out, saved)[6],
    ),
    "ties": lambda x, r, of, out, saved: (
        _backward(x, of, out, saved._replace(maps=saved.maps + 1e-4))[0],
        _backward(x, of, out, saved)[0],
    ),
    "write of the gradient": lambda x, r, of, out, saved: (
        _backward(x, of._replace(spatial_weight=of.spatial_weight * 1.001), out, saved)[0],
        _backward(x, of, out, saved)[0],
    ),
}


@pytest.mark.parametrize(("name", "layout"), list(itertools.product(MUTATIONS, LAYOUTS)))
def test_a_coefficient_that_is_off_is_seen(name: str, layout: str) -> None:
    torch.manual_seed(4)
    x, residual, of = dense((2, 48, 14, 14), layout), dense((2, 48, 14, 14), layout), weights(48, 2)
    out, saved = native.dual_path(x, residual, of)
    truth, of_truth = reference.dual_path(x, residual, of)
    assert_close([out, *saved], [truth, *of_truth], [1e-12] * 6)
    ours, right = MUTATIONS[name](x, residual, of, out, saved)
    with pytest.raises(AssertionError):
        assert_close([ours], [right], bounds(x))
