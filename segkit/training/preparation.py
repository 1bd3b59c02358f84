"""Data and folds of a run, and checks of settings, data and memory before the first step."""

import gc
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from segkit.augment.pipeline import build_pipeline
from segkit.core import config, distributed
from segkit.core.config import Config
from segkit.core.errors import ConfigError, DataError, SegkitError, shorten
from segkit.core.run import Run
from segkit.data import SOURCES, open_source, part_spec
from segkit.data.doubts import describe, file_doubts, label_doubts, split_doubts
from segkit.data.folds import (
    Split,
    class_pixels,
    make_folds,
    read_groups,
    repeat_factors,
    shares,
    table,
)
from segkit.data.loader import TrainImages, TrainOrder, digests
from segkit.data.pseudo_labelled import PseudoLabelled
from segkit.data.record import data_changes, data_record
from segkit.data.source import Source, positions
from segkit.models.pretrained.published import obtain
from segkit.models.segmenter import build_model, check_weights
from segkit.training import tracking
from segkit.training.build import build_training, parallelize, step_options
from segkit.training.defaults import set_rates, settle, warmup_steps
from segkit.training.optim import WindowMean, build_schedule
from segkit.training.step import train_step


def check_components(cfg: Config) -> None:
    """Build every component once, without data or memory, so that errors are reported early."""
    if cfg.data.train is None:
        raise ConfigError("data.train: is missing; expected the labelled images to train on")
    for part in ("train", "val", "test", "test_labels", "pseudo"):
        if (spec := part_spec(cfg.data, part)) is not None:
            config.bind(SOURCES, spec, f"data.{part}")
    build_pipeline(cfg)
    with torch.device("meta"):
        build_training(set_rates(cfg), None, torch.device("meta"))
    if os.environ.get("LOCAL_RANK", "0") == "0":
        if cfg.model.weights == "auto":
            obtain(cfg.model.backbone["name"])  # downloads once per machine
        elif cfg.model.weights is not None:
            with torch.device("meta"):
                plain = build_model(cfg.model.backbone, cfg.model.decoder, num_classes=2)
            check_weights(plain, cfg.model.backbone, cfg.model.weights)
    build_schedule(cfg.optim.schedule, total=100, warmup=min(99, cfg.optim.warmup_steps or 0))
    tracking.check(cfg.track.trackers)


@dataclass(frozen=True)
class TrainData:
    """Data of a run."""

    labelled: Source
    validation: Source  # labelled, unless data.val is set
    split: Split
    pseudo: PseudoLabelled | None = None  # labelled, followed by the pseudo-labelled images

    @property
    def source(self) -> Source:
        """Return all images for training."""
        return self.pseudo or self.labelled

    def chooses(self) -> list[str]:
        """Return the digests of the selection set, or of the fixed validation images."""
        names = self.split.selection
        if self.validation is not self.labelled:
            names = self.validation.names
        return digests(self.validation, positions(self.validation, names))


@dataclass(frozen=True)
class Fold:
    """A fold's number, indices of its validation images, and order of its training images."""

    number: int
    validation: list[int]
    order: TrainOrder


def settled(cfg: Config, source: Source, say: Callable[[str], None]) -> Config:
    """Return the configuration with the settings that it leaves open, the same on all ranks."""
    if distributed.is_main():
        if cfg.model.weights is None:
            say(
                "model.weights is null: the model starts from random weights; pretrained ones "
                "(imagenet, or a file) usually score higher"
            )
        cfg, sentences = settle(cfg, source)
        for sentence in sentences:
            say(sentence)
    return distributed.broadcast(cfg)


