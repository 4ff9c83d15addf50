"""Multi-scale context fusion against float64 mathematics: values, gradients, layouts, edges, repeats."""

import copy
import pickle
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.library import opcheck

from btinet_kernels import fused_multi_scale, use_backend
from btinet_kernels.multi_scale import native, op, reference
from btinet_kernels.multi_scale.native import Kernels
from btinet_kernels.multi_scale.op import multi_scale as operator
from btinet_kernels.multi_scale.op import multi_scale_gradient
from btinet_kernels.nn import MultiScaleContextFusion

# Tiles have 96 positions, vectors 16 channels; dilation 4 reaches beyond maps of fewer than five positions. Large maps
# do not fit one band of the backward: within an image, and after some whole images. Few positions are not worth the
# merging of the weights; the widest have their inner products in pieces. At most 512 positions and enough channels:
# the weights are turned around a panel at a time.
SHAPES = [
    (2, 3, 9),
    (3, 16, 8, 6),
    (1, 50, 20, 23),
    (2, 5, 6, 7, 9),
    (2, 33, 3, 4),
    (2, 6, 1, 1),
    (1, 7, 1, 30),
    (5, 4, 40, 1),
    (1, 16, 9, 130, 12),
    (2, 24, 130, 61),
    (9, 20, 40, 36),
    (2, 40, 6, 5),
    (1, 352, 9, 10),
    (3, 100, 12, 12),
    (6, 352, 9, 10),
]
LAYOUTS = ["rows", "planes"]


def dense(shape: tuple[int, ...], layout: str, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "rows" else x


def module(channels: int, axes: int, seed: int = 0) -> MultiScaleContextFusion:
    torch.manual_seed(seed)
    fusion = MultiScaleContextFusion(channels, spatial_dims=axes).double()
    for parameter in fusion.parameters():  # biases start at zero, where errors could hide
        torch.nn.init.normal_(parameter, std=0.4)
    return fusion


def run(fusion: MultiScaleContextFusion, x: Tensor, upstream: Tensor | None = None) -> list[Tensor]:
    """The output, then the gradients of x and every parameter."""
    x = x.detach().requires_grad_()
    out = fusion(x)
    if upstream is None:
        torch.manual_seed(1)
        upstream = torch.randn(out.shape, dtype=torch.float64).to(out.dtype)
    return [out, *torch.autograd.grad(out, [x, *fusion.parameters()], upstream)]


def largest_error(ours: list[Tensor], exact: list[Tensor]) -> float:
    """Relative to each tensor's largest magnitude, or to 1 where that is below 1: gradients may vanish exactly."""
    return max(
        ((a.double() - b).abs().max() / b.abs().max().clamp_min(1)).item()
        for a, b in zip(ours, exact, strict=True)
        if b.numel()
    )


def both(fusion: MultiScaleContextFusion, x: Tensor, upstream: Tensor | None = None) -> list[list[Tensor]]:
    results = []
    for backend in ("native", "reference"):
        with use_backend(backend):
            results.append(run(fusion, x, upstream))
    return results


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_native_in_float64(shape: tuple[int, ...], layout: str) -> None:
    x = dense(shape, layout)
    ours, exact = both(module(shape[1], len(shape) - 2), x)
    assert largest_error(ours, exact) < 1e-12
    assert ours[0].stride() == x.stride()
    assert ours[1].stride() == x.stride()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *product([(2, 48, 60, 50), (3, 37, 14, 14), (1, 16, 7, 9, 8)], [torch.float32, torch.bfloat16]),
        ((2, 200, 7, 5), torch.float32),  # in bfloat16 what is between two products is rounded, see below
    ],
)
def test_single_and_half_precision(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    fusion, x = module(shape[1], len(shape) - 2), dense(shape, layout, dtype)
    upstream = torch.randn(shape).to(dtype)
    with use_backend("reference"):
        exact = run(fusion, x.double(), upstream.double())
    with use_backend("native"):
        ours = run(fusion.float(), x, upstream)
    # The longest sums run over the positions of the batch, or over 3 C products; a few of them follow one another.
    terms = max(x.numel() // shape[1], 3 * shape[1])
    in_float32 = 8 * terms**0.5 * 2.0**-24
    assert largest_error(ours[2:], exact[2:]) < in_float32
    assert largest_error(ours[:2], exact[:2]) < in_float32 + torch.finfo(dtype).eps


@pytest.mark.parametrize("shape", [(1, 70, 4, 5), (2, 200, 7, 5)])
def test_two_products_in_bfloat16(shape: tuple[int, ...]) -> None:
    """Few positions: the convolutions' factors are not merged, and what is between them is rounded."""
    fusion, x = module(shape[1], 2), dense(shape, "rows", torch.bfloat16)
    with torch.no_grad(), use_backend("reference"):
        exact = fusion(x.double())
    with use_backend("native"):  # recording: an inference may merge the factors in order to keep them
        ours = fusion.float()(x)
    rounding = 2.0**-9  # at most, of the result, of what is between, and of the factors of both products
    assert ((ours.double() - exact).norm() / exact.norm()).item() < 6**0.5 * rounding


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 3, 7), (2, 4, 6, 5), (1, 3, 5, 2, 6)])
def test_gradcheck(shape: tuple[int, ...], layout: str) -> None:
    fusion, x = module(shape[1], len(shape) - 2), dense(shape, layout).requires_grad_()
    names = [name for name, _ in fusion.named_parameters()]

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(fusion, dict(zip(names, parameters, strict=True)), (x,))

    with use_backend("native"):
        assert gradcheck(function, (x, *fusion.parameters()), fast_mode=True)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, ::2],
        lambda x: x[..., 1:-1],
        lambda x: x.transpose(2, 3),
        lambda x: x[:1].expand(3, -1, -1, -1),
        lambda x: x[..., :1].expand(-1, -1, -1, 9),
    ],
)
def test_strides_are_honoured(view) -> None:  # type: ignore[no-untyped-def]
    x, upstream = view(dense((3, 32, 9, 11), "planes")), view(dense((3, 32, 9, 11), "rows"))
    ours, exact = both(module(x.shape[1], 2), x, upstream)
    assert largest_error(ours, exact) < 1e-12


