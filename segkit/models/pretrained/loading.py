"""Loading of weights into a model: a whole backbone or none of it, and a report of the rest."""

import functools
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

from segkit.core import untrusted
from segkit.core.errors import CheckpointError, quoted
from segkit.models.backbones import BACKBONES
from segkit.models.backbones.inputs import MOST_CHANNELS, adapt_rgb, first_convolution
from segkit.models.decoders.eomt import EoMT
from segkit.models.layers import Classifier
from segkit.models.pretrained import beit, swin
from segkit.models.pretrained.names import State
from segkit.models.pretrained.reading import read_file
from segkit.models.pretrained.recognition import Weights, recognize, recorded_settings
from segkit.models.queries import QueryClassifier

AUXILIARY = ("aux", "aux_classifier", "heads", "presence")
"""Modules of decoders that are used in training; a file or a model may be without them."""

OUTPUT_NORMS = ("norm0.", "norm1.", "norm2.", "norm3.")
"""Norms of a backbone's feature maps, which a classifier's weights do not have."""

COUNTERS = ("num_batches_tracked", "forward_passes")
"""Buffers that only count, which a file may lack."""

NECK = "neck."
"""The module of a Vision Transformer that makes a pyramid, which pretrained weights lack."""

_CONSTANTS = ("relative_position_index", "relative_coords_table")
_TABLES = ("relative_position_bias_table", "relative_coords_table")


@dataclass(frozen=True)
class Report:
    """Which entries of a file and of a model were used.

    Args:
        source: The file.
        title: Its architecture and project.
        loaded: The model's entries that now have the file's values.
        skipped: The file's entries that were not used, and why.
        initialized: The model's entries that keep their initial values, and why.
        notes: Conversions of tensors, and differences between the model's computation and that of
            the file's project, certain or possible.
    """

    source: str
    title: str
    loaded: tuple[str, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)
    initialized: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def summary(self) -> str:
        """Return the report as a line for a log."""
        parts = [f"{len(self.loaded)} entries loaded"]
        for word, reasons in (("newly initialized", self.initialized), ("skipped", self.skipped)):
            if reasons:
                counts = Counter(reasons.values()).items()
                why = "; ".join(f"{reason}: {count}" for reason, count in counts)
                parts.append(f"{len(reasons)} {word} ({why})")
        return f"{self.source}: {self.title}; {', '.join(parts)}" + "".join(
            f"; note: {note}" for note in self.notes
        )


def load_file(model: nn.Module, path: str | Path, *, source: str = "") -> Report:
    """Load weights of segkit or another project into a model; ``docs/weights.md`` lists which.

    All of the backbone is loaded, or an error is raised. All of the decoder is loaded, except class
    heads of another size, or none of it, if the file has none of the same structure.

    Args:
        model: A :class:`segkit.models.segmenter.Segmenter`.
        path: A ``.pth``, ``.pt`` or ``.safetensors`` file. Code in it is never run.
        source: Name of the file in errors and in the report; the path by default.

    Raises:
        CheckpointError: If the file cannot be read, is not recognized, or has another backbone.
    """
    path, source = Path(path), source or str(path)
    weights = identify(read_file(path), path, source=source)
    entries, report = fit(model, weights, source=source)
    model.load_state_dict(entries, strict=False)
    return report


def identify(state: State, path: Path, *, source: str) -> Weights:
    """Recognize a file by its entries, and by the configuration in segkit's own checkpoints.

    Args:
        source: Its name in errors. If it is not the path, it is the name of torchvision's own
            weights, which cannot be another project's.

    Raises:
        CheckpointError: If no architecture of segkit has these names.
    """
    weights = recognize(state, source=source)
    if Path(source) != path:
        return replace(weights, unrecorded={}, differences=())
    settings = recorded_settings(path) if weights.decoder == "" else None
    return weights if settings is None else replace(weights, settings=settings, differences=())


