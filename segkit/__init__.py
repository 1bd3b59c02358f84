"""Semantic segmentation of photographs in pure PyTorch: folds, soups, views and votes."""

__version__ = "0.1.0"

from segkit.augment import Pipeline
from segkit.backbones import BACKBONES
from segkit.config import Config
from segkit.decoders import DECODERS
from segkit.engine import load_model, train_step
from segkit.errors import CheckpointError, ConfigError, DataError, SegkitError
from segkit.losses import LOSSES, build_loss
from segkit.metrics import confusion_matrix, scores
from segkit.model import Segmenter, build_model
from segkit.optim import build_optimizer
from segkit.output import overlay
from segkit.predict import Predictor
from segkit.tta import parse_views

__all__ = [
    "BACKBONES",
    "DECODERS",
    "LOSSES",
    "CheckpointError",
    "Config",
    "ConfigError",
    "DataError",
    "Pipeline",
    "Predictor",
    "SegkitError",
    "Segmenter",
    "build_loss",
    "build_model",
    "build_optimizer",
    "confusion_matrix",
    "load_model",
    "overlay",
    "parse_views",
    "scores",
    "train_step",
]