@pytest.mark.parametrize("upstream", ["expanded", "transposed", "planes"])
def test_upstream_gradients_of_any_layout(upstream: str) -> None:
    x = dense((2, 16, 12, 13), "rows")
    gradient = {
        "expanded": torch.randn(2, 16, 1, 1, dtype=torch.float64).expand_as(x),
        "transposed": dense((2, 16, 13, 12), "planes").transpose(2, 3),
        "planes": dense((2, 16, 12, 13), "planes"),
    }[upstream]
    ours, exact = both(module(16, 2), x, gradient)
    assert largest_error(ours, exact) < 1e-12


@pytest.mark.parametrize("layout", LAYOUTS)
def test_empty_batch(layout: str) -> None:
    ours, exact = both(module(16, 2), dense((0, 16, 9, 5), layout))
    assert [a.shape for a in ours] == [b.shape for b in exact]
    assert all((a == 0).all() for a in ours)


def test_nan_reaches_what_its_taps_reach() -> None:
    x = dense((1, 16, 20, 20), "rows", torch.float32)
    x[0, 3, 10, 10] = torch.nan
    fusion = module(16, 2).float()
    with use_backend("reference"):
        hit = reference.multi_scale(x, fusion.weights()).isnan()
    with use_backend("native"):
        assert torch.equal(fusion(x).isnan(), hit)


def test_every_output_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    like, new = torch.empty_like, Tensor.new_empty

    def poison(tensor: Tensor) -> Tensor:
        return tensor.fill_(torch.nan if tensor.is_floating_point() else 255)

    monkeypatch.setattr(torch, "empty_like", lambda *args, **options: poison(like(*args, **options)))
    monkeypatch.setattr(Tensor, "new_empty", lambda *args, **options: poison(new(*args, **options)))
    for layout in LAYOUTS:
        ours, exact = both(module(19, 2), dense((2, 19, 13, 11), layout))
        assert largest_error(ours, exact) < 1e-12


def kernels(channels: int, batch: int, *, fusion: bool, dtype: torch.dtype = torch.float64) -> Kernels:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(dtype)

    return Kernels(
        [draw(channels, 1, 3, 3) for _ in range(3)],
        draw(channels, 3, channels).unbind(1),
        draw(batch, 3),
        draw(batch, channels),
        draw(channels, channels) if fusion else None,
        draw(channels) if fusion else None,
    )


def flat(kernels: Kernels) -> list[Tensor]:
    return [*kernels.taps, *kernels.pointwise, *(t for t in kernels[2:] if t is not None)]


@pytest.mark.parametrize("shape", [(3, 40, 40, 37), (3, 220, 7, 9)])
@pytest.mark.parametrize("fusion", [False, True])
def test_repeats_are_bit_identical_for_any_number_of_threads(fusion: bool, shape: tuple[int, ...]) -> None:
    x, of = dense(shape, "rows", torch.float32), kernels(shape[1], 3, fusion=fusion, dtype=torch.float32)
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2, 5, 2):
            torch.set_num_threads(threads)
            out, between = native.multi_scale(x, of, keep_between=True)
            d_x, d = native.multi_scale_backward(x, out, between, of)
            runs.append([out, d_x, *flat(d)])
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize(
    "change", ["in place", "optimizer", "fused optimizer", "load_state_dict", "new parameter", "dtype"]
)
def test_inference_follows_changed_weights(change: str) -> None:
    fusion, x = module(16, 2).eval(), dense((2, 16, 20, 20), "rows")
    with use_backend("native"), torch.no_grad():
        before = fusion(x)
        assert torch.equal(fusion(x), before)
        if change == "in place":
            fusion.scales[1].pointwise.weight.mul_(1.5)
        elif change == "load_state_dict":
            fusion.load_state_dict({name: value * 1.5 for name, value in fusion.state_dict().items()})
        elif change == "new parameter":
            fusion.fusion.weight = torch.nn.Parameter(fusion.fusion.weight * 1.5)
        elif change == "dtype":
            fusion, x = fusion.float(), x.float()
    if "optimizer" in change:
        optimizer = torch.optim.Adam(fusion.parameters(), 0.1, fused="fused" in change)
        with use_backend("native"):
            fusion(x).sum().backward()
        optimizer.step()
    with torch.no_grad():
        with use_backend("native"):
            ours = fusion(x)
        with use_backend("reference"):
            exact = fusion(x)
    assert largest_error([ours], [exact.double()]) < (1e-5 if change == "dtype" else 1e-12)


