"""The vectors between the passes on NVIDIA GPUs: three launches, and five for their gradients.

Forward, first the columns that depend on the inputs alone, then those that need the whole context, then by samples
the gate and the results. Backward, the first two once more; then through the gate by samples, through the sigmoids and
the batch normalisation by columns, and at last every product of matrices that is left, as one list of tiles.

B samples, C channels, K features; P is the width of the projections, H that of the gate's network. A name ``d_x`` is
the gradient with respect to ``x``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from btinet_kernels.interaction.passes_op import LevelOptions
from btinet_kernels.interaction.reference import GateWeights, InteractionWeights, Statistics
from btinet_kernels.interaction.triton_tiles import MOST_REGISTERS, launch, power_of_two, product_precision
from btinet_kernels.interaction.triton_vectors_backward import columns_gradient, gate_gradient, products_of_level
from btinet_kernels.interaction.triton_vectors_forward import columns_of_context, columns_of_inputs, results_of_samples
from btinet_kernels.interaction.vectors_backward import LevelGradient

NARROW = 16  # columns of a program: few, so that narrow levels occupy many multiprocessors
WIDE = 64  # columns that a product takes at a time
PARTS = 32  # parts that are added at a time
PROXIES = {"none": 0, "proxies": 3, "variance": 2}  # how many there are
TILE = 32  # rows and columns of a tile of a weight's gradient
# More samples or columns at a time than these, fewer warps or loads ahead of time would spill.
SAMPLES_OF_A_PRODUCT = 32
COLUMNS_OF_A_GRADIENT = 32
WARPS = 8


class Level(NamedTuple):
    """Sizes and constants of a level."""

    batch: int
    channels: int
    features: int
    hidden: int
    projection: int
    gate_hidden: int
    strength: float
    eps: float


class Columns(NamedTuple):
    """What the first two launches leave to the third, and to the backward."""

    hidden: Tensor  # [B, K], before its ReLU
    batch_mean: Tensor  # [K], or the running statistics
    batch_var: Tensor  # [K]
    context: Tensor  # [B, K]
    clf_gate: Tensor  # [B, K]
    seg_gate: Tensor  # [B, C]
    clf_context: Tensor  # [B, C]
    seg_parts: Tensor  # [blocks of C, B, P] of the projected residual, or [blocks of C, B] of the enhanced variance
    clf_parts: Tensor  # [blocks of K, B, P] of the projected gain
    moments: Tensor  # [2, blocks of K, B] of the new features: sum, squares around the block's own mean


class Given(NamedTuple):
    """A level's vectors and weights, each with its values one after the other."""

    stats: Statistics
    clf: Tensor
    weights: InteractionWeights
    gate: GateWeights | None
    level: Level


class Upstream(NamedTuple):
    """The gradients that arrive."""

    d_scale: Tensor  # [B, C]
    d_clf_out: Tensor  # [B, K]
    d_gates: Tensor  # [B, 2]
    d_proxies: Tensor  # [B, 3] or [B, 2]


class OfSamples(NamedTuple):
    """What the gradient of a sample's gate leaves to the columns, and to the gradients of its weights."""

    gates: Tensor  # [B, 2]
    centre: Tensor  # [B], mean of the new features
    d_variances: Tensor  # [B, 2]: of seg (variance gate only), of the new features; before `shared_gradient`
    d_edges: Tensor  # [B]
    d_seg_side: Tensor  # [B, P]
    d_clf_side: Tensor  # [B, P]
    signals: Tensor  # [B, 3] or [B, 2]
    d_gate_hidden: Tensor  # [B, H], before its ReLU
    gate_active: Tensor  # [B, H]
    d_logits: Tensor  # [B, 2]


class OfColumns(NamedTuple):
    """What the gradients of a block of columns leave to the products of matrices."""

    d_context: Tensor  # [B, K]
    d_clf_gate: Tensor  # [B, K]; the gates' before their sigmoid
    d_seg_gate: Tensor  # [B, C]
    d_clf_context: Tensor  # [B, C]
    gained: Tensor  # [B, K]
    residual: Tensor  # [B, C]
    d_norm_weight: Tensor  # [K]
    d_norm_bias: Tensor  # [K]
    d_mean: Tensor  # [B, C]; this and d_clf without what reaches them through a linear layer
    d_variance: Tensor  # [B, C]
    d_clf: Tensor  # [B, K]


