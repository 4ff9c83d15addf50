"""The mathematics of task interaction in plain PyTorch: the oracle every backend is compared with.

``seg`` is the dense stream, ``[B, C, *spatial]`` with one to three spatial dimensions; ``clf`` the vector stream,
``[B, K]``; N the number of positions. Everything that touches the dense tensor is a *pass*: ``statistics`` reads it
once, ``scale_channels`` and ``interpolate`` write the result once. Between the passes only vectors are left.

Sources: BTI-Net (arXiv 2606.29102) and its predecessor (arXiv 2603.01295, equations 1-8).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Pooling = Literal["gap", "softmax"]
Signals = Literal["proxies", "variance"]

# The official code defines the edge energy as zero for maps lower than this; it guards maps of very few pixels.
MIN_EDGE_HEIGHT = 8
# tf.math.l2_normalize bounds the squared norm from below by this.
NORMALISE_EPSILON = 1e-12
VARIANCE_EPSILON = 1e-8


class InteractionWeights(NamedTuple):
    """Weights of the task interaction (TIM). ``h`` is the width of the context, half of C in BTI-Net."""

    context_weight: Tensor  # [h, C], the 1×1 convolution before pooling
    context_bias: Tensor  # [h]
    pool_weight: Tensor | None  # [h], the pooling logit; None: global average pooling
    dense_weight: Tensor  # [K, h]
    dense_bias: Tensor  # [K]
    norm_weight: Tensor  # [K], BatchNorm over the context vector
    norm_bias: Tensor  # [K]
    running_mean: Tensor  # [K]
    running_var: Tensor  # [K]
    clf_gate_weight: Tensor  # [K, K]
    clf_gate_bias: Tensor  # [K]
    seg_gate_weight: Tensor  # [C, C]
    seg_gate_bias: Tensor  # [C]
    clf_to_seg_weight: Tensor  # [C, K]
    clf_to_seg_bias: Tensor  # [C]


class GateWeights(NamedTuple):
    """Weights of the per-image gate. With ``signals="variance"`` the projections are None and there are two inputs."""

    seg_projection: Tensor | None  # [P, C], P = 64 in BTI-Net
    clf_projection: Tensor | None  # [P, K]
    hidden_weight: Tensor  # [H, 3] or [H, 2], H = 32 in BTI-Net
    hidden_bias: Tensor  # [H]
    output_weight: Tensor  # [2, H]
    output_bias: Tensor  # [2]


class Context(NamedTuple):
    """The weights that ``statistics`` needs for the pooled context; see ``InteractionWeights``."""

    weight: Tensor
    bias: Tensor
    pool_weight: Tensor | None


class Statistics(NamedTuple):
    """What one read of the dense tensor yields. Statistics that were not asked for are empty tensors."""

    mean: Tensor  # [B, C]
    variance: Tensor  # [B, C], population variance over the positions
    edges: Tensor  # [B], Σ|forward differences| / (C N), over all spatial axes; zero where there is no neighbour
    pooled: Tensor  # [B, h], ReLU(W seg + w0) pooled over the positions
    log_sum_exp: Tensor  # [B], of the pooling logits (softmax pooling only)
    active: Tensor  # uint8 [B, N, ⌈h/8⌉], what `pack_bits` makes of where the ReLU passed (average pooling only)


class Enhanced(NamedTuple):
    """What TIM computes from the vectors."""

    modulation: Tensor  # [B, C], μ: the enhanced dense stream is seg · μ
    clf: Tensor  # [B, K]
    batch_mean: Tensor  # [K], of the context before BatchNorm
    batch_var: Tensor  # [K], population variance of the same


class Gates(NamedTuple):
    """What the gate computes from the vectors."""

    gates: Tensor  # [B, 2]: share of the interaction that reaches seg, clf
    proxies: Tensor  # [B, 3]: alignment, seg energy, clf energy; or [B, 2]: normalised seg, clf variance


def statistics(
    seg: Tensor, context: Context | None, *, variance: bool, edges: bool, active: bool = False
) -> Statistics:
    """Read the dense tensor once; see ``Statistics``. ``context=None``: no pooled context.

    ``variance``, ``edges``, ``active``: whether these statistics are wanted.
    """
    flat = seg.flatten(2)
    pooled = log_sum_exp = seg.new_empty(0)
    bits = seg.new_empty(0, dtype=torch.uint8)
    if context is not None:
        hidden = F.relu(context.weight @ flat + context.bias[:, None])
        if context.pool_weight is None:
            pooled = hidden.mean(2)
            if active:
                bits = pack_bits((hidden > 0).transpose(1, 2))
        else:
            logits = torch.einsum("j,bjn->bn", context.pool_weight, hidden)
            log_sum_exp = logits.logsumexp(1)
            pooled = torch.einsum("bjn,bn->bj", hidden, torch.softmax(logits, 1))
    return Statistics(
        flat.mean(2),
        flat.var(2, unbiased=False) if variance else seg.new_empty(0),
        edge_energy(seg) if edges else seg.new_empty(0),
        pooled,
        log_sum_exp,
        bits,
    )


def pack_bits(flags: Tensor) -> Tensor:
    """Booleans ``[..., h]`` as bits: bit ``j % 8`` of byte ``j // 8`` of ``[..., ⌈h/8⌉]``, the rest zero."""
    padded = F.pad(flags.to(torch.uint8), (0, -flags.shape[-1] % 8)).unflatten(-1, (-1, 8))
    places = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=flags.device)
    return (padded * places).sum(-1, dtype=torch.uint8)


