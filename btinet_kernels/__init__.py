"""Fused operators for multi-task networks whose tasks interact.

Functions: ``fused_tim``, ``fused_upa``, ``fused_task_interaction``, ``fused_squeeze_excite``. Modules:
``btinet_kernels.nn``. Which backend serves what on this machine: ``backends()``. In somebody else's model:
``accelerate(model)``.
"""

from btinet_kernels.accelerate import AccelerationReport, ModuleReport, accelerate, accelerates, restore
from btinet_kernels.backends import BackendError, backends, use_backend
from btinet_kernels.gates.squeeze_excite_op import fused_squeeze_excite
from btinet_kernels.gates.squeeze_excite_reference import SqueezeExciteWeights
from btinet_kernels.interaction.op import (
    InteractionResult,
    fused_task_interaction,
    fused_tim,
    fused_upa,
)
from btinet_kernels.interaction.reference import GateWeights, InteractionWeights

__version__ = "0.1.0"

__all__ = [
    "AccelerationReport",
    "BackendError",
    "GateWeights",
    "InteractionResult",
    "InteractionWeights",
    "ModuleReport",
    "SqueezeExciteWeights",
    "accelerate",
    "accelerates",
    "backends",
    "fused_squeeze_excite",
    "fused_task_interaction",
    "fused_tim",
    "fused_upa",
    "restore",
    "use_backend",
]
