"""The variables of the official Keras BTI-Net, one by one, and the parameters of ours that hold the same numbers.

Source: the authors' public code of arXiv 2606.29102.
"""

from __future__ import annotations

from collections import Counter
from itertools import chain

from btinet.models.keras_names import CONV, DENSE, DEPTHWISE, SCALAR, VECTOR, KerasVariable

BACKBONE = "tf_efficientnet_b4"
_BLOCKS_PER_STAGE = (2, 4, 4, 6, 6, 8, 2)

Variables = list[KerasVariable]


def official_variables() -> Variables:
    """All variables, in the order of the official ``model.weights``."""
    numbers = _AutomaticNames()
    *skips, bridge = [
        _residual(f"bti_res_{part}", f"refine.{i}", True, numbers)
        for i, part in enumerate(("s1", "s2", "s3", "s4", "bridge"))
    ]
    levels = [_level(f"d{i + 1}", skip, numbers) for i, skip in enumerate(reversed(skips))]
    return [*_encoder(), *bridge, *chain(*levels), *_heads(numbers)]


class _AutomaticNames:
    """Names of layers that the official code leaves to Keras, which counts them by class."""

    def __init__(self) -> None:
        self._created: Counter[str] = Counter()

    def __call__(self, layer_class: str) -> str:
        number = self._created[layer_class]
        self._created[layer_class] += 1
        return f"{layer_class}_{number}" if number else layer_class


def _encoder() -> Variables:
    normalization = [
        KerasVariable(f"normalization/{name}", "normalization", str(i), "", axes)
        for i, (name, axes) in enumerate((("mean", VECTOR), ("variance", VECTOR), ("count", SCALAR)))
    ]
    blocks = [
        _inverted_residual(f"block{stage + 1}{'abcdefgh'[i]}", f"encoder.blocks.{stage}.{i}", expands=stage > 0)
        for stage, count in enumerate(_BLOCKS_PER_STAGE)
        for i in range(count)
    ]
    return [
        *normalization,
        *_outer_conv("stem_conv", "encoder.conv_stem", bias=False),
        *_outer_norm("stem_bn", "encoder.bn1"),
        *chain(*blocks),
        *_outer_conv("top_conv", "encoder.conv_head", bias=False),
        *_outer_norm("top_bn", "encoder.bn2"),
    ]


def _inverted_residual(name: str, ours: str, expands: bool) -> Variables:
    expansion = [
        *_outer_conv(f"{name}_expand_conv", f"{ours}.conv_pw", bias=False),
        *_outer_norm(f"{name}_expand_bn", f"{ours}.bn1"),
    ]
    # timm counts the BatchNorms of a block, of which the first stage has one less.
    norm, last_norm, projection = ("bn2", "bn3", "conv_pwl") if expands else ("bn1", "bn2", "conv_pw")
    depthwise = KerasVariable(f"{name}_dwconv/kernel", "depthwise_conv2d", "0", f"{ours}.conv_dw.weight", DEPTHWISE)
    return [
        *(expansion if expands else []),
        depthwise,
        *_outer_norm(f"{name}_bn", f"{ours}.{norm}"),
        *_outer_conv(f"{name}_se_reduce", f"{ours}.se.conv_reduce"),
        *_outer_conv(f"{name}_se_expand", f"{ours}.se.conv_expand"),
        *_outer_conv(f"{name}_project_conv", f"{ours}.{projection}", bias=False),
        *_outer_norm(f"{name}_project_bn", f"{ours}.{last_norm}"),
    ]


def _level(name: str, skip: Variables, numbers: _AutomaticNames) -> Variables:
    ours = f"levels.{name}"
    upsample = numbers("conv2d_transpose")
    return [
        *_kernel(upsample, "conv2d_transpose", "", f"{ours}.upsample", CONV),
        *skip,
        *_attention_gate(f"att_gate_{name}", f"{ours}.skip_gate", numbers),
        *_residual(f"bti_res_{name}", f"{ours}.block", False, numbers),
        *_kernel(f"clf_{name}_features", "dense", "", f"{ours}.clf_features", DENSE),
        *_task_interaction(f"task_interaction_{name}", f"{ours}.interaction.tim", numbers),
        *_gate(f"upa_{name}", f"{ours}.interaction.upa", numbers),
    ]


