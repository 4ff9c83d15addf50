"""Triton kernels of the gradient through the vectors between the passes.

A name ``d_x`` is the gradient with respect to ``x``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from btinet_kernels.interaction.reference import NORMALISE_EPSILON
from btinet_kernels.interaction.triton_tiles import relu
from btinet_kernels.interaction.triton_vectors_forward import (
    gate_neurons,
    gates_of_signals,
    inverse_norm,
    load_row,
    load_tile,
    normal_of,
    side_of,
    signals_of_sample,
    store_tile,
)

_NORMALISE = tl.constexpr(NORMALISE_EPSILON)


@triton.jit
def gate_gradient(  # type: ignore[no-untyped-def]
    clf,
    edges,
    gate,
    columns,
    level,
    upstream,
    out,
    SIGNALS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Back from a sample's results through its gate to the signals."""
    sample = tl.program_id(0).to(tl.int64)
    width: tl.constexpr = 3 if SIGNALS == "proxies" else 2
    d_seg_share = tl.load(upstream.d_gates + 2 * sample)
    d_clf_share = tl.load(upstream.d_gates + 2 * sample + 1)
    for start in range(0, level.channels, BLOCK):
        c = start + tl.arange(0, BLOCK)
        at, inside = sample * level.channels + c, c < level.channels
        amplified = tl.load(columns.seg_gate + at, inside, 0.0) * tl.load(columns.clf_context + at, inside, 0.0)
        d_seg_share += level.strength * tl.sum(tl.load(upstream.d_scale + at, inside, 0.0) * amplified)
    for start in range(0, level.features, BLOCK):
        k = start + tl.arange(0, BLOCK)
        at, inside = sample * level.features + k, k < level.features
        gained = tl.load(columns.clf_gate + at, inside, 0.0) * tl.load(columns.context + at, inside, 0.0)
        d_clf_share += tl.sum(tl.load(upstream.d_clf_out + at, inside, 0.0) * gained)

    first, second, third, centre, clf_variance, by_seg, by_clf = signals_of_sample(
        edges, columns, level, sample, SIGNALS, BLOCK_O, BLOCK_I, BLOCK_T, BLOCK_S
    )
    seg_share, clf_share = gates_of_signals(first, second, third, gate, level, SIGNALS, BLOCK_I)
    if SIGNALS == "proxies":
        d_seg_logit = d_seg_share * seg_share * (1.0 - seg_share)
        d_clf_logit = d_clf_share * clf_share * (1.0 - clf_share)
    else:
        shared = seg_share * d_seg_share + clf_share * d_clf_share
        d_seg_logit, d_clf_logit = seg_share * (d_seg_share - shared), clf_share * (d_clf_share - shared)
    d_first = tl.load(upstream.d_proxies + width * sample)
    d_second = tl.load(upstream.d_proxies + width * sample + 1)
    d_third = 0.0
    if SIGNALS == "proxies":
        d_third += tl.load(upstream.d_proxies + width * sample + 2)
    for start in range(0, level.gate_hidden, BLOCK_I):
        j = start + tl.arange(0, BLOCK_I)
        inside = j < level.gate_hidden
        hidden, of_first, of_second, of_third = gate_neurons(first, second, third, gate, level, j, SIGNALS)
        of_seg = tl.load(gate.output_weight + j, inside, 0.0)
        of_clf = tl.load(gate.output_weight + level.gate_hidden + j, inside, 0.0)
        d_hidden = (d_seg_logit * of_seg + d_clf_logit * of_clf) * (hidden > 0)
        d_first += tl.sum(d_hidden * of_first)
        d_second += tl.sum(d_hidden * of_second)
        d_third += tl.sum(d_hidden * of_third)
        tl.store(out.d_gate_hidden + sample * level.gate_hidden + j, d_hidden, inside)
        tl.store(out.gate_active + sample * level.gate_hidden + j, relu(hidden), inside)

    tl.store(out.gates + 2 * sample, seg_share)
    tl.store(out.gates + 2 * sample + 1, clf_share)
    tl.store(out.d_logits + 2 * sample, d_seg_logit)
    tl.store(out.d_logits + 2 * sample + 1, d_clf_logit)
    tl.store(out.centre + sample, centre)
    tl.store(out.signals + width * sample, first)
    tl.store(out.signals + width * sample + 1, second)
    if SIGNALS == "proxies":
        tl.store(out.signals + width * sample + 2, third)
        tl.store(out.d_edges + sample, d_second)
        tl.store(out.d_variances + 2 * sample + 1, d_third / (1.0 + clf_variance))
        # A clipped norm is a constant; otherwise a unit vector does not change along itself.
        along_seg = tl.where(by_seg < _NORMALISE, 0.0, first)
        along_clf = tl.where(by_clf < _NORMALISE, 0.0, first)
        for start in range(0, level.projection, BLOCK_I):
            p = start + tl.arange(0, BLOCK_I)
            seg = side_of(columns.seg_parts, sample, p, tl.cdiv(level.channels, BLOCK_O), level, BLOCK_T)
            clf_side = side_of(columns.clf_parts, sample, p, tl.cdiv(level.features, BLOCK_O), level, BLOCK_T)
            seg, clf_side = seg * inverse_norm(by_seg), clf_side * inverse_norm(by_clf)
            at, inside = sample * level.projection + p, p < level.projection
            tl.store(out.d_seg_side + at, d_first * (clf_side - seg * along_seg) * inverse_norm(by_seg), inside)
            tl.store(out.d_clf_side + at, d_first * (seg - clf_side * along_clf) * inverse_norm(by_clf), inside)
    else:
        tl.store(out.d_variances + 2 * sample, d_first / by_seg)
        tl.store(out.d_variances + 2 * sample + 1, d_second / by_clf)


