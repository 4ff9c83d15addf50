"""What the tests of the Triton kernels share: where they run, what they are given, how far from float64 they may be.

On a machine with a GPU they run there, with ``pytest -m gpu``. Elsewhere each file runs itself again, in a process of
its own that interprets the kernels on the CPU.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
SERVED = INTERPRETED or torch.cuda.is_available()

on_device = [
    pytest.mark.usefixtures("seeded"),
    pytest.mark.skipif(not SERVED, reason="there is no GPU; the kernels ran in a process that interprets them"),
    pytest.mark.gpu,
]
# Interpreting the network's sizes would take hours.
on_hardware = pytest.mark.skipif(INTERPRETED, reason="too large to be interpreted")
HALF = [torch.float16, torch.bfloat16]
LAYOUTS = ["rows", "planes"]
PROMISES = ("test_schema", "test_faketensor")  # of opcheck
VIEWS = [
    lambda x: x[:, ::2],
    lambda x: x[..., 1:-1],
    lambda x: x.transpose(2, 3),
    lambda x: x[:1].expand(3, -1, -1, -1),
    lambda x: x.flip(0).transpose(1, 3),
]


def interpreted_in_parts(test):  # type: ignore[no-untyped-def]
    """A test of ``part``, where the kernels can only be interpreted."""
    test = pytest.mark.parametrize("part", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])(test)
    return pytest.mark.skipif(SERVED, reason="these tests run here directly")(test)


def interpreted_when_slow(test):  # type: ignore[no-untyped-def]
    """As ``interpreted_in_parts``, but all of it among the slow tests: interpreting takes up to a minute a file."""
    test = pytest.mark.parametrize("part", [pytest.param("slow or not slow", marks=pytest.mark.slow)])(test)
    return pytest.mark.skipif(SERVED, reason="these tests run here directly")(test)


def run_interpreted(file: str, part: str) -> None:
    """The tests of a file in a process that interprets the kernels."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "BTINET_BACKEND": "auto"}
    options = ["-q", "-p", "no:cacheprovider", "--import-mode=importlib", "-m", part]
    command = [sys.executable, "-m", "pytest", file, *options]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(file).parent)
    print("interpreted Triton kernels:", result.stdout.splitlines()[-1])
    assert result.returncode == 0, result.stdout[-5000:]
    assert " passed" in result.stdout


def dense(shape: Sequence[int], layout: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers, with the channels side by side in rows or apart in planes."""
    x = torch.randn(*shape).to(DEVICE, dtype)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "rows" else x


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape).to(DEVICE)


def in_double(tensors):  # type: ignore[no-untyped-def]
    return None if tensors is None else type(tensors)(*(t if t is None else t.double() for t in tensors))


def gradients(out: Tensor, upstream: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The result, the gradients of what has one, and what there is else: the running statistics."""
    leaves = {name: t for name, t in given.items() if t.requires_grad}
    of_leaves = torch.autograd.grad(out, list(leaves.values()), upstream)
    others = {name: t for name, t in given.items() if not t.requires_grad}
    return {"out": out.detach(), **dict(zip((f"d_{n}" for n in leaves), of_leaves, strict=True)), **others}


def errors(ours: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Relative to each tensor's largest magnitude, or to 1 where that is below 1."""
    assert ours.keys() == exact.keys()
    found = {}
    for name, right in exact.items():
        assert ours[name].shape == right.shape
        assert ours[name].isfinite().all(), name
        apart = (ours[name].double() - right).abs()
        found[name] = (apart.max() / right.abs().max().clamp_min(1)).item() if right.numel() else 0.0
    return found


def largest_error(ours: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest of ``errors``."""
    assert len(ours) == len(exact)
    return max(errors(dict(enumerate(ours)), dict(enumerate(exact))).values())  # type: ignore[arg-type]


def tolerance(dtype: torch.dtype, terms: int, roundings: int = 4) -> float:
    """Sums of ``terms`` in float32 err by about sqrt(terms) half-ulps, and a few follow one another.

    In half precision operands and results of the products are rounded, four times between x and a gradient.
    """
    computed = 8 * terms**0.5 * 2.0**-24
    return computed if dtype == torch.float32 else computed + roundings * torch.finfo(dtype).eps
