"""From a file's entries to a model's: all of a backbone or nothing, and a report of the rest."""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

from segkit.backbones import BACKBONES
from segkit.decoders.layers import Classifier
from segkit.errors import CheckpointError
from segkit.weights import convnets, swin
from segkit.weights.naming import Naming, Renamed, State
from segkit.weights.reading import read_file
from segkit.weights.whole import WHOLE

AUXILIARY = ("aux", "aux_classifier", "heads", "presence")
"""Parts of decoders that serve training; a file or a model may be without them."""

_CONSTANTS = ("relative_position_index", "relative_coords_table")
_OWN = Naming(title="", builds=("",), signature=())


@dataclass(frozen=True)
class Found:
    """What a file is, its entries under the names they have here.

    Args:
        title: For people.
        builds: Beginnings of the names in ``BACKBONES`` that it may be.
        decoder: The name in ``DECODERS``; empty where it is one of segkit's own checkpoints,
            ``None`` where there is none, or none of this structure here.
        instead: Why there is no decoder.
        backbone: Entries of the backbone, without a prefix.
        head: Entries of the decoder, with ``decoder.`` before them.
        settings: Attributes of a model that computes what the file's own project computes.
    """

    title: str
    builds: tuple[str, ...]
    decoder: str | None
    instead: str
    backbone: Renamed
    head: Renamed
    settings: Mapping[str, Any]

    @property
    def classes(self) -> int | None:
        """Rows of the last classifier in the file, if it has one."""
        named = (r"decoder.classifier.weight", r"decoder.classifier.4.weight")
        for name in named:
            if name in self.head.tensors:
                return self.head.tensors[name].shape[0]
        return None


