"""Plan a training from a folder of labelled photographs: ``segkit plan photos``.

    segkit plan photos                      # writes photos.json and says why
    segkit plan photos --hours 8 --weights resnet50.pth
    segkit train --cfg photos.json

The folder is searched for labels; the data, the hardware and the weights at hand set the model, the
crop, the batch, the rates, the epochs, the augmentation, the loss and the folds.
"""

import json
import math
import os
import shlex
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import numpy as np
import torch

from segkit.augment.pipeline import build_pipeline
from segkit.commands import console
from segkit.core import config, distributed
from segkit.core.config import Config
from segkit.core.errors import ConfigError, DataError, SegkitError, is_out_of_memory
from segkit.core.files import write_json
from segkit.core.machine import Machine, read_machine
from segkit.data import open_source
from segkit.data.bands import find_reading
from segkit.data.doubts import counted, describe, label_doubts
from segkit.data.fingerprint import Fingerprint, join
from segkit.data.folds import class_pixels
from segkit.data.formats import FORMATS, coco_files, mask_folders, recognize
from segkit.data.loader import TrainImages
from segkit.data.memo import MEMO, on_threads
from segkit.data.source import Source
from segkit.models.pretrained.loading import fitting, identify
from segkit.models.pretrained.published import obtain
from segkit.models.pretrained.reading import read_file
from segkit.report.duplicates import near_duplicates
from segkit.report.survey import (
    Photo,
    color_statistics,
    evenly_spaced,
    read_photo,
    shared_images,
)
from segkit.training import rules
from segkit.training.defaults import has_batch_norm, set_channels
from segkit.training.memory import training_memory
from segkit.training.preparation import check_memory
from segkit.training.rules import Choice, Cost

MARK = "Planned by segkit"
"""Beginning of the note of planned configurations, which may be overwritten."""