@triton.jit
def shared_gradient(of_samples, level, b, SIGNAL: tl.constexpr, SIGNALS: tl.constexpr, BLOCK_B: tl.constexpr):  # type: ignore[no-untyped-def]
    """Gradients of the variances of seg (0) or the new features (1), of the samples ``b``.

    The variance gate has divided them by their mean over the batch, through which all samples meet.
    """
    gradient = tl.load(of_samples.d_variances + 2 * b.to(tl.int64) + SIGNAL, b < level.batch, 0.0)
    if SIGNALS == "variance":
        total = tl.zeros((BLOCK_B,), tl.float32)
        for first in range(0, level.batch, BLOCK_B):
            other = first + tl.arange(0, BLOCK_B)
            at, inside = 2 * other.to(tl.int64) + SIGNAL, other < level.batch
            total += tl.load(of_samples.d_variances + at, inside, 0.0) * tl.load(of_samples.signals + at, inside, 0.0)
        gradient -= tl.sum(total) / level.batch
    return gradient


@triton.jit
def through(d_outputs, weight, b, i, batch, outputs, width, PRECISION: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows ``b`` and columns ``i`` of ``d_outputs @ weight``: the inverse of `linear`."""
    total = tl.zeros((b.shape[0], i.shape[0]), tl.float32)
    for first in range(0, outputs, BLOCK):
        o = first + tl.arange(0, BLOCK)
        kernel = load_tile(weight, o, i, outputs, width)
        total = tl.dot(load_tile(d_outputs, b, o, batch, outputs), kernel, total, input_precision=PRECISION)
    return total


@triton.jit
def share_of(of_samples, level, b, STREAM: tl.constexpr, SIGNALS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The gate of seg (0) or clf (1), as a column."""
    if SIGNALS == "none":
        return tl.full((b.shape[0], 1), 1.0, tl.float32)
    else:
        return tl.load(of_samples.gates + 2 * b.to(tl.int64) + STREAM, b < level.batch, 0.0)[:, None]


@triton.jit
def gained_gradient(  # type: ignore[no-untyped-def]
    clf,
    gate,
    columns,
    level,
    upstream,
    of_samples,
    d_variance,
    b,
    k,
    SIGNALS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of rows ``b`` and columns ``k``: gradient of the gain; its part through the variance; gain; gate; context."""
    batch, features = level.batch, level.features
    clf_gate, context = (
        load_tile(columns.clf_gate, b, k, batch, features),
        load_tile(columns.context, b, k, batch, features),
    )
    gained = clf_gate * context
    d_gained = load_tile(upstream.d_clf_out, b, k, batch, features) * share_of(of_samples, level, b, 1, SIGNALS)
    d_enhanced = tl.zeros((b.shape[0], k.shape[0]), tl.float32)
    if SIGNALS != "none":
        centre = tl.load(of_samples.centre + b, b < batch, 0.0)[:, None]
        d_enhanced = (2.0 / features) * d_variance[:, None] * (load_tile(clf, b, k, batch, features) + gained - centre)
        d_gained += d_enhanced
    if SIGNALS == "proxies":
        d_gained += through(
            of_samples.d_clf_side, gate.clf_projection, b, k, batch, level.projection, features, PRECISION, BLOCK
        )
    return d_gained, d_enhanced, gained, clf_gate


@triton.jit
def columns_gradient(  # type: ignore[no-untyped-def]
    clf,
    stats,
    weights,
    gate,
    columns,
    level,
    upstream,
    of_samples,
    out,
    SIGNALS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Back to the context and through its normalisation, by blocks of K; to the gates of seg, by blocks of C and B."""
    program, k_blocks, batch = tl.program_id(0), tl.cdiv(level.features, BLOCK_O), level.batch
    if program < k_blocks:
        features = level.features
        k = program * BLOCK_O + tl.arange(0, BLOCK_O)
        d_norm_weight, d_norm_bias = tl.zeros((BLOCK_O,), tl.float32), tl.zeros((BLOCK_O,), tl.float32)
        for first in range(0, batch, BLOCK_B):
            b = first + tl.arange(0, BLOCK_B)
            d_variance = tl.zeros((BLOCK_B,), tl.float32)
            if SIGNALS != "none":
                d_variance = shared_gradient(of_samples, level, b, 1, SIGNALS, BLOCK_B)
            d_context = tl.zeros((BLOCK_B, BLOCK_O), tl.float32)
            for start in range(0, features, BLOCK_I):
                j = start + tl.arange(0, BLOCK_I)
                d_gained, _, gained, clf_gate = gained_gradient(
                    clf, gate, columns, level, upstream, of_samples, d_variance, b, j, SIGNALS, PRECISION, BLOCK_I
                )
                kernel = load_tile(weights.clf_gate_weight, j, k, features, features)
                d_logit = d_gained * gained * (1.0 - clf_gate)
                d_context = tl.dot(d_logit, kernel, d_context, input_precision=PRECISION)
            d_gained, d_enhanced, gained, clf_gate = gained_gradient(
                clf, gate, columns, level, upstream, of_samples, d_variance, b, k, SIGNALS, PRECISION, BLOCK_I
            )
            d_context += d_gained * clf_gate
            d_clf = load_tile(upstream.d_clf_out, b, k, batch, features) + d_enhanced
            store_tile(out.d_clf_gate, d_gained * gained * (1.0 - clf_gate), b, k, batch, features)
            store_tile(out.d_context, d_context, b, k, batch, features)
            store_tile(out.d_clf, d_clf, b, k, batch, features)
            if SIGNALS == "proxies":
                store_tile(out.gained, gained, b, k, batch, features)
            normal, _ = normal_of(columns, level, b, k)
            d_context = tl.where((b < batch)[:, None], d_context, 0.0)
            d_norm_weight += tl.sum(d_context * normal, 0)
            d_norm_bias += tl.sum(d_context, 0)
        tl.store(out.d_norm_weight + k, d_norm_weight, k < features)
        tl.store(out.d_norm_bias + k, d_norm_bias, k < features)
    else:
        channels, c_blocks = level.channels, tl.cdiv(level.channels, BLOCK_O)
        c = (program - k_blocks) % c_blocks * BLOCK_O + tl.arange(0, BLOCK_O)
        b = (program - k_blocks) // c_blocks * BLOCK_B + tl.arange(0, BLOCK_B)
        seg_gate = load_tile(columns.seg_gate, b, c, batch, channels)
        clf_context = load_tile(columns.clf_context, b, c, batch, channels)
        amplified = level.strength * seg_gate * clf_context
        d_amplified = load_tile(upstream.d_scale, b, c, batch, channels) * share_of(of_samples, level, b, 0, SIGNALS)
        d_mean = tl.zeros((BLOCK_B, BLOCK_O), tl.float32)
        if SIGNALS == "proxies":
            mean = load_tile(stats.mean, b, c, batch, channels)
            d_residual = through(
                of_samples.d_seg_side, gate.seg_projection, b, c, batch, level.projection, channels, PRECISION, BLOCK_I
            )
            d_amplified += d_residual * mean
            d_mean = d_residual * amplified
            store_tile(out.residual, amplified * mean, b, c, batch, channels)
        if SIGNALS == "variance":
            d_variance = (shared_gradient(of_samples, level, b, 0, SIGNALS, BLOCK_B) / channels)[:, None]
            modulation = 1.0 + amplified
            d_amplified += 2.0 * d_variance * modulation * load_tile(stats.variance, b, c, batch, channels)
            store_tile(out.d_variance, d_variance * modulation * modulation, b, c, batch, channels)
        store_tile(out.d_mean, d_mean, b, c, batch, channels)
        both = level.strength * d_amplified * seg_gate * clf_context
        store_tile(out.d_seg_gate, both * (1.0 - seg_gate), b, c, batch, channels)
        store_tile(out.d_clf_context, both * (1.0 - clf_context), b, c, batch, channels)


@triton.jit
def hidden_gradient(  # type: ignore[no-untyped-def]
    d_context, weights, columns, level, of_columns, b, k, TRAINING: tl.constexpr
):
    """Gradient of the hidden features before their ReLU, from that of the context."""
    features = level.features
    normal, inverse = normal_of(columns, level, b, k)
    if TRAINING:
        shared = load_row(of_columns.d_norm_bias, k, features)
        shared += normal * load_row(of_columns.d_norm_weight, k, features)
        d_context -= shared / level.batch
    passed = load_tile(columns.hidden, b, k, level.batch, features) > 0
    return d_context * load_row(weights.norm_weight, k, features) * inverse * passed


@triton.jit
def product_of(products, tile, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The product that a tile belongs to, without its start, and the tile's number in it."""
    left, right, out = products[0].left, products[0].right, products[0].out
    bias, height, width, start = products[0].bias, products[0].height, products[0].width, products[0].start
    for n in tl.static_range(1, COUNT):
        if tile >= products[n].start:
            left, right, out = products[n].left, products[n].right, products[n].out
            bias, height, width, start = products[n].bias, products[n].height, products[n].width, products[n].start
    return left, right, out, bias, height, width, tile - start


@triton.jit
def products_of_level(  # type: ignore[no-untyped-def]
    clf,
    weights,
    columns,
    level,
    of_columns,
    of_inputs,  # the first one goes through the normalisation, here and in of_weights
    of_weights,
    input_tiles,
    INPUTS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    TRAINING: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_I: tl.constexpr,
    TILE: tl.constexpr,
):
    """A tile of a gradient that is a product of matrices: first those of the inputs, which are longer."""
    batch = level.batch
    if tl.program_id(0) < input_tiles:
        tile = tl.program_id(0)
        left, right, out, _, height, width, part = product_of(of_inputs, tile, INPUTS)
        normalised, blocks = tile < of_inputs[1].start, tl.cdiv(width, TILE)
        b = part // blocks * BLOCK_B + tl.arange(0, BLOCK_B)
        i = part % blocks * TILE + tl.arange(0, TILE)
        d_inputs = tl.zeros((BLOCK_B, TILE), tl.float32)
        if tile >= of_inputs[1].start:
            d_inputs += load_tile(out, b, i, batch, width)
        for first in range(0, height, BLOCK_I):
            o = first + tl.arange(0, BLOCK_I)
            d_output = load_tile(left, b, o, batch, height)
            if normalised:
                d_output = hidden_gradient(d_output, weights, columns, level, of_columns, b, o, TRAINING)
            d_inputs = tl.dot(d_output, load_tile(right, o, i, height, width), d_inputs, input_precision=PRECISION)
        store_tile(out, d_inputs, b, i, batch, width)
    else:
        tile = tl.program_id(0) - input_tiles
        left, right, out, bias, height, width, part = product_of(of_weights, tile, WEIGHTS)
        normalised, blocks = tile < of_weights[1].start, tl.cdiv(width, TILE)
        o = part // blocks * TILE + tl.arange(0, TILE)
        i = part % blocks * TILE + tl.arange(0, TILE)
        d_weight, d_bias = tl.zeros((TILE, TILE), tl.float32), tl.zeros((TILE,), tl.float32)
        for first in range(0, batch, BLOCK_B):
            b = first + tl.arange(0, BLOCK_B)
            d_output = load_tile(left, b, o, batch, height)
            if normalised:
                d_output = hidden_gradient(d_output, weights, columns, level, of_columns, b, o, TRAINING)
            inputs = load_tile(right, b, i, batch, width)
            d_weight = tl.dot(tl.trans(d_output), inputs, d_weight, input_precision=PRECISION)
            d_bias += tl.sum(d_output, 0)
        store_tile(out, d_weight, o, i, height, width)
        if part % blocks == 0:
            tl.store(bias + o, d_bias, o < height)
