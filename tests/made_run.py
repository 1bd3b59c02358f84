"""A run folder as training writes it, made in less than a second."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from segkit.core import config
from segkit.core.run import Run
from segkit.report import Gallery, record, write_run_page
from segkit.training.evaluate import Evaluation, count
from segkit.training.metrics import bootstrap_interval, scores

NASTY = "<img src=x onerror=\"fail()\"> & 'can'"
CLASSES = ("background", NASTY, "bag", "paper")


def begin_run(folder: Path, config: Mapping[str, Any], *, resume: bool = False) -> Run:
    """Create a run folder, or with ``resume`` continue in it."""
    run = Run(folder)
    run.check(config, resume=resume)
    run.begin(config)
    return run


class Drawn:
    """A source of computed images: a gradient, with a block of one class in each mask."""

    classes = CLASSES
    labelled = True
    faults = ()

    def __init__(self, count: int, size: tuple[int, int] = (60, 80)) -> None:
        self.names = tuple(f"{n:03d}{NASTY if n == 0 else ''}.jpg" for n in range(count))
        self._size = size

    def __len__(self) -> int:
        return len(self.names)

    def size(self, i: int) -> tuple[int, int]:
        return self._size

    def image(self, i: int) -> Tensor:
        height, width = self._size
        rows, columns = torch.arange(height)[:, None], torch.arange(width)[None]
        planes = [rows + 0 * columns, columns + 0 * rows, (rows + columns + 9 * i) % 200]
        return torch.stack(planes).to(torch.uint8)

    def mask(self, i: int) -> Tensor:
        height, width = self._size
        mask = torch.zeros(self._size, dtype=torch.uint8)
        mask[height // 4 : height // 2, width // 4 : width // 2] = 1 + i % 3
        mask[0] = 255
        return mask

    def guess(self, i: int) -> Tensor:
        """A prediction that is worse for larger ``i``."""
        return self.mask(i).roll(i, 1).clamp(max=3)


def evaluated(source: Drawn, indices: list[int], *, size: int) -> tuple[Evaluation, Gallery]:
    gallery = Gallery(source, indices, size=size)
    masks = ((i, source.guess(i), source.mask(i)) for i in indices)
    cpu = torch.device("cpu")
    return count(masks, source, indices, device=cpu, callbacks=[gallery.add]), gallery


def made_run(
    folder: Path, *, folds: int = 2, steps: int = 40, images: int = 12, **settings: object
) -> Run:
    """A run with curves, evaluations, pictures and scores; ``settings`` as ``--set`` takes them."""
    overrides = [f"{key.replace('__', '.')}={value}" for key, value in settings.items()]
    cfg = config.override(config.Config(note="<i>a note</i>"), overrides)
    run = begin_run(folder, config.to_dict(cfg))
    run.write("classes.json", {"classes": CLASSES, "category_ids": None})
    parts = [f"fold {n}" for n in range(folds)]
    run.write(
        "shares.json",
        [
            {"title": title, "images": 9, "with_class": [1, 0.5, 0, 0], "of_pixels": [1, 0, 0, 0]}
            for title in parts
        ],
    )  # fmt: skip
    rng, source, summary = np.random.default_rng(0), Drawn(images * folds), {}
    for fold in range(folds):
        run.fold(fold).mkdir()
        run.log(event="start", fold=fold, step=0, parameters=1234567, images=20, validation=images)
        for step in range(1, steps + 1):
            run.log(
                event="step", fold=fold, epoch=step // 20, step=step,
                loss=float(2 / step + rng.random()), parts={"cross_entropy": 1.0},
                lr=1e-4 * step, gradient_norm=1.0, images_per_s=50 + step,
            )  # fmt: skip
            if step % 20 == 0:
                indices = list(range(fold * images, (fold + 1) * images))
                evaluation, gallery = evaluated(source, indices, size=8)
                result = scores(evaluation.matrix).to_dict()
                result["miou"] += step / 1000
                run.log(
                    event="evaluate", fold=fold, epoch=step // 20, step=step, **result,
                    interval=bootstrap_interval(evaluation.counts),
                )  # fmt: skip
                list(record(run, fold, step, evaluation, gallery))
        summary[f"fold{fold}"] = {"seconds": 60.0, "miou": 0.5, "epoch": 2, "steps": steps}
    run.log(event="fault", file=NASTY, sentence=f"{NASTY} is empty")
    run.write("summary.json", summary)
    (folder / "infer").mkdir()
    row = {"miou": 0.5, "interval": [0.4, 0.6], "per_class": [0.5] * 4, "images": 9}
    rows = [{"name": name, "views": [], "test": row} for name in ("fold0", f"vote {NASTY}")]
    run.write("infer/scores.json", rows)
    write_run_page(run)
    return run
