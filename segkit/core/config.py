"""The configuration of a run: frozen dataclasses, strict JSON, ``--set``; knows no component."""

import dataclasses
import functools
import inspect
import json
import math
import os
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union

from segkit.core.errors import ConfigError, closest, quoted, reason, shorten
from segkit.core.files import regular

Component = Mapping[str, Any]
"""``{"name": ..., other arguments}``, or the name alone: a class or function of a registry."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def _setting(default: Any, help: str, low: float | None = None, high: float | None = None) -> Any:
    metadata = {"help": help, "low": low, "high": high}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where the photographs and their labels are, and how they are divided."""

    train: Component | None = _setting(None, "labelled images: coco, masks or demo")
    val: Component | None = _setting(None, "fixed validation images, in place of folds")
    test: Component | None = _setting(None, "images to predict, labelled or not")
    test_labels: Component | None = _setting(None, "the test images with labels, to score only")
    pseudo: Component | None = _setting(
        None, "images that models labelled (infer.py --pseudo), to train on besides"
    )
    pseudo_weight: float = _setting(
        1.0, "share of the pseudo-labelled images in each epoch, drawn anew", low=0.0, high=1.0
    )
    folds: int = _setting(5, "parts of the k-fold; each validates once", low=2, high=1000)
    selection: float = _setting(
        0.1, "share of images held out of every fold, to choose soups", low=0.0, high=0.9
    )
    groups: str | None = _setting(None, "JSON file {file name: group}; a group is never divided")
    group_pattern: str | None = _setting(
        None, "regular expression whose one group, in the file name, is the image's group"
    )
    mean: tuple[float, float, float] = _setting(IMAGENET_MEAN, "of R, G, B in 0..1")
    std: tuple[float, float, float] = _setting(IMAGENET_STD, "of R, G, B in 0..1", low=1e-6)
    workers: int = _setting(2, "processes a rank that prepare batches", low=0, high=256)
    cache: str = _setting("cache", "folder of decoded training images and masks")
    cache_gb: float = _setting(
        4.0, "most gigabytes in that folder (4 bytes a pixel); 0: decode each time", low=0.0
    )


@dataclass(frozen=True, kw_only=True)
class Model:
    """A backbone, a decoder and the weights to start from."""

    backbone: Component = _setting({"name": "resnet50"}, "a name, or a name with arguments")
    decoder: Component = _setting({"name": "upernet"}, "a name, or a name with arguments")
    weights: str | None = _setting(
        None, "'imagenet', a name of torchvision's weights, or a checkpoint file"
    )
    freeze_batch_norm: bool = _setting(False, "keep the backbone's BatchNorm as loaded")


