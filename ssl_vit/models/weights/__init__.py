"""Weights read, converted and written."""
