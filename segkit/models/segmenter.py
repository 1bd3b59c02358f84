"""The segmentation model: a backbone and a decoder."""

import fnmatch
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from segkit.core import checkpoint
from segkit.core.config import Component, Config, build, matching, parse
from segkit.core.errors import CheckpointError, ConfigError, closest, quoted
from segkit.models.backbones import BACKBONES
from segkit.models.backbones.depth import first_stages
from segkit.models.decoders import DECODERS
from segkit.models.export import export
from segkit.models.layers import resize
from segkit.models.pretrained import Report, load_file
from segkit.models.pretrained.loading import fit, identify
from segkit.models.pretrained.published import locate
from segkit.models.pretrained.reading import read_file
from segkit.models.queries import QUERY_OUTPUTS

ON_ONE_MAP = tuple(name for name, make in DECODERS.items() if getattr(make, "takes", None) == "map")
"""Decoders that work on a single feature map, such as that of a plain Vision Transformer."""


class Segmenter(nn.Module):
    """A model that maps images to logits of the same size.

    Args:
        backbone: Maps an image to a list of feature maps, shallow to deep. Its optional
            attribute ``output_modules`` names, for each map, the module that is used only for it.
        decoder: Maps feature maps to a dict of logits: ``out``, and in training ``aux*`` or, of a
            mask transformer, :data:`segkit.models.queries.QUERY_OUTPUTS`. Its optional attribute
            ``used_levels`` lists the feature maps it uses; ``align_corners`` says how its logits
            are resized; ``takes`` is ``"pyramid"`` if it needs feature maps of several strides,
            ``"map"`` if one is enough.
        freeze_batch_norm: Do not change the backbone's BatchNorm, neither statistics nor weights.

    Shape:
        image: (B, C, H, W), normalized
        logits: (B, num_classes, H, W), or (B, num_classes) for logits of the whole image; the
            outputs of queries keep their size
    """

    def __init__(
        self, backbone: nn.Module, decoder: nn.Module, *, freeze_batch_norm: bool = False
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.decoder = decoder
        self.freeze_batch_norm = freeze_batch_norm
        self.report: Report | None = None  # set by build_model if it loads weights
        self.config: dict[str, Any] | None = None  # set by build_model: the section "model"
        self.align_corners: bool = getattr(decoder, "align_corners", False)
        if freeze_batch_norm:
            for module in backbone.modules():
                if isinstance(module, _BatchNorm):
                    module.requires_grad_(False)
        for part in self._unused():
            part.requires_grad_(False)
        self._frozen_names: set[str] = set()
        self.train()

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        size = image.shape[-2:]
        outputs = self.decoder(self.backbone(image))
        return {
            name: resize(logits, size, align_corners=self.align_corners)
            if logits.ndim == 4 and name not in QUERY_OUTPUTS
            else logits
            for name, logits in outputs.items()
        }

    def train(self, mode: bool = True) -> "Segmenter":
        super().train(mode)
        for norm in self._frozen():
            norm.eval()
        return self

    def freeze(self, what: int | Sequence[str]) -> None:
        """Stop the training of parameters, and the statistics of BatchNorm among them.

        Args:
            what: The number of first stages of the backbone, or patterns of parameters' names, such
                as ``backbone.layer1.*``.

        Raises:
            ConfigError: The backbone has fewer stages, or a pattern fits no parameter.
        """
        if isinstance(what, int):
            chosen = {f"backbone.{name}" for name in first_stages(self.backbone, what)}
        else:
            names = [name for name, _ in self.named_parameters()]
            for pattern in what:
                if not fnmatch.filter(names, pattern):
                    near = closest(pattern, names)
                    raise ConfigError(f"no parameter is called {quoted(pattern)}{near}")
            chosen = {name for name in names if any(fnmatch.fnmatch(name, p) for p in what)}
        for name in chosen:
            self.get_parameter(name).requires_grad_(False)
        self._frozen_names |= chosen
        self.train(self.training)

    def export(self, path: str | Path) -> None:
        """Write a file that runs without this library; see :func:`segkit.models.export.export`."""
        export(self, path)

    def _unused(self) -> list[nn.Module]:
        """Return the modules that only feature maps unused by the decoder need.

        They are frozen, as distributed training would wait for their gradients.
        """
        names: Sequence[str] | None = getattr(self.backbone, "output_modules", None)
        used_levels: Sequence[int] | None = getattr(self.decoder, "used_levels", None)
        if names is None or used_levels is None:
            return []
        used = {names[level] for level in used_levels}
        return [self.backbone.get_submodule(name) for name in names if name not in used]

    def _frozen(self) -> list[nn.Module]:
        """Return each BatchNorm whose statistics do not change in training."""
        return [
            module
            for name, module in self.named_modules()
            if isinstance(module, _BatchNorm)
            and (
                (self.freeze_batch_norm and name.startswith("backbone."))
                or f"{name}.weight" in self._frozen_names
            )
        ]


def create_model(
    decoder: Component | str,
    backbone: Component | str = "resnet50",
    *,
    num_classes: int,
    in_channels: int = 3,
    weights: str | Path | None = None,
    **decoder_arguments: Any,
) -> Segmenter:
    """Build a model of a decoder and a backbone, such as ``create_model("unet", num_classes=5)``.

    Args:
        decoder: A name of :func:`list_decoders`, or ``{"name": ..., arguments}``.
        backbone: A name of :func:`list_backbones`, or ``{"name": ..., arguments}``.
        num_classes: Number of logit planes.
        in_channels: Channels of the images. Weights pretrained on RGB images are adapted.
        weights: ``imagenet``, another name of torchvision's weights, a file, or ``None``. What is
            not loaded is newly initialized, with the same values in each call.
        **decoder_arguments: Arguments of the decoder, such as ``width=64``.

    Raises:
        ConfigError: If a name or argument is unknown, or the backbone has no such weights.
        CheckpointError: If a file does not hold weights of this backbone.

    Returns:
        The model in training mode; its ``report`` says what was loaded.
    """
    head: dict[str, Any] = {"name": decoder} if isinstance(decoder, str) else dict(decoder)
    encoder: dict[str, Any] = {"name": backbone} if isinstance(backbone, str) else dict(backbone)
    _check_names(head.get("name"), encoder.get("name"))
    if num_classes < 1:
        raise ConfigError(f"num_classes: expected at least 1, got {num_classes}")
    if in_channels != 3:
        encoder["in_channels"] = in_channels
    return build_model(
        encoder,
        head | decoder_arguments,
        num_classes=num_classes,
        weights=None if weights is None else str(weights),
        where="",
    )


def list_backbones(filter: str = "") -> list[str]:
    """Return the backbones' names that contain or match ``filter``: ``swin``, ``resnet*``."""
    return matching(BACKBONES, filter)


def list_decoders(filter: str = "") -> list[str]:
    """Return the decoders' names that contain or match ``filter``: ``unet``, ``deeplab*``."""
    return matching(DECODERS, filter)


def _check_names(decoder: Any, backbone: Any) -> None:
    """Raise an error for an unknown name, or a name of the other argument."""
    if decoder in BACKBONES.keys() - DECODERS.keys():
        example = backbone if backbone in DECODERS else "unet"
        raise ConfigError(
            f"decoder: '{decoder}' is a backbone; the decoder is the first argument: "
            f"create_model('{example}', '{decoder}', ...)"
        )
    if backbone in DECODERS.keys() - BACKBONES.keys():
        raise ConfigError(
            f"backbone: '{backbone}' is a decoder; expected a name of list_backbones(), "
            "such as 'resnet50'"
        )
    for argument, name, registry in (
        ("decoder", decoder, DECODERS),
        ("backbone", backbone, BACKBONES),
    ):
        if isinstance(name, str) and name not in registry:
            standard = name.lower().replace("+", "plus")
            raise ConfigError(f"{argument}: unknown {quoted(name)}{closest(standard, registry)}")


def build_model(
    backbone: Component | str,
    decoder: Component | str,
    *,
    num_classes: int,
    weights: str | None = None,
    freeze_batch_norm: bool = False,
    freeze: int | Sequence[str] = 0,
    seed: int = 0,
    initialize: bool = True,
    where: str = "model.",
) -> Segmenter:
    """Build a model as a configuration describes it.

    Args:
        backbone: A name of ``BACKBONES``, or ``{"name": ..., arguments}``.
        decoder: A name of ``DECODERS``, or ``{"name": ..., arguments}``.
        num_classes: Number of logit planes.
        weights: ``imagenet`` for torchvision's best weights of this backbone, the name of others
            such as ``IMAGENET1K_V1``, or a file.
        freeze_batch_norm: Do not train the backbone's BatchNorm, neither statistics nor weights.
        freeze: What is not trained; see :meth:`Segmenter.freeze`.
        seed: Seed of the weights that are not loaded. The global random state has no effect on
            them and is not changed.
        initialize: ``False`` leaves most parameters uninitialized, which is fast, for a model whose
            whole state is loaded next.
        where: What errors put before ``backbone``, ``decoder`` and ``weights``.

    Raises:
        ConfigError: If a name or argument is unknown, or this backbone has no such weights.
        CheckpointError: If a file does not hold weights of this backbone.

    Returns:
        The model; its ``report`` says what was loaded, and its ``config`` is the section ``model``
        of a configuration that builds it again.
    """
    values = nullcontext() if initialize else _without_values()
    with torch.random.fork_rng(devices=()), values:
        torch.default_generator.manual_seed(seed)
        encoder = build(BACKBONES, backbone, f"{where}backbone")
        _check_strides(encoder.strides, decoder, f"{where}decoder")
        head = build(
            DECODERS,
            decoder,
            f"{where}decoder",
            channels=encoder.channels,
            strides=encoder.strides,
            num_classes=num_classes,
        )
    for part, module in (("backbone", encoder), ("decoder", head)):
        for name, parameter in module.named_parameters():
            if parameter.numel() == 0:
                raise ConfigError(f"{where}{part}: a size is 0, so its '{name}' is empty")
    model = Segmenter(encoder, head, freeze_batch_norm=freeze_batch_norm)
    if freeze:
        try:
            model.freeze(freeze)
        except ConfigError as error:
            raise ConfigError(f"{where}freeze: {error}") from error
    model.config = {
        "backbone": backbone,
        "decoder": decoder,
        "freeze_batch_norm": freeze_batch_norm,
        "freeze": freeze,
    }
    if weights is not None:
        path, source = locate(_name(backbone), weights, argument=f"{where}weights")
        model.report = load_file(model, path, source=source)
    return model


def _check_strides(strides: tuple[int, ...], decoder: Component | str, where: str) -> None:
    """Refuse a plain Vision Transformer's output that the decoder does not work on."""
    name = decoder if isinstance(decoder, str) else decoder.get("name")
    takes = getattr(DECODERS.get(name), "takes", None) if isinstance(name, str) else None
    if len(set(strides)) > 1 or takes is None:
        return
    if len(strides) > 1 or takes == "pyramid":
        kind = "only one feature map" if len(strides) == 1 else "tokens"
        raise ConfigError(
            f"{where}: {name} does not work on {kind}; set the backbone's output to 'pyramid' "
            f"for any decoder, to 'map' for {', '.join(ON_ONE_MAP)}, to 'tokens' for eomt"
        )


def check_weights(model: Segmenter, backbone: Component | str, weights: str) -> None:
    """Raise what :func:`build_model` would raise for ``weights``; torchvision's are downloaded.

    ``model`` is built without weights, may be on the device ``meta``, and is not changed.
    """
    path, source = locate(_name(backbone), weights, argument="model.weights")
    fit(model, identify(read_file(path), path, source=source), source=source)


@contextmanager
def _without_values() -> Iterator[None]:
    """Make the functions of ``torch.nn.init`` leave tensors unchanged."""
    names = [name for name in vars(nn.init) if name.endswith("_") and not name.startswith("_")]
    with ExitStack() as stack:
        for name in names:
            stack.callback(setattr, nn.init, name, getattr(nn.init, name))
            setattr(nn.init, name, lambda tensor, *_, **__: tensor)
        yield


def _name(component: Component | str) -> str:
    return component if isinstance(component, str) else component["name"]


def load_model(path: Path, *, verify: bool = True) -> tuple[Segmenter, Config, dict[str, Any]]:
    """Load a model from its checkpoint, with the configuration it was trained with.

    Args:
        path: A checkpoint of a run, or a soup. If it has averaged weights, these are loaded.
        verify: Compare the file with its digest first.

    Returns:
        The model in evaluation mode on the CPU, its configuration, and the checkpoint's other
        entries (``classes``, ``score``, ...).
    """
    state = checkpoint.load(path, mmap=True, verify=verify, needs=checkpoint.MODEL)
    tensors = checkpoint.weights(state)
    config = parse(state["config"], str(path))

    def build() -> Segmenter:
        return build_model(
            config.model.backbone,
            config.model.decoder,
            num_classes=len(state["classes"]),
            freeze_batch_norm=config.model.freeze_batch_norm or config.model.lora > 0,
            freeze=config.model.freeze,
            initialize=False,
        )

    try:
        with torch.device("meta"):  # an invalid configuration may describe a model of any size
            checkpoint.check_fit(build(), tensors, path)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    model = build()
    checkpoint.check_weights(model, tensors, path)
    model.load_state_dict(tensors)
    others = {key: value for key, value in state.items() if key not in ("model", "ema", "window")}
    return model.eval(), config, others
