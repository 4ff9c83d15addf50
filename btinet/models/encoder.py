"""Feature pyramids from timm: maps of increasing stride, finest first."""

from __future__ import annotations

import os
import socket
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub
import timm
import torch
from huggingface_hub import try_to_load_from_cache
from timm.models import EfficientNet
from torch import Tensor, nn

from btinet.errors import UserError
from btinet_kernels import accelerate

_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # the names timm looks for on the hub


class ExpansionEncoder(nn.Module):
    """EfficientNet tapped where the official code taps it: before each stride-2 depthwise convolution.

    The taps are the first expand activations of the stages that halve the resolution, and the head's activation: for
    EfficientNet-B4 strides 2, 4, 8, 16, 32 with 144, 192, 336, 960, 1792 channels.
    """

    def __init__(self, net: EfficientNet) -> None:
        super().__init__()
        self.conv_stem, self.bn1, self.blocks = net.conv_stem, net.bn1, net.blocks
        self.conv_head, self.bn2 = net.conv_head, net.bn2
        halving = [stage[0] for stage in _stages(self) if _halves(stage[0])]
        self.channels = [block.conv_pw.out_channels for block in halving] + [self.conv_head.out_channels]
        self.reductions = [2**i for i in range(1, len(self.channels) + 1)]

    @staticmethod
    def fits(net: EfficientNet) -> bool:
        """Whether every halving stage of ``net`` starts with an expansion at the finer resolution."""
        return all(hasattr(stage[0], "conv_pw") for stage in _stages(net) if _halves(stage[0]))

    def forward(self, image: Tensor) -> list[Tensor]:
        """``[B, C, H, W]`` → the five taps."""
        taps = []
        x = self.bn1(self.conv_stem(image))
        for stage in _stages(self):
            first, *rest = stage
            if _halves(first):
                expanded = first.bn1(first.conv_pw(x))
                taps.append(expanded)
                # Such a block has no skip connection: its input and output differ in size.
                x = first.se(first.aa(first.bn2(first.conv_dw(expanded))))
                x = first.bn3(first.conv_pwl(x))
            else:
                x = first(x)
            for block in rest:
                x = block(x)
        return [*taps, self.bn2(self.conv_head(x))]

    def early_parameters(self, stages: int = 1) -> list[nn.Parameter]:
        """Stem and all blocks up to stride 4 (the default, near to the official code's first 50 layers), 8, 16, …"""
        early: list[nn.Module] = [self.conv_stem, self.bn1]
        stride = 2
        for stage in self.blocks:
            stride *= 2 if _halves(next(stage.children())) else 1
            if stride <= 2 ** (stages + 1):
                early.append(stage)
        if stages == number_of_stages(self):
            early += [self.conv_head, self.bn2]
        return [p for module in early for p in module.parameters()]


