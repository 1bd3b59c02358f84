"""Files of models: save a model with its classes, and load a predictor from a file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from segkit.core import checkpoint, config
from segkit.core.config import IMAGENET_MEAN, IMAGENET_STD, Config
from segkit.core.errors import CheckpointError
from segkit.data import reading
from segkit.inference.predictor import Predictor
from segkit.inference.tta import Views
from segkit.models.kernels.fuse_relu import for_prediction
from segkit.models.segmenter import Segmenter, build_model, load_model
from segkit.training.step import autocast_dtype, move_model


def save(
    model: nn.Module,
    path: str | Path,
    *,
    classes: Sequence[str],
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> None:
    """Write a model to a file that :func:`load` reads, and that soups take as an ingredient.

    Args:
        model: From :func:`segkit.create_model` or :func:`segkit.build_model`.
        path: The file, which is replaced.
        classes: Class names, one per plane of logits; for a single plane that of the foreground.
        mean: Mean of each channel of the images that the model was trained with, in 0..1.
        std: Standard deviation of each channel, in 0..1.

    Raises:
        CheckpointError: The model has no record of its backbone and decoder, or has another number
            of classes or channels.
    """
    if not isinstance(model, Segmenter) or model.config is None:
        raise CheckpointError(
            f"model: {type(model).__name__} does not record its backbone and decoder; expected a "
            "model of segkit.create_model; save the state_dict() of others with torch.save"
        )
    channels: Any = model.backbone.in_channels
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            raise CheckpointError(
                f"{name}: expected {channels} numbers, one per channel of the model's images, "
                f"got {len(values)}"
            )
    cfg = config.parse({"model": model.config}, "model")
    weights = checkpoint.merged(model.state_dict())
    with torch.device("meta"):
        expected = build_model(cfg.model.backbone, cfg.model.decoder, num_classes=len(classes))
    try:
        checkpoint.check_fit(expected, weights, Path(path))
    except CheckpointError as error:
        raise CheckpointError(
            f"classes: {len(classes)} names do not fit the model: {error}"
        ) from error
    statistics = {"mean": [*map(float, mean)], "std": [*map(float, std)]}
    entries = {"config": config.to_dict(cfg), "classes": list(classes), **statistics}
    checkpoint.save({**entries, "model": weights}, Path(path))


def load(
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    views: Views = (),
    coefficients: Sequence[float] | None = None,
    overrides: Sequence[str] = (),
    fuse: bool = True,
    verify: bool = True,
) -> Predictor:
    """Return the predictor of a checkpoint, set up by the checkpoint's own configuration.

    Args:
        path: A checkpoint of a run, a soup, or a file of :func:`save`.
        device: Where the model runs; default: CUDA if available, else the CPU.
        views: Test-time augmentations, such as ``"flips"``.
        coefficients: One per view; default: equal.
        overrides: Settings in place of the checkpoint's, such as ``["infer.tile=512"]``.
        fuse: Fuse layers for prediction; without, the model can load other weights.
        verify: Compare the file with its digest first.

    Raises:
        CheckpointError: The file is missing, damaged, or no checkpoint of a model.
        ConfigError: A view or an override is invalid.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model, trained, entries = load_model(Path(path), verify=verify)
    cfg = config.override(trained, overrides)
    move_model(model, device, channels_last=cfg.train.channels_last)
    amp = autocast_dtype(cfg.train.amp, torch.device(device))
    statistics = {key: entries[key] for key in ("mean", "std") if key in entries}
    return build_predictor(
        for_prediction(model, amp) if fuse else model, cfg, device,
        classes=entries["classes"], views=views, coefficients=coefficients, graphs=cfg.infer.graphs,
        **statistics,
    )  # fmt: skip


def build_predictor(
    model: nn.Module, cfg: Config, device: str | torch.device, **options: Any
) -> Predictor:
    """Return a predictor with the settings of a configuration; ``options`` as in Predictor."""
    settings = {key: getattr(cfg.infer, key) for key in ("size", "merge", "tile", "overlap", "pad")}
    settings |= {"mean": cfg.data.mean, "std": cfg.data.std, "range": reading(cfg.data)["range"]}
    amp = autocast_dtype(cfg.train.amp, torch.device(device))
    settings |= {"amp": amp, "channels_last": cfg.train.channels_last}
    return Predictor(model, **settings | options)
