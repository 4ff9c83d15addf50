"""BTI-Net: an encoder, a decoder whose levels let segmentation and classification talk to each other, two heads.

Source: arXiv 2606.29102 and its official code. Levels are named d1 (coarsest) to d4 (finest).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from btinet.errors import UserError
from btinet.models.encoder import ExpansionEncoder, PyramidEncoder
from btinet.models.fusion import fold_batchnorms
from btinet_kernels import accelerate, fused_upsample_twice, restore
from btinet_kernels.interaction.reference import Pooling, Signals
from btinet_kernels.nn import (
    NORM_EPSILON,
    NORM_MOMENTUM,
    AttentionGate,
    Dropout,
    MultiScaleContextFusion,
    ResidualBlock,
    TaskInteractionLevel,
    TaskInteractionModule,
    initialise,
)

Interaction = Literal["none", "fixed", "gated"]
INTERACTIONS = ("none", "fixed", "gated")
Directions = Literal["both", "seg_to_clf", "clf_to_seg"]
DIRECTIONS = ("both", "seg_to_clf", "clf_to_seg")
Tasks = Literal["both", "segmentation", "classification"]
TASKS = ("both", "segmentation", "classification")

OFFICIAL_DECODER_CHANNELS = (384, 192, 96, 48)
MIN_SIZE = 32
PROXY_NAMES = {
    "proxies": ("alignment", "seg_energy", "clf_energy"),
    "variance": ("seg_variance", "clf_variance"),
}


class BTINetOutput(NamedTuple):
    """What the network returns: logits, never probabilities.

    ``gates`` and ``proxies`` hold one entry per gated level, ``"d1"`` (coarsest) upwards; levels without a gate are
    absent. The logits of a task that the network does not have are empty: ``[B, 0, H, W]`` and ``[B, 0]``.
    """

    seg_logits: Tensor  # [B, mask classes, H, W], at the size of the input; the background's is 0
    cls_logits: Tensor  # [B, classes]
    gates: dict[str, Tensor]  # level → [B, 2]: share of the interaction that reaches seg, clf
    proxies: dict[str, Tensor]  # level → [B, 3] or [B, 2], see PROXY_NAMES


def class_numbers(seg_logits: Tensor, threshold: float = 0.0) -> Tensor:
    """Which class of mask each pixel shows.

    Args:
        seg_logits: ``[B, K, H, W]``.
        threshold: the largest logit must exceed it; else the pixel is background.

    Returns:
        uint8 ``[B, H, W]``: 0 for the background, or the number of a class, from 1.
    """
    highest, channel = seg_logits.max(1)
    return torch.where(highest > threshold, channel + 1, 0).to(torch.uint8)


@dataclass(frozen=True)
class BTINetConfig:
    """Everything that determines the architecture; stored in the checkpoint.

    Args:
        backbone: timm's name of the encoder.
        num_classes: classes of the image classification.
        in_chans: channels of the image, 1 or 3.
        decoder_channels: one entry per level, coarse to fine; None: the official 384, 192, 96, 48, but never more than
            the skip connection of that level has.
        interaction: ``"none"``, ``"fixed"`` (TIM without a gate) or ``"gated"``, for all levels or one per level.
        signals: what feeds the gates: ``"proxies"`` (BTI-Net) or ``"variance"`` (its predecessor).
        pool: how the context is pooled, ``"gap"`` or ``"softmax"``.
        strength: τ of the interaction.
        clf_channels: width of the vector stream.
        dropout: probability, after each decoder block and before the last classification layer.
        mask_classes: what is segmented, beside the background.
        multi_scale: whether residual blocks have multi-scale context fusion.
        directions: ``"both"``; or ``"seg_to_clf"`` or ``"clf_to_seg"``: the interaction changes the second stream
            alone, the first leaves the level as it came. Gates see what either change would have been.
        tasks: ``"both"``; or ``"segmentation"`` or ``"classification"``: a network without the other's layers, and so
            without interaction.
    """

    backbone: str
    num_classes: int
    in_chans: int = 3
    decoder_channels: tuple[int, ...] | None = None
    interaction: Interaction | tuple[Interaction, ...] = "gated"
    signals: Signals = "proxies"
    pool: Pooling = "gap"
    strength: float = 0.7
    clf_channels: int = 256
    dropout: float = 0.3
    mask_classes: int = 1
    multi_scale: bool = True
    directions: Directions = "both"
    tasks: Tasks = "both"

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BTINetConfig:
        """The inverse of ``to_dict``; raises ``TypeError`` for unknown or missing keys."""
        lists = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
        return cls(**{**values, **lists})


class UpsampleTwice(nn.ConvTranspose2d):
    """Transposed 3×3 convolution of stride 2 that doubles the size, aligned as TensorFlow's ``same`` padding."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, stride=2)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """``[B, C_in, H, W]`` → ``[B, C_out, 2H, 2W]``."""
        assert self.bias is not None
        return fused_upsample_twice(x, self.weight, self.bias)


