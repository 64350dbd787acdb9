"""Backbones out (`load_backbone`, `export_backbone`), reference checkpoints in (`interop.load_reference`)."""

from ssl_vit.models.weights.backbone import export_backbone, load_backbone

__all__ = ["export_backbone", "load_backbone"]
