"""Base package: configuration, distributed processes, files, checkpoints, errors."""

__version__ = "0.1.0"