class Product(NamedTuple):
    """``leftᵀ @ right`` and the sums of left's columns, gradients of a weight and its bias; or ``left @ right``."""

    left: Tensor  # [B, height]
    right: Tensor  # [B, width], or the weight [height, width] whose input's gradient is wanted
    out: Tensor  # [height, width], or [B, width] to which the product is added
    bias: Tensor  # [height]
    height: int
    width: int
    start: int  # number of its first tile


def level_vectors(
    stats: Statistics, clf: Tensor, weights: InteractionWeights, gate: GateWeights | None, options: LevelOptions
) -> tuple[Tensor, ...]:
    """See ``level_op.level_vectors``: ``[B, C]``, ``[B, K]``, ``[B, 2]``, ``[B, 3]`` or ``[B, 2]``, ``[K]``, ``[K]``.

    Without a gate there are no gates and proxies, in inference no batch statistics: these are empty.
    """
    given = _given_vectors(stats, clf, weights, gate, options)
    level, proxies = given.level, PROXIES[options.signals]
    new = stats.mean.new_empty
    scale, clf_out = new(level.batch, level.channels), new(level.batch, level.features)
    gates = new((level.batch, 2) if proxies else 0)
    signals = new((level.batch, proxies) if proxies else 0)
    if not level.batch:
        norm = stats.mean.new_full((level.features if options.training else 0,), torch.nan)
        return scale, clf_out, gates, signals, norm, norm.clone()
    columns = _columns_of(given, options)
    launch(
        results_of_samples,
        level.batch,
        given.clf,
        given.stats.edges,
        given.gate,
        columns,
        level,
        scale,
        clf_out,
        gates,
        signals,
        **_sample_blocks(level, options),
    )
    if not options.training:
        return scale, clf_out, gates, signals, new(0), new(0)
    return scale, clf_out, gates, signals, columns.batch_mean, columns.batch_var


def level_backward(
    stats: Statistics,
    clf: Tensor,
    weights: InteractionWeights,
    gate: GateWeights | None,
    options: LevelOptions,
    *,
    d_scale: Tensor,
    d_clf_out: Tensor,
    d_gates: Tensor,
    d_proxies: Tensor,
) -> LevelGradient:
    """See ``vectors_backward.level_backward``: ``[B, C]``, ``[B, K]``, ``[B, 2]`` and ``[B, P]`` upstream."""
    given = _given_vectors(stats, clf, weights, gate, options)
    new, level = stats.mean.new_empty, given.level
    d_pooled = new(stats.pooled.shape)
    d_weights = [new(w.shape) for w in (*weights[3:7], *weights[9:])]
    d_gate = [new(w.shape) for w in gate or () if w is not None]
    of_samples, of_columns = _gradients(given, options, d_weights)
    d_stats = [of_columns.d_mean, of_columns.d_variance, of_samples.d_edges, d_pooled]
    result = LevelGradient(d_stats, of_columns.d_clf, d_weights, d_gate)
    if not level.batch:
        for gradient in (*d_weights, *d_gate):
            gradient.zero_()
        return result
    upstream = Upstream(*(d.contiguous() for d in (d_scale, d_clf_out, d_gates, d_proxies)))
    columns = _columns_of(given, options)
    if gate is not None:
        launch(
            gate_gradient,
            level.batch,
            given.clf,
            given.stats.edges,
            given.gate,
            columns,
            level,
            upstream,
            of_samples,
            **_sample_blocks(level, options),
        )
    b_blocks, k_blocks = _blocks(level.batch, _sample_block(level)), _blocks(level.features, NARROW)
    launch(
        columns_gradient,
        k_blocks + _blocks(level.channels, NARROW) * b_blocks,
        given.clf,
        given.stats,
        given.weights,
        given.gate,
        columns,
        level,
        upstream,
        of_samples,
        of_columns,
        SIGNALS=options.signals,
        **_column_blocks(level) | {"BLOCK_I": COLUMNS_OF_A_GRADIENT, "num_warps": WARPS, "num_stages": 1},
    )
    of_inputs, input_tiles = _products_of_inputs(given, of_columns, d_pooled)
    of_weights, weight_tiles = _products_of_weights(given, columns, of_samples, of_columns, result)
    launch(
        products_of_level,
        input_tiles + weight_tiles,
        given.clf,
        given.weights,
        columns,
        level,
        of_columns,
        of_inputs,
        of_weights,
        input_tiles,
        INPUTS=len(of_inputs),
        WEIGHTS=len(of_weights),
        TRAINING=options.training,
        PRECISION=product_precision(),
        BLOCK_B=_sample_block(level, SAMPLES_OF_A_PRODUCT),
        BLOCK_I=WIDE,
        TILE=TILE,
        num_warps=WARPS,
        maxnreg=MOST_REGISTERS,
    )
    return result


