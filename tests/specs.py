"""Inputs of encoders for tests."""

from ssl_vit.data.transform import InputSpec, Normalization


def grey(channels: int = 3, mean: float = 0.5, std: float = 0.5) -> Normalization:
    """The same mean and deviation for each channel."""
    return Normalization((mean,) * channels, (std,) * channels)


GREY = grey()


def spec(height: int, width: int | None = None, stride: int = 8, normalization: Normalization = GREY) -> InputSpec:
    """Images of `height` x `width` pixels, square by default."""
    return InputSpec((height, width or height), (stride, stride), normalization)
