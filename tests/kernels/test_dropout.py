"""Dropout: Philox's published numbers, one mask on every backend and number of threads, and its gradient."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

import btinet_kernels
from btinet_kernels import BackendError, fused_dropout, use_backend
from btinet_kernels.dropout import reference
from btinet_kernels.dropout.op import dropout
from btinet_kernels.nn import Dropout

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
BACKENDS = ["triton"] if INTERPRETED else ["native", *["triton"] * torch.cuda.is_available()]
SEED = 0x9E3779B97F4A7C15 - 2**64  # its upper half has the sign bit set
SHAPES = [(3, 5, 7, 9), (2, 64, 8, 8), (1, 1), (63,), (64,), (65,), (0, 3), (2, 3, 4, 5, 6)]


def device_of(backend: str) -> str:
    return DEVICE if backend == "triton" else "cpu"


@pytest.mark.parametrize(
    ("counter", "seed", "words"),
    [
        (0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),  # kat_vectors of Random123
        (-1, -1, None),
    ],
)
def test_published_numbers(counter: int, seed: int, words: tuple[int, ...] | None) -> None:
    ours = reference.philox(torch.tensor([counter]), torch.tensor([seed]))
    assert tuple(int(w) for w in ours) == (words or textbook(counter % 2**64, seed % 2**64))


def textbook(counter: int, seed: int) -> tuple[int, ...]:
    """Philox4x32-10 in Python's integers."""
    c, k = [counter % 2**32, counter >> 32, 0, 0], [seed % 2**32, seed >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b % 2**32, (a >> 32) ^ c[3] ^ k[1], a % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return tuple(c)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_which_places_are_dropped(shape: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("Triton's kernels take no float64")
    x = torch.randn(shape).to(device_of(backend), dtype)
    seed = torch.tensor([SEED], device=x.device)
    with use_backend(backend):
        ours = fused_dropout(x, 0.3, seed=seed)
    places = range(x.numel())
    words = [textbook(16 * (n // 64) + n % 16, SEED % 2**64)[n % 64 // 16] for n in places]
    kept = torch.tensor([word >= round(0.3 * 2**32) for word in words], dtype=torch.bool).view(shape)
    expected = torch.where(kept, x.double().cpu() / 0.7, 0)
    torch.testing.assert_close(ours.double().cpu(), expected, rtol=2 * torch.finfo(dtype).eps, atol=0)
    assert ours.dtype == dtype
    torch.testing.assert_close(reference.dropout(x, seed, 0.3), ours)


@pytest.mark.parametrize("backend", BACKENDS)
def test_far_counters_and_layouts(backend: str) -> None:
    """Places are numbered as memory lies; what is not dense becomes dense."""
    x = torch.randn(2, 6, 5, 7, device=device_of(backend))
    seed = torch.tensor([7], device=x.device)
    rows = x.contiguous(memory_format=torch.channels_last)
    with use_backend(backend):
        plain, of_rows = fused_dropout(rows.permute(0, 2, 3, 1), 0.5, seed=seed), fused_dropout(rows, 0.5, seed=seed)
        strided = fused_dropout(torch.randn(2, 12, 5, 7, device=x.device)[:, ::2].copy_(x), 0.5, seed=seed)
        dense = fused_dropout(x, 0.5, seed=seed)
    assert torch.equal(plain, of_rows.permute(0, 2, 3, 1))
    assert of_rows.stride() == rows.stride()
    assert torch.equal(strided, dense)


@pytest.mark.skipif(INTERPRETED, reason="the native kernels")
@pytest.mark.slow
def test_threads_and_instruction_sets(in_every_instruction_set: Callable[[str], list[Tensor]]) -> None:
    program = (
        "import torch, btinet_kernels as k\n"
        "for threads in (1, 3):\n"
        "    torch.set_num_threads(threads)\n"
        "    y = k.fused_dropout(torch.arange(1000.0), 0.4, seed=torch.tensor([5]))\n"
        "    print(float((y * torch.arange(1000)).sum()), int((y > 0).sum()))\n"
    )
    first, *others = in_every_instruction_set(program)
    assert first[:2].tolist() == first[2:].tolist()
    assert all(other.tolist() == first.tolist() for other in others)


@pytest.mark.skipif(INTERPRETED, reason="would take long")
@pytest.mark.parametrize("p", [0.1, 0.3, 0.9])
def test_the_share_and_the_neighbours(p: float) -> None:
    """Within five standard deviations of a fair coin: how many are dropped, and how many neighbours together."""
    n = 1 << 20
    torch.manual_seed(0)
    dropped = (fused_dropout(torch.ones(n), p) == 0).double()
    again = (fused_dropout(torch.ones(n), p) == 0).double()
    for both, share in (
        (dropped, p),
        (dropped[1:] * dropped[:-1], p * p),
        (dropped[64:] * dropped[:-64], p * p),
        (dropped[16:] * dropped[:-16], p * p),
        (dropped * again, p * p),
    ):
        assert abs(float(both.mean()) - share) < 5 * (share * (1 - share) / n) ** 0.5 * 1.5
    assert float(fused_dropout(torch.ones(n), p).mean()) == pytest.approx(1, abs=5 * (p / (1 - p) / n) ** 0.5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_passes_where_the_value_did(backend: str) -> None:
    x = torch.randn(3, 8, 6, 5, device=device_of(backend)).contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    upstream = torch.randn(3, 8, 6, 5, device=x.device)  # lies otherwise than x
    with use_backend(backend):
        out = fused_dropout(x, 0.4)
    with use_backend("reference"):  # too late
        (gradient,) = torch.autograd.grad(out, x, upstream)
    torch.testing.assert_close(gradient, torch.where(out != 0, upstream / 0.6, 0))


@pytest.mark.skipif(INTERPRETED, reason="the native kernels")
def test_gradients_of_both_orders_and_opcheck() -> None:
    x, seed = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True), torch.tensor([3])
    assert gradcheck(lambda t: fused_dropout(t, 0.4, seed=seed), x)
    assert gradgradcheck(lambda t: fused_dropout(t, 0.4, seed=seed).square(), x)
    opcheck(dropout, (torch.randn(2, 3, 4, requires_grad=True), seed, 0.3))


def test_edges_and_bad_input() -> None:
    x = torch.ones(2, 70)
    assert fused_dropout(x, 0.5, training=False) is x
    assert fused_dropout(x, 0.0) is x
    if not INTERPRETED:
        assert not fused_dropout(x, 1.0).any()
    with pytest.raises(ValueError, match=r"p must lie between 0 and 1, got 1\.5"):
        fused_dropout(x, 1.5)
    with pytest.raises(ValueError, match=r"seed must be an int64 tensor \[1\] on cpu, got torch\.float32 \[2\]"):
        fused_dropout(x, 0.5, seed=torch.zeros(2))
    if not INTERPRETED:
        with use_backend("native"), pytest.raises(BackendError, match="float16"):
            fused_dropout(x.half(), 0.5)
        assert fused_dropout(x.half(), 0.5).dtype == torch.float16  # the reference


@pytest.mark.skipif(INTERPRETED, reason="the native kernels")
def test_module_repeats_with_the_generator() -> None:
    module, x = Dropout(0.5), torch.ones(4, 33)
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        results += [module(x), module(x)]
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])
    assert not torch.equal(results[0], results[1])
    assert module.eval()(x) is x
    with use_backend("reference"):
        torch.manual_seed(1)
        plain = Dropout(0.5)(x)
        torch.manual_seed(1)
        assert torch.equal(plain, torch.nn.functional.dropout(x, 0.5))


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="the native kernels")
def test_compile() -> None:
    def step(x: Tensor, seed: Tensor) -> Tensor:
        return fused_dropout(x * 2, 0.5, seed=seed).square().sum()

    x, seed = torch.randn(3, 20, requires_grad=True), torch.tensor([11])
    plain, compiled = step(x, seed), torch.compile(step, fullgraph=True)(x, seed)
    torch.testing.assert_close(compiled, plain)
    torch.testing.assert_close(torch.autograd.grad(compiled, x), torch.autograd.grad(plain, x))


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="these tests run here directly")
def test_triton_interpreted_in_a_process_of_its_own() -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "BTINET_BACKEND": "auto"}
    options = ["-q", "-p", "no:cacheprovider", "--import-mode=importlib"]
    command = [sys.executable, "-m", "pytest", __file__, *options]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=os.path.dirname(__file__))
    assert result.returncode == 0, result.stdout[-5000:]
    assert " passed" in result.stdout


def test_it_is_listed() -> None:
    assert set(btinet_kernels.backends(verbose=False)["fused_dropout"]) == {"native", "triton", "cuda", "reference"}