def _given_vectors(
    stats: Statistics, clf: Tensor, weights: InteractionWeights, gate: GateWeights | None, options: LevelOptions
) -> Given:
    """The arguments of a level in the form that the kernels take."""
    (channels, hidden), (batch, features) = (stats.mean.shape[1], stats.pooled.shape[1]), clf.shape
    projection = 0 if gate is None or gate.seg_projection is None else gate.seg_projection.shape[0]
    gate_hidden = 0 if gate is None else gate.hidden_bias.shape[0]
    level = Level(batch, channels, features, hidden, projection, gate_hidden, options.strength, options.eps)
    needed = [None, None, None, *_dense(weights[3:])]  # the context's weights belong to the passes
    return Given(
        Statistics(*_dense(stats)),
        clf.contiguous(),
        InteractionWeights(*needed),
        None if gate is None else GateWeights(*_dense(gate)),
        level,
    )


def _columns_of(given: Given, options: LevelOptions) -> Columns:
    """The first two launches."""
    level, weights, new = given.level, given.weights, given.clf.new_empty
    batch, channels, features = level[:3]
    c_blocks, k_blocks = _blocks(channels, NARROW), _blocks(features, NARROW)
    width = {"none": 0, "proxies": level.projection, "variance": 1}[options.signals]
    columns = Columns(
        new(batch, features),
        new(features) if options.training else weights.running_mean,
        new(features) if options.training else weights.running_var,
        new(batch, features),
        new(batch, features),
        new(batch, channels),
        new(batch, channels),
        new(c_blocks, batch, width),
        new(k_blocks, batch, level.projection),
        new(2, k_blocks, batch),
    )
    blocks, b_blocks = _column_blocks(level), _blocks(batch, _sample_block(level))
    launch(
        columns_of_inputs,
        k_blocks + c_blocks * b_blocks,
        given.clf,
        given.stats,
        weights,
        given.gate,
        columns,
        level,
        SIGNALS=options.signals,
        TRAINING=options.training,
        **blocks,
    )
    launch(
        columns_of_context,
        k_blocks * b_blocks,
        given.clf,
        weights,
        given.gate,
        columns,
        level,
        SIGNALS=options.signals,
        **blocks,
    )
    return columns


def _sample_block(level: Level, most: int = 64) -> int:
    """Samples that a product takes at a time."""
    return power_of_two(level.batch, 16, most)


def _column_blocks(level: Level) -> dict[str, Any]:
    """How the kernels that take a block of columns compute."""
    blocks = {"BLOCK_B": _sample_block(level), "BLOCK_O": NARROW, "BLOCK_I": WIDE}
    return {"PRECISION": product_precision(), "num_warps": 4, "maxnreg": MOST_REGISTERS, **blocks}


