"""BTI-Net: joint segmentation and classification of medical images with decoder-level task interaction."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from btinet.errors import UserError

if TYPE_CHECKING:
    from btinet.models import BTINet, BTINetOutput, create_model, list_models, load_checkpoint

__version__ = "0.1.0"

__all__ = ["BTINet", "BTINetOutput", "UserError", "create_model", "list_models", "load_checkpoint"]


def __getattr__(name: str) -> Any:
    # Torch and timm take seconds to import; `btinet --help` needs neither.
    if name in __all__:
        return getattr(importlib.import_module("btinet.models"), name)
    raise AttributeError(f"module 'btinet' has no attribute {name!r}")
