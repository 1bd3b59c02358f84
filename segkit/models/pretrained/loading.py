"""From a file's entries to a model's: all of a backbone or nothing, and a report of the rest."""

import functools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

from segkit.core import checkpoint
from segkit.core.errors import CheckpointError, quoted
from segkit.models.backbones import BACKBONES
from segkit.models.backbones.inputs import MOST_CHANNELS, adapt_rgb, first_convolution
from segkit.models.layers import Classifier
from segkit.models.pretrained import swin
from segkit.models.pretrained.naming import State
from segkit.models.pretrained.own import trained_with
from segkit.models.pretrained.reading import read_file
from segkit.models.pretrained.recognition import Found, recognize

AUXILIARY = ("aux", "aux_classifier", "heads", "presence")
"""Parts of decoders that serve training; a file or a model may be without them."""

OUTPUT_NORMS = ("norm0", "norm1", "norm2", "norm3")
"""The norms of a backbone's feature maps, which a classifier's weights do not have."""

_CONSTANTS = ("relative_position_index", "relative_coords_table")
_TABLES = ("relative_position_bias_table", "relative_coords_table")


@dataclass(frozen=True)
class Report:
    """What became of a file's entries and of a model's.

    Args:
        source: The file.
        title: What it is.
        loaded: The model's entries that have the file's values now.
        skipped: The file's entries that were not used, and why.
        fresh: The model's entries that stay as they were, and why.
        notes: What was done to fit, where the model computes otherwise than the file's own, and
            what changes outputs and is not told by the file.
    """

    source: str
    title: str
    loaded: tuple[str, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)
    fresh: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def summary(self) -> str:
        """One line for a log."""
        parts = [f"{len(self.loaded)} entries loaded"]
        for word, reasons in (("newly initialized", self.fresh), ("skipped", self.skipped)):
            counts = Counter(reasons.values())
            if counts:
                why = "; ".join(f"{reason}: {count}" for reason, count in counts.items())
                parts.append(f"{len(reasons)} {word} ({why})")
        return f"{self.source}: {self.title}; {', '.join(parts)}" + "".join(
            f"; note: {note}" for note in self.notes
        )


def load_file(model: nn.Module, path: str | Path, *, source: str = "") -> Report:
    """Load a file of weights of this project or another one into a model.

    ``docs/weights.md`` lists what is recognized. The backbone loads whole or not at all; the
    decoder too, where the file has one of the same structure, except for class heads of another
    size.

    Args:
        model: A :class:`segkit.models.segmenter.Segmenter`.
        path: ``.pth``, ``.pt`` or ``.safetensors``. Code in it is never run.
        source: What to call it in errors and the report, the path by default.

    Raises:
        CheckpointError: Missing, unreadable, unknown, or not the whole of this backbone.
    """
    path, source = Path(path), source or str(path)
    return _load(model, identify(read_file(path), path, source=source), source=source)


def load_state(model: nn.Module, state: State, *, source: str) -> Report:
    """:func:`load_file` of entries that are in memory already.

    Args:
        model: A :class:`segkit.models.segmenter.Segmenter`.
        state: Names to tensors.
        source: Where they come from, for errors and the report.
    """
    checkpoint.refuse_forged(state, Path(source))
    return _load(model, recognize(state, source=source), source=source)


def _load(model: nn.Module, found: Found, *, source: str) -> Report:
    entries, report = fit(model, found, source=source)
    model.load_state_dict(entries, strict=False)
    return report


def identify(state: State, path: Path, *, source: str) -> Found:
    """Tell what a file is by its entries, and by the configuration in segkit's own.

    Args:
        state: Its entries.
        path: The file.
        source: What it is called. Another name than the path is that of torchvision's own weights,
            which are not mistaken for another project's.

    Raises:
        CheckpointError: It is of no architecture that segkit has.
    """
    found = recognize(state, source=source)
    if Path(source) != path:
        return replace(found, untold={}, differs=())
    settings = trained_with(path) if found.decoder == "" else None
    return found if settings is None else replace(found, settings=settings, differs=())


