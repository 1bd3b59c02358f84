"""Values of a mask: class indices from 0 up, and one value to ignore."""

IGNORE = 255
"""Mask value that losses and metrics ignore."""
