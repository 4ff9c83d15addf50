"""The network, its factory and its checkpoints."""

from btinet.models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from btinet.models.factory import create_model, list_models
from btinet.models.network import PROXY_NAMES, BTINet, BTINetConfig, BTINetOutput

__all__ = [
    "PROXY_NAMES",
    "BTINet",
    "BTINetConfig",
    "BTINetOutput",
    "Checkpoint",
    "create_model",
    "list_models",
    "load_checkpoint",
    "save_checkpoint",
]
