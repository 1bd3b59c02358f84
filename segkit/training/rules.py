"""Rules of a plan: pure functions from the data's fingerprint and the machine to settings.

The design follows nnU-Net (Isensee et al. 2021, https://doi.org/10.1038/s41592-020-01008-z): a
fingerprint of the data, then rules, then a configuration. The thresholds are segkit's own.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from segkit.core.config import IMAGENET_MEAN, IMAGENET_STD
from segkit.core.labels import Size
from segkit.core.machine import Machine
from segkit.data.doubts import counted
from segkit.data.fingerprint import Fingerprint
from segkit.training.defaults import crop_size, learning_rate

SMALLEST_OBJECT = 8.0
"""Side in pixels below which a model with stride 4 cannot separate an object from its edge."""

FEW_EPOCHS, MOST_EPOCHS, MOST_STEPS = 20, 300, 40_000
EVALUATIONS = 10
FOLDS, FEWEST_FOLDS = 5, 2
IMBALANCE = 10.0
RARE = 0.001
SELDOM = 0.1
"""Share of the images below which a class's images are drawn more often."""

SHORT = 1000
"""Steps below which a pretrained network with BatchNorm learns faster (benchmarks/plan.py)."""

SMALL, AIM = 0.02, 0.33
"""Share of the pixels below which crops aim at classes, and nnU-Net's share of such crops."""

MEMORY_SHARE = 0.8


class Choice(NamedTuple):
    """A setting of a plan, such as ``train.epochs``, its value, and the reason."""

    key: str
    value: Any
    reason: str


class ModelChoice(NamedTuple):
    """A backbone and a decoder that suits it."""

    backbone: dict[str, Any]
    decoder: dict[str, Any]
    reason: str


LIGHT = ModelChoice(
    {"name": "mobilenet_v2"},
    {"name": "unet", "widths": [96, 64, 48, 32, 16]},
    "small enough to train without a GPU",
)
MEDIUM = ModelChoice(
    {"name": "resnet34"}, {"name": "unet"}, "fits small GPUs, and needs few images"
)
LARGE = ModelChoice({"name": "convnext_tiny"}, {"name": "upernet"}, "a modern network for this GPU")


def models(machine: Machine) -> list[ModelChoice]:
    """Return models for a machine, the best with pretrained weights first, the last without."""
    if machine.device == "cpu":
        return [LIGHT]
    return [LARGE, MEDIUM] if machine.memory >= 12 else [MEDIUM]


def decoder_for(backbone: str) -> dict[str, Any]:
    """Return a decoder for a backbone whose weights were given."""
    for choice in (LIGHT, MEDIUM, LARGE):
        if choice.backbone["name"] == backbone:
            return choice.decoder
    return dict(MEDIUM.decoder if "net" in backbone else LARGE.decoder)


def scale_factor(data: Fingerprint, machine: Machine) -> tuple[float, str]:
    """Return the factor that images are scaled by, and the reason.

    Large images are scaled down so that a crop shows enough of them, unless the smaller objects,
    the first decile, would vanish.
    """
    longest, limit = max(data.size), 512 if machine.device == "cpu" else 1024
    if longest <= limit:
        return 1.0, f"images of {longest} pixels are used at their own size"
    factor = limit / longest
    small = float(np.quantile(np.array(data.sides), 0.1)) if data.sides else math.inf
    if small * factor < SMALLEST_OBJECT:
        factor = min(1.0, SMALLEST_OBJECT / max(small, 1.0))
        return factor, f"images of {longest} pixels, but objects of {small:.0f} must stay visible"
    return factor, f"images of {longest} pixels are scaled to {limit}, a crop shows more of them"


def crop(data: Fingerprint, factor: float, machine: Machine) -> Size:
    """Return height and width of a crop that nine of ten scaled images contain."""
    sizes = [(max(1, round(h * factor)), max(1, round(w * factor))) for h, w in data.sizes]
    return crop_size(sizes, 256 if machine.device == "cpu" else 512)


