"""Triton kernels of the vectors between the passes.

What a sample's gate sums over the columns is left in parts, one for each block of columns, and added in a fixed order.
The tuples that the kernels take are those of ``triton_vectors``, where their shapes are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from btinet_kernels.interaction.reference import NORMALISE_EPSILON, VARIANCE_EPSILON
from btinet_kernels.interaction.triton_tiles import relu

_NORMALISE = tl.constexpr(NORMALISE_EPSILON)
_VARIANCE = tl.constexpr(VARIANCE_EPSILON)


@triton.jit
def load_tile(matrix, row, column, rows, columns):  # type: ignore[no-untyped-def]
    """Some rows and columns of a row-major matrix, zero outside of it."""
    at = row[:, None].to(tl.int64) * columns + column[None, :]
    return tl.load(matrix + at, (row < rows)[:, None] & (column < columns)[None, :], 0.0)


@triton.jit
def store_tile(matrix, value, row, column, rows, columns):  # type: ignore[no-untyped-def]
    """The inverse of `load_tile`."""
    at = row[:, None].to(tl.int64) * columns + column[None, :]
    tl.store(matrix + at, value, (row < rows)[:, None] & (column < columns)[None, :])


@triton.jit
def load_row(vector, column, columns):  # type: ignore[no-untyped-def]
    """Some elements of a vector as a row, zero outside of it."""
    return tl.load(vector + column, column < columns, 0.0)[None, :]


@triton.jit
def sigmoid(value):  # type: ignore[no-untyped-def]
    """NaN stays NaN."""
    return 1.0 / (1.0 + tl.exp(-value))


@triton.jit
def log1p(value):  # type: ignore[no-untyped-def]
    """Corrected for what rounding ``1 + value`` has lost."""
    grown = 1.0 + value
    lost = tl.where(grown == 1.0, 1.0, grown - 1.0)
    return tl.where(grown == 1.0, value, tl.log(grown) * (value / lost))


@triton.jit
def linear(inputs, weight, bias, b, o, batch, outputs, width, PRECISION: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows ``b`` and columns ``o`` of ``inputs @ weightᵀ + bias``."""
    total = tl.zeros((b.shape[0], o.shape[0]), tl.float32)
    for first in range(0, width, BLOCK):
        i = first + tl.arange(0, BLOCK)
        kernel = load_tile(weight, o, i, outputs, width)
        total = tl.dot(load_tile(inputs, b, i, batch, width), tl.trans(kernel), total, input_precision=PRECISION)
    return total + load_row(bias, o, outputs)


@triton.jit
def normal_of(columns, level, b, k):  # type: ignore[no-untyped-def]
    """The hidden features minus their mean, over their standard deviation; and one over that."""
    inverse = 1.0 / tl.sqrt(tl.load(columns.batch_var + k, k < level.features, 1.0) + level.eps)[None, :]
    active = relu(load_tile(columns.hidden, b, k, level.batch, level.features))
    return (active - load_row(columns.batch_mean, k, level.features)) * inverse, inverse


@triton.jit
def context_of(columns, weights, level, b, k):  # type: ignore[no-untyped-def]
    """Rows ``b`` and columns ``k`` of the context."""
    normal, _ = normal_of(columns, level, b, k)
    scale, shift = load_row(weights.norm_weight, k, level.features), load_row(weights.norm_bias, k, level.features)
    return normal * scale + shift


@triton.jit
def store_projected(  # type: ignore[no-untyped-def]
    parts, value, projection, b, i, block, width, level, PRECISION: tl.constexpr, BLOCK: tl.constexpr
):
    """What the columns ``i`` of ``value`` contribute to ``value @ projectionᵀ``."""
    parts += block.to(tl.int64) * level.batch * level.projection
    for first in range(0, level.projection, BLOCK):
        p = first + tl.arange(0, BLOCK)
        kernel = load_tile(projection, p, i, level.projection, width)
        side = tl.dot(value, tl.trans(kernel), input_precision=PRECISION)
        store_tile(parts, side, b, p, level.batch, level.projection)