@dataclass(frozen=True)
class TrainingPlan:
    """A planned training.

    Args:
        config: The configuration, as JSON values.
        choices: Each setting with its reason.
        data: The fingerprint of the training images.
        warnings: Sentences about the data that a reader should not miss.
        groups: Group of each image, if there are near-duplicates; ``data.groups`` names its file.
    """

    config: dict[str, Any]
    choices: Sequence[Choice]
    data: Fingerprint
    warnings: Sequence[str]
    groups: dict[str, str]

    def save(self, path: Path | str) -> None:
        """Write the configuration, and the groups into a file beside it."""
        path, content = Path(path), self.config
        if self.groups:
            file = path.with_name(f"{path.stem}-groups.json")
            write_json(file, self.groups)
            content = {**content, "data": {**content["data"], "groups": str(file)}}
        text = json.dumps(content, indent=2, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")


def plan(
    folder: Path | str,
    *,
    hours: float = 2.0,
    weights: Path | str | None = None,
    device: torch.device | str | None = None,
) -> TrainingPlan:
    """Plan a training on the labelled photographs of a folder.

    Args:
        folder: The folder, in any layout that is recognized.
        hours: Time for the training of all folds.
        weights: A file of pretrained weights; default: torchvision's, if they are in torch's cache
            or can be downloaded.
        device: The device to train on; some steps are run on it. Default: CUDA if available.

    Raises:
        DataError: The folder has no labels that segkit reads, or they have a fault.
    """
    folder = Path(folder)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    parts = find_parts(folder)
    cfg = config.parse({"data": parts}, str(folder))
    machine = read_machine(device, Path())
    with MEMO.kept_in(Path(cfg.data.cache)):
        source = open_source(cfg, "train", cached=False)
        if needs := find_reading([source.path(i) for i in range(len(source))]):
            parts["train"] |= needs
            cfg = config.parse({"data": parts}, str(folder))
            source = open_source(cfg, "train", cached=False)
        if len(source) < 2 and "val" not in parts:
            raise DataError(
                f"{folder}: has 1 labelled image; expected 2 or more, some to train and others to "
                "validate: label more"
            )
        pixels = class_pixels(source, workers=machine.cores)
        chosen = evenly_spaced(source)
        photos = on_threads(lambda i: read_photo(source, i), chosen, "reading")
        data, groups = read_fingerprint(source, pixels, photos)
        sources = {
            f"data.{part}": source if part == "train" else open_source(cfg, part, cached=False)
            for part in parts
        }
        grays = [photo.gray for photo in photos]
        shared = shared_images(sources, grays) if len(sources) > 1 else []
    validation = len(sources["data.val"]) if "val" in parts else None
    reasons = dict.fromkeys(parts, f"found in {folder}") | {"train": describe(source)}
    choices = [Choice(f"data.{part}", spec, reasons[part]) for part, spec in parts.items()]
    choices += plan_model(machine, weights)
    choices += plan_training(data, machine, nest(choices))
    cost, choices = measure(choices, source, data, machine, device)
    batch_size = nest(choices).train.batch_size
    choices += rules.schedule(data, hours, cost, batch_size, validation)
    model = nest(choices).model
    if model.weights is not None and has_batch_norm(model):
        choices = rules.hasten(choices, data.images)
    choices += rules.loading(data, machine)
    if groups and validation is None:
        count = sum(len(group) for group in data.groups)
        why = f"{count} near-duplicates in {len(data.groups)} groups stay together"
        choices.append(Choice("data.groups", None, why))
    left_out = []
    if parts["train"]["name"] in ("coco", "masks"):  # other formats have COCO files of their own
        used = {spec.get("annotations", "") for spec in parts.values()}
        left_out = [f"left out: {sentence}" for sentence in coco_files.refusals(folder, used)]
    why = "; ".join(f"{key}: {reason}" for key, _, reason in choices)
    note = f"{MARK} for {data.images} images of {folder}. {why}"
    raw = {"note": note, **rules.nested(choices)}
    config.parse(raw, "the plan")
    return TrainingPlan(
        raw,
        choices,
        data,
        [*left_out, *label_doubts(source, pixels), *shared, *rules.warnings_about(data)],
        groups if validation is None else {},
    )


def nest(choices: Sequence[Choice]) -> Config:
    """Return the configuration of the choices that were made."""
    return set_channels(config.parse(rules.nested(choices), "the plan"))


def find_parts(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the component that reads each part of the data set in a folder.

    Raises:
        DataError: There is no such folder, or it has no labels that segkit reads.
    """
    if not folder.is_dir():
        problem = "is not a folder" if folder.exists() else "there is no such folder"
        advice = "unzip it, and give the folder" if is_zipfile(folder) else "check the path"
        raise DataError(f"{folder}: {problem}; expected a folder of labelled photographs: {advice}")
    specs = {part: recognize(folder, part) for part in ("train", "val", "test")}  # type: ignore[arg-type]
    parts = {part: spec for part, spec in specs.items() if spec is not None}
    if "train" not in parts:
        for refusals in (coco_files.refusals, mask_folders.refusals):
            if refused := next(refusals(folder), None):
                raise DataError(refused)
        kinds = sorted({path.suffix.lower() or "no suffix" for path in folder.rglob("*.*")})
        raise DataError(
            f"{folder}: has no labels that segkit recognizes "
            f"({'its files: ' + ', '.join(kinds[:8]) if kinds else 'it is empty'}); expected a "
            "COCO file, masks named as their images (images/a.jpg, masks/a.png), or files of "
            f"{', '.join(sorted({*FORMATS} - {'coco', 'masks'}))}: label the photographs with a "
            "tool that writes one of these, or describe other folders of masks in data.train of a "
            "configuration (docs/data.md)"
        )
    return parts


def read_fingerprint(
    source: Source, pixels: np.ndarray, photos: Sequence[Photo]
) -> tuple[Fingerprint, dict[str, str]]:
    """Return the fingerprint of labelled images, and the group of each if there are duplicates.

    ``photos`` are the statistics of some of the images; ``pixels`` is the result of
    :func:`segkit.data.folds.class_pixels`.
    """
    histogram = np.sum([photo.histogram for photo in photos], 0)
    mean, std = color_statistics(histogram)
    pairs = near_duplicates(np.stack([photo.gray for photo in photos]))
    groups = join([photo.name for photo in photos], [pair[:2] for pair in pairs])
    owner = {name: group[0] for group in groups for name in group}
    data = Fingerprint(
        images=len(source),
        sizes=[photo.size for photo in photos],
        classes=source.classes,
        pixels=pixels.sum(0).tolist(),
        shown=(pixels > 0).sum(0).tolist(),
        sides=[math.sqrt(x.area) for photo in photos for x in photo.instances],
        gray=len(histogram) < 3 or bool(np.array_equal(histogram[0], histogram[1])),
        mean=mean,
        std=std,
        groups=groups,
    )
    return data, {name: owner.get(name, name) for name in source.names} if groups else {}


def plan_model(machine: Machine, file: Path | str | None) -> list[Choice]:
    """Return the choice of a model and of its weights, the given ones or those at hand."""
    if file is not None:
        path = Path(file)
        names = fitting(identify(read_file(path), path, source=str(path)))
        if not names:
            raise ConfigError(f"{path}: no backbone of segkit has its structure; give another file")
        name = names[0].partition(" ")[0]
        return [
            Choice("model.backbone", {"name": name}, f"{path} has its weights"),
            Choice("model.decoder", rules.decoder_for(name), f"suits {name}"),
            Choice("model.weights", str(path), "the given file"),
        ]
    for choice in rules.models(machine):
        weights, sentence = obtain(choice.backbone["name"], option="--weights PATH")
        if weights is not None:
            break
    return [
        Choice("model.backbone", choice.backbone, choice.reason),
        Choice("model.decoder", choice.decoder, f"suits {choice.backbone['name']}"),
        Choice("model.weights", weights, sentence),
    ]


def plan_training(data: Fingerprint, machine: Machine, cfg: Config) -> list[Choice]:
    """Return the choices about a step: sizes, batch, rates, augmentation and losses."""
    share = 0.5 if cfg.data.val is None else 1.0  # of the images, in two folds or a fixed part
    factor, why = rules.scale_factor(data, machine)
    crop = rules.crop(data, factor, machine)
    state, activations = training_memory(
        cfg.model, crop, len(data.classes), recomputed=machine.device == "cpu"
    )
    room = (rules.MEMORY_SHARE * machine.memory * 1e9 - state) / activations
    longest = round(max(data.size) * factor)
    norms = has_batch_norm(cfg.model)
    pretrained = cfg.model.weights is not None
    return [
        Choice("infer.size", longest if factor < 1 else None, why),
        *rules.batch(max(1, int(share * data.images)), room, machine),
        *rules.rates("adamw", pretrained=pretrained, batch_norm=norms),
        *rules.augmentation(data, factor, crop),
        *rules.normalization(data, pretrained=pretrained),
        *rules.losses(data),
        *rules.repeats(data),
    ]


def measure(
    choices: list[Choice], source: Source, data: Fingerprint, machine: Machine, device: torch.device
) -> tuple[Cost, list[Choice]]:
    """Return the cost of a step on the device, and the choices with a batch that it can hold."""
    while True:
        cfg = nest(choices)
        try:
            step = check_memory(cfg, source, range(len(source)), device, steps=4)
            break
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or cfg.train.accumulate == cfg.train.batch_size:
                raise
            why = "a step of the device ran out of memory with fewer parts"
            parts = Choice("train.accumulate", 2 * cfg.train.accumulate, why)
            choices = [parts if choice.key == parts.key else choice for choice in choices]
    crop = next(spec["size"] for spec in cfg.augment.train or () if spec["name"] == "crop")
    scale = 1.0 if cfg.infer.size is None else cfg.infer.size / max(data.size)
    area = math.prod(data.size) * scale**2 / math.prod(crop)
    image = step / (3 * cfg.train.batch_size) * area  # forward is about a third of a step
    loading = cfg.train.batch_size * _seconds_to_load(cfg, source)
    workers = rules.workers(machine)
    return Cost(max(step, loading / workers) if workers else step + loading, image), choices


def _seconds_to_load(cfg: Config, source: Source) -> float:
    """Return the seconds to read and augment an image, the mean of a few."""
    images = TrainImages(source, range(len(source)), build_pipeline(cfg), seed=cfg.train.seed)
    chosen = range(0, len(source), max(1, len(source) // 4))
    start = time.perf_counter()
    for index in chosen:
        images[0, index]
    return (time.perf_counter() - start) / len(chosen)


def lines(made: TrainingPlan) -> Iterator[str]:
    """Yield the lines of a report of at most 80 columns."""
    data = made.data
    height, width = data.size
    classes = counted(len(data.classes), "class", "classes")
    yield f"{counted(data.images, 'image')}, {width} x {height} (median), {classes}"
    total = max(1, sum(data.pixels))
    for name, count, images in zip(data.classes, data.pixels, data.shown, strict=True):
        yield f"  {name:<30.30} {images:>7,} images {100 * count / total:>6.2f} % of pixels"
    for sentence in made.warnings:
        yield from textwrap.wrap(f"warning: {sentence}", 80, subsequent_indent="  ")
    for key, value, why in made.choices:
        yield from textwrap.wrap(
            f"{key} = {_short(value)}: {why}", 80, subsequent_indent="    ", break_on_hyphens=False
        )


def _short(value: Any) -> str:
    """Return a value as a user writes it, without the braces of components."""
    if isinstance(value, dict) and "name" in value:
        more = ", ".join(f"{key} {_short(x)}" for key, x in value.items() if key != "name")
        return f"{value['name']} ({more})" if more else value["name"]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return ", ".join(map(_short, value))
    return value if isinstance(value, str) else json.dumps(value)


def main(argv: list[str]) -> None:
    """Write the configuration and print the reasons."""
    parser = console.parser("plan", __doc__)
    parser.add_argument("folder", type=Path, help="folder of labelled photographs")
    parser.add_argument("--out", type=Path, help="the configuration to write; default FOLDER.json")
    parser.add_argument(
        "--hours", type=float, default=2.0, help="time for the training of all folds; default 2"
    )
    parser.add_argument("--weights", type=Path, help="a file of pretrained weights")
    parser.add_argument("--device", metavar="NAME", help="default: cuda if available, else cpu")
    args = parser.parse_args(argv)
    if not 0 < args.hours < math.inf:
        parser.error("--hours: expected a number above 0")
    name = args.folder.resolve().name
    if not name:
        parser.error("folder: expected a folder of labelled photographs, not the root of a disk")
    out = args.out or Path(f"{name}.json")
    check_out(out)
    advice = "plan with another --device, or on smaller images"
    with distributed.session(args.device) as device, console.memory_advice(advice):
        made = plan(args.folder, hours=args.hours, weights=args.weights, device=device)
    made.save(out)
    for line in lines(made):
        print(line)
    print(f"written: {out}\nnext: segkit train --cfg {shlex.quote(str(out))}")


def check_out(path: Path) -> None:
    """Raise an error if a file exists that no plan has written, or its folder does not."""
    if not path.parent.is_dir():
        raise SegkitError(f"--out {path}: there is no folder {path.parent}; make it first")
    if not os.access(path.parent, os.W_OK):
        raise SegkitError(
            f"--out {path}: no file may be written in {path.parent.resolve()}; name one elsewhere "
            "with --out"
        )
    if path.is_dir():
        raise SegkitError(f"--out {path}: is a folder; expected the name of a file")
    if path.exists() and f'"note": "{MARK}' not in path.read_text(errors="replace")[:100]:
        raise SegkitError(f"{path}: exists and was not planned by segkit; name another with --out")