@dataclass(frozen=True)
class Report:
    """What became of a file's entries and of a model's.

    Args:
        source: The file.
        title: What it is.
        loaded: The model's entries that have the file's values now.
        skipped: The file's entries that were not used, and why.
        fresh: The model's entries that stay as they were, and why.
        notes: What was done to fit, and where the model computes otherwise than the file's own.
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
        for word, reasons in (("left fresh", self.fresh), ("skipped", self.skipped)):
            counts = Counter(reasons.values())
            if counts:
                why = "; ".join(f"{reason}: {count}" for reason, count in counts.items())
                parts.append(f"{len(reasons)} {word} ({why})")
        return f"{self.source}: {self.title}; {', '.join(parts)}" + "".join(
            f"; note: {note}" for note in self.notes
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


def load_file(model: nn.Module, path: str | Path) -> Report:
    """Load a file of weights of this project or another one into a model.

    ``docs/weights.md`` lists what is recognized. The backbone loads whole or not at all; the
    decoder too, where the file has one of the same structure, except for class heads of another
    size.

    Args:
        model: A :class:`segkit.model.Segmenter`.
        path: ``.pth``, ``.pt`` or ``.safetensors``. Code in it is never run.

    Raises:
        CheckpointError: Missing, unreadable, unknown, or not the whole of this backbone.
    """
    return load_state(model, read_file(Path(path)), source=str(path))


def load_state(model: nn.Module, state: State, *, source: str) -> Report:
    """:func:`load_file` of entries that are in memory already.

    Args:
        model: A :class:`segkit.model.Segmenter`.
        state: Names to tensors.
        source: Where they come from, for errors and the report.
    """
    entries, report = fit(model, recognize(state, source=source), source=source)
    model.load_state_dict(entries, strict=False)
    return report


def recognize(state: State, *, source: str) -> Found:
    """Tell what a file is by its names, and give its entries the names they have here.

    Raises:
        CheckpointError: It is of no architecture that segkit has.
    """
    whole = next((one for one in WHOLE if one.decoder.describes(state)), None)
    prefix = "backbone." if any(name.startswith("backbone.") for name in state) else ""
    head = Renamed()
    if whole:
        prefix = whole.backbone
        head = whole.decoder.rename(
            {k: v for k, v in state.items() if not (prefix and k.startswith(prefix))}
        )
    if whole and not prefix:
        trunk = {name: state[name] for name in head.unknown}
        head = Renamed(head.tensors, head.names, head.beyond)
    else:
        trunk = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
    namings = (*swin.NAMINGS, *convnets.NAMINGS)
    own = whole is WHOLE[0]
    naming = _OWN if own else next((one for one in namings if one.describes(trunk)), None)
    if naming is None:
        raise CheckpointError(
            f"{source}: its names ('{next(iter(state))}', ...) are of no backbone that segkit "
            "knows; docs/weights.md lists those"
        )
    outside = {k for k in state if not k.startswith(prefix)} - set(head.names.values())
    outside -= {*head.beyond, *head.unknown}
    head = Renamed(head.tensors, head.names, (*head.beyond, *sorted(outside)), head.unknown)
    backbone = naming.rename(trunk)
    backbone = Renamed(
        backbone.tensors,
        {ours: prefix + theirs for ours, theirs in backbone.names.items()},
        tuple(prefix + name for name in backbone.beyond),
        tuple(prefix + name for name in backbone.unknown),
    )
    titles = [whole.decoder.title] if whole else []
    titles += [naming.title] if naming.title else []
    builds = whole.decoder.builds if whole else ()
    return Found(
        title=", ".join(titles),
        builds=naming.builds,
        decoder=builds[0] if builds else None,
        instead=whole.instead if whole else "the file has no decoder",
        backbone=backbone,
        head=head,
        settings=naming.settings(trunk) | (whole.decoder.settings(state) if whole else {}),
    )


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
        advice = f"choose the backbone they fit: {', '.join(names)}" if names else _NOWHERE
        raise CheckpointError(f"{source}: {why} ({found.title}); {advice}")
    notes: list[str] = []
    fresh: dict[str, str] = {}
    entries: dict[str, Tensor] = {}
    own = backbone.state_dict()
    for name, value in own.items():
        if name.endswith(_CONSTANTS):
            continue
        if name not in found.backbone.tensors:
            fresh[f"backbone.{name}"] = "not in the file"
            continue
        tensor = found.backbone.tensors[name]
        if tensor.shape != value.shape:
            note = f"position biases resized from window {_window(tensor)} to {_window(value)}"
            notes += [note] if note not in notes else []
            tensor = swin.resize_bias_table(tensor, value.shape[0])
        entries[f"backbone.{name}"] = tensor
    skipped = {
        theirs: "follows from the window" if theirs.endswith(_CONSTANTS) else "not of a backbone"
        for theirs in (
            *(found.backbone.names[ours] for ours in found.backbone.tensors if ours not in own),
            *(t for ours, t in found.backbone.names.items() if ours.endswith(_CONSTANTS)),
            *found.backbone.beyond,
        )
    }

    taken, left, why = _fit_decoder(decoder, found)
    entries |= taken
    fresh |= left
    used = {found.head.names[name] for name in taken}
    for theirs in (*found.head.names.values(), *found.head.beyond, *found.head.unknown):
        if theirs not in used:
            skipped[theirs] = "of a decoder" if why else "not of this model"
    for path, value in found.settings.items():
        part, _, attribute = path.partition(".")
        if part == "decoder" and why:
            continue
        have = getattr(model.get_submodule(part), attribute, value)
        if have != value:
            notes.append(f"made with {path} {value!r}, this model has {have!r}")
    return entries, Report(source, found.title, tuple(entries), skipped, fresh, tuple(notes))


_NOWHERE = "no backbone of segkit has its structure"


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
    for name in needed:
        have_shape, want = theirs[name].shape, own[name].shape
        if have_shape != want and not _resizable(name, have_shape, want):
            return (
                f"'{found.backbone.names[name]}' has shape {tuple(have_shape)}, the backbone "
                f"expects {tuple(want)}"
            )
    return ""


def fitting(found: Found) -> list[str]:
    """Names of the backbones that a file has exactly, windows apart."""
    values = sum(tensor.numel() for tensor in found.backbone.tensors.values())
    names = []
    for name, build in BACKBONES.items():
        if not name.startswith(found.builds) or not _plausible(name, values):
            continue
        with torch.random.fork_rng(devices=()), torch.device("meta"):
            backbone = build()
        if not misfit(backbone, found):
            names.append(name)
    return names


def windows(found: Found) -> list[int]:
    """Windows of a Swin's position biases; none for other files."""
    tables = [v for k, v in found.backbone.tensors.items() if k.endswith("bias_table")]
    return sorted({_window(table) for table in tables})


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
    return (swin.side(table.shape[0]) + 1) // 2


def _plausible(name: str, values: int) -> bool:
    """Whether a backbone of torchvision's may have so many values: building them all is slow."""
    if name not in models.list_models():
        return True
    published: Any = models.get_model_weights(name)
    whole = published.DEFAULT.meta["num_params"]
    return whole / 3 < values < 1.1 * whole
