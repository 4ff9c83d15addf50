"""The Triton kernels of depthwise convolution against float64 mathematics, on a GPU or interpreted as in
test_triton.py."""

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.nn import functional as F
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

from btinet_kernels import fused_depthwise_conv, use_backend
from btinet_kernels.depthwise.op import depthwise, depthwise_gradient, depthwise_is_served
from btinet_kernels.depthwise.reference import Geometry

pytest.importorskip("triton")

if SERVED:
    from btinet_kernels.depthwise import triton as passes
    from btinet_kernels.multi_scale import triton_depthwise

# kernel; stride, padding, dilation. The first four are those of the encoder.
GEOMETRIES = [
    (3, 1, 1, 1),
    (5, 1, 2, 1),
    (3, 2, 1, 1),
    (5, 2, 2, 1),
    *(
        pytest.param(geometry, marks=pytest.mark.slow)
        for geometry in ((3, 1, 4, 4), (7, 3, 3, 1), (1, 2, 0, 1), (3, 1, 3, 1), (3, 2, 2, 2), (2, 1, 1, 1))
    ),
    ((3, 5), (1, 2), (1, 2), (2, 1)),
]


@interpreted_when_slow
def test_interpreted_in_a_process_of_its_own(part: str) -> None:
    run_interpreted(__file__, part)


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


class Problem:
    """A convolution's input, weights and upstream gradient."""

    def __init__(self, shape, geometry, layout: str, dtype: torch.dtype = torch.float32) -> None:  # type: ignore[no-untyped-def]
        kernel, *options = map(pair, geometry)
        self.options = dict(zip(Geometry._fields, options, strict=True))
        self.x, self.weight = dense(shape, layout, dtype), drawn(shape[1], 1, *kernel)
        self.bias = drawn(shape[1])
        size = Geometry(*map(list, options)).output_size(self.x.shape[2:], kernel)
        self.upstream = dense((*shape[:2], *size), layout, dtype)

    def run(self, function, dtype: torch.dtype | None = None) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
        """The result and the gradients; in ``dtype``, or x as it is and the weights in float32."""
        tensors = {"x": self.x, "weight": self.weight, "bias": self.bias}
        leaves = {name: t.detach().to(dtype or t.dtype).requires_grad_() for name, t in tensors.items()}
        out = function(*leaves.values(), **self.options)
        return gradients(out, self.upstream.to(out.dtype), leaves)

    def exact(self) -> dict[str, Tensor]:
        return self.run(
            lambda *tensors, **options: F.conv2d(*tensors, **options, groups=len(self.weight)), torch.float64
        )

    def ours(self) -> dict[str, Tensor]:
        with use_backend("triton"):
            found = self.run(fused_depthwise_conv)
        assert found["out"].dtype == found["d_x"].dtype == self.x.dtype
        assert found["d_x"].stride() == torch.empty_like(self.x).stride()
        return found

    def check(self) -> None:
        found = errors(self.ours(), self.exact())
        positions = self.upstream.numel() // len(self.weight)
        assert max(found.values()) < tolerance(self.x.dtype, max(16, positions), roundings=1), found


