"""Reading of a file of weights as a state dict; code in it never runs."""

import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from segkit.core import checkpoint, untrusted
from segkit.core.errors import CheckpointError, quoted, reason
from segkit.core.files import require_regular_file
from segkit.models.pretrained.safetensors import read_safetensors

WRAPPERS = ("state_dict", "model", "model_state_dict")
"""Keys of training checkpoints whose values are the weights."""

WRAPPER_PREFIXES = re.compile(r"^((module|model|_orig_mod)\.)+")
"""Prefixes of names that wrappers of modules add."""


def read_file(path: Path, *, keep_prefixes: bool = False) -> dict[str, Tensor]:
    """Return the weights in a ``.pth``, ``.pt`` or ``.safetensors`` file, on the CPU.

    They are taken out of dicts with a key of :data:`WRAPPERS`. Archives and safetensors are mapped
    into memory. A checkpoint of segkit is compared with its digest first.

    Args:
        keep_prefixes: Keep :data:`WRAPPER_PREFIXES` of names.

    Raises:
        CheckpointError: If the file cannot be read, or is not a state dict.
    """
    try:
        if path.suffix == ".safetensors":
            state: Any = read_safetensors(path)
        elif checkpoint.stored_digest(path) is not None:
            state = checkpoint.load(path, mmap=True)
        else:
            state = _load(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({reason(error)})") from error
    while isinstance(state, dict):
        wrapped = [state[key] for key in WRAPPERS if isinstance(state.get(key), dict)]
        if not wrapped:
            break
        state = wrapped[0]
    expected = f"{path}: expected a state dict, names to tensors"
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise CheckpointError(expected)
    if not state:
        raise CheckpointError(f"{expected}, but it is empty")
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{expected}, but {quoted(name)} is not a tensor")
        if not name.isprintable():
            raise CheckpointError(f"{path}: the name {quoted(name)} has control characters")
    if keep_prefixes:
        return state
    return {WRAPPER_PREFIXES.sub("", name): value for name, value in state.items()}


def _load(path: Path) -> Any:
    untrusted.refuse_compressed(path)
    archive = untrusted.is_archive(path)  # files from before 2020 are not, and cannot be mapped
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old storage types, which torch converts
            state = torch.load(
                require_regular_file(path), map_location="cpu", weights_only=True, mmap=archive
            )
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: is not a file of weights alone (a state dict saved by torch): it is damaged, "
            "or holds objects whose code would have to run; if you trust it, save its state dict "
            "yourself, as docs/weights.md shows"
        ) from error
    except OSError:
        raise
    except Exception as error:  # a damaged pickle calls torch's functions with any arguments
        raise CheckpointError(
            f"{path}: is not a file of weights (a state dict saved by torch)"
        ) from error
    untrusted.refuse_forged(state, path)
    return state