@dataclass(frozen=True, kw_only=True)
class Augment:
    """What is done to a training image, in this order."""

    train: tuple[Component, ...] = _setting(
        (), "operations by name, each with 'p' and its arguments"
    )
    size: tuple[int, int] | None = _setting(
        None, "height and width every training image ends with", low=1, high=65536
    )
    device: Literal["cpu", "model"] = _setting(
        "cpu", "who renders: the workers, or the model's device, a batch at a time"
    )


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A weighted sum of losses, on the output and on auxiliary outputs."""

    terms: tuple[Component, ...] = _setting(
        ({"name": "cross_entropy"},), "losses, each with an optional 'weight'"
    )
    aux_weight: float | tuple[float, ...] = _setting(
        0.4, "weight of auxiliary outputs, one number or one for each", low=0.0
    )


@dataclass(frozen=True, kw_only=True)
class Optim:
    """How weights move."""

    optimizer: Component = _setting({"name": "adamw", "weight_decay": 0.01}, "adamw or sgd")
    lr: float = _setting(6e-5, "peak learning rate", low=0.0)
    backbone_lr_factor: float = _setting(1.0, "the backbone's share of lr", low=0.0)
    schedule: Component = _setting({"name": "cosine"}, "cosine, poly, constant or cosine_restarts")
    warmup_steps: int = _setting(0, "steps of linear warm-up", low=0)
    clip_norm: float | None = _setting(None, "largest norm of the gradient", low=0.0)


@dataclass(frozen=True, kw_only=True)
class Train:
    """The loop."""

    epochs: int = _setting(100, "passes over the training images", low=1)
    batch_size: int = _setting(8, "images an optimizer step, over all ranks together", low=1)
    accumulate: int = _setting(
        1,
        "parts a rank's batch is computed in, one after the other; dice, jaccard and tversky are "
        "then the mean over parts, unless accumulate_exact; ohem_cross_entropy, lovasz, ms_ssim "
        "and BatchNorm see each part alone",
        low=1,
    )
    accumulate_exact: bool = _setting(
        False, "dice, jaccard and tversky of all parts together, by a second forward pass of each"
    )
    seed: int = _setting(0, "of weights, folds, order and augmentation", low=0, high=2**31)
    amp: Literal["auto", "off", "bf16", "fp16"] = _setting(
        "auto", "automatic mixed precision; auto picks what the hardware is fast at"
    )
    recompute: Literal["auto", "on", "off"] = _setting(
        "auto",
        "save memory by computing outputs of norms and activations again in backward; auto does so "
        "on the CPU only, as it slows a GPU down",
    )
    channels_last: bool = _setting(True, "memory format of images and weights")
    compile: bool = _setting(False, "torch.compile the model")
    sync_batch_norm: bool = _setting(True, "BatchNorm over all ranks when there are several")
    deterministic: bool = _setting(False, "refuse operations that differ from run to run")
    ema: float | None = _setting(None, "decay of the moving average of weights", low=0.0, high=1.0)
    evaluate_every: int = _setting(1, "epochs between evaluations; the last is always one", low=1)
    save_every: int = _setting(
        0, "steps between saves of last.pt besides each epoch; 0: none", low=0
    )
    keep: int = _setting(3, "best checkpoints kept of each fold", low=1)
    log_every: int = _setting(
        20, "steps between lines of the log; the last step of an epoch has one too", low=1
    )
    max_bad_steps: int = _setting(20, "non-finite steps in a row that end the run", low=1)
    timeout: float = _setting(
        30.0, "minutes ranks wait for each other before one counts as lost", low=0.1, high=1440.0
    )


@dataclass(frozen=True, kw_only=True)
class Infer:
    """How evaluation and infer.py predict."""

    size: int | None = _setting(
        None, "longest side a photograph is resized to for the model", low=1, high=65536
    )
    batch_size: int = _setting(1, "images of one size predicted together", low=1)
    tta: tuple[str, ...] = _setting(("flips",), "views of --tta")
    merge: Literal["mean", "logits", "geometric", "max"] = _setting("mean", "how views are merged")
    palette: Literal["safe", "contest"] = _setting(
        "safe", "colors of masks, overlays and pages: for color-blind eyes too, or the contest's"
    )
    outputs: tuple[Literal["overlays", "sheets", "coco", "csv", "soft"], ...] = _setting(
        ("overlays", "coco", "csv"), "what infer.py writes besides the masks"
    )
    batch_norm_images: int = _setting(
        512, "training images that give a soup its BatchNorm statistics", low=1
    )
    tile: int | None = _setting(None, "side of tiles, for images larger than memory", low=32)
    overlap: float = _setting(0.25, "share of a tile its neighbour covers too", low=0.0, high=0.9)


@dataclass(frozen=True, kw_only=True)
class Track:
    """Who follows a run, besides its log and its page."""

    trackers: tuple[Component, ...] = _setting((), "csv, tensorboard, wandb, any number of them")
    images: int = _setting(
        20, "validation images a fold on the page, the worst and others; 0: none", low=0, high=1000
    )


@dataclass(frozen=True, kw_only=True)
class Config:
    """All of a run's settings. ``note`` is free text."""

    note: str = _setting("", "free text")
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    augment: Augment = field(default_factory=Augment)
    loss: Loss = field(default_factory=Loss)
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
    infer: Infer = field(default_factory=Infer)
    track: Track = field(default_factory=Track)


def load(name: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration.

    Args:
        name: A path, or a file of ``configs/`` with or without ``.json``.
        overrides: ``section.key=value`` each; the value is JSON, or else a string as it stands.

    Raises:
        ConfigError: One sentence with the path of the key, what was expected, the nearest word.
    """
    path = find(name)
    return override(parse(read_json(path), str(path)), overrides)


def override(config: Config, overrides: Sequence[str]) -> Config:
    """``config`` with ``section.key=value`` applied, in order."""
    raw = to_dict(config)
    for text in overrides:
        _apply(raw, text)
    return parse(raw, "--set")


def find(name: str | Path) -> Path:
    """The file a user means: a path as it is, or a name in a ``configs`` folder."""
    package = Path(__file__).resolve().parents[1]
    folders = [Path("configs"), package / "configs"]
    named = [folder / f"{name}{end}" for folder in folders for end in ("", ".json")]
    for path in (Path(name), *named):
        # os.path's tests are False also for a name longer than a file may have
        if os.path.exists(path) and not os.path.isdir(path):
            return path
    known = {path.stem for folder in folders for path in folder.glob("*.json")}
    raise ConfigError(f"no configuration file {quoted(name)}{closest(Path(name).stem, known)}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file: UTF-8, no repeated key, no NaN or infinity."""
    try:
        text = regular(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({reason(error)})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start})") from error
    if not text.strip():
        raise ConfigError(f"{path}: is empty; expected a JSON object")
    try:
        raw = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {_kind(raw)}")
    return raw