def split_data(
    cfg: Config, labelled: Source, validation: Source, run: Run, say: Callable[[str], None]
) -> tuple[Split, dict[str, Any]]:
    """Return the run's folds and selection set, and the files that a new run writes about them.

    The split is made once, and then read from the run's ``folds.json``. The files are the contents
    of JSON files for the run's folder, by name; on rank 0 only.
    """
    if labelled.classes != validation.classes:
        raise DataError("data.val: has other classes than data.train; both need the same classes")
    split: Split | None = None
    files: dict[str, Any] = {}
    path = run.folder / "folds.json"
    if distributed.is_main() and run.exists and path.exists():
        split = Split.load(path)
    elif distributed.is_main():
        names = labelled.names
        # Reads every mask, so that an invalid class index is found before training starts.
        pixels = class_pixels(labelled, workers=cfg.data.workers)
        doubts = [f"data.train: {sentence}" for sentence in label_doubts(labelled, pixels)]
        if validation is not labelled:
            counts = class_pixels(validation, workers=cfg.data.workers)
            doubts += [f"data.val: {sentence}" for sentence in label_doubts(validation, counts)]
            split = Split(folds=(validation.names,), train=names)
            parts = {"data.train": (labelled, names), "data.val": (validation, validation.names)}
        else:
            groups = read_groups(cfg.data.groups, cfg.data.group_pattern, names)
            split = make_folds(
                names, pixels, folds=cfg.data.folds, selection=cfg.data.selection,
                seed=cfg.train.seed, groups=groups, stratify=cfg.data.stratify,
            )  # fmt: skip
            say(table(split, names, pixels, labelled.classes))
            doubts += split_doubts(split, names, pixels, labelled.classes)
            parts = {f"fold {k}": (labelled, fold) for k, fold in enumerate(split.folds)}
            parts["the selection set"] = labelled, split.selection
            files["shares.json"] = [row._asdict() for row in shares(split, names, pixels)]
        for sentence in (*doubts, *file_doubts(parts)):
            say(f"warning: {sentence}")
        category_ids = getattr(labelled, "category_ids", None)
        files["folds.json"] = asdict(split)
        files["classes.json"] = {"classes": labelled.classes, "category_ids": category_ids}
    return distributed.broadcast(split), files


def with_pseudo(cfg: Config, data: TrainData, say: Callable[[str], None]) -> TrainData:
    """Return the data with the images of ``data.pseudo``, if it is set.

    Images that validate or select models may not be pseudo-labelled.
    """
    if cfg.data.pseudo is None:
        return data
    chooses = data.chooses()
    joined = PseudoLabelled(data.labelled, open_source(cfg, "pseudo"), chooses=chooses)
    say(f"pseudo labels, round {joined.round}: {len(joined.extra)} images")
    return replace(data, pseudo=joined)


def chosen_folds(text: str, count: int) -> list[int]:
    """Return the fold numbers given by ``--folds``."""
    if text == "all":
        return list(range(count))
    known = {str(number): number for number in range(count)}
    numbers = [known.get(part.strip(), -1) for part in text.split(",")]
    if -1 in numbers:
        raise SegkitError(
            f"--folds {shorten(text)}: expected all, or numbers from 0 to {count - 1}"
        )
    return numbers


def plan_folds(cfg: Config, data: TrainData, numbers: Sequence[int]) -> tuple[Config, list[Fold]]:
    """Return the configuration with its warm-up, and the folds to train.

    A warm-up that is set and is longer than the training has a warning.

    Raises:
        ConfigError: The schedule is invalid, or a fold has less images than a batch.
        DataError: An image of a fold is missing.
    """
    folds, pixels = [], None
    if cfg.data.repeat_threshold and distributed.is_main():
        pixels = class_pixels(data.labelled, workers=cfg.data.workers)
    pixels = distributed.broadcast(pixels)
    for number in numbers:
        training = positions(data.labelled, data.split.training(number))
        repeats: tuple[float, ...] = ()
        if pixels is not None:
            repeats = repeat_factors(pixels[list(training)], cfg.data.repeat_threshold)
        order = TrainOrder(
            indices=training, epochs=cfg.train.epochs, batch_size=cfg.train.batch_size,
            accumulate=cfg.train.accumulate, seed=cfg.train.seed,
            extra=data.pseudo.extra if data.pseudo else (), extra_share=cfg.data.pseudo_weight,
            repeats=repeats,
        )  # fmt: skip
        validation = positions(data.validation, data.split.folds[number])
        folds.append(Fold(number, validation, order))
    steps = min(fold.order.steps for fold in folds)
    warmup = cfg.optim.warmup_steps
    if warmup is None:
        warmup = warmup_steps(steps)
        cfg = replace(cfg, optim=replace(cfg.optim, warmup_steps=warmup))
    for fold in folds:
        build_schedule(cfg.optim.schedule, total=fold.order.steps, warmup=warmup)
    if warmup and warmup >= steps and distributed.is_main():
        warnings.warn(
            f"optim.warmup_steps: is {warmup}, but there are {steps} steps, so the learning "
            "rate never reaches optim.lr; lower it, or train longer",
            stacklevel=2,
        )
    return cfg, folds


