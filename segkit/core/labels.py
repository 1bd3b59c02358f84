"""The size of an image, and the value of ignored pixels in a mask."""

IGNORE = 255
"""Mask value that losses and metrics ignore."""

Size = tuple[int, int]
"""Height and width of an image in pixels."""
