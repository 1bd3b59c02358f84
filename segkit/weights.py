"""Weights from elsewhere → this project's names."""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from segkit.errors import CheckpointError


@dataclass(frozen=True)
class Report:
    """What became of a file's entries: loaded, skipped, or missing from it by nature."""

    loaded: tuple[str, ...]
    skipped: tuple[str, ...]
    fresh: tuple[str, ...]


def load_file(model: nn.Module, path: str | Path) -> Report:
    """Load a torchvision classifier's state dict into ``model.backbone``.

    Args:
        model: A :class:`segkit.model.Segmenter`.
        path: A file that ``torch.save`` wrote. Code in it is never run.

    Raises:
        CheckpointError: Missing, unreadable, or not the whole of this backbone.
    """
    path = Path(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path}: is not a file of weights (a state dict saved by torch)"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(x, Tensor) for x in state.values()):
        raise CheckpointError(f"{path}: expected a plain state dict, names to tensors")
    return load_backbone(model, state, source=str(path))


def load_backbone(model: nn.Module, state: Mapping[str, Tensor], *, source: str) -> Report:
    """Copy a classifier's weights into ``model.backbone``, all of it or nothing.

    Args:
        model: A :class:`segkit.model.Segmenter`.
        state: Names to tensors; what the backbone does not have is skipped.
        source: Where they come from, for errors.

    Raises:
        CheckpointError: If a weight of the backbone is missing or has another shape.
    """
    backbone = model.get_submodule("backbone")
    own = backbone.state_dict()
    fresh = tuple(key for key in own if key.split(".")[0] in getattr(backbone, "fresh", ()))
    wanted = [key for key in own if key not in fresh]
    missing = [key for key in wanted if key not in state]
    if missing:
        raise CheckpointError(
            f"{source}: has {len(wanted) - len(missing)} of the backbone's {len(wanted)} entries, "
            f"'{missing[0]}' is missing; choose the backbone these weights were made for"
        )
    for key in wanted:
        if state[key].shape != own[key].shape:
            raise CheckpointError(
                f"{source}: '{key}' has shape {tuple(state[key].shape)}, the backbone expects "
                f"{tuple(own[key].shape)}; choose the backbone these weights were made for"
            )
    backbone.load_state_dict({key: state[key] for key in wanted}, strict=False)
    skipped = tuple(key for key in state if key not in own)
    return Report(loaded=tuple(wanted), skipped=skipped, fresh=fresh)
