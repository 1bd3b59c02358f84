"""Configuration of a run: frozen dataclasses, strict JSON, overrides; independent of components."""

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
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from segkit.core.errors import ConfigError, closest, first_line, quoted, reason, shorten
from segkit.core.files import matches_schema, require_regular_file, unique_keys

Component = Mapping[str, Any]
"""Class or function of a registry: ``{"name": ..., other arguments}``, or the name alone."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def _setting(default: Any, help: str, low: float | None = None, high: float | None = None) -> Any:
    metadata = {"help": help, "low": low, "high": high}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Images and labels, and their division into folds."""

    train: Component | None = _setting(None, "labelled images: coco, masks or demo")
    val: Component | None = _setting(None, "fixed validation images, in place of folds")
    test: Component | None = _setting(None, "images to predict, labelled or not")
    test_labels: Component | None = _setting(None, "the test images with labels, to score only")
    pseudo: Component | None = _setting(None, "images with pseudo labels (infer.py --pseudo)")
    pseudo_weight: float = _setting(1.0, "share of the pseudo-labelled images in an epoch", 0, 1)
    teacher: str | tuple[str, ...] | None = _setting(
        None,
        "a trained run, whose folds vote, or a list of runs and checkpoints: soft labels for the "
        "training images (distillation)",
    )
    folds: int = _setting(5, "number of folds; each is used for validation once", 2, 1000)
    selection: float = _setting(0.1, "share of images in no fold, which choose soups", 0, 0.9)
    stratify: bool = _setting(
        True, "folds have similar shares of each class; false: images are divided at random"
    )
    groups: str | None = _setting(None, "JSON file {file name: group}; a group is never split")
    group_pattern: str | None = _setting(
        None, "regular expression with one group: the image's group in its file name"
    )
    repeat_threshold: float = _setting(
        0.0,
        "images of a class that is in a smaller share f of the images than this are drawn more "
        "often, in proportion to sqrt(repeat_threshold / f); 0: all images equally",
        0,
        1,
    )
    mean: tuple[float, ...] = _setting(
        IMAGENET_MEAN,
        "mean of R, G, B in 0..1, or of each band; three are repeated for more bands, and averaged "
        "for gray",
    )
    std: tuple[float, ...] = _setting(
        IMAGENET_STD, "standard deviation of R, G, B in 0..1, or of each band, as mean", 1e-6
    )
    workers: int = _setting(2, "data-loader workers per rank", 0, 256)
    cache: str = _setting("cache", "folder for decoded training images and masks")
    cache_gb: float = _setting(
        4.0, "maximum size of data.cache in GB, 4 bytes per pixel; 0: no cache", 0
    )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Backbone, decoder and initial weights."""

    backbone: Component = _setting({"name": "resnet34"}, "a name, or a name with arguments")
    decoder: Component = _setting({"name": "unet"}, "a name, or a name with arguments")
    weights: str | None = _setting(
        "auto",
        "'imagenet', the name of torchvision weights, or a checkpoint file; null: random; auto: "
        "imagenet if torchvision's weights are in torch's cache or can be downloaded, else null",
    )
    freeze_batch_norm: bool = _setting(False, "freeze BatchNorm of the backbone")
    freeze: int | tuple[str, ...] = _setting(
        0,
        "what is not trained: the number of first stages of the backbone (the stem is in the "
        "first), or patterns of parameters' names, such as backbone.layer1.*",
        0,
    )
    lora: int = _setting(
        0,
        "rank of low-rank updates (LoRA) of the backbone's linear layers, in attention and MLPs, "
        "whose own weights are frozen; 0: none",
        0,
        1024,
    )
    lora_alpha: float | None = _setting(
        None, "low-rank updates are scaled by lora_alpha / lora; null: by 1", 1e-6
    )


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Augmentation of training images, in this order."""

    train: tuple[Component, ...] | None = _setting(
        None,
        "operations: name, probability 'p', arguments; null: small changes of scale, a crop not "
        "larger than most images, mirroring, and colors",
    )
    size: tuple[int, int] | None = _setting(
        None, "height and width of training images after augmentation", 1, 65536
    )
    device: Literal["cpu", "model"] = _setting(
        "cpu", "where images are transformed: in the workers, or in batches on the model's device"
    )


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weighted sum of losses of the output and the auxiliary outputs."""

    terms: tuple[Component, ...] = _setting(
        ({"name": "cross_entropy"},), "losses, each with an optional 'weight'"
    )
    teacher_terms: tuple[Component, ...] = _setting(
        ({"name": "soft_cross_entropy"}, {"name": "jaccard_metric"}),
        "with data.teacher, losses of its soft labels, in addition to terms",
    )
    teacher_weight: float = _setting(
        0.5, "with data.teacher, share of teacher_terms in the loss; terms have the rest", 0, 1
    )
    aux_weight: float | tuple[float, ...] = _setting(
        0.4, "weight of the auxiliary outputs: one number, or one per output", 0
    )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer and learning rate."""

    optimizer: Component = _setting({"name": "adamw", "weight_decay": 0.01}, "adamw or sgd")
    lr: float | None = _setting(
        None, "peak learning rate; null: by the optimizer, the weights and the norms", 0
    )
    backbone_lr_factor: float | None = _setting(
        None, "factor on lr for the backbone; null: 0.1 for AdamW and pretrained weights, else 1", 0
    )
    layer_decay: float = _setting(
        1.0,
        "factor on the learning rate from each layer of the backbone to the layer before it; the "
        "rate of the last layer is lr times both factors",
        1e-3,
        1,
    )
    schedule: Component = _setting({"name": "cosine"}, "cosine, poly, constant or cosine_restarts")
    warmup_steps: int | None = _setting(
        None, "number of steps of linear warm-up; null: a twentieth of the steps, at most 500", 0
    )
    clip_norm: float | None = _setting(None, "maximum norm of the gradient", 0)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Training loop."""

    epochs: int = _setting(50, "passes over the training images", 1)
    batch_size: int = _setting(8, "images per optimizer step, over all ranks", 1)
    accumulate: int = _setting(
        1,
        "number of micro-batches that a rank's batch is computed in (gradient accumulation); dice, "
        "jaccard, tversky and their forms for soft labels are then their mean, unless "
        "accumulate_exact is set; ohem_cross_entropy, lovasz, ms_ssim and BatchNorm are computed "
        "per micro-batch",
        1,
    )
    accumulate_exact: bool = _setting(
        False,
        "dice, jaccard, tversky and their forms for soft labels over the whole batch, by a second "
        "forward pass per micro-batch",
    )
    seed: int = _setting(0, "seed of weights, folds, order and augmentation", 0, 2**31)
    amp: Literal["auto", "off", "bf16", "fp16"] = _setting(
        "auto", "automatic mixed precision; auto chooses the fastest type of the hardware"
    )
    recompute: Literal["auto", "on", "off"] = _setting(
        "auto",
        "save memory: recompute outputs of norms and activations in backward; auto: only on the "
        "CPU, because it is slower on a GPU",
    )
    channels_last: bool = _setting(True, "memory format of images and weights")
    compile: bool = _setting(False, "torch.compile the model")
    sync_batch_norm: bool = _setting(True, "synchronize BatchNorm over all ranks")
    deterministic: bool = _setting(False, "use deterministic algorithms only")
    ema: float | None = _setting(None, "decay of the moving average of the weights", 0, 1)
    average: float = _setting(
        0.0,
        "share of all steps, such as 0.01: the mean of the weights of the last steps before each "
        "evaluation (LAWA) is evaluated too, and saved where it scores better; 0: none",
        0,
        1,
    )
    evaluate_every: int = _setting(1, "epochs between evaluations; the last is always evaluated", 1)
    save_every: int = _setting(0, "steps between saves of last.pt; 0: after each epoch only", 0)
    keep: int = _setting(3, "number of best checkpoints kept per fold", 1)
    log_every: int = _setting(20, "steps between lines of the log; each epoch's last is logged", 1)
    max_bad_steps: int = _setting(20, "consecutive non-finite steps that end the run", 1)
    timeout: float = _setting(30.0, "minutes that a rank waits for the others", 0.1, 1440)


@dataclass(frozen=True, kw_only=True)
class InferConfig:
    """Prediction, in evaluations and in infer.py."""

    size: int | None = _setting(None, "longer side of images for the model; null: as is", 1, 65536)
    batch_size: int | None = _setting(
        None,
        "images of equal size predicted together; null: 8 on a GPU (large ones fewer), else 1",
        1,
    )
    pad: int | None = _setting(
        None,
        "pad images by repeating their edges, to sides that are multiples of this, so that images "
        "of different sizes are evaluated together",
        1,
        65536,
    )
    tta: tuple[str, ...] = _setting(("flips",), "views of test-time augmentation (--tta)")
    merge: Literal["mean", "logits", "geometric", "max"] = _setting("mean", "how views are merged")
    palette: Literal["safe", "contest"] = _setting(
        "safe", "colors: safe for color blindness, or the trash contest's"
    )
    outputs: tuple[Literal["overlays", "sheets", "coco", "csv", "soft", "confidence"], ...] = (
        _setting(("overlays", "coco", "csv"), "outputs of infer.py in addition to the masks")
    )
    batch_norm_images: int = _setting(
        512, "number of training images to compute a soup's BatchNorm statistics with", 1
    )
    tile: int | None = _setting(None, "side of tiles, for images that do not fit in memory", 32)
    overlap: float = _setting(0.25, "share of a tile that overlaps the next tile", 0, 0.9)
    details: Literal["infer", "always", "off"] = _setting(
        "infer",
        "boundary IoU, boundary F-score and recall of objects by size: in the scores of infer.py, "
        "always (in evaluations of a training, too), or off",
    )
    graphs: bool = _setting(
        True, "on CUDA, infer.py replays a CUDA graph for image sizes that recur"
    )


@dataclass(frozen=True, kw_only=True)
class TrackConfig:
    """Trackers of a run, in addition to its log and page."""

    trackers: tuple[Component, ...] = _setting((), "any of csv, tensorboard, wandb")
    images: int = _setting(20, "validation images per fold on the page; 0: none", 0, 1000)


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a run."""

    note: str = _setting("", "free text")
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    infer: InferConfig = field(default_factory=InferConfig)
    track: TrackConfig = field(default_factory=TrackConfig)