def fit(model: nn.Module, found: Found, *, source: str) -> tuple[dict[str, Tensor], Report]:
    """What a model would take of a file; the model is not touched.

    Returns:
        The model's new entries, and the report.

    Raises:
        CheckpointError: The file does not have the whole of the model's backbone.
    """
    backbone, decoder = model.get_submodule("backbone"), model.get_submodule("decoder")
    if why := misfit(backbone, found):
        names = fitting(found)
        advice = f"choose the backbone it fits: {', '.join(names)}"
        if (channels := _input_channels(backbone, found)) != 3:
            advice += f", with in_channels {channels}"
        if not names:
            advice = "no backbone of segkit has its structure"
        raise CheckpointError(f"{source}: {why} ({found.title}); {advice}")
    own_parts = {name.split(".")[0] for name in backbone.state_dict()}
    norms = output_norms(found)
    if norms and norms[0].split(".")[0] not in own_parts:
        raise CheckpointError(
            f"{source}: '{found.backbone.names[norms[0]]}' is of norms of the feature maps, which "
            f"this backbone does not have ({found.title}); give the backbone output_norms: true"
        )
    entries, fresh, notes = _fit_backbone(backbone, found)
    heads, left, why = _fit_decoder(decoder, found)
    unused = _unused_of_backbone(backbone, found)
    used = {found.head.names[name] for name in heads}
    for theirs in (*found.head.names.values(), *found.head.beyond, *found.head.unknown):
        if theirs not in used:
            unused[theirs] = "of a decoder" if why else "not of this model"
    notes += _settings_of(model, found, without_decoder=bool(why))
    entries |= heads
    own = model.state_dict()
    for name, tensor in entries.items():
        theirs = found.head.names.get(name) or found.backbone.names[name.removeprefix("backbone.")]
        if own[name].is_floating_point() and not tensor.is_floating_point():
            raise CheckpointError(
                f"{source}: {quoted(theirs)} has type {tensor.dtype}, expected floating point"
            )
        if not checkpoint.is_finite(tensor):
            raise CheckpointError(
                f"{source}: {quoted(theirs)} holds NaN or infinity; use another file"
            )
    report = Report(source, found.title, tuple(entries), unused, fresh | left, tuple(notes))
    return entries, report


def output_norms(found: Found) -> list[str]:
    """A file's entries for the norms of feature maps, by the names they have here."""
    return [name for name in found.backbone.tensors if name.split(".")[0] in OUTPUT_NORMS]


def misfit(backbone: nn.Module, found: Found) -> str:
    """Why a file does not have exactly this backbone; empty where it does."""
    theirs = found.backbone.tensors
    own = {k: v for k, v in backbone.state_dict().items() if not k.endswith(_CONSTANTS)}
    own_norms = {k for k in own if k.split(".")[0] in getattr(backbone, "fresh", ())}
    lacks_norms = not own_norms & theirs.keys()
    needed = [
        name
        for name in own
        if not (lacks_norms and name in own_norms)
        # counted since PyTorch 0.4.1; older files are whole without
        and (name in theirs or not name.endswith("num_batches_tracked"))
    ]
    missing = [name for name in needed if name not in theirs]
    if missing:
        have = len(needed) - len(missing)
        return f"has {have} of the backbone's {len(needed)} entries, '{missing[0]}' is missing"
    parts = {_part(name) for name in own}
    more = [k for k in theirs if k not in own and _part(k) in parts and not k.endswith(_CONSTANTS)]
    more = [*found.backbone.unknown, *(found.backbone.names[name] for name in more)]
    if more:
        return f"has {len(more)} entries more than the backbone, the first '{more[0]}'"
    image_weight = f"{first_convolution(backbone)}.weight"
    for name in needed:
        have_shape, want = theirs[name].shape, own[name].shape
        if name == image_weight and have_shape == (want[0], 3, *want[2:]):
            continue  # it is adapted if the backbone's images have other channels than RGB
        if have_shape != want and not _resizable(name, have_shape, want):
            return (
                f"'{found.backbone.names[name]}' has shape {tuple(have_shape)}, the backbone "
                f"expects {tuple(want)}"
            )
    return ""


def fitting(found: Found) -> list[str]:
    """Return the names of the backbones that a file has, with some window, norms and channels."""
    values = sum(tensor.numel() for tensor in found.backbone.tensors.values())
    names = []
    for name in BACKBONES:
        if not name.startswith(found.builds) or not _plausible(name, values):
            continue
        options = {}
        if (channels := _input_channels(_without_values(name), found)) != 3:
            options["in_channels"] = channels
        if name.startswith("convnext_"):
            options["output_norms"] = bool(output_norms(found))
        if not misfit(_without_values(name, **options), found):
            names.append(name)
    return names


@functools.cache
def _without_values(name: str, **options: Any) -> nn.Module:
    with torch.random.fork_rng(devices=()), torch.device("meta"):
        return BACKBONES[name](**options)


def _input_channels(backbone: nn.Module, found: Found) -> int:
    """Return the channels of the images that a file's weights are for; 3 if they cannot be."""
    weight = found.backbone.tensors.get(f"{first_convolution(backbone)}.weight")
    channels = weight.shape[1] if weight is not None and weight.ndim == 4 else 3
    return channels if 1 <= channels <= MOST_CHANNELS else 3


def windows(found: Found) -> list[int]:
    """Windows of a Swin's position biases; none for other files."""
    tables = [v for k, v in found.backbone.tensors.items() if k.endswith(_TABLES) and v.ndim]
    return sorted({_window(table) for table in tables})


