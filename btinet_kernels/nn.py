"""Modules on top of the operators: the building blocks of BTI-Net, and drop-ins for other multi-task networks.

Layouts: dense maps are ``[B, C, *spatial]``, vectors ``[B, K]``. Modules that hold convolutions take ``spatial_dims``
(1, 2 or 3, default 2); those that only hold vectors work for any of them. New weights are drawn as Keras draws them
(Glorot uniform, zero biases), because the official networks were trained from there.

Source: arXiv 2606.29102 (BTI-Net) and 2603.01295 (its predecessor).
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from btinet_kernels.accelerated import has_hooks
from btinet_kernels.backends import choose
from btinet_kernels.dropout.op import fused_dropout
from btinet_kernels.gates.attention_op import fused_joint_projection, fused_position_gate
from btinet_kernels.gates.attention_reference import JointWeights
from btinet_kernels.gates.dual_path_op import fused_dual_path_attention
from btinet_kernels.gates.reference import KERNEL_WIDTH, DualPathWeights
from btinet_kernels.gates.squeeze_excite_op import fused_squeeze_excite
from btinet_kernels.gates.squeeze_excite_reference import Activation, Gate, SqueezeExciteWeights
from btinet_kernels.interaction.op import InteractionResult, fused_task_interaction, fused_tim, fused_upa
from btinet_kernels.interaction.reference import GateWeights, InteractionWeights, Pooling, Signals
from btinet_kernels.multi_scale.op import MergeCache, fused_multi_scale
from btinet_kernels.multi_scale.reference import ScaleWeights
from btinet_kernels.separable.op import fused_separable_conv, is_left_to_library
from btinet_kernels.separable.reference import BatchNormWeights, SeparableWeights

NORM_EPSILON = 1e-3  # Keras's BatchNormalization defaults; its momentum 0.99 is PyTorch's 0.01
NORM_MOMENTUM = 0.01

_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_INTERPOLATION = {1: "linear", 2: "bilinear", 3: "trilinear"}


class TaskInteractionModule(nn.Module):
    """Bidirectional task interaction (TIM): ``(seg [B, C, *spatial], clf [B, K])`` → both, enhanced.

    Args:
        seg_channels: C.
        clf_channels: K.
        strength: τ; channels of seg are amplified by at most 1 + τ.
        pool: how seg context is pooled: ``"gap"`` (the official code) or ``"softmax"`` (a learned logit per position,
            the papers' words; it starts equal to ``"gap"``).
    """

    def __init__(self, seg_channels: int, clf_channels: int, strength: float = 0.7, pool: Pooling = "gap") -> None:
        super().__init__()
        if pool not in ("gap", "softmax"):
            raise ValueError(f"pool must be 'gap' or 'softmax', got {pool!r}.")
        width = max(1, seg_channels // 2)
        self.strength = strength
        self.context = nn.Linear(seg_channels, width)
        self.pool_weight = nn.Parameter(torch.zeros(width)) if pool == "softmax" else None
        self.dense = nn.Linear(width, clf_channels)
        self.norm = nn.BatchNorm1d(clf_channels, eps=NORM_EPSILON, momentum=NORM_MOMENTUM)
        self.clf_gate = nn.Linear(clf_channels, clf_channels)
        self.seg_gate = nn.Linear(seg_channels, seg_channels)
        self.clf_to_seg = nn.Linear(clf_channels, seg_channels)
        initialise(self)

    def weights(self) -> InteractionWeights:
        """The parameters and buffers in the form the functions take."""
        norm = self.norm
        assert norm.running_mean is not None
        assert norm.running_var is not None
        return InteractionWeights(
            self.context.weight,
            self.context.bias,
            self.pool_weight,
            self.dense.weight,
            self.dense.bias,
            norm.weight,
            norm.bias,
            norm.running_mean,
            norm.running_var,
            self.clf_gate.weight,
            self.clf_gate.bias,
            self.seg_gate.weight,
            self.seg_gate.bias,
            self.clf_to_seg.weight,
            self.clf_to_seg.bias,
        )

    def forward(self, seg: Tensor, clf: Tensor) -> tuple[Tensor, Tensor]:
        """``fused_tim``; in training mode it updates the running statistics of ``norm``."""
        norm = self.norm
        return fused_tim(
            seg,
            clf,
            self.weights(),
            strength=self.strength,
            training=norm.training,
            momentum=_momentum(norm),
            eps=norm.eps,
        )


class UncertaintyProxyAttention(nn.Module):
    """Per-image gate (UPA) between base and enhanced features of both streams.

    Its inputs are statistics of activations, not estimates of uncertainty, in spite of the name the papers gave it.

    Args:
        seg_channels: C.
        clf_channels: K.
        signals: ``"proxies"``: alignment, seg energy and clf energy feed two sigmoids (BTI-Net); ``"variance"``: two
            batch-relative variances feed a softmax (its predecessor).
        projection: width of the space in which the two streams' changes are aligned.
        hidden: width of the gate's network.
    """

    def __init__(
        self,
        seg_channels: int,
        clf_channels: int,
        signals: Signals = "proxies",
        projection: int = 64,
        hidden: int = 32,
    ) -> None:
        super().__init__()
        if signals not in ("proxies", "variance"):
            raise ValueError(f"signals must be 'proxies' or 'variance', got {signals!r}.")
        self.signals: Signals = signals
        proxies = signals == "proxies"
        self.seg_projection = nn.Linear(seg_channels, projection, bias=False) if proxies else None
        self.clf_projection = nn.Linear(clf_channels, projection, bias=False) if proxies else None
        self.hidden = nn.Linear(3 if proxies else 2, hidden)
        self.output = nn.Linear(hidden, 2)
        initialise(self)

    def weights(self) -> GateWeights:
        """The parameters in the form the functions take."""
        return GateWeights(
            None if self.seg_projection is None else self.seg_projection.weight,
            None if self.clf_projection is None else self.clf_projection.weight,
            self.hidden.weight,
            self.hidden.bias,
            self.output.weight,
            self.output.bias,
        )

    def forward(
        self, seg_base: Tensor, seg_enhanced: Tensor, clf_base: Tensor, clf_enhanced: Tensor
    ) -> InteractionResult:
        """``fused_upa``: ``base + gate · (enhanced − base)`` for both streams, with gates and proxies."""
        return fused_upa(seg_base, seg_enhanced, clf_base, clf_enhanced, self.weights(), signals=self.signals)


class TaskInteractionLevel(nn.Module):
    """One decoder level of BTI-Net: TIM and its gate, fused into two passes over ``seg``.

    ``level(seg, clf)`` returns ``(seg, clf, gates, proxies)``. The submodules ``tim`` and ``upa`` are ordinary
    ``TaskInteractionModule`` and ``UncertaintyProxyAttention``; arguments as there.
    """

    def __init__(
        self,
        seg_channels: int,
        clf_channels: int,
        strength: float = 0.7,
        pool: Pooling = "gap",
        signals: Signals = "proxies",
    ) -> None:
        super().__init__()
        self.tim = TaskInteractionModule(seg_channels, clf_channels, strength, pool)
        self.upa = UncertaintyProxyAttention(seg_channels, clf_channels, signals)

    def forward(self, seg: Tensor, clf: Tensor) -> InteractionResult:
        """``fused_task_interaction``; in training mode it updates the running statistics of ``tim.norm``."""
        norm = self.tim.norm
        return fused_task_interaction(
            seg,
            clf,
            self.tim.weights(),
            self.upa.weights(),
            signals=self.upa.signals,
            strength=self.tim.strength,
            training=norm.training,
            momentum=_momentum(norm),
            eps=norm.eps,
        )


class SeparableConv(nn.Sequential):
    """Depthwise convolution without bias, then a pointwise one with bias; the size is kept.

    With kernels of width 3 it is ``fused_separable_conv``, which can do a ReLU and a BatchNorm that follow as well.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        dilation: int = 1,
        spatial_dims: int = 2,
    ) -> None:
        convolution = _CONVOLUTIONS[spatial_dims]
        padding = dilation * (kernel_size // 2)
        super().__init__()
        self.depthwise = convolution(
            in_channels,
            in_channels,
            kernel_size,
            padding=padding,
            dilation=dilation,
            groups=in_channels,
            bias=False,
        )
        self.pointwise = convolution(in_channels, out_channels, 1)

    def forward(self, x: Tensor, relu: bool = False, norm: nn.Module | None = None) -> Tensor:
        """Apply the convolutions to ``[B, C_in, …]``, then, if asked, a ReLU and a BatchNorm."""
        norm = None if isinstance(norm, nn.Identity) else norm  # folded away
        weights = SeparableWeights(self.depthwise.weight, self.pointwise.weight, self.pointwise.bias)
        known = self.depthwise.kernel_size[0] == 3 and (norm is None or _is_plain(norm))
        if not known or is_left_to_library(x, weights):
            out = super().forward(x)
            out = F.relu(out) if relu else out
            return out if norm is None else norm(out)
        dilation = self.depthwise.dilation[0]
        if norm is None:
            return fused_separable_conv(x, weights, dilation=dilation, relu=relu)
        assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
        if norm.training and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
        of_norm = BatchNormWeights(norm.weight, norm.bias, norm.running_mean, norm.running_var)  # type: ignore[arg-type]
        options: dict[str, Any] = {"training": norm.training, "momentum": norm.momentum, "eps": norm.eps}
        return fused_separable_conv(x, weights, dilation=dilation, relu=relu, norm=of_norm, **options)


class MultiScaleContextFusion(nn.Module):
    """Three separable convolutions of dilation 1, 2 and 4, weighted per image and fused: ``[B, C, *spatial]`` → same.

    Args:
        channels: C.
        reduction: the network that weighs the scales has C // reduction hidden units.
        spatial_dims: 1, 2 or 3.

    Source: arXiv 2603.01295, equations (9), (10), without the inner residual that only its README mentions.
    """

    def __init__(self, channels: int, reduction: int = 8, spatial_dims: int = 2) -> None:
        super().__init__()
        self.scales = nn.ModuleList(
            SeparableConv(channels, channels, dilation=dilation, spatial_dims=spatial_dims) for dilation in (1, 2, 4)
        )
        hidden = max(1, channels // reduction)
        self.scale_attention = nn.Sequential(
            nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, 3), nn.Softmax(1)
        )
        self.fusion = _CONVOLUTIONS[spatial_dims](channels, channels, 1)
        self._cache = MergeCache()
        initialise(self)

    def keep_merged(self) -> None:
        """Multiply the 1×1 convolutions once for all inferences to come, even of few positions; takes 3 C² values."""
        self._cache = MergeCache(calls=math.inf)

    def weights(self) -> ScaleWeights:
        """The parameters as ``fused_multi_scale`` takes them."""
        scales = cast("list[SeparableConv]", list(self.scales))
        hidden, _, share, _ = cast("list[nn.Linear]", list(self.scale_attention))
        depthwise, pointwise = [s.depthwise.weight for s in scales], [s.pointwise.weight for s in scales]
        biases = [s.pointwise.bias for s in scales]
        attention = [hidden.weight, hidden.bias, share.weight, share.bias]
        return ScaleWeights._make([*depthwise, *pointwise, *biases, *attention, self.fusion.weight, self.fusion.bias])

    def forward(self, x: Tensor) -> Tensor:
        """``fused_multi_scale`` of ``x``."""
        return fused_multi_scale(x, self.weights(), self._cache)


class DualPathAttention(nn.Module):
    """Channel gate times spatial gate: ``[B, C, *spatial]`` → same.

    The spatial gate is a convolution of width 7 over the channels' maximum and mean.
    """

    def __init__(self, channels: int, spatial_dims: int = 2) -> None:
        super().__init__()
        hidden = max(8, channels // 16)
        self.channel_path = nn.Sequential(
            nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels), nn.Sigmoid()
        )
        self.spatial_path = _CONVOLUTIONS[spatial_dims](2, 1, KERNEL_WIDTH, padding=KERNEL_WIDTH // 2)
        initialise(self)

    def weights(self) -> DualPathWeights:
        """The parameters in the form the function takes."""
        hidden, _, gate, _ = self.channel_path
        spatial = self.spatial_path
        return DualPathWeights(hidden.weight, hidden.bias, gate.weight, gate.bias, spatial.weight, spatial.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``fused_dual_path_attention``: gate ``x``; with a residual, ``ReLU(gated x + residual)``."""
        return fused_dual_path_attention(x, self.weights(), residual)


class SqueezeExcite(nn.Module):
    """Channel gate from the channels' means (arXiv 1709.01507): ``[B, C, *spatial]`` → same.

    Args:
        channels: C.
        reduced: width between the two layers.
        act: ``"relu"`` or ``"silu"``.
        gate: ``"sigmoid"`` or ``"hardsigmoid"``.
    """

    def __init__(self, channels: int, reduced: int, act: Activation = "relu", gate: Gate = "sigmoid") -> None:
        super().__init__()
        self.act: Activation = act
        self.gate: Gate = gate
        self.reduce = nn.Linear(channels, reduced)
        self.expand = nn.Linear(reduced, channels)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """``fused_squeeze_excite``."""
        reduce, expand = self.reduce, self.expand
        weights = SqueezeExciteWeights(reduce.weight, reduce.bias, expand.weight, expand.bias)
        return fused_squeeze_excite(x, weights, act=self.act, gate=self.gate)


class Dropout(nn.Dropout):
    """``nn.Dropout`` that computes with ``fused_dropout``: in parallel, and without a mask in memory.

    Where no fast backend serves, it is ``nn.Dropout``, whose random numbers are others.
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__(p)

    def forward(self, x: Tensor) -> Tensor:
        """Drop elements of ``x`` in training mode."""
        if self.training and choose("fused_dropout", x) == "reference":
            return super().forward(x)
        return fused_dropout(x, self.p, training=self.training)


class ResidualBlock(nn.Module):
    """Two separable convolutions, multi-scale fusion, optional attention, residual: ``[B, C_in, …]`` → ``[B, C, …]``.

    Order as in the official code: SepConv, ReLU, BatchNorm, SepConv, BatchNorm, fusion, attention, + input, ReLU.

    Args:
        in_channels: channels of the input; the residual is projected when they differ from ``channels``.
        channels: C.
        attention: whether ``DualPathAttention`` follows the fusion.
        spatial_dims: 1, 2 or 3.
        multi_scale: whether there is the fusion.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        attention: bool = True,
        spatial_dims: int = 2,
        multi_scale: bool = True,
    ) -> None:
        super().__init__()
        norm = _NORMS[spatial_dims]
        self.conv1 = SeparableConv(in_channels, channels, spatial_dims=spatial_dims)
        self.norm1 = norm(channels, eps=NORM_EPSILON, momentum=NORM_MOMENTUM)
        self.conv2 = SeparableConv(channels, channels, spatial_dims=spatial_dims)
        self.norm2 = norm(channels, eps=NORM_EPSILON, momentum=NORM_MOMENTUM)
        self.multi_scale = MultiScaleContextFusion(channels, spatial_dims=spatial_dims) if multi_scale else None
        self.attention = DualPathAttention(channels, spatial_dims) if attention else None
        self.projection = _CONVOLUTIONS[spatial_dims](in_channels, channels, 1) if in_channels != channels else None
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        out = self.conv1(x, relu=True, norm=self.norm1)
        out = self.conv2(out, norm=self.norm2)
        if self.multi_scale is not None:
            out = self.multi_scale(out)
        residual = x if self.projection is None else self.projection(x)
        return F.relu(out + residual) if self.attention is None else self.attention(out, residual)


class AttentionGate(nn.Module):
    """Gate a skip connection by what the decoder asks for: ``(x [B, C_x, …], g [B, C_g, …])`` → ``x · gate``.

    Args:
        skip_channels: C_x.
        gating_channels: C_g.
        inter_channels: width of the space in which the two are compared.
        spatial_dims: 1, 2 or 3.

    ``g`` is resized linearly where its size differs from that of ``x``.
    """

    def __init__(self, skip_channels: int, gating_channels: int, inter_channels: int, spatial_dims: int = 2) -> None:
        super().__init__()
        convolution = _CONVOLUTIONS[spatial_dims]
        self.skip_transform = convolution(skip_channels, inter_channels, 1)
        self.gating_transform = convolution(gating_channels, inter_channels, 1)
        self.context = nn.Sequential(
            SeparableConv(inter_channels, inter_channels, dilation=1, spatial_dims=spatial_dims),
            SeparableConv(inter_channels, inter_channels, dilation=2, spatial_dims=spatial_dims),
            convolution(inter_channels, 1, 1),
            nn.Sigmoid(),
        )
        initialise(self)

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        """Gate ``x`` by ``g``."""
        skip, gating = self.skip_transform, self.gating_transform
        if g.shape[2:] == x.shape[2:]:
            assert skip.bias is not None
            assert gating.bias is not None
            hidden = fused_joint_projection(x, g, JointWeights(skip.weight, skip.bias, gating.weight, gating.bias))
        else:
            resized = F.interpolate(gating(g), x.shape[2:], mode=_INTERPOLATION[x.ndim - 2], align_corners=False)
            hidden = F.relu(skip(x) + resized)
        gate = cast("nn.Conv2d", self.context[2])
        assert gate.bias is not None
        return fused_position_gate(x, self.context[:2](hidden), gate.weight, gate.bias)


def initialise(module: nn.Module) -> None:
    """Draw every convolution and linear layer of ``module`` as Keras does: Glorot uniform, zero biases."""
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _momentum(norm: nn.BatchNorm1d) -> float:
    if norm.momentum is None:
        raise ValueError("the interaction's BatchNorm needs a momentum; cumulative averages are not supported.")
    return norm.momentum


def _is_plain(norm: nn.Module) -> bool:
    """Whether a BatchNorm does nothing but what ``fused_separable_conv`` does, and nobody watches it."""
    if not isinstance(norm, tuple(_NORMS.values())) or type(norm) not in _NORMS.values() or has_hooks(norm):
        return False
    return bool(norm.affine and norm.track_running_stats and norm.momentum is not None)


def _over_space(vector: Tensor, dense: Tensor) -> Tensor:
    return vector.reshape(*vector.shape, *[1] * (dense.ndim - 2))
