"""Export backbones, load them (`load_backbone`), and load official checkpoints (`interop.load_reference`)."""

from ssl_vit.models.weights.backbone import export_backbone, load_backbone

__all__ = ["export_backbone", "load_backbone"]