def fit(model: nn.Module, weights: Weights, *, source: str) -> tuple[dict[str, Tensor], Report]:
    """Return the entries that a model would load, and the report; the model is not changed.

    Raises:
        CheckpointError: If the weights are not of the model's backbone.
    """
    backbone, decoder = model.get_submodule("backbone"), model.get_submodule("decoder")
    if isinstance(decoder, EoMT) and weights.decoder != "":
        depth = len([*backbone.get_submodule("blocks").children()])
        weights = _with_blocks_in_decoder(weights, depth)
    _check_backbone(backbone, weights, source)
    entries, initialized, notes = _fit_backbone(backbone, weights)
    heads, left, why = _fit_decoder(decoder, weights)
    entries |= heads
    names = {f"backbone.{name}": theirs for name, theirs in weights.backbone.names.items()}
    names |= weights.head.names
    own = model.state_dict()
    for name, tensor in entries.items():
        if own[name].is_floating_point() and not tensor.is_floating_point():
            raise CheckpointError(
                f"{source}: {quoted(names[name])} has type {tensor.dtype}, expected floating point"
            )
        if not untrusted.is_finite(tensor):
            raise CheckpointError(
                f"{source}: {quoted(names[name])} holds NaN or infinity; use another file"
            )
    skipped = {}
    used = {names[name] for name in entries}
    for part, reason in (
        (weights.backbone, "not of a backbone"),
        (weights.head, "of a decoder" if why else "not of this model"),
    ):
        for theirs in (*part.names.values(), *part.ignored, *part.unknown):
            if theirs not in used:
                constant = theirs.endswith(_CONSTANTS)
                skipped[theirs] = "follows from the window" if constant else reason
    notes += _compare_settings(model, weights, with_decoder=not why)
    loaded, initialized = tuple(entries), initialized | left
    return entries, Report(source, weights.title, loaded, skipped, initialized, tuple(notes))


def _with_blocks_in_decoder(weights: Weights, depth: int) -> Weights:
    """Return a whole ViT's weights with its norm, and its blocks from ``depth`` on, in ``eomt``."""
    trunk = replace(weights.backbone, tensors={}, names={})
    tensors, names = dict(weights.head.tensors), dict(weights.head.names)
    head = replace(weights.head, tensors=tensors, names=names)
    for name, tensor in weights.backbone.tensors.items():
        part, new = trunk, name
        block = re.match(r"blocks\.(\d+)\.", name)
        if block and int(block[1]) >= depth:
            part, new = head, f"decoder.blocks.{int(block[1]) - depth}.{name[block.end() :]}"
        elif name.startswith("norm."):
            part, new = head, f"decoder.{name}"
        part.tensors[new], part.names[new] = tensor, weights.backbone.names[name]
    return replace(weights, backbone=trunk, head=head)


def _check_backbone(backbone: nn.Module, weights: Weights, source: str) -> None:
    """Raise a CheckpointError if the weights are not of this backbone."""
    if why := misfit(backbone, weights):
        names = fitting(weights)
        advice = f"choose the backbone it fits: {', '.join(names)}"
        if not names:
            advice = "no backbone of segkit has its structure"
        raise CheckpointError(f"{source}: {why} ({weights.title}); {advice}")
    norms = output_norms(weights)
    if norms and not any(name.startswith(OUTPUT_NORMS) for name in backbone.state_dict()):
        raise CheckpointError(
            f"{source}: '{weights.backbone.names[norms[0]]}' is of norms of the feature maps, "
            f"which this backbone does not have ({weights.title}); "
            "give the backbone output_norms: true"
        )


def output_norms(weights: Weights) -> list[str]:
    """Return the entries of norms of feature maps, by segkit's names."""
    return [name for name in weights.backbone.tensors if name.startswith(OUTPUT_NORMS)]


