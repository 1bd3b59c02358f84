"""Semantic segmentation of photographs in pure PyTorch: folds, soups, views and votes."""

from segkit.augment import Pipeline, list_augmentations
from segkit.commands.plan import TrainingPlan, plan
from segkit.core import __version__
from segkit.core.config import Config
from segkit.core.errors import CheckpointError, ConfigError, DataError, SegkitError
from segkit.inference import soup
from segkit.inference.label_errors import label_quality, rank_labels
from segkit.inference.model_file import load, save
from segkit.inference.outputs import overlay
from segkit.inference.prediction import Prediction
from segkit.inference.predictor import Predictor
from segkit.inference.tta import parse_views
from segkit.models.backbones import BACKBONES
from segkit.models.decoders import DECODERS
from segkit.models.segmenter import (
    Segmenter,
    build_model,
    create_model,
    list_backbones,
    list_decoders,
    load_model,
)
from segkit.training.losses import LOSSES, build_loss, list_losses
from segkit.training.metrics import confusion_matrix, scores
from segkit.training.optim import build_optimizer
from segkit.training.step import train_step

__all__ = [
    "BACKBONES",
    "DECODERS",
    "LOSSES",
    "CheckpointError",
    "Config",
    "ConfigError",
    "DataError",
    "Pipeline",
    "Prediction",
    "Predictor",
    "SegkitError",
    "Segmenter",
    "TrainingPlan",
    "__version__",
    "build_loss",
    "build_model",
    "build_optimizer",
    "confusion_matrix",
    "create_model",
    "label_quality",
    "list_augmentations",
    "list_backbones",
    "list_decoders",
    "list_losses",
    "load",
    "load_model",
    "overlay",
    "parse_views",
    "plan",
    "rank_labels",
    "save",
    "scores",
    "soup",
    "train_step",
]
