"""What everything stands on: configuration, processes, files, checkpoints, errors."""

__version__ = "0.1.0"
