"""Dropout on NVIDIA GPUs: one pass, whose random numbers the kernel makes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from btinet_kernels.dropout.reference import LANES, factor, threshold
from btinet_kernels.interaction.triton_tiles import launch

BLOCKS = tl.constexpr(16)  # of 64 places, in a program
_LANES = tl.constexpr(LANES)


@triton.jit
def dropout_of_places(x, seed, out, count, threshold, factor):  # type: ignore[no-untyped-def]
    """``out = x · factor`` where the place's word is not below the threshold, else 0."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    counter = block[:, None] * _LANES + tl.arange(0, _LANES)[None, :]
    low, high = (counter & 0xFFFFFFFF).to(tl.uint32), (counter >> 32).to(tl.uint32)
    zero = high * 0
    first, second, third, fourth = tl.philox(tl.load(seed), low, high, zero, zero)
    place = block[:, None] * (4 * _LANES) + tl.arange(0, _LANES)[None, :]
    _keep(x, out, place, first, count, threshold, factor)
    _keep(x, out, place + _LANES, second, count, threshold, factor)
    _keep(x, out, place + 2 * _LANES, third, count, threshold, factor)
    _keep(x, out, place + 3 * _LANES, fourth, count, threshold, factor)


@triton.jit
def _keep(x, out, place, word, count, threshold, factor):  # type: ignore[no-untyped-def]
    inside = place < count
    value = tl.load(x + place, inside, 0.0).to(tl.float32) * factor
    kept = word.to(tl.uint32, bitcast=True).to(tl.int64) >= threshold
    tl.store(out + place, tl.where(kept, value, 0.0), inside)


def dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """See ``reference.dropout``."""
    out = torch.empty_like(x)
    if out.stride() != x.stride():  # x is not dense
        x = out.copy_(x)
    if x.numel():
        programs = triton.cdiv(x.numel(), 4 * LANES * BLOCKS.value)
        launch(dropout_of_places, programs, x, seed, out, x.numel(), threshold(p), factor(p))
    return out
