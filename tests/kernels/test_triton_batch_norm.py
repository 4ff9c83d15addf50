"""The Triton kernels of batch normalisation against float64 mathematics, on a GPU or interpreted as in
test_triton.py."""

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from triton_support import (
    DEVICE,
    HALF,
    LAYOUTS,
    PROMISES,
    SERVED,
    VIEWS,
    dense,
    drawn,
    errors,
    gradients,
    interpreted_when_slow,
    on_device,
    on_hardware,
    run_interpreted,
    tolerance,
)

from btinet_kernels import fused_batch_norm_act, use_backend
from btinet_kernels.normalization.op import SMALLEST, batch_norm, batch_norm_gradient, batch_norm_is_served

pytest.importorskip("triton")

if SERVED:
    from btinet_kernels.normalization import triton as normalization


@interpreted_when_slow
def test_interpreted_in_a_process_of_its_own(part: str) -> None:
    run_interpreted(__file__, part)


class Norm:
    """A batch normalisation's vectors, and what to do with them."""

    def __init__(self, channels: int, act: str = "silu", training: bool = True) -> None:
        self.act, self.training = act, training
        vectors = drawn(channels), drawn(channels), drawn(channels), 1 + drawn(channels).abs()
        self.vectors = dict(zip(("weight", "bias", "running_mean", "running_var"), vectors, strict=True))

    def fused(self, x: Tensor, upstream: Tensor, backend: str = "triton") -> dict[str, Tensor]:
        x = x.detach().requires_grad_()
        given = {name: v.clone().requires_grad_(name in ("weight", "bias")) for name, v in self.vectors.items()}
        with use_backend(backend):
            out = fused_batch_norm_act(
                x,
                *(given.get(name) for name in ("weight", "bias", "running_mean", "running_var")),
                training=self.training,
                momentum=0.3,
                eps=1e-3,
                act=self.act,  # type: ignore[arg-type]
            )
            assert out.dtype == x.dtype
            assert out.stride() == torch.empty_like(x).stride()
            return gradients(out, upstream, {"x": x, **given})

    def by_hand(self, x: Tensor, upstream: Tensor) -> dict[str, Tensor]:
        """In float64, sharing no code with the reference."""
        x = x.detach().double().requires_grad_()
        given = {name: v.double().requires_grad_(name in ("weight", "bias")) for name, v in self.vectors.items()}
        count, shape = x.numel() // x.shape[1], [1, -1, *[1] * (x.ndim - 2)]
        mean, variance = (given.get(name) for name in ("running_mean", "running_var"))
        if self.training:
            over = [axis for axis in range(x.ndim) if axis != 1]
            of_batch = x.mean(over), (x - x.mean(over, keepdim=True)).square().sum(over)
            if mean is not None and variance is not None:
                given["running_mean"] = 0.7 * mean + 0.3 * of_batch[0].detach()
                given["running_var"] = 0.7 * variance + 0.3 * of_batch[1].detach() / (count - 1)
            mean, variance = of_batch[0], of_batch[1] / count
        z = (x - mean.view(shape)) / (variance.view(shape) + 1e-3).sqrt()  # type: ignore[union-attr]
        z = z * given["weight"].view(shape) if "weight" in given else z
        z = z + given["bias"].view(shape) if "bias" in given else z
        out = {"identity": z, "relu": z.clamp_min(0), "silu": z / (1 + (-z).exp())}[self.act]
        return gradients(out, upstream.double(), {"x": x, **given})


