"""The gating end of an attention gate on NVIDIA GPUs: launches of the kernels in ``triton_position_gate``.

Any strides and one to three spatial axes; float32, float16 and bfloat16 are stored, float32 is what is computed with.
docs/kernels_gpu.md says what each kernel costs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from btinet_kernels.gates.triton_position_gate import position_gate_gradient_of_tiles, position_gate_of_tiles
from btinet_kernels.interaction.triton_tiles import (
    MOST_REGISTERS,
    channel_block,
    launch,
    layout_of,
    position_block,
)

TILE = 2048  # elements: sixteen for each thread of four warps


def position_gate(x: Tensor, h: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """See ``attention_native.position_gate``."""
    out, count = torch.empty_like(x), x.shape[2:].numel()
    gate = x.new_empty(len(x), count, dtype=torch.float32)
    if not x.numel():
        return out, gate
    of_x, of_h, of_out = layout_of(x), layout_of(h), layout_of(out)
    tiles, blocks = _tiles(x)
    launch(
        position_gate_of_tiles,
        tiles,
        x,
        h,
        weight.contiguous(),
        bias,
        out,
        gate,
        of_x.size,
        of_x.strides,
        of_h.strides,
        of_out.strides,
        count,
        x.shape[1],
        h.shape[1],
        X_EVEN=of_x.even,
        H_EVEN=of_h.even,
        OUT_EVEN=of_out.even,
        **blocks,
    )
    return out, gate


def position_gate_backward(d_out: Tensor, x: Tensor, h: Tensor, gate: Tensor, weight: Tensor) -> list[Tensor]:
    """See ``attention_native.position_gate_backward``."""
    d_x, d_h, hidden = torch.empty_like(x), torch.empty_like(h), h.shape[1]
    if not x.numel():
        return [d_x, d_h, weight.new_zeros(weight.shape), weight.new_zeros(1)]
    of_d_out, of_x, of_h, of_d_x, of_d_h = (layout_of(t) for t in (d_out, x, h, d_x, d_h))
    tiles, blocks = _tiles(x)
    gathered = gate.new_empty(tiles, hidden + 1)
    launch(
        position_gate_gradient_of_tiles,
        tiles,
        d_out,
        x,
        h,
        gate.contiguous(),
        weight.contiguous(),
        d_x,
        d_h,
        gathered,
        of_x.size,
        of_d_out.strides,
        of_x.strides,
        of_h.strides,
        of_d_x.strides,
        of_d_h.strides,
        x.shape[2:].numel(),
        x.shape[1],
        hidden,
        D_OUT_EVEN=of_d_out.even,
        X_EVEN=of_x.even,
        H_EVEN=of_h.even,
        D_X_EVEN=of_d_x.even,
        D_H_EVEN=of_d_h.even,
        **blocks,
    )
    of_weight, of_bias = gathered.sum(0).split([hidden, 1])
    # Copies: outputs of an operator share no memory.
    return [d_x, d_h, of_weight.reshape(weight.shape).clone(), of_bias.clone()]


def _tiles(x: Tensor) -> tuple[int, dict[str, Any]]:
    """Tiles of all samples, and their size."""
    count = x.shape[2:].numel()
    block_c = channel_block(x.shape[1]) if x.stride(1) == 1 else 16  # planes are read in long runs of positions
    block_n = position_block(len(x), count, most=TILE // block_c)
    blocks = {"BLOCK_N": block_n, "BLOCK_C": block_c, "num_warps": 4, "maxnreg": MOST_REGISTERS}
    return len(x) * triton.cdiv(count, block_n), blocks