class DecoderLevel(nn.Module):
    """Upsample, gate the skip connection, concatenate, residual block, dropout; then the tasks interact."""

    def __init__(
        self,
        in_channels: int,
        skip_channels: int,
        source_channels: int,
        channels: int,
        interaction: Interaction,
        config: BTINetConfig,
    ) -> None:
        super().__init__()
        self.directions = config.directions
        self.upsample = UpsampleTwice(in_channels, channels)
        self.skip_gate = AttentionGate(skip_channels, channels, max(1, channels // 2))
        self.block = ResidualBlock(channels + skip_channels, channels, attention=False, multi_scale=config.multi_scale)
        self.dropout = Dropout(config.dropout)
        self.clf_features: nn.Linear | None = None
        if config.tasks != "segmentation":
            self.clf_features = nn.Linear(source_channels, config.clf_channels)
        self.interaction: nn.Module | None = None
        if interaction == "fixed":
            self.interaction = TaskInteractionModule(channels, config.clf_channels, config.strength, config.pool)
        elif interaction == "gated":
            self.interaction = TaskInteractionLevel(
                channels, config.clf_channels, config.strength, config.pool, config.signals
            )

    def forward(self, x: Tensor, skip: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """``x``: the coarser level; ``source``: the map whose mean starts clf. Returns seg, clf, gates, proxies."""
        x = self.upsample(x)
        seg = self.dropout(self.block(torch.cat((x, self.skip_gate(skip, x)), 1)))
        if self.clf_features is None:
            return seg, source.new_empty(len(source), 0), None, None
        clf = _vector(self.clf_features, source)
        if self.interaction is None:
            return seg, clf, None, None
        gates = proxies = None
        if isinstance(self.interaction, TaskInteractionModule):
            changed_seg, changed_clf = self.interaction(seg, clf)
        else:
            changed_seg, changed_clf, gates, proxies = self.interaction(seg, clf)
        seg = seg if self.directions == "seg_to_clf" else changed_seg
        clf = clf if self.directions == "clf_to_seg" else changed_clf
        return seg, clf, gates, proxies


class ClassificationLevel(nn.Module):
    """A level of a network that only classifies: a decoder level's share of the vector stream."""

    def __init__(self, source_channels: int, clf_channels: int) -> None:
        super().__init__()
        self.clf_features = nn.Linear(source_channels, clf_channels)

    def forward(self, x: Tensor, skip: Tensor, source: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """As ``DecoderLevel``, but ``x`` stays what it is."""
        return x, _vector(self.clf_features, source), None, None


class BTINet(nn.Module):
    """Joint segmentation and classification with decoder-level task interaction.

    ``model(image)``: ``[B, in_chans, H, W]``, normalised as the checkpoint's preprocessing says, any H, W ≥ 32, →
    ``BTINetOutput``. Build it with ``btinet.create_model``.
    """

    def __init__(self, config: BTINetConfig, encoder: ExpansionEncoder | PyramidEncoder) -> None:
        super().__init__()
        channels, reductions = encoder.channels, encoder.reductions
        decoder_channels = _decoder_channels(config, channels)
        interactions = _interactions(config, len(decoder_channels))
        segments, classifies = config.tasks != "classification", config.tasks != "segmentation"
        self.config = config
        self.batchnorms_left: dict[str, str] | None = None  # of a fused network: path → why it could not be folded
        self.stride = reductions[-1]
        self.finest_stride = reductions[-1 - len(decoder_channels)]
        self.encoder = encoder
        used = channels[-1 - len(decoder_channels) :]  # finest skip … bridge
        self.refine = nn.ModuleList(ResidualBlock(c, c, multi_scale=config.multi_scale) for c in used)
        if not segments:
            self.refine[0] = nn.Identity()  # the decoder alone sees the finest map
        self.levels = nn.ModuleDict()
        below = used[-1]
        for i, (width, interaction) in enumerate(zip(decoder_channels, interactions, strict=True)):
            self.levels[f"d{i + 1}"] = (
                DecoderLevel(below, used[-2 - i], used[-1 - i], width, interaction, config)
                if segments
                else ClassificationLevel(used[-1 - i], config.clf_channels)
            )
            below = width
        widths = max(8, below // 2), max(8, below // 3)
        self.seg_head: nn.Sequential | None = nn.Sequential(
            UpsampleTwice(below, widths[0]),
            nn.Conv2d(widths[0], widths[1], 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(widths[1], config.mask_classes, 1),
        )
        self.clf_head: nn.Sequential | None = nn.Sequential(
            nn.Linear(sum(used[1:]) + len(decoder_channels) * config.clf_channels, config.clf_channels),
            nn.ReLU(),
            nn.BatchNorm1d(config.clf_channels, eps=NORM_EPSILON, momentum=NORM_MOMENTUM),
            nn.Dropout(config.dropout),
            nn.Linear(config.clf_channels, max(1, config.num_classes)),  # none, if the head is dropped below
        )
        for part in (self.levels, self.seg_head, self.clf_head):
            initialise(part)
        if not segments:
            self.seg_head = None
        if not classifies:
            self.clf_head = None

    def forward(self, image: Tensor) -> BTINetOutput:
        """See the class."""
        height, width = image.shape[-2:]
        if min(height, width) < MIN_SIZE:
            raise ValueError(f"the image is {height}×{width}, but at least {MIN_SIZE}×{MIN_SIZE} is needed.")
        padded = F.pad(image, (0, -width % self.stride, 0, -height % self.stride), mode="replicate")
        maps = self.encoder(padded)[-len(self.refine) :]
        maps = [block(x) for block, x in zip(self.refine, maps, strict=True)]
        seg, gates, proxies, vectors = maps[-1], {}, {}, [x.mean((2, 3)) for x in maps[1:]]
        for i, (name, level) in enumerate(self.levels.items()):
            seg, clf, gate, proxy = level(seg, maps[-2 - i], maps[-1 - i])
            vectors.append(clf)
            if gate is not None:
                gates[name], proxies[name] = gate, proxy
        seg_logits, cls_logits = image.new_empty(len(image), 0, height, width), image.new_empty(len(image), 0)
        if self.seg_head is not None:
            seg_logits = self.seg_head(seg)
            if self.finest_stride > 2:
                seg_logits = F.interpolate(seg_logits, padded.shape[-2:], mode="bilinear", align_corners=False)
        if self.clf_head is not None:
            cls_logits = self.clf_head(torch.cat(vectors, 1))
        return BTINetOutput(seg_logits[..., :height, :width], cls_logits, gates, proxies)

    def train(self, mode: bool = True) -> BTINet:
        """As in ``nn.Module``, but a BatchNorm whose weight is frozen keeps to its running statistics."""
        if mode and self.batchnorms_left is not None:
            raise UserError("a fused network cannot be trained; train the one that fuse() was called on.")
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm) and module.weight is not None and not module.weight.requires_grad:
                module.eval()
        return self

    def fuse(self, size: int | tuple[int, int] = 64) -> BTINet:
        """A copy for inference whose BatchNorms are folded into convolutions and linear layers, where that is exact.

        On the CPU its convolutions keep their weights as oneDNN wants them, beside the plain ones, and multi-scale
        fusions keep the product of their 1×1 convolutions. Its outputs are the same up to rounding. ``batchnorms_left``
        says which BatchNorms are left, and why. It cannot be trained or saved as a checkpoint.

        Args:
            size: height and width of the random image that shows how the network is connected; for encoders that take
                one size only.

        Raises:
            UserError: the network is in training mode.
        """
        if self.training:
            raise UserError("fuse() takes a network in evaluation mode, where BatchNorms are fixed; call eval() first.")
        if self.batchnorms_left is not None:
            return self
        fused = copy.deepcopy(self).requires_grad_(False)
        restore(fused)  # folding recognises layers by their classes
        weight = next(self.parameters())
        height, width = (size, size) if isinstance(size, int) else size
        image = torch.rand(1, self.config.in_chans, height, width, device=weight.device, dtype=weight.dtype)
        fused.batchnorms_left = fold_batchnorms(fused, image)
        accelerate(fused.encoder)
        for module in fused.modules():
            if isinstance(module, MultiScaleContextFusion):
                module.keep_merged()
        return fused

    def gate_parameters(self) -> list[nn.Parameter]:
        """The parameters that stage 2 trains: those of the gates (UPA)."""
        return [p for name, p in self.named_parameters() if ".upa." in name]


def _vector(features: nn.Linear, source: Tensor) -> Tensor:
    """The vector stream of a level before any interaction."""
    return F.relu(features(source.mean((2, 3))))


def _decoder_channels(config: BTINetConfig, channels: Sequence[int]) -> tuple[int, ...]:
    if config.decoder_channels is None:
        skips = channels[-2::-1]
        return tuple(
            min(official, max(16, skip)) for official, skip in zip(OFFICIAL_DECODER_CHANNELS, skips, strict=False)
        )
    if not 1 <= len(config.decoder_channels) < len(channels) or min(config.decoder_channels) < 1:
        raise UserError(
            f"decoder_channels {list(config.decoder_channels)}: {config.backbone} has {len(channels)} feature maps, so "
            f"1 to {len(channels) - 1} positive widths are needed."
        )
    return config.decoder_channels


def _interactions(config: BTINetConfig, levels: int) -> tuple[Interaction, ...]:
    given = config.interaction
    per_level: tuple[Interaction, ...] = (given,) * levels if isinstance(given, str) else tuple(given)
    if len(per_level) != levels or any(choice not in INTERACTIONS for choice in per_level):
        raise UserError(
            f"interaction {given!r}: give one of {', '.join(INTERACTIONS)}, or {levels} of them, coarse to fine."
        )
    for name, value, choices in (("directions", config.directions, DIRECTIONS), ("tasks", config.tasks, TASKS)):
        if value not in choices:
            raise UserError(f"{name} {value!r}: give one of {', '.join(choices)}.")
    interacts = any(choice != "none" for choice in per_level)
    if config.tasks != "both" and interacts:
        raise UserError(
            f"tasks {config.tasks!r}: a single task has no other to interact with; make the interaction none."
        )
    if config.directions != "both" and not interacts:
        raise UserError(
            f"directions {config.directions!r}: without an interaction there is no direction; make it fixed or gated."
        )
    return per_level