def misfit(backbone: nn.Module, weights: Weights) -> str:
    """Return why the weights are not exactly of this backbone; empty if they are."""
    theirs, names = weights.backbone.tensors, weights.backbone.names
    own = {k: v for k, v in backbone.state_dict().items() if not k.endswith(_CONSTANTS)}
    has_norms = any(name in own for name in output_norms(weights))
    has_neck = any(name.startswith(NECK) for name in theirs)
    needed = [
        name
        for name in own
        if (has_norms or not name.startswith(OUTPUT_NORMS))
        and (has_neck or not name.startswith(NECK))
        # counted since PyTorch 0.4.1; older files are whole without
        and (name in theirs or not name.endswith("num_batches_tracked"))
    ]
    missing = [name for name in needed if name not in theirs]
    if missing:
        have = len(needed) - len(missing)
        return f"has {have} of the backbone's {len(needed)} entries, '{missing[0]}' is missing"
    parts = {_part(name) for name in own}
    more = [k for k in theirs if k not in own and _part(k) in parts and not k.endswith(_CONSTANTS)]
    if more := [*weights.backbone.unknown, *(names[name] for name in more)]:
        return f"has {len(more)} entries more than the backbone, the first '{more[0]}'"
    image_weight = f"{first_convolution(backbone)}.weight"
    for name in needed:
        have_shape, want = theirs[name].shape, own[name].shape
        adaptable = name == image_weight and have_shape == (want[0], 3, *want[2:])
        if have_shape != want and not adaptable and not _resizable(name, have_shape, want):
            return (
                f"'{names[name]}' has shape {tuple(have_shape)}, the backbone expects {tuple(want)}"
            )
    return ""


def fitting(weights: Weights) -> list[str]:
    """Return the backbones that these weights are of, such as ``swin_b (window 12)``."""
    values = sum(tensor.numel() for tensor in weights.backbone.tensors.values())
    names = []
    for name in BACKBONES:
        if not name.startswith(weights.backbones) or not _plausible(name, values):
            continue
        arguments: dict[str, Any] = {}
        if (channels := _input_channels(_on_meta(name), weights)) != 3:
            arguments["in_channels"] = channels
        if name.startswith("convnext_") and output_norms(weights):
            arguments["output_norms"] = True
        if not misfit(_on_meta(name, **arguments), weights):
            for side in windows(weights):
                arguments["window"] = side
            words = (f" ({key} {json.dumps(value)})" for key, value in arguments.items())
            names.append(name + "".join(words))
    return names


@functools.cache
def _on_meta(name: str, **options: Any) -> nn.Module:
    with torch.random.fork_rng(devices=()), torch.device("meta"):
        return BACKBONES[name](**options)


def _input_channels(backbone: nn.Module, weights: Weights) -> int:
    """Return the channels of the images that the weights are for; 3 if they cannot be."""
    weight = weights.backbone.tensors.get(f"{first_convolution(backbone)}.weight")
    channels = weight.shape[1] if weight is not None and weight.ndim == 4 else 3
    return channels if 1 <= channels <= MOST_CHANNELS else 3


def windows(weights: Weights) -> list[int]:
    """Return the windows of the position biases of a Swin or BEiT; nothing for other backbones."""
    tables = [v for k, v in weights.backbone.tensors.items() if k.endswith(_TABLES) and v.ndim]
    return sorted({_window(table) for table in tables})


def _fit_backbone(
    backbone: nn.Module, weights: Weights
) -> tuple[dict[str, Tensor], dict[str, str], list[str]]:
    """Return a backbone's new entries, those that keep their values, and notes on conversions."""
    entries: dict[str, Tensor] = {}
    left: dict[str, str] = {}
    notes: dict[str, None] = {}  # without duplicates
    image_weight = f"{first_convolution(backbone)}.weight"
    for name, value in backbone.state_dict().items():
        tensor = weights.backbone.tensors.get(name, value)
        if name.endswith(_CONSTANTS):
            if name.endswith(_TABLES) and tensor.ndim and _window(tensor) != _window(value):
                sides = f"for window {_window(value)}, the file's are for {_window(tensor)}"
                notes[f"position biases are computed {sides}"] = None
            continue
        if name not in weights.backbone.tensors:
            left[f"backbone.{name}"] = "not in the file"
            continue
        if tensor.shape != value.shape and name == image_weight:
            notes[f"RGB filters of '{name}' adapted to {value.shape[1]} channels"] = None
            tensor = adapt_rgb(tensor, value.shape[1])
        elif tensor.shape != value.shape:
            sides = f"from window {_window(tensor)} to {_window(value)}"
            notes[f"position biases resized {sides}"] = None
            with_class_token = value.shape[0] != swin.side(value.shape[0]) ** 2
            resized = beit.resize_table if with_class_token else swin.resize_bias_table
            tensor = resized(tensor, value.shape[0])
        entries[f"backbone.{name}"] = tensor
    return entries, left, list(notes)


