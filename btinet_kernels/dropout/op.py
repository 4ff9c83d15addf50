"""Dropout as autograd sees it: its gradient is itself, with the same seed."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from btinet_kernels.backends import choose, kernels_for
from btinet_kernels.dropout import reference

OPERATOR = "fused_dropout"


def fused_dropout(x: Tensor, p: float = 0.5, *, training: bool = True, seed: Tensor | None = None) -> Tensor:
    """Zero each element with probability p and divide the others by 1 − p, in parallel and without a mask in memory.

    The random numbers are a function of the seed and of the element's place in memory (Philox4x32-10): threads and
    backends do not change them, the memory format does, and the backward makes them again.

    Args:
        x: any shape and strides.
        p: between 0 and 1.
        training: else ``x`` is returned as it is.
        seed: int64 ``[1]`` on the device of ``x``; without, it is drawn from PyTorch's generator of that device.

    Returns:
        A tensor of the shape, dtype and memory format of ``x``.

    Raises:
        ValueError: p outside [0, 1], or a seed of another kind.

    Source: arXiv 1207.0580; Philox: Salmon et al., SC 2011.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"{OPERATOR}: p must lie between 0 and 1, got {p}.")
    if seed is not None and (seed.shape != (1,) or seed.dtype != torch.int64 or seed.device != x.device):
        raise ValueError(
            f"{OPERATOR}: seed must be an int64 tensor [1] on {x.device}, got {seed.dtype} {list(seed.shape)} on "
            f"{seed.device}."
        )
    if not training or p == 0:
        return x
    if seed is None:
        seed = torch.randint(2**63 - 1, (1,), device=x.device)
    return reference.dropout(x, seed, p) if choose(OPERATOR, x) == "reference" else dropout(x, seed, p)


@custom_op("btinet_kernels::dropout", mutates_args=())
def dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """See ``fused_dropout``."""
    passes = import_module(f"btinet_kernels.dropout.{kernels_for(x, OPERATOR)}")
    return passes.dropout(x, seed, p)


@dropout.register_fake
def _(x, seed, p):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, seed, ctx.p = inputs
    ctx.save_for_backward(seed)
    ctx.stride = output.stride()


def _backward(ctx: Any, d_out: Tensor) -> tuple[Any, ...]:
    if d_out.stride() != ctx.stride:  # places are numbered as those of the output
        d_out = torch.empty_strided(d_out.shape, ctx.stride, dtype=d_out.dtype, device=d_out.device).copy_(d_out)
    (seed,) = ctx.saved_tensors
    return dropout(d_out, seed, ctx.p), None, None


dropout.register_autograd(_backward, setup_context=_setup)
