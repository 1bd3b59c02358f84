"""Train a run: for each fold a model, its training steps and its evaluations.

python train.py --cfg demo
torchrun --nproc-per-node 4 train.py --cfg swin.json --folds 0
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from segkit.augment.pipeline import build_pipeline
from segkit.commands import console, reference
from segkit.core import backend, checkpoint, config, distributed
from segkit.core.background import Background, HostCopy
from segkit.core.config import Config
from segkit.core.errors import ConfigError, DataError, SegkitError, shorten
from segkit.core.run import Run, new_folder, runs
from segkit.data import SOURCES, open_source
from segkit.data.folds import Split
from segkit.data.loader import EvalBatches, TrainImages, TrainOrder, digests, train_batches
from segkit.data.memo import MEMO
from segkit.data.pseudo_labelled import PseudoLabelled
from segkit.data.source import Source, positions
from segkit.inference.predictor import Predictor
from segkit.inference.tta import parse_views
from segkit.models.segmenter import build_model, check_weights
from segkit.report import Gallery, class_table, record, score_table, write_run_page
from segkit.training import tracking
from segkit.training.build import (
    build_training,
    dropout_seeds,
    per_part,
    step_options,
    train_order,
    wrap,
)
from segkit.training.evaluate import evaluate
from segkit.training.losses import Criterion, build_loss
from segkit.training.metrics import bootstrap_interval, scores
from segkit.training.optim import build_optimizer, build_schedule, set_lr
from segkit.training.preparation import add_pseudo, check_data, check_folds, check_memory, divide
from segkit.training.state import TrainState
from segkit.training.step import Step, train_step

MEMORY_TO_BEGIN = (
    "set train.recompute=on or the backbone's checkpointing=true, raise train.accumulate, or lower "
    "train.batch_size or the crop (augment.size)"
)
MEMORY_TO_TRAIN = (
    f"{MEMORY_TO_BEGIN}, in a new run; to resume this run with the same settings, use "
    "--run-dir {run} --resume"
)
MEMORY_TO_EVALUATE = (
    "in an evaluation; lower infer.batch_size and go on with --run-dir {run} --resume, or set "
    "infer.tile in a new run"
)
"""Advice if the device runs out of memory."""

TELL_MEMORY = ("cuda",)
"""Devices that raise an error when memory runs out; on the CPU, the system kills the process."""


def main(argv: Sequence[str]) -> None:
    """Train the folds given on the command line."""
    args = parse_arguments(argv)
    cfg = config.load(args.cfg, args.set)
    check(cfg)
    lost = console.end_without_peer
    backend.set_deterministic(cfg.train.deterministic)
    with distributed.session(args.device, cfg.train.timeout, on_lost=lost) as device:
        say = console.printer(quiet=args.quiet, verbose=args.verbose)
        run, resume = find_run(args, cfg)

        # ---- checks before the folder is created
        with MEMO.kept_in(Path(cfg.data.cache)):
            train_source = open_source(cfg, "train")
            val_source = open_source(cfg, "val") if cfg.data.val else train_source
            split, files = divide(cfg, train_source, val_source, run, say)
            pseudo = add_pseudo(cfg, train_source, val_source, split, say)
            if distributed.is_main():
                files |= check_data(run, split, train_source, val_source, pseudo)
        folds = chosen_folds(args.folds, len(split.folds))
        check_folds(cfg, folds, split, train_source, val_source, pseudo)
        if device.type in TELL_MEMORY and not distributed.broadcast(run.exists):
            training = positions(train_source, split.training(folds[0]))
            with console.memory_advice(MEMORY_TO_BEGIN):
                check_memory(cfg, train_source, training, device)
        if distributed.is_main():
            run.begin(config.to_dict(cfg), files)
        distributed.barrier()

        if cfg.model.weights is None:
            say("model.weights is null: the model starts from random weights")
        before = run.optional("summary.json", {})
        summary = {}
        follow = tracking.following(run, cfg.track.trackers)
        with (
            run.recording(),
            follow as trackers,
            console.Stop() as stop,
            Background() as background,
        ):
            tell_faults((pseudo or train_source, val_source), run, say)
            if pseudo is not None and distributed.is_main():
                run.log(event="pseudo", round=pseudo.round, images=len(pseudo.extra))
            sources = train_source, val_source, pseudo
            job = Job(cfg, run, split, *sources, device, resume, stop, say, trackers, background)
            for fold in folds:
                with console.memory_advice(MEMORY_TO_TRAIN.format(run=run.folder)):
                    summary[f"fold{fold}"] = train_fold(job, fold)
                if job.stop.signal:
                    say(f"stopped by {job.stop.name}; go on with: --run-dir {run.folder} --resume")
                    sys.exit(130 if job.stop.signal == signal.SIGINT else 0)
            if distributed.is_main():
                run.write("summary.json", {**before, **summary})
                say(score_table(write_run_page(run)))
        say(
            f"done: {run.folder}; predict with: python infer.py --run-dir {run.folder}; train on "
            f"with: --run-dir {run.folder} --resume --set train.epochs={2 * cfg.train.epochs}"
        )


@dataclass(frozen=True)
class Job:
    """Everything that the folds of a run share."""

    cfg: Config
    run: Run
    split: Split
    train_source: Source
    val_source: Source
    pseudo: PseudoLabelled | None
    device: torch.device
    resume: bool
    stop: console.Stop
    say: Callable[[str], None]
    trackers: tracking.Followers
    background: Background
    host: HostCopy = field(default_factory=HostCopy)


def train_fold(job: Job, fold: int) -> dict[str, Any]:
    """Train a fold from its first step, or from its saved state, to its last step."""
    cfg, run, device, say = job.cfg, job.run, job.device, job.say
    folder, source = run.fold(fold), job.train_source
    training = positions(source, job.split.training(fold))
    validation = positions(job.val_source, job.split.folds[fold])
    if job.pseudo is not None:
        source = job.pseudo
    extra = job.pseudo.extra if job.pseudo else ()
    folder.mkdir(exist_ok=True)

    # ---- model, optimizer and saved state
    state, criterion, saved = begin_training(job, fold, len(source.classes))
    order = train_order(cfg, training, extra, start_step=state.step)
    if saved is not None:
        say(going_on(fold, state.step, order, saved["config"]["train"]["epochs"]))
    log = StepLog(run, fold, cfg.train.batch_size)
    if distributed.is_main():
        log.begin(state, order, resume=job.resume, saved=saved is not None, validation=validation)
    about = {
        "config": config.to_dict(cfg),
        "classes": list(source.classes),
        "fold": fold,
        "trained_on": digests(source, [*training, *extra]) if distributed.is_main() else [],
        "pseudo_round": job.pseudo.round if job.pseudo else 0,
    }

    # ---- steps
    images = TrainImages(
        source, [*training, *extra], build_pipeline(cfg),
        seed=cfg.train.seed, render=cfg.augment.device == "cpu",
    )  # fmt: skip
    batches = train_batches(images, order, workers=cfg.data.workers, device=device)
    schedule = build_schedule(cfg.optim.schedule, total=order.steps, warmup=cfg.optim.warmup_steps)
    options = step_options(cfg, device)
    net = wrap(state.model, cfg, device)
    predict = validator(state, cfg, options["amp"])
    val_batches = validation_batches(cfg, job.val_source, validation, device)
    progress = distributed.Progress(
        None, f"fold {fold}", total=order.steps * cfg.train.batch_size,
        initial=state.step * cfg.train.batch_size, unit="image", parts=cfg.train.epochs, delay=0,
    )  # fmt: skip
    started = time.perf_counter() - state.seconds
    shapes: list[torch.Size] = []
    clock = Clock()
    log.restart(state.step)
    net.train()
    while state.step < order.steps and not job.stop.signal:
        with clock.measure("loading"):
            parts = list(islice(batches, cfg.train.accumulate))
        factor = schedule(state.step)
        set_lr(state.optimizer, factor)
        shapes, last_shapes = [pixels.shape for pixels, _ in parts], shapes
        with backend.cudnn_autotuning(shapes == last_shapes):
            result = train_step(
                net, criterion, state.optimizer, parts,
                scaler=state.scaler, seeds=dropout_seeds(cfg, state.step), **options,
            )  # fmt: skip
        state.advance(result.finite)
        clock.start()
        epoch, into_epoch = divmod(state.step, order.steps_per_epoch)
        lr = cfg.optim.lr * factor
        progress.update(cfg.train.batch_size, partial(note, state.step, order, result.loss, lr))
        if not result.finite:
            names = [source.names[index] for _, index in order.batch(state.step - 1)]
            log.bad_step(state, names, limit=cfg.train.max_bad_steps)
        if state.step % cfg.train.log_every == 0 or not into_epoch:
            log.step(state.step, epoch, result, lr)

        # ---- evaluations and checkpoints
        last_step = state.step == order.steps
        evaluated: Evaluated | None = None
        if last_step or (not into_epoch and epoch % cfg.train.evaluate_every == 0):
            with clock.measure("evaluation"):
                evaluated = evaluate_fold(job, fold, epoch, state, predict, val_batches)
            net.train()
            log.restart(state.step)
        due = cfg.train.save_every and state.step % cfg.train.save_every == 0
        if job.stop.asked(device) or due or not into_epoch or last_step:
            state.seconds = time.perf_counter() - started
            if distributed.is_main():
                with clock.measure("saving"):
                    save_fold(job, fold, state, about, evaluated)
        job.background.check()
    with clock.measure("saving"):
        job.background.wait()
    progress.close()
    best_score, best_epoch = state.top[0] if state.top else (None, None)
    return {
        "miou": best_score,
        "epoch": best_epoch,
        "steps": state.step,
        "bad_steps": state.bad_steps,
        "seconds": round(time.perf_counter() - started, 1),
        "shares": clock.shares(),
    }


def begin_training(
    job: Job, fold: int, num_classes: int
) -> tuple[TrainState, Criterion, dict[str, Any] | None]:
    """Build a fold's training and load its saved state, if the run is resumed and has one.

    Returns:
        The training's state, its loss, and the entries of ``last.pt`` or ``None``.
    """
    cfg, saved = job.cfg, job.run.last(fold) if job.resume else None
    state, criterion = build_training(
        cfg, num_classes, job.device,
        weights=cfg.model.weights if saved is None else None, initialize=saved is None,
    )  # fmt: skip
    if state.model.report is not None:
        job.say(state.model.report.summary())
    if saved is not None:
        state.load_state_dict(saved, job.run.fold(fold) / "last.pt")
    elif distributed.is_main():
        state.init = checkpoint.digest_tensors(state.model.state_dict())
    if terms := per_part(criterion, cfg) if cfg.train.accumulate > 1 else []:
        job.say(
            f"train.accumulate={cfg.train.accumulate}: {', '.join(terms)}: the mean over the "
            "parts, not the loss of the whole batch (see docs/training.md)"
        )
    return state, criterion, saved


def validator(state: TrainState, cfg: Config, amp: torch.dtype | None) -> Predictor:
    """Return the predictor for evaluations."""
    return Predictor(
        state.averaged,
        mean=cfg.data.mean,
        std=cfg.data.std,
        size=cfg.infer.size,
        tile=cfg.infer.tile,
        overlap=cfg.infer.overlap,
        pad=cfg.infer.pad,
        amp=amp,
        channels_last=cfg.train.channels_last,
        graphs=False,  # they would hold memory that steps need
    )


def validation_batches(
    cfg: Config, source: Source, validation: Sequence[int], device: torch.device
) -> EvalBatches:
    """Return the batches of evaluations; images are padded as the predictor pads them."""
    whole = cfg.infer.size is None and cfg.infer.tile is None
    return EvalBatches(
        source,
        validation,
        labels=True,
        batch_size=cfg.infer.batch_size,
        workers=cfg.data.workers,
        pad=cfg.infer.pad or 1 if whole else 1,
        pin=device.type == "cuda",
    )


@dataclass(frozen=True)
class Evaluated:
    """An evaluation that is to be saved and drawn.

    Args:
        entries: Entries of the model's checkpoint: ``epoch``, ``step``, ``score``, ``iou``.
        ranked: (score, epoch) of the best checkpoints and of this one, from best to worst.
        draw: Functions that write the pictures and the page.
    """

    entries: dict[str, Any]
    ranked: list[tuple[float, int]]
    draw: Sequence[Callable[[], object]]


def evaluate_fold(
    job: Job,
    fold: int,
    epoch: int,
    state: TrainState,
    predict: Predictor,
    batches: EvalBatches,
) -> Evaluated:
    """Evaluate and log the scores.

    Args:
        job: Everything that the folds share.
        fold: Number of the fold.
        epoch: Number of epochs done.
        state: Training state; the score is added to its ``top``.
        predict: Predictor with the model to evaluate.
        batches: The images to evaluate on.
    """
    cfg, run, source = job.cfg, job.run, job.val_source
    predict.model.eval()
    distributed.share_buffers(predict.model)
    gallery = Gallery(source, batches.indices, size=cfg.track.images)
    with console.memory_advice(MEMORY_TO_EVALUATE.format(run=run.folder)):
        evaluation = evaluate(predict.mask, batches, device=job.device, callback=gallery.add)
    result = scores(evaluation.matrix)
    if result.miou is None:
        raise DataError(f"fold {fold}: no validation image has a labelled pixel")
    ranked = rank_best([*state.top, (result.miou, epoch)])
    if distributed.is_main():
        run.log(
            event="evaluate", fold=fold, epoch=epoch, step=state.step, **result.to_dict(),
            interval=bootstrap_interval(evaluation.counts),
        )  # fmt: skip
    draw: list[Callable[[], object]] = [partial(write_run_page, run)]
    gallery.gather()
    if ranked[0][1] == epoch and distributed.is_main():
        show = partial(record, run, fold, state.step, evaluation, gallery)
        if job.trackers.show_pictures:
            job.trackers.pictures(state.step, show())
        else:
            draw.insert(0, show)
    state.top = ranked[: cfg.train.keep]
    job.say(f"fold {fold} epoch {epoch}: mIoU {result.miou:.4f} (best {ranked[0][0]:.4f})")
    if console.is_verbose():
        job.say(class_table(source.classes, result.iou))
    entries = {"epoch": epoch, "step": state.step, "score": result.miou, "iou": list(result.iou)}
    return Evaluated(entries, ranked, draw)


def save_fold(
    job: Job, fold: int, state: TrainState, about: dict[str, Any], evaluated: Evaluated | None
) -> None:
    """Save the state, and the evaluated model if it is among the best, while training goes on.

    Args:
        job: Everything that the folds share.
        fold: Number of the fold.
        state: Training state.
        about: Entries of a checkpoint other than the state.
        evaluated: Evaluation after this step, if there was one.
    """
    folder, keep = job.run.fold(fold), job.cfg.train.keep
    job.background.wait()  # its job reads the copy that is overwritten now
    copied = job.host.take(state.state_dict())

    def write() -> None:
        saved = copied()
        if evaluated is not None:
            best = {**about, "init": saved["init"], "model": checkpoint.weights(saved)}
            keep_best(folder, {**best, **evaluated.entries}, evaluated.ranked, keep)
        checkpoint.save({**about, **saved}, folder / "last.pt", keep_previous=True)
        for draw in evaluated.draw if evaluated is not None else ():
            draw()

    job.background.start(write)


class Clock:
    """Measures how the wall time after the first step is spent."""

    def __init__(self) -> None:
        self._start: float | None = None
        self._seconds = {"loading": 0.0, "evaluation": 0.0, "saving": 0.0}

    def start(self) -> None:
        """Start, unless it has started already."""
        if self._start is None:
            self._start = time.perf_counter()

    @contextmanager
    def measure(self, activity: str) -> Iterator[None]:
        """Add the time of the block to an activity."""
        before = time.perf_counter()
        yield
        if self._start is not None:
            self._seconds[activity] += time.perf_counter() - before

    def shares(self) -> dict[str, float]:
        """Return the share of each activity and of the steps, which are all that is not measured.

        ``loading`` is the time that steps wait for data.
        """
        if self._start is None:
            return {}
        total = time.perf_counter() - self._start
        shares = {name: round(seconds / total, 4) for name, seconds in self._seconds.items()}
        return {"steps": round(1 - sum(shares.values()), 4), **shares}


class StepLog:
    """Log of a fold's steps on rank 0; rates exclude the time of evaluations."""

    def __init__(self, run: Run, fold: int, batch_size: int) -> None:
        self.run, self.fold, self.batch_size = run, fold, batch_size
        self.restart(0)

    def begin(
        self,
        state: TrainState,
        order: TrainOrder,
        *,
        resume: bool,
        saved: bool,
        validation: Sequence[int],
    ) -> None:
        """Log that the fold starts or resumes; remove later events of an interrupted run.

        Args:
            state: Training state of the fold.
            order: Order of its training images.
            resume: True if the run is resumed.
            saved: True if the fold resumes from a saved state.
            validation: Indices of its validation images.
        """
        if resume:
            self.run.rewind(self.fold, state.step if saved else -1)
        if state.step < order.steps:
            self.run.reopen(self.fold)
        self.run.log(
            event="resume" if saved else "start", fold=self.fold, step=state.step,
            steps_per_epoch=order.steps_per_epoch,
            parameters=sum(parameter.numel() for parameter in state.model.parameters()),
            images=len(order.indices), validation=len(validation),
        )  # fmt: skip

    def restart(self, step: int) -> None:
        """Restart the measurement of the rate."""
        self._since, self._since_step = time.perf_counter(), step

    def step(self, step: int, epoch: int, result: Step, lr: float) -> None:
        """Log a step's loss and the rate since the last logged step."""
        if not distributed.is_main():
            return
        seconds = time.perf_counter() - self._since
        rate = (step - self._since_step) * self.batch_size / seconds
        self.restart(step)
        self.run.log(
            event="step", fold=self.fold, epoch=epoch, step=step,
            loss=round(float(result.loss), 6),
            parts={name: round(float(part), 6) for name, part in result.parts.items()},
            lr=lr, gradient_norm=float(result.gradient_norm), images_per_s=round(rate, 2),
        )  # fmt: skip

    def bad_step(self, state: TrainState, names: Sequence[str], *, limit: int) -> None:
        """Log a step with a non-finite gradient; ``limit`` of them in a row end the run."""
        if distributed.is_main():
            self.run.log(event="non-finite", fold=self.fold, step=state.step, images=names)
        if state.bad_in_row >= limit:
            raise SegkitError(
                f"fold {self.fold}: loss or gradient was not finite in {state.bad_in_row} steps in "
                f"a row, the last on {', '.join(names[:4])}; lower optim.lr, or set optim.clip_norm"
            )


