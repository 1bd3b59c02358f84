"""A file of weights as names and tensors, whatever it is wrapped in; code in it never runs."""

import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from segkit.core import checkpoint
from segkit.core.errors import CheckpointError, quoted, reason
from segkit.core.files import regular
from segkit.models.pretrained.safetensors import read_safetensors

WRAPPERS = ("state_dict", "model", "model_state_dict")
"""Keys under which projects keep the weights beside their optimizer and their notes."""

_COMPILED_OR_PARALLEL = re.compile(r"^((module|model|_orig_mod)\.)+")


def read_file(path: Path, *, keep_prefixes: bool = False) -> dict[str, Tensor]:
    """The weights in a ``.pth``, ``.pt`` or ``.safetensors`` file, on the CPU.

    What wraps them (:data:`WRAPPERS`) is opened, and the prefixes that wrapping modules give to
    names (``module.``, ``model.``) are taken off unless ``keep_prefixes`` is set. Archives and
    safetensors are mapped into memory. A checkpoint of segkit is compared with its digest first.

    Raises:
        CheckpointError: Missing, unreadable, or not weights.
    """
    try:
        if path.suffix == ".safetensors":
            found: Any = read_safetensors(path)
        elif checkpoint.stored_digest(path) is not None:
            found = checkpoint.load(path, mmap=True)
        else:
            found = _load(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({reason(error)})") from error
    while isinstance(found, dict):
        inner = [found[key] for key in WRAPPERS if isinstance(found.get(key), dict)]
        if not inner:
            break
        found = inner[0]
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise CheckpointError(f"{path}: expected a state dict, names to tensors")
    other = [name for name, value in found.items() if not isinstance(value, Tensor)]
    if other or not found:
        what = f"{quoted(other[0])} is none" if other else "it is empty"
        raise CheckpointError(f"{path}: expected a state dict, names to tensors, but {what}")
    if odd := [name for name in found if not name.isprintable()]:
        raise CheckpointError(f"{path}: {quoted(odd[0])} is no name of weights")
    if keep_prefixes:
        return found
    return {_COMPILED_OR_PARALLEL.sub("", name): value for name, value in found.items()}


def _load(path: Path) -> Any:
    checkpoint.refuse_compressed(path)
    archive = checkpoint.is_archive(path)  # files from before 2020 are not, and cannot be mapped
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch tells of ancient types that it converts
            found = torch.load(regular(path), map_location="cpu", weights_only=True, mmap=archive)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: is not a file of weights alone (a state dict saved by torch): it is damaged, "
            "or holds objects whose code would have to run; if you trust it, load it with torch "
            "yourself and save its state dict"
        ) from error
    except OSError:
        raise
    except Exception as error:  # a damaged pickle calls torch's functions with anything
        raise CheckpointError(
            f"{path}: is not a file of weights (a state dict saved by torch)"
        ) from error
    checkpoint.refuse_forged(found, path)
    return found
