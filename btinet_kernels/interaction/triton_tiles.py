"""What the Triton kernels share: addresses, matrix products on tensor cores, sizes of blocks.

Kernels see a dense tensor as positions times channels: position ``n`` counts row-major through the spatial axes,
whatever the strides. All addresses are computed in 64 bits.
"""

from __future__ import annotations

import os
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Without a limit the assembler spills a few bytes to let one more program reside.
MOST_REGISTERS = 255

# The interpreter multiplies the bit patterns of bf16 numbers; it is handed float32 of the same values.
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def offset_of(n, size, strides, EVEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Address of position ``n``; ``size`` and ``strides`` are those of `Layout`."""
    if EVEN:
        return n.to(tl.int64) * strides[4]
    else:
        column, row = n % size[2], n // size[2]
        depth, row = (row // size[1]).to(tl.int64), (row % size[1]).to(tl.int64)
        return depth * strides[2] + row * strides[3] + column.to(tl.int64) * strides[4]


@triton.jit
def has_next(n, size, AXIS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Whether position ``n`` has a neighbour further along an axis: 0 the last one, 1 the one before, 2 the first."""
    if AXIS == 0:
        return n % size[2] + 1 < size[2]
    elif AXIS == 1:
        return n // size[2] % size[1] + 1 < size[1]
    else:
        return n // (size[2] * size[1]) + 1 < size[0]


@triton.jit
def step_of(size, AXIS: tl.constexpr):  # type: ignore[no-untyped-def]
    """How many positions further that neighbour is."""
    if AXIS == 0:
        return 1
    elif AXIS == 1:
        return size[2]
    else:
        return size[2] * size[1]


@triton.jit
def add_exact_product(exact, value, total, TERMS: tl.constexpr):  # type: ignore[no-untyped-def]
    """``total + exact @ value`` for a left side of bf16 numbers, on the bf16 tensor cores.

    ``value`` is written as a sum of bf16 numbers: one holds bf16 exactly, two err by 2^-16, three hold float32.
    """
    for _ in tl.static_range(TERMS):
        term = value.to(tl.bfloat16)
        if _INTERPRETED:
            total += tl.dot(exact.to(tl.float32), term.to(tl.float32))
        else:
            total = tl.dot(exact, term, total)
        value = value.to(tl.float32) - term.to(tl.float32)
    return total


@triton.jit
def add_product(left, right, total, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """``total + left @ right`` of two tiles of one dtype."""
    if _INTERPRETED:
        return total + tl.dot(left.to(tl.float32), right.to(tl.float32))
    else:
        return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit
def add_context(total, seg, weight, here, c, h, inside, channels, hidden, stride, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """The tile ``[n, c]`` of seg, and ``total + seg @ weight[h, c]ᵀ``."""
    in_c = c < channels
    value = tl.load(seg + here[:, None] + (c.to(tl.int64) * stride)[None, :], inside[:, None] & in_c[None, :], 0.0)
    kernel = tl.load(
        weight + h[:, None].to(tl.int64) * channels + c[None, :], (h < hidden)[:, None] & in_c[None, :], 0.0
    )
    if value.dtype == tl.bfloat16:
        total = add_exact_product(value, tl.trans(kernel), total, 2)
    else:
        total = tl.dot(value.to(tl.float32), tl.trans(kernel), total, input_precision=PRECISION)
    return value.to(tl.float32), total


@triton.jit
def relu(value):  # type: ignore[no-untyped-def]
    """NaN stays NaN."""
    return tl.where(value < 0, 0.0, value)


class Layout(NamedTuple):
    """Size ``(depth, height, width)`` and strides ``(batch, channel, depth, height, width)`` of a dense tensor."""

    size: tuple[int, int, int]
    strides: tuple[int, int, int, int, int]
    even: bool  # position n lies at n · strides[4]


def layout_of(dense: Tensor) -> Layout:
    """Layout of ``[B, C, *spatial]``; missing spatial axes come first, with size 1."""
    missing = 5 - dense.ndim
    size = (1,) * missing + tuple(dense.shape[2:])
    strides = (0,) * missing + dense.stride()[2:]
    # Axes of size 1 have strides without a meaning: an even layout is judged, and stepped through, without them.
    axes = [(n, stride) for n, stride in zip(size, strides, strict=True) if n > 1]
    step = axes[-1][1] if axes else 0
    even = all(stride == n * inner for (_, stride), (n, inner) in pairwise(axes))
    if even:
        strides = (0, 0, step)
    return Layout(size, (*dense.stride()[:2], *strides), even)  # type: ignore[arg-type]


def product_precision() -> str:
    """How float32 products are computed, as ``torch.set_float32_matmul_precision`` asks for."""
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def power_of_two(size: int, least: int, most: int) -> int:
    """The smallest power of two that holds ``size``, between ``least`` and ``most``."""
    return min(max(triton.next_power_of_2(size), least), most)


def channel_block(channels: int) -> int:
    """Channels that a program takes at a time: 32, or 16 where that leaves fewer of them idle."""
    return 32 if -channels % 32 <= -channels % 16 else 16


def position_block(batch: int, count: int, most: int = 128) -> int:
    """Positions in a tile: fewer where the tiles would not occupy every multiprocessor (132 on an H200) twice."""
    block = most
    while block > 32 and batch * triton.cdiv(count, block) < 264:
        block //= 2
    return power_of_two(count, 16, block)


def launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """Run ``kernel`` on the device of its first argument, in the current stream."""
    with torch.cuda.device_of(arguments[0]):
        kernel[(programs,)](*arguments, enable_fp_fusion=True, **constants)
