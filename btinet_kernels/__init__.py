"""Fused operators for multi-task networks whose tasks interact.

Functions: ``fused_tim``, ``fused_upa``, ``fused_task_interaction``, ``fused_multi_scale``, ``fused_separable_conv``,
``fused_dual_path_attention``, ``fused_joint_projection``, ``fused_position_gate``, ``fused_upsample_twice``,
``fused_squeeze_excite``, ``fused_batch_norm_act``, ``fused_depthwise_conv``, ``fused_dropout``,
``fused_segmentation_loss``. Modules: ``btinet_kernels.nn``. In somebody else's model: ``accelerate(model)``. Which
backend serves what on this machine: ``backends()``.
"""

from btinet_kernels.accelerate import AccelerationReport, ModuleReport, accelerate, accelerates, restore
from btinet_kernels.backends import BackendError, backends, use_backend
from btinet_kernels.depthwise.op import fused_depthwise_conv
from btinet_kernels.dropout.op import fused_dropout
from btinet_kernels.gates.attention_op import fused_joint_projection, fused_position_gate
from btinet_kernels.gates.attention_reference import JointWeights
from btinet_kernels.gates.dual_path_op import fused_dual_path_attention
from btinet_kernels.gates.reference import DualPathWeights
from btinet_kernels.gates.squeeze_excite_op import fused_squeeze_excite
from btinet_kernels.gates.squeeze_excite_reference import SqueezeExciteWeights
from btinet_kernels.interaction.op import (
    InteractionResult,
    fused_task_interaction,
    fused_tim,
    fused_upa,
)
from btinet_kernels.interaction.reference import GateWeights, InteractionWeights
from btinet_kernels.losses.op import fused_segmentation_loss
from btinet_kernels.losses.reference import SegmentationLossOptions
from btinet_kernels.multi_scale.op import fused_multi_scale
from btinet_kernels.multi_scale.reference import ScaleWeights
from btinet_kernels.normalization.op import fused_batch_norm_act
from btinet_kernels.separable.op import fused_separable_conv
from btinet_kernels.separable.reference import BatchNormWeights, SeparableWeights
from btinet_kernels.upsampling.op import fused_upsample_twice

__version__ = "0.1.0"

__all__ = [
    "AccelerationReport",
    "BackendError",
    "BatchNormWeights",
    "DualPathWeights",
    "GateWeights",
    "InteractionResult",
    "InteractionWeights",
    "JointWeights",
    "ModuleReport",
    "ScaleWeights",
    "SegmentationLossOptions",
    "SeparableWeights",
    "SqueezeExciteWeights",
    "accelerate",
    "accelerates",
    "backends",
    "fused_batch_norm_act",
    "fused_depthwise_conv",
    "fused_dropout",
    "fused_dual_path_attention",
    "fused_joint_projection",
    "fused_multi_scale",
    "fused_position_gate",
    "fused_segmentation_loss",
    "fused_separable_conv",
    "fused_squeeze_excite",
    "fused_task_interaction",
    "fused_tim",
    "fused_upa",
    "fused_upsample_twice",
    "restore",
    "use_backend",
]