def load(name: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Load a configuration, merged with the configurations that it builds on (``"base"``).

    Args:
        name: A path, or a file of ``configs/`` with or without ``.json``.
        overrides: ``section.key=value`` each; a value that is not valid JSON is a string.

    Raises:
        ConfigError: The message names the key, what was expected and the most similar name.
    """
    path = find(name)
    return override(parse(_read_merged(path), str(path)), overrides)


def override(config: Config, overrides: Sequence[str]) -> Config:
    """Return ``config`` with each ``section.key=value`` applied, in order."""
    raw = to_dict(config)
    for text in overrides:
        _apply(raw, text)
    return parse(raw, "overrides")


_FOLDERS = Path("configs"), Path(__file__).resolve().parents[1] / "configs"


def shipped() -> list[str]:
    """Return the names of the configurations in the ``configs`` folders."""
    return sorted({path.stem for folder in _FOLDERS for path in folder.glob("*.json")})


def find(name: str | Path) -> Path:
    """Return the path of a configuration: an existing path, or a name in a ``configs`` folder."""
    if path := _search(name, Path(name)):
        return path
    if os.path.isdir(name):
        raise ConfigError(
            f"{name}: is a folder; expected a configuration, which segkit plan {name} writes"
        )
    raise ConfigError(f"no configuration file {quoted(name)}{closest(Path(name).stem, shipped())}")


def _search(name: str | Path, *paths: Path) -> Path | None:
    """Return the first file of ``paths``, or of ``name`` in the ``configs`` folders."""
    named = [folder / f"{name}{end}" for folder in _FOLDERS for end in ("", ".json")]
    # os.path.exists does not raise for a name that is too long for a file, unlike Path
    files = (path for path in (*paths, *named) if os.path.exists(path) and not os.path.isdir(path))
    return next(files, None)


def _read_merged(path: Path, children: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a configuration and its base, whose values it replaces; ``children`` build on it."""
    raw = _read_json(path)
    base = raw.pop("base", None)
    if {"images", "annotations"} <= raw.keys():
        raise ConfigError(
            f"{path}: is a COCO file; expected a configuration, which segkit plan writes for the "
            "folder of photographs"
        )
    parse(raw, str(path))  # checked alone, so that an error names the file it is in
    if base is None:
        return raw
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base: expected a string, got {_kind(base)}")
    files = (*children, path)
    chain = " → ".join(map(str, files))
    base_path = _search(base, path.parent / base, path.parent / f"{base}.json")
    if base_path is None:
        raise ConfigError(
            f"{path}: base: no configuration file {quoted(base)} ({chain})"
            f"{closest(Path(base).stem, shipped())}"
        )
    if any(base_path.samefile(file) for file in files):
        raise ConfigError(
            f"{path}: base: {quoted(base)} is a cycle, {chain} → {base_path}; "
            "expected a configuration that does not build on this one"
        )
    return merge(_read_merged(base_path, files), raw)


def merge(base: Any, values: Any) -> Any:
    """Return ``base`` with ``values`` merged into it.

    Objects are merged key by key. Lists, and components of another name, are replaced.
    """
    if isinstance(base, str) and isinstance(values, Mapping):
        base = {"name": base}
    if isinstance(base, Mapping) and isinstance(values, str):
        values = {"name": values}
    if not (isinstance(base, Mapping) and isinstance(values, Mapping)):
        return values
    if values.get("name", base.get("name")) != base.get("name"):
        return values
    merged = {key: merge(base[key], value) for key, value in values.items() if key in base}
    return {**base, **values, **merged}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        text = require_regular_file(path).read_text(encoding="utf-8")
        raw = _parse_json(text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({reason(error)})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: is not UTF-8 text (byte {error.start}); expected a configuration in JSON, "
            "which segkit plan FOLDER writes"
        ) from error
    except (ValueError, RecursionError) as error:
        why = f"is not valid JSON: {error}" if text.strip() else "is empty; expected a JSON object"
        raise ConfigError(f"{path}: {why}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {_kind(raw)}")
    return raw


def _parse_json(text: str) -> Any:
    """Parse JSON; repeated keys, NaN and infinity are errors."""
    return json.loads(text, object_pairs_hook=unique_keys, parse_constant=_refuse_constant)


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is not a JSON number")


def _apply(raw: dict[str, Any], text: str) -> None:
    """Apply ``section.key=value`` to a configuration of JSON values."""
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"override {shorten(text)}: expected section.key=value")
    try:
        parsed = _parse_json(value)
    except (ValueError, RecursionError):
        parsed = value  # a string, so that paths and names need no quotes
    at: Any = raw
    for depth, part in enumerate(parts):
        here, last = ".".join(parts[:depth]), depth == len(parts) - 1
        if isinstance(at, list) and part not in map(str, range(len(at))):
            why = f"{here} has {len(at)} items, no item {quoted(part)}"
        elif not isinstance(at, list | dict):
            why = f"{here} holds {_kind(at)}, so it has no {quoted(part)}"
        elif isinstance(at, dict) and part not in at and not last:
            why = f"unknown key {quoted(part)}{closest(part, at)}"
        else:
            step: Any = int(part) if isinstance(at, list) else part
            if last:
                at[step] = parsed
            else:
                at = at[step]
            continue
        raise ConfigError(f"override {shorten(text)}: {why}")