class TestDepthwise:
    pytestmark = on_device

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("geometry", GEOMETRIES)
    @pytest.mark.usefixtures("poisoned")
    def test_geometries(self, geometry, layout: str) -> None:  # type: ignore[no-untyped-def]
        Problem((2, 5, 9, 8), geometry, layout).check()

    # Tiles hold 16 or 32 channels and 16 to 128 positions.
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("shape", [(1, 32, 1, 70), (1, 33, 1, 1), (1, 1, 20, 7)])
    @pytest.mark.usefixtures("poisoned")
    def test_shapes(self, shape: tuple[int, ...], layout: str) -> None:
        Problem(shape, (5, 2, 2, 1), layout).check()

    @pytest.mark.parametrize(("layout", "dtype"), zip(LAYOUTS, HALF, strict=True))
    def test_half_precision(self, layout: str, dtype: torch.dtype) -> None:
        Problem((2, 17, 7, 6), (3, 2, 1, 1), layout, dtype).check()

    @pytest.mark.parametrize(("geometry", "layout"), [((3, 1, 1, 1), "planes"), ((5, 2, 2, 1), "rows")])
    def test_programs_that_take_several_tiles(
        self, geometry: tuple[int, ...], layout: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(triton_depthwise, "ENOUGH_PROGRAMS", 5)
        monkeypatch.setattr(passes, "TILE", 256)
        monkeypatch.setattr(passes, "TILE_WITH_SUMS", 256)
        Problem((1, 3, 13, 11), geometry, layout).check()

    @pytest.mark.slow
    @pytest.mark.parametrize("view", VIEWS)
    def test_strides_are_honoured(self, view) -> None:  # type: ignore[no-untyped-def]
        x, upstream = view(dense((3, 6, 5, 6), "planes")), view(dense((3, 6, 5, 6), "rows"))
        problem = Problem(tuple(x.shape), (3, 1, 1, 1), "rows")
        problem.x, problem.upstream = x, upstream
        problem.check()

    def test_upstream_gradients_may_be_expanded(self) -> None:
        problem = Problem((2, 5, 6, 7), (3, 1, 1, 1), "rows")
        problem.upstream = drawn(2, 5, 1, 1).expand(2, 5, 6, 7)
        problem.check()

    def test_without_a_bias(self) -> None:
        problem = Problem((2, 5, 6, 6), (5, 1, 2, 1), "rows")
        with use_backend("triton"):
            out = fused_depthwise_conv(problem.x, problem.weight, padding=2)
        exact = F.conv2d(problem.x.double(), problem.weight.double(), padding=2, groups=5)
        assert errors({"out": out}, {"out": exact})["out"] < tolerance(torch.float32, 25)

    @pytest.mark.usefixtures("poisoned")
    def test_inputs_that_no_tap_meets_have_no_gradient(self) -> None:
        found = Problem((1, 4, 7, 7), (1, 3, 0, 1), "rows").ours()["d_x"]
        assert (found != 0).sum() == 4 * 3 * 3

    def test_nan_reaches_what_its_taps_reach(self) -> None:
        problem = Problem((1, 6, 12, 12), (5, 2, 2, 1), "rows")
        problem.x[0, 3, 7, 6] = torch.nan
        hit = F.conv2d(problem.x, problem.weight, problem.bias, 2, 2, groups=6).isnan()
        with use_backend("triton"):
            out = fused_depthwise_conv(problem.x, problem.weight, problem.bias, stride=2, padding=2)
        assert torch.equal(out.isnan(), hit)

    def test_repeats_are_bit_identical(self) -> None:
        problem = Problem((2, 6, 5, 4), (3, 1, 1, 1), "rows")
        first, second = problem.ours(), problem.ours()
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_empty_batch(self) -> None:
        x, weight = torch.empty(0, 4, 6, 6, device=DEVICE), drawn(4, 1, 3, 3)
        with use_backend("triton"):
            assert fused_depthwise_conv(x, weight, padding=1).shape == x.shape

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_opcheck(self, layout: str) -> None:
        problem = Problem((1, 3, 4, 3), (3, (2, 1), 1, 1), layout, torch.bfloat16)
        geometry = [list(each) for each in problem.options.values()]
        with use_backend("triton"):
            opcheck(depthwise, (problem.x, problem.weight, problem.bias, *geometry), test_utils=PROMISES)
            arguments = (problem.upstream, problem.x, problem.weight, *geometry)
            opcheck(depthwise_gradient, arguments, test_utils=PROMISES)

    @on_hardware
    def test_auto_takes_every_shape(self) -> None:
        for x in (dense((1, 4, 7, 7), "rows"), dense((1, 4, 60, 60), "planes")):
            assert depthwise_is_served(x, drawn(4, 1, 3, 3), Geometry([1, 1], [1, 1], [1, 1]))

    @on_hardware
    @pytest.mark.parametrize("dtype", [torch.float32, *HALF])
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize(
        ("shape", "geometry"),
        [
            ((8, 192, 56, 56), (3, 1, 1, 1)),
            ((8, 144, 112, 112), (3, 2, 1, 1)),
            ((8, 192, 56, 56), (5, 2, 2, 1)),
            ((8, 336, 28, 28), (5, 1, 2, 1)),
        ],
    )
    def test_the_encoders_shapes(self, shape, geometry, layout: str, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
        Problem(shape, geometry, layout, dtype).check()
