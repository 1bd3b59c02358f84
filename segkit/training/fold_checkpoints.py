"""Checkpoints of a fold: resumed from, and saved while training goes on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from segkit.core import checkpoint, config, distributed
from segkit.core.background import Background, HostCopy
from segkit.core.config import Config
from segkit.core.errors import SegkitError
from segkit.core.run import Run
from segkit.data.loader import TrainOrder, digests
from segkit.training.build import build_training, losses_per_micro_batch
from segkit.training.losses import Criterion
from segkit.training.optim import WindowMean
from segkit.training.preparation import Fold, TrainData
from segkit.training.state import TrainState


def begin_training(
    cfg: Config,
    run: Run,
    fold: Fold,
    num_classes: int,
    device: torch.device,
    say: Callable[[str], None],
    *,
    resume: bool,
    teacher: Sequence[str] = (),
) -> tuple[TrainState, Criterion, bool]:
    """Build a fold's training and load its saved state, if the run is resumed and has one.

    ``teacher`` has the digests of the teacher's checkpoints. Return the training's state, its loss,
    and whether the state was loaded.
    """
    saved = run.load_last_state(fold.number) if resume else None
    weights = cfg.model.weights if saved is None else None
    state, criterion = build_training(
        cfg, num_classes, device, weights=weights, initialize=saved is None
    )
    if state.model.report is not None:
        say(state.model.report.summary())
    if cfg.train.average:
        total, every = fold.order.steps, fold.order.steps_per_epoch * cfg.train.evaluate_every
        window = max(1, round(cfg.train.average * total))
        state.window = WindowMean(state.model, window=window, every=every, total=total)
    if saved is not None:
        path = run.fold(fold.number) / "last.pt"
        state.load_state_dict(saved, path)
        if saved.get("teacher", []) != list(teacher):
            raise SegkitError(
                f"data.teacher: has other checkpoints than {path} began with; restore them, or "
                "start a new run with another --run-dir"
            )
        epochs = saved["config"]["train"]["epochs"]
        say(resumed_message(fold.number, state.step, fold.order, epochs))
    elif distributed.is_main():
        state.init = checkpoint.digest_tensors(checkpoint.merged(state.model.state_dict()))
    if terms := losses_per_micro_batch(criterion, cfg) if cfg.train.accumulate > 1 else []:
        say(
            f"train.accumulate={cfg.train.accumulate}: {', '.join(terms)}: the mean over the "
            "micro-batches, not the loss of the whole batch (see docs/training.md)"
        )
    return state, criterion, saved is not None


def resumed_message(fold: int, step: int, order: TrainOrder, epochs: int) -> str:
    """Return a sentence about a resumed fold; ``epochs`` is its earlier ``train.epochs``."""
    if step == order.steps:
        return (
            f"fold {fold}: all {order.epochs} epochs are done; "
            f"to go on, add --set train.epochs={2 * order.epochs}"
        )
    sentence = f"fold {fold}: going on after step {step}"
    if order.epochs != epochs:
        sentence += (
            f"; train.epochs is {order.epochs} now and was {epochs}, "
            f"so the learning rate follows the schedule of {order.epochs} epochs from here"
        )
    return sentence


def checkpoint_entries(cfg: Config, data: TrainData, fold: Fold) -> dict[str, Any]:
    """Return the entries of a fold's checkpoints that do not change."""
    trained_on = [*fold.order.indices, *fold.order.extra]
    return {
        "config": config.to_dict(cfg),
        "classes": list(data.source.classes),
        "fold": fold.number,
        "trained_on": digests(data.source, trained_on) if distributed.is_main() else [],
        "pseudo_round": data.pseudo.round if data.pseudo else 0,
    }


@dataclass(frozen=True)
class Evaluated:
    """An evaluation that is to be saved and drawn.

    Args:
        entries: Entries of the model's checkpoint: ``epoch``, ``step``, ``score``, ``iou``, and
            ``average``, whose weights they are.
        ranked: (score, epoch) of the best checkpoints and of this one, from best to worst.
        draw: Functions that write the pictures and the page.
    """

    entries: dict[str, Any]
    ranked: list[tuple[float, int]]
    draw: Sequence[Callable[[], object]]


@dataclass(frozen=True)
class Saver:
    """Saves the last and the ``keep`` best checkpoints of folds on rank 0, in the background."""

    background: Background
    keep: int
    host: HostCopy = field(default_factory=HostCopy)

    def reserve(self, state: TrainState) -> None:
        """Allocate the memory for copies of the state, in the background."""
        if distributed.is_main():
            self.background.start(partial(self.host.reserve, state.state_dict()))

    def save(
        self, folder: Path, state: TrainState, entries: dict[str, Any], evaluated: Evaluated | None
    ) -> None:
        """Save the state, and the ``evaluated`` model if it is among the best.

        ``entries`` are those of the checkpoints other than the state.
        """
        if not distributed.is_main():
            return
        self.background.wait()  # its job reads the copy that is overwritten now
        copied = self.host.take(state.state_dict())

        def write() -> None:
            saved = copied()
            if evaluated is not None:
                weights = checkpoint.weights(saved, evaluated.entries["average"])
                best = {**entries, "init": saved["init"], "model": weights}
                keep_best(folder, {**best, **evaluated.entries}, evaluated.ranked, self.keep)
            checkpoint.save({**entries, **saved}, folder / "last.pt", keep_previous=True)
            for draw in evaluated.draw if evaluated is not None else ():
                draw()

        self.background.start(write)


def rank_best(scored: list[tuple[float, int]]) -> list[tuple[float, int]]:
    """Sort pairs (score, epoch) from best to worst; of equal scores the earlier epoch is first."""
    return sorted(scored, key=lambda pair: (-pair[0], pair[1]))


def keep_best(
    folder: Path, state: dict[str, Any], ranked: list[tuple[float, int]], keep: int
) -> None:
    """Save a checkpoint if its epoch is among the ``keep`` best, and delete those of other epochs.

    ``best.pt`` is a link to the best epoch's file.
    """
    epoch = state["epoch"]
    if epoch in [best_epoch for _, best_epoch in ranked[:keep]]:
        checkpoint.save(state, epoch_file(folder, epoch))
        if ranked[0][1] == epoch:
            checkpoint.link(epoch_file(folder, epoch), folder / "best.pt")
    for _, dropped_epoch in ranked[keep:]:
        path = epoch_file(folder, dropped_epoch)
        if path.is_file() and checkpoint.stored_digest(path):  # segkit wrote it
            path.unlink()


def epoch_file(folder: Path, epoch: int) -> Path:
    """Return the path of an epoch's checkpoint."""
    return folder / f"epoch{epoch:04d}.pt"
