"""Settings that a configuration leaves open, set from the data, the model and the weights.

They are ``null`` in a new configuration (``model.weights``: ``"auto"``). A run's ``config.json``
has their values, which a resumed run uses again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from segkit.augment.color import colored
from segkit.core.config import Config, ModelConfig, bind, parse, to_dict
from segkit.core.errors import ConfigError
from segkit.data import SOURCES
from segkit.data.source import Source
from segkit.models.pretrained.published import obtain
from segkit.models.segmenter import build_model

OPEN: dict[str, dict[str, Any]] = {
    "model": {"weights": "auto"},
    "augment": {"train": None},
    "optim": {"lr": None, "backbone_lr_factor": None, "warmup_steps": None},
}
"""Settings that can be left open, and the value that says so."""

MULTIPLE = 32
"""Sides of crops are multiples of the largest stride of most backbones."""

LARGEST_CROP = 512
MAX_WARMUP = 500

SGD_LR, PRETRAINED_LR, PRETRAINED_FACTOR = 1e-2, 1e-3, 0.1
RANDOM_LR, RANDOM_LR_WITHOUT_BATCH_NORM = 2e-3, 3e-4


def set_channels(cfg: Config) -> Config:
    """Return the configuration with the model's channels, mean and deviation of the data's bands.

    Raises:
        ConfigError: ``data.train`` is invalid, or the model or ``data.mean`` has other channels.
    """
    if cfg.data.train is None:
        return cfg
    channels = bind(SOURCES, cfg.data.train, "data.train").keywords.get("channels", 3)
    if (given := cfg.model.backbone.get("in_channels", channels)) != channels:
        raise ConfigError(
            f"model.backbone.in_channels: is {given}, but data.train is read with {channels} "
            "channels; set data.train.channels, and leave in_channels out"
        )
    backbone = cfg.model.backbone
    if channels != 3:
        backbone = {**backbone, "in_channels": channels}
    mean, std = (_per_band(getattr(cfg.data, key), channels, key) for key in ("mean", "std"))
    return replace(
        cfg, data=replace(cfg.data, mean=mean, std=std), model=replace(cfg.model, backbone=backbone)
    )


def _per_band(values: tuple[float, ...], channels: int, key: str) -> tuple[float, ...]:
    """Return a number per band: three are repeated for more bands, and averaged for gray."""
    if len(values) not in (3, channels):
        raise ConfigError(
            f"data.{key}: has {len(values)} numbers; expected {channels}, one per band"
        )
    if len(values) == channels:
        return values
    if channels == 1:
        return (sum(values) / 3,)
    return tuple(values[band % 3] for band in range(channels))


def crop_size(sizes: Sequence[tuple[int, int]], largest: int = LARGEST_CROP) -> tuple[int, int]:
    """Return (height, width) of a crop that nine of ten images contain, at most ``largest``."""
    smallest = [min(sorted(sides)[len(sides) // 10], largest) for sides in zip(*sizes, strict=True)]
    height, width = (side // MULTIPLE * MULTIPLE or side for side in smallest)
    return height, width


def learning_rate(optimizer: str, *, pretrained: bool, batch_norm: bool) -> tuple[float, float]:
    """Return the peak learning rate and the factor for the backbone.

    SGD with 0.01 is what DeepLab and mmsegmentation fine-tune with. With AdamW, a pretrained
    backbone has a tenth of the decoder's rate. Random weights have the rate of segkit's small
    configurations, and less without BatchNorm, where training diverges earlier.
    """
    if optimizer == "sgd":
        return SGD_LR, 1.0
    if pretrained:
        return PRETRAINED_LR, PRETRAINED_FACTOR
    return RANDOM_LR if batch_norm else RANDOM_LR_WITHOUT_BATCH_NORM, 1.0


def warmup_steps(steps: int) -> int:
    """Return the length of the warm-up of a training of ``steps`` steps: fewer than these."""
    return min(MAX_WARMUP, steps // 20)


def augmentation(crop: tuple[int, int]) -> tuple[Mapping[str, Any], ...]:
    """Return light augmentation that is right for most photographs."""
    return (
        {"name": "scale", "range": [0.8, 1.25]},
        {"name": "crop", "size": list(crop)},
        {"name": "hflip"},
        {"name": "photometric", "p": 0.5},
    )


def describe(operations: Sequence[Mapping[str, Any]]) -> str:
    """Return the names of operations, and the sizes of crops, such as ``crop 64 x 96``."""
    sizes = (" {} x {}".format(*spec["size"]) if "size" in spec else "" for spec in operations)
    return ", ".join(f"{spec['name']}{size}" for spec, size in zip(operations, sizes, strict=True))


def has_batch_norm(model: ModelConfig) -> bool:
    """Return True if the backbone has BatchNorm."""
    with torch.device("meta"):
        built = build_model(model.backbone, model.decoder, num_classes=2)
    return any(isinstance(module, _BatchNorm) for module in built.backbone.modules())


def set_rates(cfg: Config) -> Config:
    """Return the configuration with its learning rates; weights are ``"auto"`` or known."""
    if None not in (cfg.optim.lr, cfg.optim.backbone_lr_factor):
        return cfg
    name, pretrained = cfg.optim.optimizer["name"], cfg.model.weights not in (None, "auto")
    norms = has_batch_norm(cfg.model)
    lr, factor = learning_rate(name, pretrained=pretrained, batch_norm=norms)
    optim = cfg.optim
    lr = lr if optim.lr is None else optim.lr
    factor = factor if optim.backbone_lr_factor is None else optim.backbone_lr_factor
    return replace(cfg, optim=replace(optim, lr=lr, backbone_lr_factor=factor))


def set_augmentation(cfg: Config, source: Source) -> Config:
    """Return the configuration with its augmentation, for the sizes of the source's images."""
    if cfg.augment.train is not None:
        return cfg
    crop = cfg.augment.size or crop_size([source.size(i) for i in range(len(source))])
    return replace(cfg, augment=replace(cfg.augment, train=augmentation(crop)))