def note(step: int, order: TrainOrder, loss: Tensor, lr: float) -> str:
    """Return the text about a step for the progress bar or line."""
    epochs = f"epoch {step / order.steps_per_epoch:.3g} of {order.epochs}"
    return f"{epochs}, loss {float(loss):.4g}, lr {lr:.3g}"


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = reference.parser("train", "Train the folds of a configuration.")
    console.add_config_options(parser)
    parser.add_argument("--folds", default="all", help="all, or numbers such as 0 or 0,2")
    parser.add_argument("--run-dir", type=Path, help="folder of the run; default runs/NAME-TIME")
    parser.add_argument(
        "--resume", action="store_true", help="resume --run-dir, or the newest run of NAME"
    )
    console.add_run_options(parser)
    return parser.parse_args(argv)


def check(cfg: Config) -> None:
    """Build every component once, without data or memory, so that errors are reported early."""
    if cfg.data.train is None:
        raise ConfigError("data.train: is missing; expected the labelled images to train on")
    for part in ("train", "val", "test", "test_labels", "pseudo"):
        if (spec := getattr(cfg.data, part)) is not None:
            config.bind(SOURCES, spec, f"data.{part}")
    build_pipeline(cfg)
    with torch.device("meta"):
        model = build_model(cfg.model.backbone, cfg.model.decoder, num_classes=2)
    if cfg.model.weights is not None and os.environ.get("LOCAL_RANK", "0") == "0":
        check_weights(model, cfg.model.backbone, cfg.model.weights)
    build_optimizer(model, cfg.optim.optimizer, lr=cfg.optim.lr)
    build_schedule(cfg.optim.schedule, total=100, warmup=min(99, cfg.optim.warmup_steps))
    build_loss(cfg.loss.terms, aux_weight=cfg.loss.aux_weight, num_classes=None)
    parse_views(cfg.infer.tta)
    tracking.check(cfg.track.trackers)