def _sample_blocks(level: Level, options: LevelOptions) -> dict[str, Any]:
    """How the kernels that take one sample compute."""
    block = power_of_two(max(level.channels, level.features), 16, 1024)
    samples = power_of_two(level.batch, 1, 128)  # the variance gate goes through the parts of all samples
    blocks = {"BLOCK": block, "BLOCK_O": NARROW, "BLOCK_I": WIDE, "BLOCK_T": PARTS, "BLOCK_S": samples}
    return {"SIGNALS": options.signals, "num_warps": 4, "maxnreg": MOST_REGISTERS, **blocks}


def _blocks(size: int, block: int) -> int:
    """How many blocks hold ``size``; ``triton.cdiv`` takes longer than an allocation."""
    return -(-size // block)


def _dense(vectors: tuple[Tensor | None, ...]) -> list[Any]:
    return [None if v is None else v.contiguous() for v in vectors]


def _gradients(given: Given, options: LevelOptions, d_weights: list[Tensor]) -> tuple[OfSamples, OfColumns]:
    """What the third and the fourth launch write; empty where there is none."""
    new, (batch, channels, features, _, projection, gate_hidden) = given.clf.new_empty, given.level[:6]
    signals, gated = options.signals, given.gate is not None
    proxies = signals == "proxies"
    of_samples = OfSamples(
        new(batch, 2 if gated else 0),
        new(batch if gated else 0),
        new(batch, 2 if gated else 0),
        new(batch if proxies else 0),
        new(batch, projection),
        new(batch, projection),
        new(batch, PROXIES[signals]),
        new(batch, gate_hidden),
        new(batch, gate_hidden),
        new(batch, 2 if gated else 0),
    )
    of_columns = OfColumns(
        new(batch, features),
        new(batch, features),
        new(batch, channels),
        new(batch, channels),
        new(batch, features if proxies else 0),
        new(batch, channels if proxies else 0),
        d_weights[2],
        d_weights[3],
        new(batch, channels),
        new((batch, channels) if signals == "variance" else 0),
        new(batch, features),
    )
    return of_samples, of_columns


def _products_of_inputs(given: Given, of: OfColumns, d_pooled: Tensor) -> tuple[tuple[Product, ...], int]:
    weights, level = given.weights, given.level
    rows = _blocks(level.batch, _sample_block(level, SAMPLES_OF_A_PRODUCT))
    products, tiles = [], 0
    for left, weight, out in (
        (of.d_context, weights.dense_weight, d_pooled),
        (of.d_seg_gate, weights.seg_gate_weight, of.d_mean),
        (of.d_clf_context, weights.clf_to_seg_weight, of.d_clf),
    ):
        height, width = weight.shape
        products.append(Product(left, weight, out, out, height, width, tiles))
        tiles += rows * _blocks(width, TILE)
    return tuple(products), tiles


def _products_of_weights(
    given: Given, columns: Columns, of_samples: OfSamples, of: OfColumns, result: LevelGradient
) -> tuple[tuple[Product, ...], int]:
    stats, d_weights, d_gate = given.stats, result.weights, result.gate
    pairs = [
        (of.d_context, stats.pooled, *d_weights[:2]),
        (of.d_clf_gate, columns.context, *d_weights[4:6]),
        (of.d_seg_gate, stats.mean, *d_weights[6:8]),
        (of.d_clf_context, given.clf, *d_weights[8:10]),
    ]
    if len(d_gate) == len(GateWeights._fields):
        # The projections have no bias; nobody reads its gradient.
        unused = d_gate[0].new_empty(d_gate[0].shape[0])
        pairs += [(of_samples.d_seg_side, of.residual, d_gate[0], unused)]
        pairs += [(of_samples.d_clf_side, of.gained, d_gate[1], torch.empty_like(unused))]
    if d_gate:
        pairs += [(of_samples.d_gate_hidden, of_samples.signals, *d_gate[-4:-2])]
        pairs += [(of_samples.d_logits, of_samples.gate_active, *d_gate[-2:])]
    products, tiles = [], 0
    for left, right, out, bias in pairs:
        height, width = out.shape
        products.append(Product(left, right, out, bias, height, width, tiles))
        tiles += _blocks(height, TILE) * _blocks(width, TILE)
    return tuple(products), tiles
