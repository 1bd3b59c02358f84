"""A backbone and a decoder as one network."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from segkit.core import checkpoint
from segkit.core.config import Component, Config, build, parse
from segkit.core.errors import CheckpointError, ConfigError
from segkit.models.backbones import BACKBONES
from segkit.models.decoders import DECODERS
from segkit.models.export import export
from segkit.models.layers import resize
from segkit.models.pretrained import Report, load_file
from segkit.models.pretrained.loading import fit, identify
from segkit.models.pretrained.published import locate
from segkit.models.pretrained.reading import read_file


class Segmenter(nn.Module):
    """Image to logits at the image's size.

    Args:
        backbone: Gives feature maps, shallow to deep. Where some of its parts serve a single map,
            its ``only_for(level)`` gives them.
        decoder: Turns maps into a dict of logits: ``out``, and ``aux*`` in training. ``reads``,
            if it has that, are the maps it uses; ``align_corners`` is how its logits are resized.
        freeze_batch_norm: Keep the backbone's BatchNorm as it is, statistics and weights.

    Shape:
        image: (B, 3, H, W), normalized
        logits: (B, num_classes, H, W), or (B, num_classes) where a decoder judges the whole image
    """

    def __init__(
        self, backbone: nn.Module, decoder: nn.Module, *, freeze_batch_norm: bool = False
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.decoder = decoder
        self.freeze_batch_norm = freeze_batch_norm
        self.report: Report | None = None  # what build_model loaded
        self.align_corners: bool = getattr(decoder, "align_corners", False)
        if freeze_batch_norm:
            for norm in self._frozen():
                norm.requires_grad_(False)
        for part in self._unused():
            part.requires_grad_(False)
        self.train()

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        size = image.shape[-2:]
        outputs = self.decoder(self.backbone(image))
        return {
            name: resize(logits, size, align_corners=self.align_corners)
            if logits.ndim == 4
            else logits
            for name, logits in outputs.items()
        }

    def train(self, mode: bool = True) -> "Segmenter":
        super().train(mode)
        if self.freeze_batch_norm:
            for norm in self._frozen():
                norm.eval()
        return self

    def export(self, path: str | Path) -> None:
        """Write a program that runs without this library: :func:`segkit.models.export.export`."""
        export(self, path)

    def _unused(self) -> list[nn.Module]:
        """Parts that serve only maps the decoder does not use.

        Distributed training would wait for their gradients.
        """
        backbone: Any = self.backbone
        reads: Sequence[int] | None = getattr(self.decoder, "reads", None)
        if reads is None or not hasattr(backbone, "only_for"):
            return []
        maps = range(len(backbone.channels))
        used = {maps[level] for level in reads}
        return [backbone.only_for(level) for level in maps if level not in used]

    def _frozen(self) -> list[nn.Module]:
        return [module for module in self.backbone.modules() if isinstance(module, _BatchNorm)]


def build_model(
    backbone: Component | str,
    decoder: Component | str,
    *,
    num_classes: int,
    weights: str | None = None,
    freeze_batch_norm: bool = False,
    seed: int = 0,
    initialize: bool = True,
) -> Segmenter:
    """Build a model by name.

    Args:
        backbone: A name of ``BACKBONES``, or ``{"name": ..., arguments}``.
        decoder: A name of ``DECODERS``, or ``{"name": ..., arguments}``.
        num_classes: Number of logit planes.
        weights: ``imagenet`` for the best that torchvision has for this backbone, another name of
            its weights such as ``IMAGENET1K_V1``, or a file.
        freeze_batch_norm: Keep the backbone's BatchNorm as loaded.
        seed: Of the weights that are not loaded: equal seeds start equal, whatever the global
            random state, which is left as it was.
        initialize: ``False`` leaves most parameters as memory holds them, which is fast: for a
            model whose whole state is loaded next.

    Raises:
        ConfigError: An unknown name or argument, or weights that this backbone does not have.
        CheckpointError: A file that does not hold this backbone's weights.

    Returns:
        The model; its ``report`` says what was loaded.
    """
    values = nullcontext() if initialize else _without_values()
    with torch.random.fork_rng(devices=()), values:
        torch.default_generator.manual_seed(seed)
        encoder = build(BACKBONES, backbone, "model.backbone")
        head = build(
            DECODERS,
            decoder,
            "model.decoder",
            channels=encoder.channels,
            strides=encoder.strides,
            num_classes=num_classes,
        )
    for part, module in (("backbone", encoder), ("decoder", head)):
        for name, parameter in module.named_parameters():
            if parameter.numel() == 0:
                raise ConfigError(f"model.{part}: a size is 0, so its '{name}' is empty")
    model = Segmenter(encoder, head, freeze_batch_norm=freeze_batch_norm)
    if weights is not None:
        path, source = locate(_name(backbone), weights)
        model.report = load_file(model, path, source=source)
    return model


def check_weights(model: Segmenter, backbone: Component | str, weights: str) -> None:
    """Raise what :func:`build_model` with ``weights`` would raise; torchvision's are downloaded.

    Args:
        model: Built without weights; it is not touched, and may be on the device ``meta``.
        backbone: The one it was built with.
        weights: As in :func:`build_model`.
    """
    path, source = locate(_name(backbone), weights)
    fit(model, identify(read_file(path), path, source=source), source=source)


@contextmanager
def _without_values() -> Iterator[None]:
    """Make the functions of ``torch.nn.init`` leave tensors as they are."""
    names = [name for name in vars(nn.init) if name.endswith("_") and not name.startswith("_")]
    with ExitStack() as stack:
        for name in names:
            stack.callback(setattr, nn.init, name, getattr(nn.init, name))
            setattr(nn.init, name, lambda tensor, *_, **__: tensor)
        yield


def _name(component: Component | str) -> str:
    return component if isinstance(component, str) else component["name"]


def load_model(path: Path, *, verify: bool = True) -> tuple[Segmenter, Config, dict[str, Any]]:
    """A model from its checkpoint alone, with the configuration it was trained with.

    Args:
        path: A checkpoint of a run, or a soup; of averaged weights and others, the averaged ones.
        verify: Compare the file with its digest first.

    Returns:
        The model in evaluation mode on the CPU, its configuration, and the checkpoint's other
        entries (``classes``, ``score``, ...).
    """
    state = checkpoint.load(path, mmap=True, verify=verify, needs=checkpoint.MODEL)
    config = parse(state["config"], str(path))

    def build() -> Segmenter:
        return build_model(
            config.model.backbone,
            config.model.decoder,
            num_classes=len(state["classes"]),
            freeze_batch_norm=config.model.freeze_batch_norm,
            initialize=False,
        )

    try:
        with torch.device("meta"):  # a model that the file does not hold may be of any size
            checkpoint.check_fit(build(), checkpoint.weights(state), path)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    model = build()
    checkpoint.check_weights(model, checkpoint.weights(state), path)
    model.load_state_dict(checkpoint.weights(state))
    others = {key: value for key, value in state.items() if key not in ("model", "ema")}
    return model.eval(), config, others
