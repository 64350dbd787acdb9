"""Encoders, and the weights that they start from."""
