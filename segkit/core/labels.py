"""What the values of a mask mean: class indices from 0 up, and one that is no class."""

IGNORE = 255
"""The mask value that no loss and no metric counts."""
