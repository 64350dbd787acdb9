"""Which files are taken for images, by what their names end in."""

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "npy")
"""In lower case, without the dot: what `decode` reads."""