def parse(raw: Mapping[str, Any], where: str = "") -> Config:
    """Convert a mapping to a checked configuration; ``where`` names its origin in errors."""
    try:
        return _convert_dataclass(raw, Config, "")
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}" if where else str(error)) from error


def to_dict(config: Any) -> dict[str, Any]:
    """Convert a configuration to plain JSON values; :func:`parse` is the inverse."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def bind(
    registry: Mapping[str, Callable[..., Any]],
    spec: Component | str,
    path: str,
    given: Sequence[str] = (),
) -> functools.partial:
    """Check a component against its constructor's signature and annotations.

    Args:
        registry: Classes or functions by name.
        spec: ``{"name": ..., arguments}``, or the name alone.
        path: Key of the component in the configuration, for errors.
        given: Arguments that the caller adds later; the configuration must not set them.

    Returns:
        The constructor with the configured arguments, converted to their annotated types.
    """
    arguments = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = arguments.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError(f"{path}.name: is missing{closest('', registry)}")
    if name not in registry:
        raise ConfigError(f"{path}.name: unknown {quoted(name)}{closest(name, registry)}")
    target = registry[name]
    types = hints(target, checks=True)
    parameters = settable(target, given)
    for key in arguments:
        if key not in parameters:
            raise ConfigError(
                f"{path}.{shorten(key)}: '{name}' has no such argument{closest(key, parameters)}"
            )
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and key not in arguments:
            expected = type_description(types[key])
            raise ConfigError(f"{path}.{key}: is missing; '{name}' expects {expected}")
    converted = {
        key: _convert(value, types.get(key, Any), f"{path}.{key}")
        for key, value in arguments.items()
    }
    return functools.partial(target, **converted)


def build(
    registry: Mapping[str, Callable[..., Any]], spec: Component | str, path: str, **given: Any
) -> Any:
    """Build a component: :func:`bind`, then call; errors of the constructor name ``path``.

    An error of PyTorch, such as for a negative size, becomes a ConfigError if the configuration
    sets arguments of the component; otherwise it is a bug of segkit, and is raised unchanged.
    """
    make = bind(registry, spec, path, given=tuple(given))
    keys = [] if isinstance(spec, str) else [key for key in spec if key != "name"]
    try:
        return make(**given)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except (ArithmeticError, RuntimeError, ValueError) as error:
        if not keys:
            raise
        given_here = (f"{key}={shorten(str(make.keywords[key]))}" for key in keys)
        why = first_line(error)
        raise ConfigError(f"{path}: cannot be made with {', '.join(given_here)} ({why})") from error


def matching(registry: Mapping[str, Any], pattern: str) -> list[str]:
    """Return the names of a registry that contain or match ``pattern``: ``swin``, ``resnet*``."""
    return [name for name in registry if pattern in name or fnmatch(name, pattern)]


def settable(target: Callable[..., Any], given: Sequence[str] = ()) -> dict[str, inspect.Parameter]:
    """Return the parameters that a configuration may set: those not in ``given``."""
    return {
        key: parameter
        for key, parameter in inspect.signature(target).parameters.items()
        if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        and key not in given
    }


def constructor(target: Callable[..., Any]) -> Callable[..., Any]:
    """Return the class or function that builds a component; a registry may hold partials of it."""
    return target.func if isinstance(target, functools.partial) else target


def hints(target: Callable[..., Any], *, checks: bool = False) -> dict[str, Any]:
    """Return the annotated types of a component's parameters; ``checks``: with their checks.

    ``Annotated[type, check]`` is an argument that ``check(value, path)`` raises a ConfigError for.
    """
    make = constructor(target)
    function = make.__init__ if inspect.isclass(make) else make
    return typing.get_type_hints(function, include_extras=checks)


def check_bounds(low: float, high: float, **arguments: Any) -> None:
    """Check that arguments (numbers or sequences) are within ``low`` to ``high``.

    What is no number is not checked.

    Raises:
        ConfigError: A number is outside; the message names the argument.
    """
    for name, value in arguments.items():
        for number in value if isinstance(value, Sequence) else (value,):
            if isinstance(number, int | float) and not low <= number <= high:
                expected = f"at least {low:g}" if high == math.inf else f"{low:g} to {high:g}"
                raise ConfigError(f"{name}: expected {expected}, got {number}")


def _convert_dataclass(raw: Any, cls: Any, path: str) -> Any:
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{path}: expected an object, got {_kind(raw)}")
    known = {setting.name: setting for setting in dataclasses.fields(cls)}
    values = {}
    for key, value in raw.items():
        here = f"{path}.{shorten(str(key))}" if path else shorten(str(key))
        if key not in known:
            raise ConfigError(f"{here}: unknown key{closest(str(key), known)}")
        setting = known[key]
        if dataclasses.is_dataclass(setting.type):
            values[key] = _convert_dataclass(value, setting.type, here)
        else:
            values[key] = _convert(value, setting.type, here)
            low, high = setting.metadata["low"], setting.metadata["high"]
            if low is not None:
                check_bounds(low, math.inf if high is None else high, **{here: values[key]})
    return cls(**values)


_CONTAINERS: dict[Any, Any] = {
    **dict.fromkeys((tuple, list, Sequence), (list, tuple)),
    **dict.fromkeys((Mapping, dict), (Mapping, str)),
}
"""Python types of the JSON values that a container accepts; a string can be a component."""


def _fits(value: Any, hint: Any) -> bool:
    """Return True if ``value`` is of the type ``hint``; items of containers are not checked."""
    kind = typing.get_origin(hint) or hint
    if kind is Literal:
        return any(value == word and type(value) is type(word) for word in typing.get_args(hint))
    return matches_schema(value, _CONTAINERS.get(kind, kind))


def _convert(value: Any, hint: Any, path: str) -> Any:
    """Convert ``value`` to its annotated type: lists to tuples, ints to floats, nothing else."""
    kind, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind is Annotated:
        value = _convert(value, inner[0], path)
        for check in inner[1:]:
            check(value, path)
        return value
    options = inner if kind in (Union, types.UnionType) else (hint,)
    accepting = next((option for option in options if _fits(value, option)), None)
    if accepting is None:
        near = closest(value, map(str, inner)) if kind is Literal and isinstance(value, str) else ""
        raise ConfigError(f"{path}: expected {type_description(hint)}, got {_kind(value)}{near}")
    if accepting is not hint:
        return _convert(value, accepting, path)
    if kind is float:
        return _finite(value, path)
    if kind is int and not -(2**63) <= value < 2**63:
        raise ConfigError(f"{path}: expected an integer of 64 bits, got {shorten(str(value), 40)}")
    if isinstance(value, list | tuple) and kind is not Any:
        if kind is not tuple or inner[1:] == (Ellipsis,):
            inner = (inner[0] if inner else Any,) * len(value)
        elif len(value) != len(inner):
            raise ConfigError(f"{path}: expected {type_description(hint)}, got {len(value)} values")
        items = enumerate(zip(value, inner, strict=True))
        return tuple(_convert(item, each, f"{path}[{i}]") for i, (item, each) in items)
    if isinstance(value, str) and kind in (Mapping, dict):
        return {"name": value}
    return value


def _finite(value: float, path: str) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ConfigError(f"{path}: expected a finite number, got {value!s:.20}")
    return number


_WORDS: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
    types.NoneType: "null",
    Any: "a value",
    Mapping: "an object",
    dict: "an object",
}


def type_description(hint: Any) -> str:
    """Return an annotation in plain words, for messages."""
    kind, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind is Annotated:
        return type_description(inner[0])
    if kind in (Union, types.UnionType):
        return " or ".join(map(type_description, inner))
    if kind is Literal:
        return "one of " + ", ".join(map(repr, inner))
    if kind is tuple and inner[1:] != (Ellipsis,):
        return f"a list of {len(inner)} ({', '.join(map(type_description, inner))})"
    if kind in (tuple, list, Sequence):
        return f"a list ({type_description(inner[0])} each)" if inner else "a list"
    return _WORDS.get(kind, str(hint))


def _kind(value: Any) -> str:
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    return f"{json.dumps(value):.60}"