def _compare_settings(model: nn.Module, weights: Weights, *, with_decoder: bool) -> list[str]:
    """Return sentences on settings with which the model computes differently, or may."""

    def have(path: str) -> Any:
        part, _, attribute = path.rpartition(".")
        if not with_decoder and part != "backbone":
            return None
        value = getattr(model.get_submodule(part), attribute, None)
        return tuple(value) if isinstance(value, list) else value

    return [
        *(
            f"made with {path} {value!r}, this model has {have(path)!r}"
            for path, value in weights.settings.items()
            if have(path) not in (None, value)
        ),
        *(
            f"the file does not tell {path}, {have(path)!r} in this model: {why}"
            for path, why in weights.unrecorded.items()
            if have(path) is not None
        ),
        *weights.differences,
    ]


def _fit_decoder(
    decoder: nn.Module, weights: Weights
) -> tuple[dict[str, Tensor], dict[str, str], str]:
    """Return a decoder's new entries, those that keep their values, and why all do, if so."""
    own = {f"decoder.{name}": value for name, value in decoder.state_dict().items()}
    theirs = weights.head.tensors
    if weights.decoder is None:  # with a ViT's last blocks, if the decoder has them
        entries = {k: x for k, x in theirs.items() if k in own and x.shape == own[k].shape}
        left = dict.fromkeys((name for name in own if name not in entries), weights.reason)
        return entries, left, weights.reason
    classes = Classifier, QueryClassifier
    heads = {f"decoder.{k}" for k, part in decoder.named_modules() if isinstance(part, classes)}
    entries, left = {}, {}
    wrong = [f"'{name}' is more" for name in theirs if name not in own and not _auxiliary(name)]
    wrong += [f"'{name}' is more" for name in weights.head.unknown]
    for name, value in own.items():
        is_head = name.rpartition(".")[0] in heads
        tensor = theirs.get(name)
        if tensor is None:
            if is_head or _auxiliary(name) or name.endswith(COUNTERS):
                left[name] = "not in the file"
            else:
                wrong.append(f"'{name}' is missing")
        elif tensor.shape == value.shape:
            entries[name] = tensor
        elif is_head and tensor.shape[1:] == value.shape[1:]:
            left[name] = f"{tensor.shape[0]} classes in the file, {value.shape[0]} here"
        else:
            shapes = f"{tuple(tensor.shape)}, here {tuple(value.shape)}"
            wrong.append(f"'{name}' has shape {shapes}")
    if not wrong:
        return entries, left, ""
    file = f"the file's decoder, {weights.decoder}," if weights.decoder else "it"
    why = f"{file} differs: {wrong[0]}"
    return {}, dict.fromkeys(own, why), why


def _auxiliary(name: str) -> bool:
    return name.split(".")[1] in AUXILIARY


def _part(name: str) -> str:
    """Return the stage of an entry; a backbone has all of a stage of the classifier, or none."""
    first, second, *_ = f"{name}.".split(".")
    return f"{first}.{second}" if first == "features" else first


def _resizable(name: str, have: torch.Size, want: torch.Size) -> bool:
    if not name.endswith("relative_position_bias_table") or len(have) != 2:
        return False
    others = [entries - swin.side(entries) ** 2 for entries in (have[0], want[0])]
    return have[1] == want[1] and others[0] == others[1] in (0, 3)


def _window(table: Tensor) -> int:
    """Return the window of a table of biases, (entries, heads), or of coordinates, (1, n, n, 2)."""
    return ((table.shape[1] if table.ndim == 4 else swin.side(table.shape[0])) + 1) // 2


def _plausible(name: str, values: int) -> bool:
    """Return False if torchvision's backbone differs much in size, so that it need not be built."""
    if name not in models.list_models():
        return True
    published: Any = models.get_model_weights(name)
    whole = published.DEFAULT.meta["num_params"]
    return whole / 3 < values < 1.1 * whole