def batch(images: int, room: float, machine: Machine) -> list[Choice]:
    """Return the batch and its parts; the activations of ``room`` images fit into the memory."""
    want = 8 if machine.device == "cpu" else 16
    size = _power_of_two(min(want, max(min(2, images), images // 4)))
    parts = max(1, size // _power_of_two(max(1, min(size, room))))
    return [
        Choice("train.batch_size", size, f"at least four steps in {images} images"),
        Choice("train.accumulate", parts, f"memory holds about {room:,.0f} images"),
    ]


def _power_of_two(number: float) -> int:
    return 1 << int(math.log2(number))


def rates(optimizer: str, *, pretrained: bool, batch_norm: bool) -> list[Choice]:
    """Return the learning rates, the limit of the gradient and the moving average."""
    lr, factor = learning_rate(optimizer, pretrained=pretrained, batch_norm=batch_norm)
    why = "a pretrained backbone changes less" if pretrained else "all of it starts from random"
    return [
        Choice("optim.lr", lr, f"{optimizer}, {'with' if batch_norm else 'without'} BatchNorm"),
        Choice("optim.backbone_lr_factor", factor, why),
        Choice("optim.warmup_steps", None, "a twentieth of the steps, at most 500"),
        Choice("optim.clip_norm", 5.0, "a batch with wrong labels changes little"),
    ]


def hasten(choices: Sequence[Choice], images: int) -> list[Choice]:
    """Return the choices with twice the rates, also of the backbone, if there are few steps.

    Args:
        choices: With epochs, folds and the rates of pretrained weights and BatchNorm.
        images: Number of training images of all folds.
    """
    values = {choice.key: choice.value for choice in choices}
    steps = values["train.epochs"] * steps_per_epoch(
        images, values["train.batch_size"],
        folds=values.get("data.folds"), selection=values.get("data.selection", 0.0),
    )  # fmt: skip
    if steps >= SHORT:
        return list(choices)
    why = f"{steps} steps are few, so twice the usual rate"
    return [
        Choice(choice.key, 2 * choice.value, why)
        if choice.key in ("optim.lr", "optim.backbone_lr_factor")
        else choice
        for choice in choices
    ]


def augmentation(data: Fingerprint, factor: float, size: Size) -> list[Choice]:
    """Return the operations of augmentation for these images."""
    few = data.images < 200
    low, high = (0.7, 1.4) if few else (0.8, 1.25)
    operations: list[dict[str, Any]] = [
        {"name": "scale", "range": [round(low * factor, 3), round(high * factor, 3)]}
    ]
    if few:
        operations.append({"name": "rotate", "degrees": [-10, 10], "p": 0.5})
    aim, aimed = _aim(data, factor, size)
    crop = {"name": "crop", "size": list(size), "max_class_share": 0.9, **aim}
    operations += [crop, {"name": "hflip"}]
    if data.gray:
        operations += [{"name": "brightness", "range": [0.8, 1.2]}]
    else:
        operations += [{"name": "photometric", "p": 0.5}]
    why = "few images, so more rotation and scale" if few else "light: scale, mirroring"
    why += f"; {'gray' if data.gray else 'color'} images; nine of ten contain the crop{aimed}"
    return [
        Choice("augment.train", operations, why),
        Choice("infer.tta", ["identity", "hflip"], "the views that training has seen"),
    ]


def _aim(data: Fingerprint, factor: float, size: Size) -> tuple[dict[str, float], str]:
    """Return the crop's ``aim`` and its reason, if a small class would often be out of the crop."""
    total = sum(data.pixels)
    share, name = min(
        ((n / total, name) for n, name in zip(data.pixels, data.classes, strict=True) if n),
        default=(1.0, ""),
    )
    part = math.prod(size) / (math.prod(data.size) * factor**2)
    if share >= SMALL or part > 0.5:
        return {}, ""
    why = f"a third of the crops aim at a class, as {name} has {100 * share:.2g} % of the pixels"
    return {"aim": AIM}, f"; {why}"


def repeats(data: Fingerprint) -> list[Choice]:
    """Return the threshold of repeated images, if a class is in few images."""
    shares = [count / max(1, data.images) for count in data.shown]
    seldom = [(f, name) for f, name in zip(shares, data.classes, strict=True) if 0 < f < SELDOM]
    if not seldom:
        return []
    share, name = min(seldom)
    often = math.sqrt(SELDOM / share)
    why = f"{name} is in {100 * share:.2g} % of the images, drawn {often:.1f} times as often"
    return [Choice("data.repeat_threshold", SELDOM, why)]


def normalization(data: Fingerprint, *, pretrained: bool) -> list[Choice]:
    """Return mean and deviation of the bands; pretrained weights keep ImageNet's of R, G, B."""
    bands = len(data.mean)
    if pretrained and bands == 3:
        return []
    kept = 3 if pretrained and bands > 3 else 0
    mean, std = ([round(x, 4) for x in values[kept:]] for values in (data.mean, data.std))
    why = "measured" if pretrained else "measured, as the weights are random"
    why = f"ImageNet's of R, G, B; the others {why}" if kept else why
    return [
        Choice("data.mean", [*IMAGENET_MEAN[:kept], *mean], why),
        Choice("data.std", [*IMAGENET_STD[:kept], *(max(0.01, x) for x in std)], why),
    ]


def losses(data: Fingerprint) -> list[Choice]:
    """Return the losses, by the imbalance of the classes."""
    share = np.array(data.pixels) / max(1, sum(data.pixels))
    present = share[share > 0]
    ratio = float(present.max() / present.min()) if len(present) else 1.0
    if ratio < IMBALANCE:
        why = f"the classes' pixels differ by a factor of {ratio:.1f} only"
        return [Choice("loss.terms", [{"name": "cross_entropy"}], why)]
    why = f"the largest class has {ratio:,.0f} times the pixels of the smallest"
    return [Choice("loss.terms", [{"name": "cross_entropy"}, {"name": "dice"}], why)]


def warnings_about(data: Fingerprint) -> list[str]:
    """Return a sentence for each class that training can hardly learn."""
    total = max(1, sum(data.pixels))
    sentences = []
    for name, count, images in zip(data.classes, data.pixels, data.shown, strict=True):
        if count and (count < RARE * total or images < min(FOLDS, data.images)):
            share = 100 * count / total
            shown = counted(images, "image")
            sentences.append(f"the class {name} is rare: {shown}, {share:.2g} % of pixels")
    return sentences


class Cost(NamedTuple):
    """Measured seconds of a step and of the prediction of an image."""

    step: float
    image: float


def steps_per_epoch(
    images: int, batch_size: int, *, folds: int | None = None, selection: float = 0.0
) -> int:
    """Return the steps of an epoch of a fold, or without folds of a training on all images."""
    share = 1 - 1 / folds if folds else 1.0
    return max(1, int(images * (1 - selection) * share) // batch_size)


def hours_of(cost: Cost, epochs: int, folds: int, steps: int, validation: int) -> float:
    """Return the hours that a training takes."""
    evaluated = min(epochs, EVALUATIONS) * validation * cost.image
    return folds * (epochs * steps * cost.step + evaluated) / 3600


def epochs_within(hours: float, cost: Cost, folds: int, steps: int, validation: int) -> int:
    """Return the most epochs that fit, at least 1; arguments as :func:`hours_of`."""
    most = max(1, min(MOST_EPOCHS, MOST_STEPS // max(1, steps)))
    return max(
        (n for n in range(1, most + 1) if hours_of(cost, n, folds, steps, validation) <= hours),
        default=1,
    )


def schedule(
    data: Fingerprint, hours: float, cost: Cost, batch_size: int, validation: int | None
) -> list[Choice]:
    """Return folds, selection set and epochs that take ``hours`` for all folds.

    ``validation`` is the number of images of a fixed validation part; ``None``: folds.
    """
    if validation is not None:
        steps = steps_per_epoch(data.images, batch_size)
        return _epochs(hours, cost, 1, steps, validation, "one training, validated on data.val")
    selection = 0.1 if data.units >= 50 else 0.0
    choices = [
        Choice(
            "data.selection", selection,
            f"{data.units} images or groups of near-duplicates: "
            + ("a tenth chooses between models" if selection else "too few to set some aside"),
        )
    ]  # fmt: skip
    most = max(FEWEST_FOLDS, min(FOLDS, data.units // 8))
    for folds in range(most, FEWEST_FOLDS - 1, -1):
        each = int(data.images * (1 - selection) / folds)
        steps = steps_per_epoch(data.images, batch_size, folds=folds, selection=selection)
        if epochs_within(hours, cost, folds, steps, each) >= FEW_EPOCHS:
            break
    why = f"{data.units} images or groups" if folds == most else "the time allows no more"
    choices.append(Choice("data.folds", folds, why))
    return choices + _epochs(hours, cost, folds, steps, each, f"{folds} folds")


def _epochs(
    hours: float, cost: Cost, folds: int, steps: int, validation: int, what: str
) -> list[Choice]:
    epochs = epochs_within(hours, cost, folds, steps, validation)
    takes = hours_of(cost, epochs, folds, steps, validation)
    time = f"{takes:.1f} h" if takes >= 1 else f"{60 * takes:.0f} min"
    why = f"{what}, {steps} steps of {cost.step:.2f} s per epoch: about {time}"
    if takes > hours:
        why += f", more than the {hours:g} h allowed"
    total = epochs * steps
    average = [Choice("train.ema", 0.99, "averages the last steps")] if total >= 400 else []
    every = max(1, round(epochs / EVALUATIONS))
    return [
        Choice("train.epochs", epochs, why),
        Choice(
            "train.evaluate_every",
            every,
            "after each epoch" if every == 1 else f"about {EVALUATIONS} evaluations",
        ),
        *average,
    ]


def workers(machine: Machine) -> int:
    """Return the number of data-loader workers; on the CPU, they would slow the model down."""
    return 0 if machine.device == "cpu" else max(1, min(8, machine.cores - 1))


def loading(data: Fingerprint, machine: Machine) -> list[Choice]:
    """Return workers and the size of the cache."""
    need = data.images * math.prod(data.size) * 4 / 1e9
    size = round(min(max(1.0, 1.2 * need), machine.disk / 2), 1)
    why = f"{need:.1f} GB are needed, {machine.disk:.0f} GB of the disk are free"
    return [
        Choice("data.workers", workers(machine), f"{machine.cores} cores"),
        Choice("data.cache_gb", size, why),
    ]


def nested(choices: Sequence[Choice]) -> dict[str, Any]:
    """Return the settings as sections of a configuration, without those of ``null``.

    ``model.weights`` is kept, because its ``null`` means random weights.
    """
    sections: dict[str, Any] = {}
    for key, value, _ in choices:
        section, name = key.split(".")
        if value is not None or key == "model.weights":
            sections.setdefault(section, {})[name] = value
    return sections
