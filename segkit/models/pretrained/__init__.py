"""Weights from elsewhere → this project's names."""

from segkit.models.pretrained.loading import Report, load_file, load_state

__all__ = ["Report", "load_file", "load_state"]