def test_inference_merges_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fusion, x, merges = module(16, 2).eval(), dense((2, 16, 20, 20), "rows"), []
    merge = op._merge
    monkeypatch.setattr(op, "_merge", lambda weights: merges.append(1) or merge(weights))
    with use_backend("native"):
        with torch.inference_mode():
            results = [fusion(x) for _ in range(3)]
        assert len(merges) == 1
        copied = copy.deepcopy(fusion)
        pickled = pickle.loads(pickle.dumps(fusion))
        with torch.no_grad():
            results += [copied(x), pickled(x)]
    assert all(torch.equal(results[0], other) for other in results)


def test_few_positions_are_merged_when_the_product_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    fusion, x, merges = module(16, 2).eval(), dense((1, 16, 1, 2), "rows"), []
    merge = op._merge
    monkeypatch.setattr(op, "_merge", lambda weights: merges.append(1) or merge(weights))
    with use_backend("native"), torch.no_grad():
        once = fusion(x)
        assert not merges
        fusion.keep_merged()
        for of in (fusion, copy.deepcopy(fusion), pickle.loads(pickle.dumps(fusion))):
            for _ in range(2):
                torch.testing.assert_close(of(x), once)
        assert len(merges) == 3


def test_opcheck() -> None:
    fusion = module(5, 2)
    for layout in LAYOUTS:
        x = dense((2, 5, 6, 7), layout).requires_grad_()
        weights = tuple(fusion.weights())
        opcheck(operator, (x, *weights))
        out, *saved = operator(x, *weights)
        opcheck(op.multi_scale_merged, (x.detach(), saved[2].detach(), *(w.detach() for w in weights)))
        opcheck(
            multi_scale_gradient,
            (torch.randn_like(out), x.detach(), *saved, *(w.detach() for w in weights)),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_compiles_whole_and_for_any_batch() -> None:
    fusion = module(8, 2)
    compiled = torch.compile(fusion, fullgraph=True, dynamic=True)
    with use_backend("native"):
        for batch in (2, 3, 5):
            x = dense((batch, 8, 9, 10), "rows").requires_grad_()
            out, expected = compiled(x), fusion(x)
            torch.testing.assert_close(out, expected)
            ours, plain = (torch.autograd.grad(y.square().sum(), [x, *fusion.parameters()]) for y in (out, expected))
            for a, b in zip(ours, plain, strict=True):
                torch.testing.assert_close(a, b)


def test_half_precision_activations_keep_their_weights() -> None:
    fusion, x = module(16, 2).float(), dense((2, 16, 20, 20), "rows", torch.bfloat16)
    with use_backend("native"), torch.autocast("cpu", torch.bfloat16):
        out, *gradients = run(fusion, x)
    assert out.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in gradients[1:])


def test_a_second_derivative_raises() -> None:
    fusion, x = module(4, 2), dense((2, 4, 9, 9), "rows").requires_grad_()
    with use_backend("native"):
        (gradient,) = torch.autograd.grad(fusion(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match=r"use_backend\('reference'\)"):
            gradient.sum().backward()


def test_wrong_shapes_are_named() -> None:
    fusion = module(4, 2)
    with pytest.raises(ValueError, match="depthwise1"):
        fused_multi_scale(dense((2, 5, 9, 9), "rows"), fusion.weights())
    with pytest.raises(ValueError, match="one to three spatial dimensions"):
        fused_multi_scale(torch.randn(2, 4), fusion.weights())


@pytest.mark.parametrize("fusion", [False, True])
@pytest.mark.parametrize("which", Kernels._fields)
def test_a_coefficient_that_is_off_is_seen(which: str, fusion: bool) -> None:
    x, right = dense((2, 16, 12, 12), "rows"), kernels(16, 2, fusion=fusion)
    field = getattr(right, which)
    if field is None:
        return
    off = field * 1.001 if isinstance(field, Tensor) else [field[0] * 1.001, *field[1:]]
    wrong = right._replace(**{which: off})
    (out, between), (wrong_out, _) = (native.multi_scale(x, k, keep_between=True) for k in (right, wrong))
    assert largest_error([wrong_out], [out]) > 1e-6
    if "bias" not in which:
        ours, exact = (native.multi_scale_backward(x, x, between, k)[0] for k in (wrong, right))
        assert largest_error([ours], [exact]) > 1e-6
