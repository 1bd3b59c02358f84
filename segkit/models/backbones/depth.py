"""Depth of a backbone's parameters, for layer-wise learning rates and frozen stages."""

import itertools
from typing import Any

from torch import nn

from segkit.core.errors import ConfigError


def layers(backbone: nn.Module) -> list[list[str]]:
    """Return the names of the modules and parameters of each layer, from the image on.

    A layer is a block, or what stands between sequences of blocks: the stem, a downsampling.

    Args:
        backbone: Its attribute ``stages`` lists for each stage the names of its modules (or
            parameters), in the order they run. A sequence of blocks of one class has a layer per
            block; a convolution, norm or parameter by itself belongs to the layer before it in its
            stage, if there is one.

    Raises:
        ConfigError: It has no ``stages``.
    """
    modules = dict(backbone.named_modules())
    result: list[list[str]] = []
    for stage in stages(backbone):
        start = len(result)
        for name in stage:
            part = modules.get(name)  # None for a parameter
            if part is not None and next(part.parameters(), None) is None:
                continue
            if part is not None and _is_blocks(part):
                result += [[f"{name}.{child}"] for child, _ in part.named_children()]
            elif len(result) > start and (part is None or next(part.children(), None) is None):
                result[-1].append(name)
            else:
                result.append([name])
    return result


def stages(backbone: nn.Module) -> list[list[str]]:
    """Return the attribute ``stages`` of a backbone without norms that only a feature map needs.

    Raises:
        ConfigError: It has no ``stages``.
    """
    names: Any = getattr(backbone, "stages", None)
    if names is None:
        raise ConfigError(
            f"{type(backbone).__name__} has no attribute 'stages', which the depth of its "
            "parameters is taken from; add it as docs/extending.md says"
        )
    outputs: Any = getattr(backbone, "output_modules", ())
    return [[name for name in stage if name not in outputs] for stage in names]


def depths(backbone: nn.Module) -> tuple[dict[str, int], int]:
    """Return the number of the layer of each parameter by name, and the number of layers.

    Parameters in no layer, such as norms of the feature maps, are as deep as the decoder: their
    number is that of the layers.
    """
    names = layers(backbone)
    numbers = {name: depth for depth, layer in enumerate(names) for name in layer}
    known = {}
    for parameter, _ in backbone.named_parameters():
        inside = (numbers[name] for name in _with_parents(parameter) if name in numbers)
        known[parameter] = next(inside, len(names))
    return known, len(names)


def first_stages(backbone: nn.Module, number: int) -> list[str]:
    """Return the names of the parameters of the first stages.

    Raises:
        ConfigError: It has fewer stages, or no attribute ``stages``.
    """
    known = stages(backbone)
    if number > len(known):
        raise ConfigError(f"expected at most {len(known)}, the backbone's stages, got {number}")
    names = set(itertools.chain(*known[:number]))
    parameters = (name for name, _ in backbone.named_parameters())
    return [name for name in parameters if not names.isdisjoint(_with_parents(name))]


def _with_parents(name: str) -> list[str]:
    """Return a name and those of the modules around it, from the inside out."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]


def _is_blocks(part: nn.Module) -> bool:
    """Return True for a list of modules of one class that have modules of their own."""
    if not isinstance(part, nn.Sequential | nn.ModuleList):
        return False
    kinds = {type(child) for child in part.children()}
    nested = all(next(child.children(), None) is not None for child in part.children())
    return len(kinds) == 1 and nested and not kinds <= {nn.Sequential, nn.ModuleList}
