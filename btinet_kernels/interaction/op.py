"""How autograd sees task interaction: schemas, fake kernels, backward formulas, and the public functions.

Each operator is one custom op: passes over the dense tensor around a function of vectors. The passes come from a
backend; the vector function is in ``reference.py``, its gradient in ``vectors_backward.py``. Double backward is served
by the reference (``use_backend("reference")``); through a fused operator it raises.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from btinet_kernels.backends import choose
from btinet_kernels.interaction import reference
from btinet_kernels.interaction.level_op import differentiable_level, level_forward
from btinet_kernels.interaction.passes_op import LevelOptions, pack
from btinet_kernels.interaction.reference import GateWeights, InteractionWeights, Signals
from btinet_kernels.interaction.upa_op import interpolate_forward, interpolation


class InteractionResult(NamedTuple):
    """What a gated interaction returns."""

    seg: Tensor  # [B, C, *spatial]
    clf: Tensor  # [B, K]
    gates: Tensor  # [B, 2]: how much of the interaction reached seg, clf
    proxies: Tensor  # [B, 3] or [B, 2]: the signals that fed the gate


def fused_tim(
    seg: Tensor,
    clf: Tensor,
    weights: InteractionWeights,
    *,
    strength: float = 0.7,
    training: bool = False,
    momentum: float = 0.01,
    eps: float = 1e-3,
) -> tuple[Tensor, Tensor]:
    """Task interaction (TIM): seg features are amplified per channel, clf features get pooled seg context.

    Args:
        seg: dense stream, ``[B, C, *spatial]``, one to three spatial dimensions, any strides.
        clf: vector stream, ``[B, K]``.
        weights: see ``InteractionWeights``; they may stay float32 under half-precision activations.
        strength: τ, the largest possible amplification minus one.
        training: normalise the context by batch statistics, and update ``weights.running_mean`` and ``running_var`` in
            place, as ``torch.nn.functional.batch_norm`` does (the variance uncorrected, as Keras does).
        momentum: share of the new batch in the running statistics.
        eps: BatchNorm's ε.

    Returns:
        The enhanced ``seg`` and ``clf``, of the shapes, dtypes and memory formats of the inputs.

    Source: arXiv 2603.01295, equations (1)-(5); arXiv 2606.29102.
    """
    options = LevelOptions("none", strength, training, eps)
    result = _interact("fused_tim", seg, clf, weights, None, options, momentum)
    return result.seg, result.clf


def fused_task_interaction(
    seg: Tensor,
    clf: Tensor,
    weights: InteractionWeights,
    gate: GateWeights,
    *,
    signals: Signals = "proxies",
    strength: float = 0.7,
    training: bool = False,
    momentum: float = 0.01,
    eps: float = 1e-3,
) -> InteractionResult:
    """TIM followed by its per-image gate (UPA), in two passes over ``seg``.

    Equal to ``fused_upa(seg, seg', clf, clf', gate)`` of ``seg', clf' = fused_tim(seg, clf, weights)``, without ever
    forming the enhanced dense tensor. Arguments as in ``fused_tim`` and ``fused_upa``.

    Source: arXiv 2606.29102 (``signals="proxies"``); arXiv 2603.01295, equations (6)-(8) (``"variance"``).
    """
    _check_signals(signals, gate)
    options = LevelOptions(signals, strength, training, eps)
    return _interact("fused_task_interaction", seg, clf, weights, gate, options, momentum)


def fused_upa(
    seg_base: Tensor,
    seg_enhanced: Tensor,
    clf_base: Tensor,
    clf_enhanced: Tensor,
    gate: GateWeights,
    *,
    signals: Signals = "proxies",
) -> InteractionResult:
    """Gate between base and enhanced features, wherever they come from: ``base + w[b] · (enhanced − base)``.

    Args:
        seg_base: ``[B, C, *spatial]``; the edge energy is measured on it.
        seg_enhanced: of the same shape and dtype.
        clf_base: ``[B, K]``.
        clf_enhanced: ``[B, K]``.
        gate: see ``GateWeights``.
        signals: ``"proxies"``: two sigmoids of alignment, seg and clf energy (BTI-Net); ``"variance"``: a softmax of
            two variances relative to their batch means (its predecessor).
    """
    _check_streams(seg_base, clf_base)
    if seg_enhanced.shape != seg_base.shape or seg_enhanced.dtype != seg_base.dtype:
        raise ValueError(
            f"fused_upa: seg_enhanced is {_describe(seg_enhanced)}, but seg_base is {_describe(seg_base)}; "
            "they must agree in shape and dtype."
        )
    _check_signals(signals, gate)
    if choose("fused_upa", seg_base, seg_enhanced) == "reference":
        outputs = interpolate_forward(reference, seg_base, seg_enhanced, clf_base, clf_enhanced, gate, signals)
    else:
        outputs = interpolation(seg_base, seg_enhanced, clf_base, clf_enhanced, *gate, signals)
    return InteractionResult(*outputs[:4])


def _interact(
    operator: str,
    seg: Tensor,
    clf: Tensor,
    weights: InteractionWeights,
    gate: GateWeights | None,
    options: LevelOptions,
    momentum: float,
) -> InteractionResult:
    _check_streams(seg, clf)
    read = weights
    if options.training:
        # The running statistics are not read, and they change before the backward runs: they stay outside.
        read = weights._replace(running_mean=seg.new_empty(0), running_var=seg.new_empty(0))
    packed = pack(read, gate)
    if choose(operator, seg) == "reference":
        outputs = level_forward(reference, seg, clf, packed, options)
    else:
        outputs = differentiable_level(seg, clf, *packed, *options)
    if options.training:
        with torch.no_grad():
            weights.running_mean.lerp_(outputs[4].to(weights.running_mean.dtype), momentum)
            weights.running_var.lerp_(outputs[5].to(weights.running_var.dtype), momentum)
    return InteractionResult(*outputs[:4])


def _check_streams(seg: Tensor, clf: Tensor) -> None:
    if not 3 <= seg.ndim <= 5 or clf.ndim != 2 or seg.shape[0] != clf.shape[0]:
        raise ValueError(
            f"seg must be [B, C, *spatial] with one to three spatial dimensions and clf [B, K] with the same B; "
            f"got {_describe(seg)} and {_describe(clf)}."
        )


def _check_signals(signals: str, gate: GateWeights) -> None:
    if signals not in ("proxies", "variance"):
        raise ValueError(f"signals must be 'proxies' or 'variance', got {signals!r}.")
    if (gate.seg_projection is None) != (signals == "variance"):
        raise ValueError(
            f"signals={signals!r} does not fit the gate's weights: projections are "
            f"{'missing' if gate.seg_projection is None else 'given'}."
        )


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