def _heads(numbers: _AutomaticNames) -> Variables:
    upsample, conv = numbers("conv2d_transpose"), numbers("conv2d")
    return [
        *_kernel(numbers("dense"), "dense", "", "clf_head.0", DENSE),
        *_kernel(upsample, "conv2d_transpose", "", "seg_head.0", CONV),
        *_outer_norm(numbers("batch_normalization"), "clf_head.2"),
        *_outer_conv(conv, "seg_head.1"),
        *_outer_conv("segmentation_output", "seg_head.3"),
        *_kernel("classification_output", "dense", "", "clf_head.4", DENSE),
    ]


def _residual(name: str, ours: str, attention: bool, numbers: _AutomaticNames) -> Variables:
    of, path = "residual_block", f"{name}/{name}"
    scales, multi_scale = f"{path}_multiscale/{name}_multiscale", f"{ours}.multi_scale"
    held = "multiscale/dilation_convs/separable_conv2d"
    block = [
        *_separable(f"{path}_conv1", of, "conv1", f"{ours}.conv1"),
        *_norm(f"{path}_bn1", of, "bn1", f"{ours}.norm1"),
        *_separable(f"{path}_conv2", of, "conv2", f"{ours}.conv2"),
        *_norm(f"{path}_bn2", of, "bn2", f"{ours}.norm2"),
        *_separable(f"{scales}_sep_conv_1", of, held, f"{multi_scale}.scales.0"),
        *_separable(f"{scales}_sep_conv_2", of, f"{held}_1", f"{multi_scale}.scales.1"),
        *_separable(f"{scales}_sep_conv_4", of, f"{held}_2", f"{multi_scale}.scales.2"),
        *_two_dense(
            f"{scales}_scale_attention",
            of,
            "multiscale/scale_attention",
            f"{multi_scale}.scale_attention",
            numbers,
        ),
        *_kernel(f"{scales}_fusion", of, "multiscale/cross_scale_fusion", f"{multi_scale}.fusion", CONV),
    ]
    if not attention:
        return [*block, *_kernel(f"{path}_proj", of, "residual_proj", f"{ours}.projection", CONV)]
    gate = f"{path}_attention/{name}_attention"
    return [
        *block,
        *_two_dense(f"{gate}_channel_path", of, "attention/channel_path", f"{ours}.attention.channel_path", numbers),
        *_kernel(f"{gate}_spatial", of, "attention/spatial_path", f"{ours}.attention.spatial_path", CONV),
    ]


def _attention_gate(name: str, ours: str, numbers: _AutomaticNames) -> Variables:
    of, path = "attention_gate", f"{name}/{name}"
    context, held = f"{path}_context_attention", "context_attention/layers"
    first, second = numbers("separable_conv2d"), numbers("separable_conv2d")
    return [
        *_kernel(f"{path}_x_transform", of, "x_transform", f"{ours}.skip_transform", CONV),
        *_kernel(f"{path}_g_transform", of, "g_transform", f"{ours}.gating_transform", CONV),
        *_separable(f"{context}/{first}", of, f"{held}/separable_conv2d", f"{ours}.context.0"),
        *_separable(f"{context}/{second}", of, f"{held}/separable_conv2d_1", f"{ours}.context.1"),
        *_kernel(f"{context}/{numbers('conv2d')}", of, f"{held}/conv2d", f"{ours}.context.2", CONV),
    ]


