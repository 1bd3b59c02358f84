"""Weights from elsewhere → this project's names."""

from segkit.weights.loading import Report, fit, load_file, load_state, recognize
from segkit.weights.reading import read_file

__all__ = ["Report", "fit", "load_file", "load_state", "read_file", "recognize"]