def parse(raw: Mapping[str, Any], where: str = "") -> Config:
    """A checked configuration from a plain mapping; ``where`` names its origin in errors."""
    try:
        return _convert_dataclass(raw, Config, "")
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}" if where else str(error)) from error


def to_dict(config: Any) -> dict[str, Any]:
    """The resolved configuration as plain JSON values; :func:`parse` reads it back equal."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def describe() -> str:
    """Every field with its type, default and one line, for ``--help``."""
    lines = ["settings (in the file, or by --set section.key=value):"]
    for section in dataclasses.fields(Config):
        lines.append("")
        if not dataclasses.is_dataclass(section.type):
            lines.append(_describe(section, section.name))
            continue
        lines.append(f"  {section.name}: {(section.type.__doc__ or '').strip()}")
        lines += [_describe(one, f"{section.name}.{one.name}") for one in _fields(section.type)]
    return "\n".join(lines)


def bind(
    registry: Mapping[str, Callable[..., Any]],
    spec: Component | str,
    path: str,
    given: Sequence[str] = (),
) -> functools.partial:
    """Check a component against its constructor's signature and annotations.

    Args:
        registry: Name to class or function.
        spec: ``{"name": ..., arguments}``, or the name alone.
        path: Where the component stands in the configuration, for errors.
        given: Arguments the caller adds later; the configuration may not set them.

    Returns:
        The constructor with the configured arguments, each of its annotated type.
    """
    if isinstance(spec, str):
        spec = {"name": spec}
    arguments = dict(spec)
    name = arguments.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError(f"{path}.name: is missing{closest('', registry)}")
    if name not in registry:
        raise ConfigError(f"{path}.name: unknown {quoted(name)}{closest(name, registry)}")
    target = registry[name]
    hints = _hints(target)
    parameters = {
        key: parameter
        for key, parameter in inspect.signature(target).parameters.items()
        if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    }
    settable = [key for key in parameters if key not in given]
    for key in arguments:
        if key not in settable:
            raise ConfigError(
                f"{path}.{shorten(key)}: '{name}' has no such argument{closest(key, settable)}"
            )
    for key in settable:
        if parameters[key].default is inspect.Parameter.empty and key not in arguments:
            raise ConfigError(f"{path}.{key}: is missing; '{name}' expects {_spell(hints[key])}")
    converted = {
        key: _convert(value, hints.get(key, Any), f"{path}.{key}")
        for key, value in arguments.items()
    }
    return functools.partial(target, **converted)


def build(
    registry: Mapping[str, Callable[..., Any]], spec: Component | str, path: str, **given: Any
) -> Any:
    """:func:`bind`, then call; what the constructor itself refuses is told with ``path``.

    Numbers that PyTorch refuses, such as a negative size, are the configuration's mistake where it
    sets arguments; without any they are a fault of segkit's, and pass as they are.
    """
    make = bind(registry, spec, path, given=tuple(given))
    try:
        return make(**given)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except (ArithmeticError, RuntimeError, ValueError) as error:
        if not make.keywords:
            raise
        arguments = ", ".join(
            f"{key}={shorten(str(value))}" for key, value in make.keywords.items()
        )
        why = str(error).strip().partition("\n")[0]
        raise ConfigError(f"{path}: cannot be made with {arguments} ({why})") from error


def check_bounds(low: float, high: float, **arguments: float | Sequence[float]) -> None:
    """Refuse arguments of a component that are, or hold, a number outside ``low`` to ``high``.

    Raises:
        ConfigError: One sentence with the name of the argument.
    """
    for name, value in arguments.items():
        for number in value if isinstance(value, Sequence) else (value,):
            if not low <= number <= high:
                raise ConfigError(f"{name}: expected {low:g} to {high:g}, got {number}")


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    return typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    repeated = {key for key in keys if keys.count(key) > 1}
    if repeated:
        raise ValueError(f"the key {quoted(min(repeated))} stands twice in one object")
    return dict(pairs)


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is not a JSON number")


def _apply(raw: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"--set {shorten(text)}: expected section.key=value")
    try:
        parsed = json.loads(value, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        parsed = value  # not JSON: a string, so that paths and names need no quotes
    at: Any = raw
    for depth, part in enumerate(parts):
        here = ".".join(parts[:depth])
        last = depth == len(parts) - 1
        step: int | str = part
        if isinstance(at, list):
            if part not in map(str, range(len(at))):
                raise ConfigError(
                    f"--set {shorten(text)}: {here} has {len(at)} items, no item {quoted(part)}"
                )
            step = int(part)
        elif not isinstance(at, dict):
            raise ConfigError(
                f"--set {shorten(text)}: {here} holds {_kind(at)}, so it has no {quoted(part)}"
            )
        elif not last and part not in at:
            raise ConfigError(
                f"--set {shorten(text)}: unknown key {quoted(part)}{closest(part, at)}"
            )
        if last:
            at[step] = parsed
        else:
            at = at[step]


def _fields(cls: Any) -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(cls)


def _convert_dataclass(raw: Any, cls: Any, path: str) -> Any:
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{path}: expected an object, got {_kind(raw)}")
    known = {one.name: one for one in _fields(cls)}
    values = {}
    for key, value in raw.items():
        here = f"{path}.{shorten(str(key))}" if path else shorten(str(key))
        if key not in known:
            raise ConfigError(f"{here}: unknown key{closest(str(key), known)}")
        one = known[key]
        if dataclasses.is_dataclass(one.type):
            values[key] = _convert_dataclass(value, one.type, here)
        else:
            values[key] = _convert(value, one.type, here)
            _check_range(values[key], one, here)
    return cls(**values)


def _check_range(value: Any, one: dataclasses.Field, path: str) -> None:
    low, high = one.metadata.get("low"), one.metadata.get("high")
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, int | float) and not isinstance(number, bool):
            if low is not None and number < low:
                raise ConfigError(f"{path}: expected at least {low:g}, got {number:g}")
            if high is not None and number > high:
                raise ConfigError(f"{path}: expected at most {high:g}, got {number:g}")


def _convert(value: Any, hint: Any, path: str) -> Any:
    """``value`` as the annotated type: lists become tuples, ints serve as floats, no more."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    refusal = f"{path}: expected {_spell(hint)}, got {_kind(value)}"
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        for option in inner:
            if _shape_fits(value, option):
                return _convert(value, option, path)
        raise ConfigError(refusal)
    if origin is Literal:
        if value in inner and type(value) in {type(word) for word in inner}:
            return value
        nearest = closest(value, map(str, inner)) if isinstance(value, str) else ""
        raise ConfigError(f"{path}: expected {_spell(hint)}, got {_kind(value)}{nearest}")
    if not _shape_fits(value, hint):
        raise ConfigError(refusal)
    if hint is float:
        return _finite(value, path)
    if hint is int and not -(2**63) <= value < 2**63:
        raise ConfigError(f"{path}: expected an integer of 64 bits, got {shorten(str(value), 40)}")
    if origin in _SEQUENCES:
        if origin is not tuple or (len(inner) == 2 and inner[1] is Ellipsis):
            hints = [inner[0] if inner else Any] * len(value)
        elif len(value) == len(inner):
            hints = list(inner)
        else:
            raise ConfigError(f"{path}: expected {_spell(hint)}, got {len(value)} values")
        return tuple(
            _convert(one, h, f"{path}[{i}]")
            for i, (one, h) in enumerate(zip(value, hints, strict=True))
        )
    if _is_mapping(hint) and isinstance(value, str):
        return {"name": value}
    return value


