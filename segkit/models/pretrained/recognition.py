"""What a file of weights is, told by the names in it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from segkit.core.errors import CheckpointError
from segkit.models.pretrained import convnets, swin
from segkit.models.pretrained.naming import Naming, Renamed, State
from segkit.models.pretrained.whole import OWN, WHOLE

_OWN_BACKBONE = Naming(title="", builds=("",), signature=())
_CLASSIFIER = re.compile(
    r"(?:decoder\.|decode_head\.)?"
    r"(?:head|head\.fc|fc|_fc|last_linear|conv_seg|classifier(?:\.\d)?)\.weight"
)


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
        untold: Attributes that the file does not tell, and what its project's files have.
        differs: What the project computes otherwise, or may.
        classes: Rows of its classifier, if it has one.
    """

    title: str
    builds: tuple[str, ...]
    decoder: str | None
    instead: str
    backbone: Renamed
    head: Renamed
    settings: Mapping[str, Any]
    untold: Mapping[str, str]
    differs: tuple[str, ...]
    classes: int | None


def recognize(state: State, *, source: str) -> Found:
    """Tell what a file is, and give its entries the names they have here.

    Raises:
        CheckpointError: It is of no architecture that segkit has.
    """
    whole = next(one for one in WHOLE if one.decoder.describes(state))
    prefix = whole.backbone
    inside = {k: v for k, v in state.items() if prefix and k.startswith(prefix)}
    head = whole.decoder.rename({k: v for k, v in state.items() if k not in inside})
    if not prefix:
        inside = {name: state[name] for name in head.unknown}
        head = replace(head, unknown=())
    trunk = {name.removeprefix(prefix): tensor for name, tensor in inside.items()}
    namings = [_OWN_BACKBONE] if whole is OWN else [*swin.NAMINGS, *convnets.NAMINGS]
    naming = next((one for one in namings if one.describes(trunk)), None)
    if naming is None:
        raise CheckpointError(
            f"{source}: its names ('{next(iter(state))}', ...) are of no backbone that segkit "
            "knows; docs/weights.md lists those"
        )
    try:
        backbone = naming.rename(trunk, prefix=prefix)
        settings = whole.decoder.settings(state) | naming.settings(trunk)
    except (RuntimeError, IndexError) as error:  # of tensors whose shapes cannot be what they say
        raise CheckpointError(f"{source}: has shapes that are of no {naming.title}") from error
    builds = whole.decoder.builds
    untold = {**naming.untold, **whole.decoder.untold}
    doubts = () if whole.decoder.title else naming.doubts
    return Found(
        title=", ".join(title for title in (whole.decoder.title, naming.title) if title),
        builds=naming.builds,
        decoder=builds[0] if builds else None,
        instead=whole.instead,
        backbone=backbone,
        head=head,
        settings=settings,
        untold={path: why for path, why in untold.items() if path not in settings},
        differs=(*whole.decoder.differs, *naming.differs, *doubts),
        classes=_classes(head.tensors or state),
    )


def _classes(state: State) -> int | None:
    heads = [x for name, x in state.items() if _CLASSIFIER.fullmatch(name) and x.ndim > 1]
    return heads[-1].shape[0] if heads else None