@triton.jit
def columns_of_inputs(  # type: ignore[no-untyped-def]
    clf,
    stats,
    weights,
    gate,
    columns,
    level,
    SIGNALS: tl.constexpr,
    TRAINING: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Hidden features and their moments over the batch, by blocks of K; then the gates of seg, by blocks of C and B."""
    program, k_blocks = tl.program_id(0), tl.cdiv(level.features, BLOCK_O)
    if program < k_blocks:
        k = program * BLOCK_O + tl.arange(0, BLOCK_O)
        mean, squares = tl.zeros((BLOCK_O,), tl.float32), tl.zeros((BLOCK_O,), tl.float32)
        for first in range(0, level.batch, BLOCK_B):
            b = first + tl.arange(0, BLOCK_B)
            hidden = linear(
                stats.pooled,
                weights.dense_weight,
                weights.dense_bias,
                b,
                k,
                level.batch,
                level.features,
                level.hidden,
                PRECISION,
                BLOCK_I,
            )
            store_tile(columns.hidden, hidden, b, k, level.batch, level.features)
            if TRAINING:
                # Blocks of samples are merged by their means and squares around them, which cancels nothing.
                inside = (b < level.batch)[:, None]
                active = tl.where(inside, relu(hidden), 0.0)
                members = 1.0 * tl.minimum(level.batch - first, BLOCK_B)
                block_mean = tl.sum(active, 0) / members
                centred = tl.where(inside, active - block_mean[None, :], 0.0)
                apart, share = block_mean - mean, members / (first + members)
                mean += apart * share
                squares += tl.sum(centred * centred, 0) + apart * apart * share * first
        if TRAINING:
            tl.store(columns.batch_mean + k, mean, k < level.features)
            tl.store(columns.batch_var + k, squares / level.batch, k < level.features)
    else:
        c_blocks = tl.cdiv(level.channels, BLOCK_O)
        c_block = (program - k_blocks) % c_blocks
        c = c_block * BLOCK_O + tl.arange(0, BLOCK_O)
        b = (program - k_blocks) // c_blocks * BLOCK_B + tl.arange(0, BLOCK_B)
        batch, channels = level.batch, level.channels
        seg_gate = sigmoid(
            linear(
                stats.mean,
                weights.seg_gate_weight,
                weights.seg_gate_bias,
                b,
                c,
                batch,
                channels,
                channels,
                PRECISION,
                BLOCK_I,
            )
        )
        clf_context = sigmoid(
            linear(
                clf,
                weights.clf_to_seg_weight,
                weights.clf_to_seg_bias,
                b,
                c,
                batch,
                channels,
                level.features,
                PRECISION,
                BLOCK_I,
            )
        )
        store_tile(columns.seg_gate, seg_gate, b, c, batch, channels)
        store_tile(columns.clf_context, clf_context, b, c, batch, channels)
        amplified = level.strength * seg_gate * clf_context
        if SIGNALS == "proxies":
            residual = amplified * load_tile(stats.mean, b, c, batch, channels)
            store_projected(
                columns.seg_parts, residual, gate.seg_projection, b, c, c_block, channels, level, PRECISION, BLOCK_I
            )
        if SIGNALS == "variance":
            enhanced = (1.0 + amplified) * (1.0 + amplified) * load_tile(stats.variance, b, c, batch, channels)
            at = c_block.to(tl.int64) * batch + b
            tl.store(columns.seg_parts + at, tl.sum(enhanced, 1), b < batch)


@triton.jit
def columns_of_context(  # type: ignore[no-untyped-def]
    clf,
    weights,
    gate,
    columns,
    level,
    SIGNALS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """The context and the gate of clf, which needs all of the context, by blocks of K and B."""
    k_blocks, features = tl.cdiv(level.features, BLOCK_O), level.features
    k_block = tl.program_id(0) % k_blocks
    k = k_block * BLOCK_O + tl.arange(0, BLOCK_O)
    b = tl.program_id(0) // k_blocks * BLOCK_B + tl.arange(0, BLOCK_B)
    logit = tl.zeros((BLOCK_B, BLOCK_O), tl.float32)
    for first in range(0, features, BLOCK_I):
        i = first + tl.arange(0, BLOCK_I)
        kernel = load_tile(weights.clf_gate_weight, k, i, features, features)
        logit = tl.dot(context_of(columns, weights, level, b, i), tl.trans(kernel), logit, input_precision=PRECISION)
    clf_gate = sigmoid(logit + load_row(weights.clf_gate_bias, k, features))
    context = context_of(columns, weights, level, b, k)
    store_tile(columns.context, context, b, k, level.batch, features)
    store_tile(columns.clf_gate, clf_gate, b, k, level.batch, features)
    gained = clf_gate * context
    if SIGNALS != "none":
        inside = (k < features)[None, :]
        enhanced = tl.where(inside, load_tile(clf, b, k, level.batch, features) + gained, 0.0)
        total = tl.sum(enhanced, 1)
        centred = tl.where(inside, enhanced - (total / tl.minimum(features - k_block * BLOCK_O, BLOCK_O))[:, None], 0.0)
        at = columns.moments + k_block.to(tl.int64) * level.batch + b
        tl.store(at, total, b < level.batch)
        tl.store(at + k_blocks.to(tl.int64) * level.batch, tl.sum(centred * centred, 1), b < level.batch)
    if SIGNALS == "proxies":
        store_projected(
            columns.clf_parts, gained, gate.clf_projection, b, k, k_block, features, level, PRECISION, BLOCK_I
        )


@triton.jit
def add_parts(parts, at, inside, blocks, stride, BLOCK_T: tl.constexpr):  # type: ignore[no-untyped-def]
    """Σ of what the ``blocks`` of columns left at the elements ``at``, a whole ``stride`` apart."""
    total = tl.zeros((at.shape[0],), tl.float32)
    for first in range(0, blocks, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        place = t[:, None].to(tl.int64) * stride + at[None, :]
        total += tl.sum(tl.load(parts + place, (t < blocks)[:, None] & inside[None, :], 0.0), 0)
    return total


@triton.jit
def side_of(parts, sample, p, blocks, level, BLOCK_T: tl.constexpr):  # type: ignore[no-untyped-def]
    """A sample's projected vector."""
    stride = level.projection * tl.full((), 1, tl.int64) * level.batch
    return add_parts(parts, sample * level.projection + p, p < level.projection, blocks, stride, BLOCK_T)


@triton.jit
def seg_variance_of(columns, level, b, BLOCK_O: tl.constexpr, BLOCK_T: tl.constexpr):  # type: ignore[no-untyped-def]
    """Mean over the channels of the enhanced dense stream's variance, of the samples ``b``."""
    blocks = tl.cdiv(level.channels, BLOCK_O)
    return add_parts(columns.seg_parts, b, b < level.batch, blocks, level.batch, BLOCK_T) / level.channels


@triton.jit
def clf_variance_of(columns, level, b, BLOCK_O: tl.constexpr, BLOCK_T: tl.constexpr):  # type: ignore[no-untyped-def]
    """Mean and variance over the new features of the samples ``b``."""
    blocks, inside = tl.cdiv(level.features, BLOCK_O), b < level.batch
    mean = add_parts(columns.moments, b, inside, blocks, level.batch, BLOCK_T) / level.features
    squares = tl.zeros((b.shape[0],), tl.float32)
    for first in range(0, blocks, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        valid = (t < blocks)[:, None] & inside[None, :]
        at = columns.moments + t[:, None].to(tl.int64) * level.batch + b[None, :]
        members = tl.maximum(tl.minimum(level.features - t * BLOCK_O, BLOCK_O), 1)[:, None]
        apart = tl.load(at, valid, 0.0) / members - mean[None, :]
        around = tl.load(at + blocks.to(tl.int64) * level.batch, valid, 0.0)
        squares += tl.sum(tl.where(valid, around + members * apart * apart, 0.0), 0)
    return mean, squares / level.features


@triton.jit
def inverse_norm(squared):  # type: ignore[no-untyped-def]
    """One over the norm, which is bounded from below; NaN stays NaN."""
    return 1.0 / tl.sqrt(tl.where(squared < _NORMALISE, _NORMALISE, squared))


@triton.jit
def signals_of_sample(  # type: ignore[no-untyped-def]
    edges,
    columns,
    level,
    sample,
    SIGNALS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Inputs of the gate's network; mean and variance of the new features; what the signals were divided by.

    There are two inputs and a zero with ``variance``, whose divisors are the batch's typical signals; with ``proxies``
    the divisors are the squared norms of both projections.
    """
    own = sample + tl.arange(0, 1)
    centre, clf_variance = clf_variance_of(columns, level, own, BLOCK_O, BLOCK_T)
    centre, clf_variance = tl.sum(centre), tl.sum(clf_variance)
    by_seg, by_clf = 0.0, 0.0
    if SIGNALS == "proxies":
        product = 0.0
        c_blocks, k_blocks = tl.cdiv(level.channels, BLOCK_O), tl.cdiv(level.features, BLOCK_O)
        for first in range(0, level.projection, BLOCK_I):
            p = first + tl.arange(0, BLOCK_I)
            seg = side_of(columns.seg_parts, sample, p, c_blocks, level, BLOCK_T)
            clf = side_of(columns.clf_parts, sample, p, k_blocks, level, BLOCK_T)
            product += tl.sum(seg * clf)
            by_seg += tl.sum(seg * seg)
            by_clf += tl.sum(clf * clf)
        alignment = product * inverse_norm(by_seg) * inverse_norm(by_clf)
        return alignment, tl.load(edges + sample), log1p(clf_variance), centre, clf_variance, by_seg, by_clf
    else:
        for first in range(0, level.batch, BLOCK_S):
            b = first + tl.arange(0, BLOCK_S)
            _, variance = clf_variance_of(columns, level, b, BLOCK_O, BLOCK_T)
            by_seg += tl.sum(seg_variance_of(columns, level, b, BLOCK_O, BLOCK_T))
            by_clf += tl.sum(variance)
        by_seg, by_clf = by_seg / level.batch + _VARIANCE, by_clf / level.batch + _VARIANCE
        seg_variance = tl.sum(seg_variance_of(columns, level, own, BLOCK_O, BLOCK_T))
        return seg_variance / by_seg, clf_variance / by_clf, 0.0, centre, clf_variance, by_seg, by_clf


@triton.jit
def gate_neurons(first, second, third, gate, level, j, SIGNALS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The hidden layer ``j`` of the gate's network before its ReLU, and the weights of its inputs."""
    inside = j < level.gate_hidden
    width: tl.constexpr = 3 if SIGNALS == "proxies" else 2
    of_first = tl.load(gate.hidden_weight + j * width, inside, 0.0)
    of_second = tl.load(gate.hidden_weight + j * width + 1, inside, 0.0)
    hidden = tl.load(gate.hidden_bias + j, inside, 0.0) + of_first * first + of_second * second
    of_third = tl.zeros((j.shape[0],), tl.float32)
    if SIGNALS == "proxies":
        of_third = tl.load(gate.hidden_weight + j * width + 2, inside, 0.0)
        hidden += of_third * third
    return hidden, of_first, of_second, of_third


@triton.jit
def gates_of_signals(first, second, third, gate, level, SIGNALS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Share of the interaction that reaches seg, and clf."""
    of_seg, of_clf = tl.load(gate.output_bias), tl.load(gate.output_bias + 1)
    for start in range(0, level.gate_hidden, BLOCK):
        j = start + tl.arange(0, BLOCK)
        hidden, _, _, _ = gate_neurons(first, second, third, gate, level, j, SIGNALS)
        of_seg += tl.sum(relu(hidden) * tl.load(gate.output_weight + j, j < level.gate_hidden, 0.0))
        of_clf += tl.sum(relu(hidden) * tl.load(gate.output_weight + level.gate_hidden + j, j < level.gate_hidden, 0.0))
    if SIGNALS == "proxies":
        return sigmoid(of_seg), sigmoid(of_clf)
    else:
        return sigmoid(of_seg - of_clf), sigmoid(of_clf - of_seg)


@triton.jit
def results_of_samples(  # type: ignore[no-untyped-def]
    clf,
    edges,
    gate,
    columns,
    level,
    scale,
    clf_out,
    gates,
    proxies,
    SIGNALS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """The gate of a sample, if there is one, and the results."""
    sample = tl.program_id(0).to(tl.int64)
    seg_share, clf_share = 1.0, 1.0
    if SIGNALS != "none":
        alignment, seg_energy, clf_energy, _, _, _, _ = signals_of_sample(
            edges, columns, level, sample, SIGNALS, BLOCK_O, BLOCK_I, BLOCK_T, BLOCK_S
        )
        seg_share, clf_share = gates_of_signals(alignment, seg_energy, clf_energy, gate, level, SIGNALS, BLOCK_I)
        tl.store(gates + 2 * sample, seg_share)
        tl.store(gates + 2 * sample + 1, clf_share)
        width: tl.constexpr = 3 if SIGNALS == "proxies" else 2
        tl.store(proxies + width * sample, alignment)
        tl.store(proxies + width * sample + 1, seg_energy)
        if SIGNALS == "proxies":
            tl.store(proxies + width * sample + 2, clf_energy)
    for first in range(0, level.channels, BLOCK):
        c = first + tl.arange(0, BLOCK)
        at, inside = sample * level.channels + c, c < level.channels
        amplified = level.strength * tl.load(columns.seg_gate + at, inside) * tl.load(columns.clf_context + at, inside)
        tl.store(scale + at, 1.0 + seg_share * amplified, inside)
    for first in range(0, level.features, BLOCK):
        k = first + tl.arange(0, BLOCK)
        at, inside = sample * level.features + k, k < level.features
        gained = tl.load(columns.clf_gate + at, inside) * tl.load(columns.context + at, inside)
        tl.store(clf_out + at, tl.load(clf + at, inside) + clf_share * gained, inside)
