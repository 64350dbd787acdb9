"""ssl_vit: self-supervised pre-training of vision backbones on your own images."""

__version__ = "0.1.0"
