"""Loading of pretrained weights, of segkit and of other projects."""

from segkit.models.pretrained.loading import Report, load_file

__all__ = ["Report", "load_file"]
