"""From an image to a sample."""