def _task_interaction(name: str, ours: str, numbers: _AutomaticNames) -> Variables:
    of, path = "task_interaction_module", f"{name}/{name}"
    context, held = f"{path}_seg_to_clf", "seg_to_clf/layers"
    conv, dense, norm = (numbers(layer) for layer in ("conv2d", "dense", "batch_normalization"))
    back = f"{path}_clf_to_seg/{numbers('dense')}"
    return [
        *_kernel(f"{context}/{conv}", of, f"{held}/conv2d", f"{ours}.context", CONV),
        *_kernel(f"{context}/{dense}", of, f"{held}/dense", f"{ours}.dense", DENSE),
        *_norm(f"{context}/{norm}", of, f"{held}/batch_normalization", f"{ours}.norm"),
        *_kernel(back, of, "clf_to_seg/layers/dense", f"{ours}.clf_to_seg", DENSE),
        *_kernel(f"{path}_seg_gate", of, "seg_gate", f"{ours}.seg_gate", DENSE),
        *_kernel(f"{path}_clf_gate", of, "clf_gate", f"{ours}.clf_gate", DENSE),
    ]


def _gate(name: str, ours: str, numbers: _AutomaticNames) -> Variables:
    of, path = "uncertainty_proxy_attention", f"{name}/{name}"
    hidden, output = numbers("dense"), numbers("dense")
    return [
        *_kernel(f"{path}_sp", of, "seg_proj", f"{ours}.seg_projection", DENSE, bias=False),
        *_kernel(f"{path}_cp", of, "clf_proj", f"{ours}.clf_projection", DENSE, bias=False),
        *_kernel(f"{path}_wn/{hidden}", of, "weight_network/layers/dense", f"{ours}.hidden", DENSE),
        *_kernel(f"{path}_wn/{output}", of, "weight_network/layers/dense_1", f"{ours}.output", DENSE),
    ]


def _outer_conv(name: str, ours: str, bias: bool = True) -> Variables:
    return _kernel(name, "conv2d", "", ours, CONV, bias)


def _outer_norm(name: str, ours: str) -> Variables:
    return _norm(name, "batch_normalization", "", ours)


def _two_dense(name: str, of: str, held: str, ours: str, numbers: _AutomaticNames) -> Variables:
    """A squeeze to hidden units and back, in our ``Sequential`` with a ReLU between the two."""
    return [
        *_kernel(f"{name}/{numbers('dense')}", of, f"{held}/layers/dense", f"{ours}.0", DENSE),
        *_kernel(f"{name}/{numbers('dense')}", of, f"{held}/layers/dense_1", f"{ours}.2", DENSE),
    ]


def _kernel(name: str, of: str, held: str, ours: str, axes: tuple[int, ...], bias: bool = True) -> Variables:
    kernel = KerasVariable(f"{name}/kernel", of, _place(held, 0), f"{ours}.weight", axes)
    return [kernel, KerasVariable(f"{name}/bias", of, _place(held, 1), f"{ours}.bias", VECTOR)][: 1 + bias]


def _separable(name: str, of: str, held: str, ours: str) -> Variables:
    parts = (
        ("depthwise_kernel", "depthwise.weight", DEPTHWISE),
        ("pointwise_kernel", "pointwise.weight", CONV),
        ("bias", "pointwise.bias", VECTOR),
    )
    return _parts(name, of, held, ours, parts)


def _norm(name: str, of: str, held: str, ours: str) -> Variables:
    parts = (
        ("gamma", "weight", VECTOR),
        ("beta", "bias", VECTOR),
        ("moving_mean", "running_mean", VECTOR),
        ("moving_variance", "running_var", VECTOR),
    )
    return _parts(name, of, held, ours, parts)


def _parts(name: str, of: str, held: str, ours: str, parts: tuple[tuple[str, str, tuple[int, ...]], ...]) -> Variables:
    return [
        KerasVariable(f"{name}/{theirs}", of, _place(held, i), f"{ours}.{mine}", axes)
        for i, (theirs, mine, axes) in enumerate(parts)
    ]


def _place(held: str, position: int) -> str:
    return f"{held}/{position}" if held else str(position)