def edge_energy(seg: Tensor) -> Tensor:
    """Mean absolute forward difference, summed over the spatial axes: ``[B, C, *spatial]`` → ``[B]``."""
    total = seg.new_zeros(seg.shape[0])
    for axis in range(2, seg.ndim):
        total = total + seg.diff(dim=axis).abs().flatten(1).sum(1)
    return total / max(seg[0].numel() if len(seg) else 1, 1)


def scale_channels(seg: Tensor, scale: Tensor) -> Tensor:
    """``seg · scale[b, c]``."""
    return seg * over_space(scale, seg)


def interpolate(base: Tensor, enhanced: Tensor, weight: Tensor) -> Tensor:
    """``base + weight[b] · (enhanced − base)``."""
    return base + over_space(weight[:, None], base) * (enhanced - base)


def channel_dot(grad: Tensor, seg: Tensor) -> Tensor:
    """Sum of ``grad · seg`` over the positions: ``[B, C]``."""
    return (grad * seg).flatten(2).sum(2)


def over_space(vector: Tensor, dense: Tensor) -> Tensor:
    """Append spatial axes to ``[B, C]`` so that it broadcasts over ``dense``."""
    return vector.reshape(*vector.shape, *[1] * (dense.ndim - 2))


def enhance(
    stats: Statistics,
    clf: Tensor,
    weights: InteractionWeights,
    *,
    strength: float,
    training: bool,
    eps: float,
) -> Enhanced:
    """TIM's vector mathematics: equations (1)-(4) of 2603.01295, from the statistics of ``seg``."""
    hidden = F.relu(F.linear(stats.pooled, weights.dense_weight, weights.dense_bias))
    if training:
        batch_var, batch_mean = torch.var_mean(hidden, 0, unbiased=False)
    else:
        batch_mean, batch_var = weights.running_mean, weights.running_var
    context = (hidden - batch_mean) * torch.rsqrt(batch_var + eps) * weights.norm_weight + weights.norm_bias
    clf_gate = torch.sigmoid(F.linear(context, weights.clf_gate_weight, weights.clf_gate_bias))
    seg_gate = torch.sigmoid(F.linear(stats.mean, weights.seg_gate_weight, weights.seg_gate_bias))
    clf_context = torch.sigmoid(F.linear(clf, weights.clf_to_seg_weight, weights.clf_to_seg_bias))
    return Enhanced(1 + strength * seg_gate * clf_context, clf + clf_gate * context, batch_mean, batch_var)


def proxy_gates(seg_residual: Tensor, edges: Tensor, clf: Tensor, clf_enhanced: Tensor, weights: GateWeights) -> Gates:
    """BTI-Net's gate: two sigmoids of (alignment, seg energy, clf energy).

    ``seg_residual``: mean over the positions of enhanced − base, ``[B, C]``; ``edges``: of the base, ``[B]``.
    """
    assert weights.seg_projection is not None
    assert weights.clf_projection is not None
    alignment = (
        _normalise(F.linear(seg_residual, weights.seg_projection))
        * _normalise(F.linear(clf_enhanced - clf, weights.clf_projection))
    ).sum(1)
    clf_energy = torch.log1p(_variance(clf_enhanced))
    proxies = torch.stack((alignment, edges, clf_energy), 1)
    return Gates(torch.sigmoid(_gate_network(proxies, weights)), proxies)


def variance_gates(seg_variance: Tensor, clf_enhanced: Tensor, weights: GateWeights) -> Gates:
    """The predecessor's gate: softmax over two variances, each relative to its mean in the batch (equations 6, 7).

    ``seg_variance``: variance over the positions of the enhanced dense stream, ``[B, C]``.
    """
    signals = torch.stack((seg_variance.mean(1), _variance(clf_enhanced)), 1)
    proxies = signals / (signals.mean(0, keepdim=True) + VARIANCE_EPSILON)
    return Gates(torch.softmax(_gate_network(proxies, weights), 1), proxies)


def gate_of_level(stats: Statistics, enhanced: Enhanced, clf: Tensor, weights: GateWeights, signals: Signals) -> Gates:
    """The gate between a level and its own enhancement, where seg enhanced = seg · μ needs no second tensor."""
    if signals == "proxies":
        residual = (enhanced.modulation - 1) * stats.mean
        return proxy_gates(residual, stats.edges, clf, enhanced.clf, weights)
    return variance_gates(enhanced.modulation.square() * stats.variance, enhanced.clf, weights)


def has_edge_energy(seg: Tensor) -> bool:
    """Whether the edge energy is defined for a map of this height (the first spatial dimension)."""
    return seg.shape[2] >= MIN_EDGE_HEIGHT


def _gate_network(signals: Tensor, weights: GateWeights) -> Tensor:
    hidden = F.relu(F.linear(signals, weights.hidden_weight, weights.hidden_bias))
    return F.linear(hidden, weights.output_weight, weights.output_bias)


def _normalise(vector: Tensor) -> Tensor:
    return vector * torch.rsqrt(vector.square().sum(1, keepdim=True).clamp_min(NORMALISE_EPSILON))


def _variance(vector: Tensor) -> Tensor:
    """Population variance of each row; unlike ``Tensor.var`` silent about an empty batch."""
    return (vector - vector.mean(1, keepdim=True)).square().mean(1)