class PyramidEncoder(nn.Module):
    """Any other timm backbone, through ``features_only``."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        info: Any = net.feature_info
        self.channels = list(info.channels())
        self.reductions = list(info.reduction())
        self._modules_of_levels = list(info.module_name())
        self._channels_last = str(getattr(net, "output_fmt", "")).endswith("NHWC")

    def forward(self, image: Tensor) -> list[Tensor]:
        """``[B, C, H, W]`` → one map per level."""
        maps = self.net(image)
        return [m.permute(0, 3, 1, 2) for m in maps] if self._channels_last else list(maps)

    def early_parameters(self, stages: int = 1) -> list[nn.Parameter]:
        """All parameters up to the level of stride 4 (the default), 8, 16, …"""
        level = self.reductions.index(2 ** (stages + 1))
        name = self._modules_of_levels[level]
        names = (name, name.replace(".", "_"))  # features_only may have flattened the backbone
        modules = list(self.net.named_modules())
        inside = [i for i, (path, _) in enumerate(modules) if any(f"{path}.".startswith(f"{n}.") for n in names)]
        early = modules[: inside[-1] + 1] if inside else []
        return [p for _, module in early for p in module.parameters(recurse=False)]


def number_of_stages(encoder: ExpansionEncoder | PyramidEncoder) -> int:
    """How many stages ``early_parameters`` can tell apart: the feature maps of stride 4 and more."""
    return sum(reduction >= 4 for reduction in encoder.reductions)


def create_encoder(
    backbone: str, in_chans: int, weights: str | os.PathLike[str] | None
) -> ExpansionEncoder | PyramidEncoder:
    """Build ``ExpansionEncoder`` or ``PyramidEncoder`` for a timm model name, its modules accelerated.

    Args:
        backbone: timm's name, e.g. ``efficientnet_b4``.
        in_chans: channels of the image.
        weights: None (random), ``"imagenet"`` (timm downloads them) or a file of timm weights for this backbone.

    Raises:
        UserError: unknown backbone, no feature pyramid, weights that cannot be had or do not fit.
    """
    if not timm.is_model(backbone):
        near = ", ".join(timm.list_models(f"{backbone.split('_')[0]}*")[:4])
        hint = f"; timm has {near}" if near else ""
        raise UserError(f"model 'btinet_{backbone}': timm knows no backbone {backbone!r}{hint}.")
    try:
        if weights is None:
            encoder = _build(backbone, in_chans=in_chans)
        elif weights == "imagenet":
            _require_weights(backbone)
            encoder = _build(backbone, in_chans=in_chans, pretrained=True)
        else:
            encoder = _build_from_file(backbone, in_chans, weights)
    except OSError as error:
        raise UserError(_unreachable(backbone, _first_line(error))) from error
    except (RuntimeError, AttributeError, KeyError) as error:
        raise UserError(f"model 'btinet_{backbone}': {_first_line(error)}") from error
    if len(encoder.reductions) < 2 or any(
        b != 2 * a for a, b in zip(encoder.reductions, encoder.reductions[1:], strict=False)
    ):
        raise UserError(
            f"model 'btinet_{backbone}': its feature maps have strides {encoder.reductions}, but each must be twice "
            "the one before; choose a hierarchical backbone such as a ResNet or ConvNeXt."
        )
    accelerate(encoder)
    return encoder


def _build(backbone: str, **options: Any) -> ExpansionEncoder | PyramidEncoder:
    if timm.models.model_entrypoint(backbone).__module__ == EfficientNet.__module__:
        net = timm.create_model(backbone, **options)
        if isinstance(net, EfficientNet) and ExpansionEncoder.fits(net):
            return ExpansionEncoder(net)
    return PyramidEncoder(timm.create_model(backbone, features_only=True, **options))


def _build_from_file(backbone: str, in_chans: int, file: str | os.PathLike[str]) -> ExpansionEncoder | PyramidEncoder:
    """Build with timm weights from a file, and make sure that they arrived: timm skips what does not fit."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fresh = _build(backbone, in_chans=in_chans)
        torch.manual_seed(0)
        try:
            loaded = _build(
                backbone, in_chans=in_chans, pretrained=True, pretrained_cfg_overlay={"file": os.fspath(file)}
            )
        except Exception as error:  # unpicklers raise anything
            raise UserError(
                f"weights {os.fspath(file)!r}: not timm weights of {backbone} ({_first_line(error)})."
            ) from error
    matrices = [(a, b) for a, b in zip(fresh.parameters(), loaded.parameters(), strict=True) if a.ndim > 1]
    untouched = sum(torch.equal(a, b) for a, b in matrices)
    if untouched:
        raise UserError(
            f"weights {os.fspath(file)!r}: not timm weights of {backbone} ({untouched} of its {len(matrices)} weight "
            "tensors are not in the file)."
        )
    return loaded


def _stages(net: Any) -> list[list[Any]]:
    return [list(stage) for stage in net.blocks]


def _halves(block: nn.Module) -> bool:
    strided = getattr(block, "conv_dw", None) or getattr(block, "conv_exp", None) or getattr(block, "conv", None)
    return strided is not None and max(strided.stride) == 2


def _require_weights(backbone: str) -> None:
    """Fail at once, instead of after minutes of retries, when the weights are neither cached nor reachable."""
    config = timm.get_pretrained_cfg(backbone)
    if config is None or not (config.hf_hub_id or config.url):
        raise UserError(f"model 'btinet_{backbone}': timm has no ImageNet weights for it; use --weights none.")
    behind_proxy = any(os.environ.get(name) for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"))
    if behind_proxy or not config.hf_hub_id:
        return
    if any(isinstance(try_to_load_from_cache(config.hf_hub_id, name), str) for name in _WEIGHT_FILES):
        return
    host = urlsplit(huggingface_hub.constants.ENDPOINT).hostname or ""
    try:
        socket.getaddrinfo(host, 443)
    except OSError as error:
        raise UserError(_unreachable(backbone, f"{host} cannot be reached")) from error


def _unreachable(backbone: str, reason: str) -> str:
    return (
        f"ImageNet weights of {backbone} could not be had ({reason}); download its timm weights file elsewhere and "
        f"pass --weights FILE, or train from scratch with --weights none."
    )


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]