class TestBatchNorm:
    pytestmark = on_device

    MODES = tuple(product(["identity", "relu", "silu"], [True, False]))
    # Tiles hold 16 to 128 positions of 16 or 32 channels; one position, no axes of space, three of them.
    SHAPES = ((1, 32, 3, 13), (3, 33, 1, 1), (9, 40), (2, 3, 2, 3, 4), (2, 5, 140))

    def check(self, norm: Norm, x: Tensor, upstream: Tensor, terms: int | None = None) -> None:
        found = errors(norm.fused(x, upstream), norm.by_hand(x, upstream))
        assert max(found.values()) < tolerance(x.dtype, terms or max(16, x.numel() // x.shape[1])), found

    @pytest.mark.parametrize(("act", "training"), MODES)
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.usefixtures("poisoned")
    def test_equals_the_formula(self, layout: str, act: str, training: bool) -> None:
        shape = (2, 17, 9, 8)
        self.check(Norm(17, act, training), dense(shape, layout) * 2 + 3, dense(shape, layout))

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.usefixtures("poisoned")
    def test_shapes(self, layout: str, shape: tuple[int, ...]) -> None:
        self.check(Norm(shape[1]), dense(shape, layout) * 2 + 3, dense(shape, layout))

    @pytest.mark.parametrize("dtype", HALF)
    @pytest.mark.parametrize("act", ["relu", pytest.param("silu", marks=pytest.mark.slow)])
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_half_precision(self, layout: str, act: str, dtype: torch.dtype) -> None:
        shape = (2, 21, 6, 7)
        self.check(Norm(21, act), dense(shape, layout, dtype) * 2 + 3, dense(shape, layout, dtype))

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("programs", [1, 10**6])
    def test_few_programs_and_many(self, layout: str, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Several tiles a part, the last of them incomplete; more parts than are combined at once."""
        monkeypatch.setattr(normalization, "ENOUGH_PROGRAMS", programs)
        monkeypatch.setattr(normalization, "TILE", 256)
        monkeypatch.setattr(normalization, "ROWS", 4)
        shape = (3, 5, 13, 11)
        self.check(Norm(5), dense(shape, layout) + 3, dense(shape, layout))

    @pytest.mark.parametrize("programs", [1, 10**6])
    def test_values_far_from_zero(self, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """A mean of 1000 deviations: squares in float32 would leave nothing of the variance."""
        monkeypatch.setattr(normalization, "ENOUGH_PROGRAMS", programs)
        norm, x = Norm(3, "identity"), dense((2, 3, 20, 30), "rows") + 1000
        found = errors(norm.fused(x, x), norm.by_hand(x, x))
        # Means are rounded as values of 1000 are; over 1200 positions it averages out.
        assert found["running_mean"] < 4 * 2.0**-24
        assert found["running_var"] < 4 * 1000 * 2.0**-24 / 1200**0.5
        assert found["out"] < 4 * 1000 * 2.0**-24

    @pytest.mark.parametrize("missing", [["weight"], ["bias"], ["weight", "bias"], ["running_mean", "running_var"]])
    def test_without_some_vectors(self, missing: list[str]) -> None:
        norm, shape = Norm(6), (3, 6, 5, 4)
        for name in missing:
            del norm.vectors[name]
        self.check(norm, dense(shape, "rows"), dense(shape, "rows"))

    @pytest.mark.slow
    @pytest.mark.parametrize("view", VIEWS)
    def test_strides_are_honoured(self, view) -> None:  # type: ignore[no-untyped-def]
        x, upstream = view(dense((3, 6, 5, 6), "planes")), view(dense((3, 6, 5, 6), "rows"))
        self.check(Norm(x.shape[1]), x, upstream, x.numel())

    def test_upstream_gradients_may_be_expanded(self) -> None:
        self.check(Norm(5), dense((2, 5, 6, 7), "rows"), drawn(2, 5, 1, 1).expand(2, 5, 6, 7))

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    @pytest.mark.parametrize(("act", "training"), MODES)
    def test_what_is_not_finite_reaches_what_it_reaches_in_pytorch(
        self, act: str, training: bool, value: float
    ) -> None:
        norm, x = Norm(5, act, training), dense((2, 5, 6, 4), "rows")
        norm.vectors["weight"].abs_()
        x[1, 2, 3, 1] = value
        ours, exact = (norm.fused(x, torch.ones_like(x), backend) for backend in ("triton", "reference"))
        assert all(torch.equal(ours[name].isfinite(), right.isfinite()) for name, right in exact.items())

    def test_nothing_passes_a_relu_at_zero(self) -> None:
        norm, x = Norm(4, "relu"), dense((2, 4, 3, 5), "rows")
        for name in ("weight", "bias"):
            norm.vectors[name].zero_()
        found = norm.fused(x, x)
        assert not found["d_weight"].any()
        assert not found["d_bias"].any()

    def test_repeats_are_bit_identical(self) -> None:
        norm, x = Norm(17), dense((2, 17, 9, 4), "rows")
        first, second = (norm.fused(x, x) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_empty_batch(self) -> None:
        norm, x = Norm(4, training=False), dense((0, 4, 3, 3), "rows")
        assert norm.fused(x, x)["d_x"].shape == x.shape

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("training", [True, False])
    def test_opcheck(self, training: bool, layout: str) -> None:
        x, norm = dense((2, 5, 4, 3), layout, torch.bfloat16), Norm(5)
        weights, moments = list(norm.vectors.values())[:2], list(norm.vectors.values())[2:]
        with use_backend("triton"):
            found = [None, None] if training else moments
            opcheck(batch_norm, (x, *weights, *found, 1e-3, "silu"), test_utils=PROMISES)
            opcheck(batch_norm_gradient, (x, x, *weights, *moments, training, 1e-3, "silu"), test_utils=PROMISES)

    @on_hardware
    def test_what_auto_takes(self) -> None:
        rows = torch.empty(1, 8, 128, SMALLEST // 1024, device=DEVICE).to(memory_format=torch.channels_last)
        assert batch_norm_is_served(rows, "identity")
        assert not batch_norm_is_served(rows[..., :-1], "silu")

    @on_hardware
    @pytest.mark.parametrize("dtype", [torch.float32, *HALF])
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("shape", [(8, 144, 112, 112), (8, 960, 14, 14), (4, 1792, 7, 7)])
    def test_the_networks_shapes(self, shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
        self.check(Norm(shape[1]), dense(shape, layout, dtype), dense(shape, layout, dtype))
