"""Trained runs as inference needs them: configuration, images, checkpoints."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from segkit.augment.pipeline import build_pipeline
from segkit.core import checkpoint, config, distributed
from segkit.core.config import Config
from segkit.core.errors import SegkitError
from segkit.core.run import Run
from segkit.data import open_source
from segkit.data.folds import Split
from segkit.data.loader import TrainImages, TrainOrder, digests, train_batches
from segkit.data.source import Source, positions
from segkit.models.segmenter import build_model


@dataclass(frozen=True)
class Images:
    """Subset of a source, with the title of its score column.

    ``left_out`` collects the reason for skipping each unreadable image, by index; without it, the
    first such image raises an error.
    """

    title: str
    source: Source
    indices: list[int]
    left_out: dict[int, str] | None = None

    def rank_indices(self) -> list[int]:
        """Return the indices of this rank's images."""
        return self.indices[distributed.rank() :: distributed.world_size()]

    def digests(self) -> list[str]:
        """Return the digests of the image files."""
        return digests(self.source, self.indices)


class TrainedRun:
    """A run to predict with; ``overrides`` such as ``infer.tile=512`` replace its settings."""

    def __init__(self, run: Run, overrides: Sequence[str] = ()) -> None:
        self.run, self.overrides = run, overrides
        self._sources: dict[str, Source] = {}  # opening one may parse a large COCO file

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.run.folder

    @cached_property
    def config(self) -> Config:
        """The run's configuration with the overrides."""
        saved = config.parse(self.run.read("config.json"), str(self.folder))
        return config.override(saved, self.overrides)

    def source(self, part: str) -> Source:
        """Return a part of the run's data, such as ``"train"``; each is opened once."""
        if part not in self._sources:
            self._sources[part] = open_source(self.config, part)
        return self._sources[part]

    def labelled(self) -> list[Images]:
        """Return the images that have labels, which train, validate or choose, by part."""
        parts = [part for part in ("train", "val") if getattr(self.config.data, part) is not None]
        sources = {part: self.source(part) for part in parts}
        return [Images(part, source, [*range(len(source))]) for part, source in sources.items()]

    def best_checkpoints(self) -> list[Path]:
        """Return the best checkpoint of every fold that has one."""
        paths = [self.run.fold(number) / "best.pt" for number in self.run.folds()]
        if not paths:
            raise SegkitError(f"{self.folder}: has no best.pt in any fold yet; let it train on")
        return paths

    def initial_weights(self) -> dict[str, Tensor]:
        """Return the weights that every fold started from, made again from the configuration.

        All folds start from the same ones: ``train.seed`` and ``model.weights`` determine them. The
        digest in each checkpoint (``init``) proves it.
        """
        cfg, paths = self.config, self.best_checkpoints()
        model = build_model(
            cfg.model.backbone, cfg.model.decoder, weights=cfg.model.weights, seed=cfg.train.seed,
            num_classes=len(checkpoint.entries(paths[0])["classes"]),
        )  # fmt: skip
        made = checkpoint.digest_tensors(model.state_dict())
        for path in paths:
            if checkpoint.entries(path).get("init") != made:
                raise SegkitError(
                    f"{path}: did not start from the weights that its configuration makes here, "
                    "which are the anchor of a stock soup; use another kind of soup"
                )
        return model.state_dict()

    def selection(self) -> Images | None:
        """Return the run's selection set, or its fixed validation images."""
        split = Split.load(self.folder / "folds.json")
        has_val = bool(self.config.data.val)
        part, names = ("val", split.folds[0]) if has_val else ("train", split.selection)
        if not names:
            return None
        source = self.source(part)
        return Images("selection", source, positions(source, names))

    def training_batches(self, device: torch.device) -> Iterator[Tensor]:
        """Return batches of augmented training images, ``infer.batch_norm_images`` in all."""
        cfg = self.config
        source = self.source("train")
        split = Split.load(self.folder / "folds.json")
        names = {name for fold in range(len(split.folds)) for name in split.training(fold)}
        indices = positions(source, sorted(names))
        images = TrainImages(source, indices, build_pipeline(cfg), seed=cfg.train.seed)
        size = cfg.train.batch_size
        order = TrainOrder(indices, epochs=1, batch_size=size, accumulate=1, seed=cfg.train.seed)
        batches = train_batches(images, order, workers=cfg.data.workers, device=device)
        count = max(1, cfg.infer.batch_norm_images // size)
        shown = distributed.Progress(islice(batches, count), "BatchNorm", total=count, unit="batch")
        return (image for image, _ in shown)


def common_selection(runs: Sequence[TrainedRun]) -> Images | None:
    """Return the images that every run held out, ``None`` if there are none."""
    first, *others = [run.selection() for run in runs]
    if first is None:
        return None
    common = set(first.digests())
    for images in others:
        common.intersection_update(images.digests() if images else ())
    pairs = zip(first.indices, first.digests(), strict=True)
    indices = [index for index, digest in pairs if digest in common]
    return replace(first, indices=indices) if indices else None
