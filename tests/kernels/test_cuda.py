"""The CUDA passes against float64 mathematics: on a GPU, and everywhere else their own source emulated on the host.

The emulation (cuda_emulation/) compiles csrc/cuda with the host's compiler and runs the threads of a block as fibers.
"""

import itertools
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from btinet_kernels import use_backend
from btinet_kernels.backends import cuda_module
from btinet_kernels.interaction import cuda, passes_op, reference
from btinet_kernels.interaction.reference import Context, Statistics
from btinet_kernels.nn import TaskInteractionLevel

CSRC = Path(__file__).parents[2] / "csrc"
EMULATION = Path(__file__).parent / "cuda_emulation"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# A tile holds 64 positions and 48 channels, a vector 4 or 8 elements: sizes around both, 1 to 3 dimensions.
SHAPES = [
    (2, 3, 9),
    (3, 16, 8, 6),
    (2, 17, 9, 11),
    (2, 5, 4, 3, 6),
    (2, 100, 5, 13),
    (1, 48, 8, 8),
    pytest.param((1, 208, 9, 8), marks=pytest.mark.slow),  # 104 hidden channels take two rounds of 96
    (2, 6, 1, 1),
    (1, 1, 1),
]


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """csrc/cuda and its bindings, compiled for the host."""
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no C++ compiler to build the emulation with")
    folder = tmp_path_factory.mktemp("emulation")
    includes = [EMULATION, Path(torch.__file__).parent / "include", Path(sysconfig.get_path("include"))]
    flags = ["-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    flags += [f"-I{path}" for path in includes]

    def compile_one(source: Path) -> str:
        target = folder / f"{source.stem}.o"
        subprocess.run([compiler, *flags, "-x", "c++", "-c", str(source), "-o", str(target)], check=True)
        return str(target)

    sources = [*sorted((CSRC / "cuda").glob("*.cu")), CSRC / "bindings_cuda.cpp", EMULATION / "fibers.cpp"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    library = folder / "_cuda.so"
    subprocess.run([compiler, "-shared", *objects, "-o", str(library)], check=True)
    loader = ExtensionFileLoader("_cuda", str(library))
    spec = spec_from_loader("_cuda", loader)
    assert spec
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


def skip_without_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    if cuda_module is None:
        pytest.skip("the CUDA part is not built")


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where the passes run; whatever they allocate is full of NaN, or of ones for bits."""
    if request.param == "cuda":
        skip_without_gpu()
    else:
        monkeypatch.setattr(cuda, "cuda_module", request.getfixturevalue("emulated"))
        monkeypatch.setattr(cuda, "_device", lambda tensor: nullcontext())
        monkeypatch.setattr(cuda, "_stream", lambda tensor: 0)
        for vectors in ("level_vectors", "level_backward"):  # they are Triton's, which needs a GPU
            monkeypatch.delattr(cuda, vectors, raising=False)

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def poison(*arguments: Any, **options: Any) -> Tensor:
            tensor = allocate(*arguments, **options)
            return tensor.fill_(torch.nan if tensor.is_floating_point() else 255)

        return poison

    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    return torch.device("cpu" if request.param == "emulated" else "cuda")


def dense(shape: Sequence[int], channels_last: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    x = torch.randn(tuple(shape), dtype=torch.float64).to(device, dtype)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x


def context_for(channels: int, softmax: bool, device: torch.device, hidden: int | None = None) -> Context:
    hidden = max(1, channels // 2) if hidden is None else hidden
    weights = (torch.randn(hidden, channels) / channels**0.5, torch.randn(hidden) * 0.3, torch.randn(hidden) * 0.5)
    return Context(*[w.to(device) if softmax or i < 2 else None for i, w in enumerate(weights)])  # type: ignore[arg-type]


def exact(values: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if v is None else v.double() for v in values]


def error(ours: Tensor, true: Tensor) -> float:
    """Relative to the largest magnitude, or to 0.1 where that is smaller: gradients may vanish exactly."""
    assert ours.shape == true.shape
    return ((ours.double() - true).abs().max() / true.abs().max().clamp_min(0.1)).item() if true.numel() else 0.0


def tolerance(shape: Sequence[int], stored: torch.dtype = torch.float32) -> float:
    """Two products of split operands in a row, a sum over the batch's positions or channels, and one rounding."""
    longest = max(shape[0] * torch.Size(shape[2:]).numel(), shape[1], 1)
    rounding = 0.0 if stored == torch.float32 else torch.finfo(stored).eps / 2
    return 2 * 2.0**-20 + 4 * longest**0.5 * 2.0**-24 + rounding


class Passes:
    """All passes over one random input, and their exact results."""

    def __init__(self, seg: Tensor, grad: Tensor, context: Context | None, *, keep_active: bool = True) -> None:
        wanted = {"variance": True, "edges": True, "active": True}
        of = None if context is None else Context(*exact(context))  # type: ignore[arg-type]
        self.seg, self.context = seg, context
        self.statistics = cuda.statistics(seg, context, **wanted)
        self.exact_statistics = reference.statistics(seg.double(), of, **wanted)
        scale = torch.randn(seg.shape[:2], device=seg.device)
        gradient = Statistics(*[torch.randn_like(s) for s in self.statistics[:4]], *[seg.new_empty(0)] * 2)
        saved = self.statistics if keep_active else self.statistics._replace(active=seg.new_empty(0))
        out, weights = cuda.statistics_backward(seg, grad, scale, context, saved, gradient)
        self.dense = [
            out,
            cuda.scale_channels(seg, scale),
            cuda.interpolate(seg, grad, scale[:, 0]),
        ]
        self.vectors = [*self.statistics[:5], *weights, cuda.channel_dot(grad, seg)]
        seg, grad, scale = seg.double(), grad.double(), scale.double()
        out, weights = passes_op._statistics_backward_reference(
            seg, grad, scale, of, self.exact_statistics, Statistics(*[g.double() for g in gradient])
        )
        self.exact_dense = [
            out,
            reference.scale_channels(seg, scale),
            reference.interpolate(seg, grad, scale[:, 0]),
        ]
        self.exact_vectors = [*self.exact_statistics[:5], *weights, reference.channel_dot(grad, seg)]

    def worst(self) -> tuple[float, float]:
        """Errors of the dense results and of the vectors."""
        return (
            max(error(a, b) for a, b in zip(self.dense, self.exact_dense, strict=True)),
            max(error(a, b) for a, b in zip(self.vectors, self.exact_vectors, strict=True)),
        )

    def check(self) -> None:
        shape = self.seg.shape
        dense, vectors = self.worst()
        assert vectors < tolerance(shape)
        assert dense < tolerance(shape, self.seg.dtype)
        if self.context is not None and self.context.pool_weight is None:
            assert torch.equal(self.statistics.active, self.exact_statistics.active)

    def all(self) -> list[Tensor]:
        return [*self.dense, *self.vectors, self.statistics.active]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_reference(
    device: torch.device, dtype: torch.dtype, channels_last: bool, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    for softmax in (False, True):
        seg, grad = (dense(shape, channels_last, dtype, device) for _ in range(2))
        passes = Passes(seg, grad, context_for(shape[1], softmax, device))
        passes.check()
        assert all(out.stride() == torch.empty_like(seg).stride() for out in passes.dense)


@pytest.mark.parametrize("hidden", [1, 9, 23, 25, 97])
@pytest.mark.parametrize("softmax", [False, True])
def test_any_width_of_the_context(device: torch.device, softmax: bool, hidden: int) -> None:
    torch.manual_seed(0)
    shape = (2, 7, 5, 9)
    seg, grad = (dense(shape, True, torch.float32, device) for _ in range(2))
    Passes(seg, grad, context_for(7, softmax, device, hidden), keep_active=False).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, ::2],
        lambda x: x[..., 1:-1],
        lambda x: x.transpose(2, 3),
        lambda x: x[:, :, ::2],
        lambda x: x[:1].expand(3, -1, -1, -1),
        lambda x: x[..., :1].expand(-1, -1, -1, 9),
        lambda x: x.transpose(1, 3),
        lambda x: x[:, :8].movedim(1, -1).contiguous().movedim(-1, 1)[:, :, 1:, 2:],
        lambda x: x[:, 1:9, :, 4:],
    ],
)
def test_strides_are_honoured(device: torch.device, view: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    base = torch.randn(2, 3, 12, 12, 12, dtype=torch.float64).to(device, dtype)
    seg, grad = view(base[0]), view(base[1])
    Passes(seg, grad, context_for(seg.shape[1], False, device)).check()
    other = dense(seg.shape, seg.stride(1) != 1, dtype, device)  # gradients come in any format
    Passes(seg, other, context_for(seg.shape[1], True, device)).check()


@pytest.mark.parametrize(("variance", "edges"), list(itertools.product([False, True], repeat=2)))
def test_what_is_not_wanted_is_empty(device: torch.device, variance: bool, edges: bool) -> None:
    torch.manual_seed(0)
    shape = (2, 19, 6, 7)
    seg, grad = (dense(shape, True, torch.float32, device) for _ in range(2))
    stats = cuda.statistics(seg, None, variance=variance, edges=edges, active=True)
    true = reference.statistics(seg.double(), None, variance=variance, edges=edges)
    assert [s.shape for s in stats] == [t.shape for t in true]
    gradient = Statistics(*[torch.ones_like(s) for s in stats])
    scale = torch.randn(2, 19, device=device)
    out, weights = cuda.statistics_backward(seg, grad, scale, None, stats, gradient)
    expected, _ = passes_op._statistics_backward_reference(
        seg.double(), grad.double(), scale.double(), None, true, Statistics(*[g.double() for g in gradient])
    )
    assert weights == []
    assert error(out, expected) < tolerance(shape)
    assert max(error(a, b) for a, b in zip(stats[:3], true[:3], strict=True)) < tolerance(shape)


@pytest.mark.filterwarnings("ignore:var.*degrees of freedom")  # the reference's
@pytest.mark.parametrize("softmax", [False, True])
def test_an_empty_batch_has_no_gradient(device: torch.device, softmax: bool) -> None:
    seg = torch.zeros(0, 6, 4, 4, device=device)
    passes = Passes(seg, seg, context_for(6, softmax, device))
    assert all(out.shape == seg.shape for out in passes.dense)
    assert all((v == 0).all() for v in passes.vectors)


def test_variance_does_not_cancel(device: torch.device) -> None:
    torch.manual_seed(0)
    seg = dense((2, 6, 31, 9), False, torch.float32, device) + 1e4
    seg[:, :, 0, 0] = -3e4  # the first position is far from the rest
    stats = cuda.statistics(seg, None, variance=True, edges=False)
    true = reference.statistics(seg.double(), None, variance=True, edges=False)
    assert error(stats.variance, true.variance) < tolerance(seg.shape)
    assert error(stats.mean, true.mean) < tolerance(seg.shape)
    seg[:, :, 0, 0] = 1e4
    stats = cuda.statistics(seg, None, variance=True, edges=False)
    true = reference.statistics(seg.double(), None, variance=True, edges=False)
    assert error(stats.variance, true.variance) < tolerance(seg.shape)


def test_ties_have_zero_slope(device: torch.device) -> None:
    torch.manual_seed(0)
    for channels_last in (False, True):
        seg = dense((3, 4, 9, 10), channels_last, torch.float32, device).round().clamp(-1, 1)
        Passes(seg, seg, context_for(4, False, device)).check()


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_is_not_hidden(device: torch.device, dtype: torch.dtype, softmax: bool) -> None:
    seg = torch.randn(2, 6, 9, 9, device=device).to(dtype)
    seg[0, 1, 3, 3] = torch.nan
    stats = cuda.statistics(seg, context_for(6, softmax, device), variance=True, edges=True)
    for broken, sound in (s for s in stats if s.numel()):
        assert broken.isnan().any()
        assert sound.isfinite().all()


def test_softmax_pooling_survives_large_logits(device: torch.device) -> None:
    torch.manual_seed(0)
    seg = dense((2, 6, 9, 10), True, torch.float32, device)
    context = context_for(6, True, device)
    context = context._replace(pool_weight=1e4 * context.pool_weight)  # type: ignore[operator]
    stats = cuda.statistics(seg, context, variance=False, edges=False)
    true = reference.statistics(seg.double(), Context(*exact(context)), variance=False, edges=False)  # type: ignore[arg-type]
    # a logit of 10^4 is off by its rounding, and exp() turns that into a relative error
    assert error(stats.pooled, true.pooled) < 1e4 * tolerance(seg.shape)
    assert error(stats.log_sum_exp, true.log_sum_exp) < tolerance(seg.shape)


@pytest.mark.parametrize("softmax", [False, True])
def test_a_wrong_coefficient_is_noticed(device: torch.device, softmax: bool) -> None:
    torch.manual_seed(0)
    seg, grad = (dense((2, 20, 8, 9), True, torch.float32, device) for _ in range(2))
    passes = Passes(seg, grad, context_for(20, softmax, device))
    passes.check()
    for results, true in ((passes.dense, passes.exact_dense), (passes.vectors, passes.exact_vectors)):
        for ours, sound in zip(list(results), true, strict=True):
            if sound.numel():
                assert error(ours * (1 + 1e-4), sound) > tolerance(seg.shape)


@pytest.mark.parametrize("softmax", [False, True])
def test_repeats_are_bit_identical(device: torch.device, monkeypatch: pytest.MonkeyPatch, softmax: bool) -> None:
    """On a GPU run after run; emulated, also when the last thread of a block goes first between two barriers."""
    runs = []
    for order in ("forward", "backward", "forward"):
        monkeypatch.setenv("BTINET_EMULATION_ORDER", order)
        torch.manual_seed(0)
        seg, grad = (dense((3, 56, 11, 13), True, torch.float32, device) for _ in range(2))
        runs.append(Passes(seg, grad, context_for(56, softmax, device)).all())
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(other, runs[0], strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("signals", ["proxies", "variance"])
@pytest.mark.parametrize("pool", ["gap", "softmax"])
def test_level_forward_and_backward(pool: str, signals: str) -> None:
    skip_without_gpu()
    torch.manual_seed(0)
    module = TaskInteractionLevel(96, 40, pool=pool, signals=signals).cuda()
    seg = torch.randn(4, 96, 20, 20, device="cuda", requires_grad=True)
    clf = torch.randn(4, 40, device="cuda", requires_grad=True)

    def run(backend: str, dtype: torch.dtype) -> list[Tensor]:
        with use_backend(backend):
            inputs = [seg.to(dtype).detach().requires_grad_(), clf.to(dtype).detach().requires_grad_()]
            of = module.to(dtype)
            result = of(*inputs)
            loss = sum(x.square().sum() for x in result)
            return [*result, *torch.autograd.grad(loss, [*inputs, *of.parameters()])]

    true = [t.clone() for t in run("reference", torch.float64)]
    for ours, sound in zip(run("cuda", torch.float32), true, strict=True):
        # vectors of a batch of four pass a BatchNorm, which magnifies rounding
        assert error(ours, sound) < 100 * tolerance(seg.shape)


@pytest.mark.gpu
@pytest.mark.parametrize("softmax", [False, True])
def test_cuda_graphs_capture_the_passes(softmax: bool) -> None:
    skip_without_gpu()
    context = context_for(48, softmax, torch.device("cuda"))
    seg, grad = torch.randn(2, 4, 48, 32, 32, device="cuda")

    def passes() -> list[Tensor]:
        stats = cuda.statistics(seg, context, variance=True, edges=True, active=True)
        out, weights = cuda.statistics_backward(seg, grad, stats.mean, context, stats, stats)
        return [*stats, out, *weights, cuda.channel_dot(grad, seg), cuda.scale_channels(seg, stats.mean)]

    passes()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = passes()
    for _ in range(2):
        seg.normal_()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, passes(), strict=True))


@pytest.mark.gpu
@pytest.mark.slow
def test_offsets_beyond_32_bits() -> None:
    skip_without_gpu()
    seg = torch.ones(1, 3, 2**30 + 8, device="cuda", dtype=torch.float16)
    out = cuda.scale_channels(seg, torch.tensor([[1.0, 2.0, 3.0]], device="cuda"))
    assert out[0, :, -5:].float().mean(1).tolist() == [1, 2, 3]
    assert cuda.channel_dot(seg, seg).tolist() == [[2.0**30] * 3]  # to float32