def check_data(run: Run, data: TrainData) -> dict[str, Any]:
    """Check that a resumed run has the data that it began with.

    Return the record of the data, by file name, if the run has none yet; else an empty dict.

    Raises:
        DataError: Classes, images or labels have changed.
    """
    names = {"train": data.split.training(0), "val": data.split.folds[0]}
    if data.validation is data.labelled:
        names = {"train": (*names["train"], *names["val"], *data.split.selection)}
    sources = {"train": data.labelled, "val": data.validation}
    parts: dict[str, tuple[Source, Sequence[int]]]
    parts = {part: (sources[part], positions(sources[part], names[part])) for part in names}
    if data.pseudo is not None:
        parts["pseudo"] = data.pseudo, data.pseudo.extra
    record = data_record(parts)
    if not run.exists or not (run.folder / "classes.json").exists():
        return {"data.json": record}
    known = run.read_or_default("data.json", None)
    before = known if known and known["format"] == record["format"] else {"images": {}}
    if changes := data_changes({**before, **run.read("classes.json")}, record):
        raise DataError(
            f"{run.folder}: the data changed since the run began ({'; '.join(changes)}); "
            "restore the data, or start a new run with another --run-dir"
        )
    return {} if before["images"] else {"data.json": record}


def check_memory(
    cfg: Config,
    source: Source,
    training: Sequence[int],
    device: torch.device,
    *,
    steps: int = 2,
    teacher: Callable[[Tensor], Tensor] | None = None,
) -> float:
    """Run training steps with a temporary model, so that too little memory fails at once.

    Only the second step includes the memory of the optimizer's state; averages of the weights are
    held too. Each micro-batch repeats the first training image. Return the seconds of the fastest
    step.
    """
    sample = TrainImages(source, training, build_pipeline(cfg), seed=cfg.train.seed)[0, training[0]]
    if isinstance(sample, DataError):
        raise sample
    share = cfg.train.batch_size // (cfg.train.accumulate * distributed.world_size())
    images, masks = (x.to(device).expand(share, *x.shape).contiguous() for x in sample[:2])
    with device:
        state, criterion = build_training(cfg, len(source.classes), device)
    if cfg.train.average:
        state.window = WindowMean(state.model, window=1, every=1, total=steps)
    net, parts = parallelize(state.model, cfg, device), min(2, cfg.train.accumulate)
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        train_step(
            net, criterion, state.optimizer, [(images, masks)] * parts,
            scaler=state.scaler, teacher=teacher, **step_options(cfg, device),
        )  # fmt: skip
        seconds.append(time.perf_counter() - start)
    del state, net, criterion
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return min(seconds)


def report_data(data: TrainData, run: Run, say: Callable[[str], None]) -> None:
    """Report what is read; report and log images left out, and pseudo labels."""
    say(f"data.train: {describe(data.labelled)}")
    if data.validation is not data.labelled:
        say(f"data.val: {describe(data.validation)}")
    report_faults((data.source, data.validation), run, say)
    if data.pseudo is not None and distributed.is_main():
        run.log(event="pseudo", round=data.pseudo.round, images=len(data.pseudo.extra))


def report_faults(sources: Sequence[Source], run: Run, say: Callable[[str], None]) -> None:
    """Report the faults of the data; log those that are not in the log yet.

    A faulty image is left out; a faulty object is ignored in its box.
    """
    logged = {event["sentence"] for event in run.events() if event["event"] == "fault"}
    names = {name for source in sources for name in source.names}
    for fault in dict.fromkeys(fault for source in sources for fault in source.faults):
        effect = "ignored in its box" if fault.file in names else "left out"
        say(f"{effect}: {fault.sentence}")
        if distributed.is_main() and fault.sentence not in logged:
            run.log(event="fault", file=fault.file, sentence=fault.sentence)
