"""Encoders, and the weights that they start from."""

from ssl_vit.models.config import EncoderConfig

__all__ = ["EncoderConfig"]