def _fit_backbone(
    backbone: nn.Module, found: Found
) -> tuple[dict[str, Tensor], dict[str, str], list[str]]:
    """A backbone's new entries, those that stay as they are, and what was done to fit."""
    entries: dict[str, Tensor] = {}
    fresh: dict[str, str] = {}
    notes: dict[str, None] = {}
    image_weight = f"{first_convolution(backbone)}.weight"
    for name, value in backbone.state_dict().items():
        if name.endswith(_CONSTANTS):
            theirs = found.backbone.tensors.get(name, value)
            if name.endswith(_TABLES) and theirs.ndim and _window(theirs) != _window(value):
                sides = f"for window {_window(value)}, the file's are for {_window(theirs)}"
                notes[f"position biases are computed {sides}"] = None
            continue
        if name not in found.backbone.tensors:
            fresh[f"backbone.{name}"] = "not in the file"
            continue
        tensor = found.backbone.tensors[name]
        if tensor.shape != value.shape and name == image_weight:
            notes[f"RGB filters of '{name}' adapted to {value.shape[1]} channels"] = None
            tensor = adapt_rgb(tensor, value.shape[1])
        elif tensor.shape != value.shape:
            sides = f"from window {_window(tensor)} to {_window(value)}"
            notes[f"position biases resized {sides}"] = None
            tensor = swin.resize_bias_table(tensor, value.shape[0])
        entries[f"backbone.{name}"] = tensor
    return entries, fresh, list(notes)


def _settings_of(model: nn.Module, found: Found, *, without_decoder: bool) -> list[str]:
    """Where a model computes otherwise than the file's project, or may."""

    def have(path: str) -> Any:
        part, _, attribute = path.rpartition(".")
        if without_decoder and not path.startswith("backbone."):
            return None
        value = getattr(model.get_submodule(part), attribute, None)
        return tuple(value) if isinstance(value, list) else value

    told = {path: value for path, value in found.settings.items() if have(path) is not None}
    return [
        *(
            f"made with {path} {value!r}, this model has {have(path)!r}"
            for path, value in told.items()
            if have(path) != value
        ),
        *(
            f"the file does not tell {path}, {have(path)!r} in this model: {why}"
            for path, why in found.untold.items()
            if have(path) is not None
        ),
        *found.differs,
    ]


def _unused_of_backbone(backbone: nn.Module, found: Found) -> dict[str, str]:
    """The file's entries at a backbone's place that it does not take, and why."""
    own = backbone.state_dict()
    names = found.backbone.names.items()
    unused = {theirs: "not of a backbone" for ours, theirs in names if ours not in own}
    unused |= dict.fromkeys(found.backbone.beyond, "not of a backbone")
    constants = [*found.backbone.names.values(), *found.backbone.beyond]
    return unused | {k: "follows from the window" for k in constants if k.endswith(_CONSTANTS)}


def _fit_decoder(decoder: nn.Module, found: Found) -> tuple[dict[str, Tensor], dict[str, str], str]:
    """The decoder's new entries, those that stay as they are, and why none is taken, if so."""
    own = {f"decoder.{name}": value for name, value in decoder.state_dict().items()}
    theirs = found.head.tensors
    if found.decoder is None:
        return {}, dict.fromkeys(own, found.instead), found.instead
    heads = {
        f"decoder.{name}"
        for name, module in decoder.named_modules()
        if isinstance(module, Classifier)
    }
    taken: dict[str, Tensor] = {}
    left: dict[str, str] = {}
    wrong = [f"'{name}' is more" for name in theirs if name not in own and not _auxiliary(name)]
    wrong += [f"'{name}' is more" for name in found.head.unknown]
    for name, value in own.items():
        is_head = name.rpartition(".")[0] in heads
        if name in theirs and theirs[name].shape == value.shape:
            taken[name] = theirs[name]
        elif name in theirs and is_head and theirs[name].shape[1:] == value.shape[1:]:
            left[name] = f"{theirs[name].shape[0]} classes in the file, {value.shape[0]} here"
        elif name in theirs:
            shapes = f"{tuple(theirs[name].shape)}, here {tuple(value.shape)}"
            wrong.append(f"'{name}' has shape {shapes}")
        elif is_head or _auxiliary(name) or name.endswith("num_batches_tracked"):
            left[name] = "not in the file"
        else:
            wrong.append(f"'{name}' is missing")
    if wrong:
        known = f"the file's decoder, {found.decoder}, differs" if found.decoder else "it differs"
        why = f"{known}: {wrong[0]}"
        return {}, dict.fromkeys(own, why), why
    return taken, left, ""


def _auxiliary(name: str) -> bool:
    return name.split(".")[1] in AUXILIARY


def _part(name: str) -> str:
    """The stage that an entry belongs to: backbones are cut after whole ones."""
    first, second, *_ = name.split(".")
    return f"{first}.{second}" if first == "features" else first


def _resizable(name: str, have: torch.Size, want: torch.Size) -> bool:
    if not name.endswith("relative_position_bias_table") or len(have) != 2:
        return False
    return have[1] == want[1] and swin.side(have[0]) ** 2 == have[0]


def _window(table: Tensor) -> int:
    """The window of a table of biases, (entries, heads), or of coordinates, (1, side, side, 2)."""
    return ((table.shape[1] if table.ndim == 4 else swin.side(table.shape[0])) + 1) // 2


def _plausible(name: str, values: int) -> bool:
    """Whether a backbone of torchvision's may have so many values: building them all is slow."""
    if name not in models.list_models():
        return True
    published: Any = models.get_model_weights(name)
    whole = published.DEFAULT.meta["num_params"]
    return whole / 3 < values < 1.1 * whole
