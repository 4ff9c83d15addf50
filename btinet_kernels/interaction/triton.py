"""The passes on NVIDIA GPUs: heuristics and launches of the kernels in ``triton_forward`` and ``triton_backward``.

The vectors between them, `level_vectors` and `level_backward`, are those of ``triton_vectors``.

Any strides and one to three spatial axes; float32, float16 and bfloat16 are stored, float32 is what is computed with.
docs/kernels_gpu.md says what each kernel costs.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from btinet_kernels.interaction import reference
from btinet_kernels.interaction.passes_op import statistics_backward_of
from btinet_kernels.interaction.pointers import new_statistics
from btinet_kernels.interaction.reference import Context, Statistics
from btinet_kernels.interaction.triton_backward import softmax_context_gradient, statistics_gradient
from btinet_kernels.interaction.triton_forward import (
    apply_to_tiles,
    channel_dot_of_parts,
    combine_sums,
    statistics_of_samples,
    statistics_of_tiles,
)
from btinet_kernels.interaction.triton_tiles import (
    MOST_REGISTERS,
    channel_block,
    launch,
    layout_of,
    position_block,
    power_of_two,
    product_precision,
)
from btinet_kernels.interaction.triton_vectors import level_backward as level_backward
from btinet_kernels.interaction.triton_vectors import level_vectors as level_vectors

# A softmax over the positions needs a tile's whole context in one program; the reference takes wider ones.
WIDEST_SOFTMAX_CONTEXT = 256
# The gradients of seg and of the context's weights share a read of seg where both fit the registers.
WIDEST_FUSED_CONTEXT = 32
# Eight for each multiprocessor of an H200: with fewer, programs take less work each, whatever that costs.
ENOUGH_PROGRAMS = 1056


def statistics(
    seg: Tensor, context: Context | None, *, variance: bool, edges: bool, active: bool = False
) -> Statistics:
    """See ``reference.statistics``."""
    batch, channels = seg.shape[:2]
    layout, count = layout_of(seg), seg[0, 0].numel() if len(seg) else 0
    hidden = 0 if context is None else context.weight.shape[0]
    softmax = context is not None and context.pool_weight is not None
    if softmax and hidden > WIDEST_SOFTMAX_CONTEXT:
        return reference.statistics(seg.float(), context, variance=variance, edges=edges)
    result = new_statistics(seg, context, variance=variance, edges=edges, active=active)
    active = result.active.numel() > 0
    vector = result.mean.new_empty
    if not seg.numel():
        return result
    block_h = power_of_two(hidden, 16, WIDEST_SOFTMAX_CONTEXT if softmax else 64)
    block_n = position_block(batch, count, most=min(128, max(16, 4096 // block_h)))
    h_blocks, tiles = max(1, triton.cdiv(hidden, block_h)), triton.cdiv(count, block_n)
    sums = vector(batch, tiles, channels)
    squares = vector(batch, tiles, channels) if variance else sums
    roughness = vector(batch, tiles, h_blocks) if edges else sums
    pooled = vector(batch, tiles, hidden) if context is not None else sums
    shares = vector(batch, tiles, 2) if softmax else sums
    weight, bias, pool_weight = _context(context, sums)
    flags = {"CONTEXT": context is not None, "SOFTMAX": softmax, "VARIANCE": variance}
    launch(
        statistics_of_tiles,
        batch * tiles * h_blocks,
        seg,
        weight,
        bias,
        pool_weight,
        sums,
        squares,
        roughness,
        pooled,
        shares,
        result.active,
        layout.size,
        layout.strides,
        count,
        channels,
        hidden,
        tiles,
        EVEN=layout.even,
        ACTIVE=active,
        EDGE_AXES=seg.ndim - 2 if edges else 0,
        PRECISION=product_precision(),
        H_BLOCKS=h_blocks,
        BLOCK_N=block_n,
        BLOCK_C=channel_block(channels),
        BLOCK_H=block_h,
        num_warps=8 if block_n * block_h >= 4096 else 4,
        maxnreg=MOST_REGISTERS,
        **flags,
    )
    launch(
        statistics_of_samples,
        batch * triton.cdiv(max(channels, hidden), 64),
        sums,
        squares,
        roughness,
        pooled,
        shares,
        *result[:5],
        count,
        channels,
        hidden,
        tiles,
        block_n,
        h_blocks,
        EDGES=edges,
        BLOCK_T=16,
        BLOCK=64,
        num_warps=4,
        **flags,
    )
    return result


def scale_channels(seg: Tensor, scale: Tensor) -> Tensor:
    """See ``reference.scale_channels``."""
    return _apply(seg, seg, scale.contiguous(), interpolate=False)


def interpolate(base: Tensor, enhanced: Tensor, weight: Tensor) -> Tensor:
    """See ``reference.interpolate``."""
    return _apply(base, enhanced, weight.contiguous(), interpolate=True)


def channel_dot(grad: Tensor, seg: Tensor) -> Tensor:
    """See ``reference.channel_dot``."""
    batch, channels = seg.shape[:2]
    out = seg.new_empty(batch, channels, dtype=torch.float32)
    if not seg.numel():
        return out
    count, block_n, block_c = seg[0, 0].numel(), 64, 32
    of_grad, of_seg = layout_of(grad), layout_of(seg)
    tiles, blocks = triton.cdiv(count, block_n), triton.cdiv(channels, block_c)
    tiles_per_part = min(tiles, max(1, batch * tiles * blocks // ENOUGH_PROGRAMS))
    parts = triton.cdiv(tiles, tiles_per_part)
    partial = out if parts == 1 else out.new_empty(batch, parts, channels)
    launch(
        channel_dot_of_parts,
        batch * parts * blocks,
        grad,
        seg,
        partial,
        of_seg.size,
        of_grad.strides,
        of_seg.strides,
        count,
        channels,
        parts,
        tiles_per_part,
        GRAD_EVEN=of_grad.even,
        SEG_EVEN=of_seg.even,
        BLOCK_N=block_n,
        BLOCK_C=block_c,
        num_warps=4,
    )
    if parts > 1:
        combine_parts(partial, out, out, batch, parts)
    return out


def statistics_backward(
    seg: Tensor, grad: Tensor, scale: Tensor, context: Context | None, saved: Statistics, gradient: Statistics
) -> tuple[Tensor, list[Tensor]]:
    """``grad · scale`` plus the gradient through ``statistics``: gradient of seg, gradients of the context."""
    weights = [] if context is None else [w for w in context if w is not None]
    if not seg.numel():
        return torch.empty_like(seg), [torch.zeros_like(w) for w in weights]
    if context is None:
        out, _ = _gradient_of_tiles(seg, grad, scale, None, saved.active, saved, gradient)
        return out, []
    if context.pool_weight is None:
        active = saved.active
        if not active.numel():
            active = statistics(seg, context, variance=False, edges=False, active=True).active
        out, of_weights = _gradient_of_tiles(seg, grad, scale, context, active, saved, gradient)
        return out, of_weights
    if context.weight.shape[0] > WIDEST_SOFTMAX_CONTEXT:
        return _wide_softmax_backward(seg, grad, scale, context, gradient)
    d_context, d_pool_weight = _softmax_gradient(seg, context, saved, gradient)
    out, of_weights = _gradient_of_tiles(seg, grad, scale, context, d_context, saved, gradient)
    return out, [*of_weights, d_pool_weight]


def _apply(base: Tensor, enhanced: Tensor, factor: Tensor, *, interpolate: bool) -> Tensor:
    out = torch.empty_like(base)
    if not base.numel():
        return out
    batch, channels = base.shape[:2]
    count, block_n, block_c = base[0, 0].numel(), 64, power_of_two(channels, 16, 64)
    of_base, of_enhanced, of_out = layout_of(base), layout_of(enhanced), layout_of(out)
    launch(
        apply_to_tiles,
        batch * triton.cdiv(count, block_n) * triton.cdiv(channels, block_c),
        base,
        enhanced,
        factor,
        out,
        of_base.size,
        of_base.strides,
        of_enhanced.strides,
        of_out.strides,
        count,
        channels,
        BASE_EVEN=of_base.even,
        ENHANCED_EVEN=of_enhanced.even,
        OUT_EVEN=of_out.even,
        INTERPOLATE=interpolate,
        BLOCK_N=block_n,
        BLOCK_C=block_c,
        num_warps=4,
    )
    return out


def _softmax_gradient(seg: Tensor, context: Context, saved: Statistics, gradient: Statistics) -> tuple[Tensor, Tensor]:
    """Gradients of the context before its ReLU, ``[B, N, h]``, and of the pooling weight."""
    (batch, channels), hidden, count = seg.shape[:2], context.weight.shape[0], seg[0, 0].numel()
    layout, block_h = layout_of(seg), power_of_two(hidden, 16, WIDEST_SOFTMAX_CONTEXT)
    block_n = position_block(batch, count, most=min(64, max(16, 4096 // block_h)))
    tiles = triton.cdiv(count, block_n)
    d_context = saved.mean.new_empty(batch, count, hidden)
    partial, d_pool_weight = saved.mean.new_empty(batch * tiles, hidden), saved.mean.new_empty(hidden)
    weight, bias, pool_weight = _context(context, saved.mean)
    launch(
        softmax_context_gradient,
        batch * tiles,
        seg,
        weight,
        bias,
        pool_weight,
        saved.log_sum_exp.contiguous(),
        saved.pooled.contiguous(),
        gradient.pooled.contiguous(),
        d_context,
        partial,
        layout.size,
        layout.strides,
        count,
        channels,
        hidden,
        tiles,
        EVEN=layout.even,
        PRECISION=product_precision(),
        BLOCK_N=block_n,
        BLOCK_C=channel_block(channels),
        BLOCK_H=block_h,
        num_warps=8 if block_n * block_h >= 4096 else 4,
        maxnreg=MOST_REGISTERS,
    )
    combine_parts(partial, d_pool_weight, d_pool_weight, 1, batch * tiles)
    return d_context, d_pool_weight


def _gradient_of_tiles(
    seg: Tensor,
    grad: Tensor,
    scale: Tensor,
    context: Context | None,
    active: Tensor,
    saved: Statistics,
    gradient: Statistics,
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of seg and of the context's weight and bias; ``active``: its bits, or its gradient from a softmax."""
    (batch, channels), count, out = seg.shape[:2], seg[0, 0].numel(), torch.empty_like(seg)
    hidden = 0 if context is None else context.weight.shape[0]
    softmax = context is not None and context.pool_weight is not None
    fused = hidden <= WIDEST_FUSED_CONTEXT and not softmax
    block_h = power_of_two(hidden, 16, 64)
    h_blocks = triton.cdiv(max(hidden, 1), block_h)
    block_c = 16 if fused and hidden else channel_block(channels)
    c_blocks = triton.cdiv(channels, block_c)
    of_seg, of_grad, of_out = layout_of(seg), layout_of(grad), layout_of(out)
    weight, _, _ = _context(context, scale)
    empty = scale
    exact_terms = 3 if product_precision() == "tf32x3" else 2
    d_weight = scale.new_empty(hidden, channels)
    d_bias = scale.new_empty(hidden)

    def run(*, dense: bool, weights: bool, groups: int) -> None:
        block_n = position_block(batch * c_blocks, count, most=64 if dense and not softmax else 32)
        tiles = triton.cdiv(count, block_n)
        # A part's weight gradient is written and read again: it should gather from many times h positions.
        wanted = max(1, min(16 * hidden if weights else 1, batch * count * c_blocks * groups // ENOUGH_PROGRAMS))
        tiles_per_part = min(tiles, triton.cdiv(wanted, block_n))
        samples_per_part = min(batch, max(1, wanted // count)) if tiles_per_part == tiles else 1
        parts = triton.cdiv(batch, samples_per_part) * triton.cdiv(tiles, tiles_per_part)
        partial = scale.new_empty(parts, hidden * (channels + 1)) if weights else empty
        launch(
            statistics_gradient,
            parts * groups * c_blocks,
            seg,
            grad,
            scale.contiguous(),
            weight,
            active.contiguous() if context is not None else empty,
            saved.mean.contiguous(),
            gradient.mean.contiguous() if gradient.mean.numel() else torch.zeros_like(saved.mean),
            gradient.variance.contiguous(),
            gradient.edges.contiguous(),
            gradient.pooled.contiguous(),
            out,
            partial,
            of_seg.size,
            of_seg.strides,
            of_grad.strides,
            of_out.strides,
            batch,
            count,
            channels,
            hidden,
            tiles,
            samples_per_part,
            tiles_per_part,
            SEG_EVEN=of_seg.even,
            GRAD_EVEN=of_grad.even,
            OUT_EVEN=of_out.even,
            VARIANCE=gradient.variance.numel() > 0,
            EDGE_AXES=seg.ndim - 2 if gradient.edges.numel() else 0,
            AVERAGE=context is not None and not softmax,
            SOFTMAX=softmax,
            DENSE=dense,
            WEIGHTS=weights,
            SEG_TERMS={torch.bfloat16: 1, torch.float16: 2, torch.float32: exact_terms}[seg.dtype],
            OUT_TERMS=exact_terms if seg.dtype == torch.float32 else 2,
            PRECISION=product_precision(),
            H_GROUPS=groups,
            H_LOOP=h_blocks // groups if weights else h_blocks,
            BLOCK_N=block_n,
            BLOCK_C=block_c,
            BLOCK_H=block_h,
            num_warps=8,
            num_stages=1,
            maxnreg=None if dense and hidden <= 192 else MOST_REGISTERS,
        )
        if weights:
            combine_parts(partial, d_weight, d_bias, 1, parts)

    if fused:
        run(dense=True, weights=context is not None, groups=1)
    else:
        run(dense=True, weights=False, groups=1)
        run(dense=False, weights=True, groups=h_blocks)
    return out, [d_weight, d_bias]


def _wide_softmax_backward(
    seg: Tensor, grad: Tensor, scale: Tensor, context: Context, gradient: Statistics
) -> tuple[Tensor, list[Tensor]]:
    saved = Statistics(*[scale.new_empty(0)] * 6)
    backward = statistics_backward_of(reference)
    out, weights = backward(seg.float(), grad.float(), scale, context, saved, gradient)
    return out.to(seg.dtype), weights


def combine_parts(partial: Tensor, out: Tensor, tail: Tensor, rows: int, parts: int) -> None:
    """``[rows, parts, columns]`` summed over the parts into ``out`` and, where that is full, ``tail``."""
    columns = partial.numel() // (rows * parts)
    launch(
        combine_sums,
        rows * triton.cdiv(columns, 64),
        partial,
        out,
        tail,
        parts,
        columns,
        out.numel() // rows,
        BLOCK_T=32,
        BLOCK=64,
        num_warps=4,
    )


def _context(context: Context | None, placeholder: Tensor) -> list[Tensor]:
    """Weight, bias and pooling weight; what there is none of is never read."""
    if context is None:
        return [placeholder] * 3
    return [placeholder if w is None else w.contiguous() for w in context]
