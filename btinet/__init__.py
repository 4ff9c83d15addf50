"""BTI-Net: joint segmentation and classification of medical images with decoder-level task interaction."""

from btinet.errors import UserError
from btinet.models import BTINet, BTINetOutput, create_model, list_models, load_checkpoint

__version__ = "0.1.0"

__all__ = ["BTINet", "BTINetOutput", "UserError", "create_model", "list_models", "load_checkpoint"]