_SEQUENCES = (tuple, list, Sequence)


def _is_mapping(hint: Any) -> bool:
    return hint in (Mapping, dict) or typing.get_origin(hint) in (Mapping, dict)


def _shape_fits(value: Any, hint: Any) -> bool:
    """Whether ``value`` is of the kind ``hint`` asks for, its inside not looked at."""
    origin = typing.get_origin(hint)
    if hint is Any:
        return True
    if hint is type(None) or hint is None:
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, str)
    if origin is Literal:
        return value in typing.get_args(hint)
    if origin in _SEQUENCES or hint in _SEQUENCES:
        return isinstance(value, list | tuple)
    if _is_mapping(hint):
        return isinstance(value, Mapping | str)
    raise TypeError(f"segkit.core.config cannot check values against {hint}")


def _finite(value: float, path: str) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ConfigError(f"{path}: expected a finite number, got {value!s:.20}")
    return number


def _spell(hint: Any) -> str:
    """An annotation in a user's words."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_spell(option) for option in inner)
    if origin is Literal:
        return "one of " + ", ".join(repr(word) for word in inner)
    if origin is tuple and not (len(inner) == 2 and inner[1] is Ellipsis):
        return f"a list of {len(inner)} ({', '.join(_spell(one) for one in inner)})"
    if origin in _SEQUENCES:
        return f"a list ({_spell(inner[0])} each)" if inner else "a list"
    if _is_mapping(hint):
        return "an object"
    plain = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
    return {**plain, type(None): "null", Any: "a value"}.get(hint, str(hint))


def _kind(value: Any) -> str:
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    return f"{json.dumps(value):.60}"


def _describe(one: dataclasses.Field, path: str) -> str:
    default = one.default
    if default is dataclasses.MISSING:
        default = one.default_factory() if callable(one.default_factory) else None
    kind = f"{_spell(one.type)}; default {json.dumps(default)}"
    return f"    {path}\n        {one.metadata['help']} ({kind})"