def find_run(args: argparse.Namespace, cfg: Config) -> tuple[Run, bool]:
    """Return the run, whose folder may not exist yet, and whether to resume it.

    With several ranks, only rank 0's run holds the lock of the folder.
    """
    run, resume = None, False
    if distributed.is_main():
        name = Path(args.cfg).stem
        candidates = [Run(args.run_dir)] if args.run_dir else runs(name)
        interrupted = bool(candidates) and candidates[0].interrupted_here()
        resume = args.resume or interrupted
        if not args.run_dir and not interrupted:
            candidates = [run for run in candidates if args.resume and run.resumable()]
        run = candidates[0] if candidates else Run(new_folder(name))
        with console.naming_options(resume="--resume"):
            run.check(config.to_dict(cfg), resume=resume)
    folder, resume = distributed.broadcast((run and run.folder, resume))
    return run or Run(folder), resume


def tell_faults(sources: Sequence[Source], run: Run, say: Callable[[str], None]) -> None:
    """Report the faults that were left out of the data; log those that are not in the log yet."""
    logged = {event["sentence"] for event in run.events() if event["event"] == "fault"}
    for fault in dict.fromkeys(fault for source in sources for fault in source.faults):
        say(f"left out: {fault.sentence}")
        if distributed.is_main() and fault.sentence not in logged:
            run.log(event="fault", file=fault.file, sentence=fault.sentence)


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


def going_on(fold: int, step: int, order: TrainOrder, epochs: int) -> str:
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


if __name__ == "__main__":
    console.run(main)