def settle(cfg: Config, source: Source) -> tuple[Config, list[str]]:
    """Set all settings that are open, except the warm-up, which depends on the folds.

    Returns:
        The configuration, and a sentence for each choice.
    """
    said = []
    if (bands := cfg.model.backbone.get("in_channels", 3)) != 3:
        changed = "the first 3, taken as R, G, B" if colored(bands) == 3 else f"{colored(bands)}"
        said.append(f"images of {bands} bands: color operations change {changed}")
    if cfg.model.weights == "auto":
        weights, sentence = obtain(cfg.model.backbone["name"])
        cfg = replace(cfg, model=replace(cfg.model, weights=weights))
        said.append(f"model.weights: {sentence}")
    before, cfg = cfg, set_augmentation(set_rates(cfg), source)
    if before.optim != cfg.optim:
        start = "pretrained" if cfg.model.weights else "random"
        said.append(
            f"optim.lr: {cfg.optim.lr:g}, times {cfg.optim.backbone_lr_factor:g} for the backbone "
            f"({cfg.optim.optimizer['name']}, {start} weights)"
        )
    if before.augment != cfg.augment:
        said.append(f"augment.train: {describe(cfg.augment.train or ())}")
    return cfg, said


def as_recorded(cfg: Config, recorded: Mapping[str, Any]) -> Config:
    """Return the configuration with the values of a run's ``config.json`` where it is open."""
    raw = to_dict(cfg)
    for section, settings in OPEN.items():
        known = recorded.get(section)
        for key, value in settings.items():
            if raw[section][key] == value and isinstance(known, Mapping) and key in known:
                raw[section][key] = known[key]
    return parse(raw, "config.json of the run")
