"""Train a run: for each fold a model, its training steps and its evaluations.

python train.py --cfg demo
torchrun --nproc-per-node 4 train.py --cfg swin.json --folds 0
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

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
from segkit.data.doubts import describe
from segkit.data.loader import EvalBatches, TrainImages, TrainOrder, digests, train_batches
from segkit.data.memo import MEMO
from segkit.data.source import Source
from segkit.inference.model_file import build_predictor
from segkit.inference.predictor import Predictor
from segkit.inference.teacher import Teacher, open_teacher, teacher_checkpoints
from segkit.inference.tta import parse_views
from segkit.models.pretrained.published import obtain
from segkit.models.segmenter import build_model, check_weights
from segkit.report import Gallery, class_table, record, score_table, write_run_page
from segkit.training import tracking
from segkit.training.build import (
    build_training,
    dropout_seeds,
    losses_per_micro_batch,
    parallelize,
    step_options,
)
from segkit.training.defaults import as_recorded, set_rates, settle
from segkit.training.details import DetailCounter
from segkit.training.evaluate import Evaluation, evaluate
from segkit.training.fold_log import Clock, FoldLog
from segkit.training.losses import Criterion
from segkit.training.metrics import Scores, bootstrap_interval, scores
from segkit.training.optim import WindowMean, build_schedule, set_lr
from segkit.training.preparation import (
    Fold,
    TrainData,
    check_data,
    check_memory,
    plan_folds,
    split_data,
    with_pseudo,
)
from segkit.training.state import TrainState
from segkit.training.step import train_step

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

CHECKED_FOR_MEMORY = ("cuda",)
"""Devices that raise an error when memory runs out; on the CPU, the system kills the process."""


def main(argv: Sequence[str]) -> None:
    """Train the folds given on the command line."""
    args = parse_arguments(argv)
    cfg = config.load(args.cfg, args.set)
    check_components(cfg)
    backend.set_deterministic(cfg.train.deterministic)
    lost = console.end_without_peer
    with distributed.session(args.device, cfg.train.timeout, on_lost=lost) as device:
        say = console.printer(quiet=args.quiet, verbose=args.verbose)
        cfg, run, resume = find_run(args, cfg)
        cfg, data, folds, teacher = prepare(args, cfg, run, device, say)
        before = run.read_or_default("summary.json", {})
        summary = {}
        with (
            run.recording(),
            tracking.open_trackers(run, cfg.track.trackers) as trackers,
            console.Stop() as stop,
            Background() as background,
        ):
            job = Job(cfg, run, data, teacher, device, resume, stop, say, trackers, background)
            log_data(job)
            for fold in folds:
                with console.memory_advice(MEMORY_TO_TRAIN.format(run=run.folder)):
                    summary[f"fold{fold.number}"] = train_fold(job, fold)
                if stop.signal:
                    say(f"stopped by {stop.name}; go on with: --run-dir {run.folder} --resume")
                    sys.exit(130 if stop.signal == signal.SIGINT else 0)
            if distributed.is_main():
                run.write("summary.json", {**before, **summary})
                say(score_table(write_run_page(run)))
        say(f"done: {run.folder}, shown by {run.folder / 'report.html'}")
        say(next_commands(cfg, run))


def next_commands(cfg: Config, run: Run) -> str:
    """Return the commands that a user may want after a training, one per line."""
    infer = f"segkit infer --run-dir {run.folder}"
    lines = [f"{infer} --images PHOTO.jpg"]
    if cfg.data.test is not None:
        lines.append(f"{infer}{' --soup --tta' if len(run.folds()) > 1 else ' --tta'}")
    further = f"--resume --set train.epochs={2 * cfg.train.epochs}"
    lines.append(
        f"segkit train --cfg {run.folder / 'config.json'} --run-dir {run.folder} {further}"
    )
    return "\n  ".join(["next: predict photographs, the test set, or train on", *lines])


def prepare(
    args: argparse.Namespace,
    cfg: Config,
    run: Run,
    device: torch.device,
    say: Callable[[str], None],
) -> tuple[Config, TrainData, list[Fold], Teacher | None]:
    """Read the data, check all that can fail before training, and create the run's folder.

    Returns:
        The configuration with the settings that were open, the data, the folds, and the teacher.
    """
    with MEMO.kept_in(Path(cfg.data.cache)):
        labelled = open_source(cfg, "train")
        cfg = settled(cfg, labelled, say)
        validation = open_source(cfg, "val") if cfg.data.val else labelled
        split, files = split_data(cfg, labelled, validation, run, say)
        data = with_pseudo(cfg, TrainData(labelled, validation, split), say)
        if distributed.is_main():
            files |= check_data(run, data)
    cfg, folds = plan_folds(cfg, data, chosen_folds(args.folds, len(split.folds)))
    teacher = open_teacher(cfg, data, folds, device, say)
    if device.type in CHECKED_FOR_MEMORY and not distributed.broadcast(run.exists):
        with console.memory_advice(MEMORY_TO_BEGIN):
            check_memory(cfg, labelled, folds[0].order.indices, device, teacher=teacher)
    if distributed.is_main():
        run.begin(config.to_dict(cfg), files)
    distributed.barrier()
    return cfg, data, folds, teacher


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


@dataclass(frozen=True)
class Job:
    """Everything that the folds of a run share."""

    cfg: Config
    run: Run
    data: TrainData
    teacher: Teacher | None
    device: torch.device
    resume: bool
    stop: console.Stop
    say: Callable[[str], None]
    trackers: tracking.Trackers
    background: Background
    host: HostCopy = field(default_factory=HostCopy)


def train_fold(job: Job, fold: Fold) -> dict[str, Any]:
    """Train a fold from its first step, or from its saved state, to its last step."""
    cfg, device, source = job.cfg, job.device, job.data.source
    job.run.fold(fold.number).mkdir(exist_ok=True)

    # ---- model, optimizer, saved state, data
    state, criterion, saved = begin_training(job, fold)
    order = fold.order.starting_at(state.step)
    log = FoldLog(job.run, fold.number, cfg.train.batch_size)
    log.begin(state, order, len(fold.validation), resume=job.resume, saved=saved)
    images = TrainImages(
        source, [*order.indices, *order.extra], build_pipeline(cfg),
        seed=cfg.train.seed, render=cfg.augment.device == "cpu",
    )  # fmt: skip
    batches = train_batches(images, order, workers=cfg.data.workers, device=device)
    schedule = build_schedule(
        cfg.optim.schedule, total=order.steps, warmup=cfg.optim.warmup_steps or 0
    )
    options = step_options(cfg, device)
    net = parallelize(state.model, cfg, device)
    # Graphs would hold memory that steps need.
    predictors = {
        name: build_predictor(model, cfg, device, graphs=False)
        for name, model in state.averages().items()
    }
    val_batches = validation_batches(cfg, job.data.validation, fold.validation, device)
    entries = checkpoint_entries(job, fold)
    progress = distributed.Progress(
        None, f"fold {fold.number}", total=order.steps * cfg.train.batch_size,
        initial=state.step * cfg.train.batch_size, unit="image", parts=cfg.train.epochs, delay=0,
    )  # fmt: skip
    started = time.perf_counter() - state.seconds
    clock = Clock()
    first_step, shapes = state.step + 1, list[torch.Size]()
    log.restart(state.step)
    net.train()
    while state.step < order.steps and not job.stop.signal:
        # ---- a step
        with clock.measure("loading"):
            parts = list(islice(batches, cfg.train.accumulate))
        factor = schedule(state.step)
        set_lr(state.optimizer, factor)
        shapes, last_shapes = [pixels.shape for pixels, _ in parts], shapes
        with backend.cudnn_autotuning(shapes == last_shapes):
            result = train_step(
                net, criterion, state.optimizer, parts,
                scaler=state.scaler, seeds=dropout_seeds(cfg, state.step), teacher=job.teacher,
                **options,
            )  # fmt: skip
        state.advance(result.finite)
        clock.start()
        if state.step == first_step:
            val_batches.start_workers()
            if distributed.is_main():
                job.background.start(partial(job.host.reserve, state.state_dict()))

        # ---- log
        epoch, step_of_epoch = divmod(state.step, order.steps_per_epoch)
        lr = (cfg.optim.lr or 0.0) * factor
        progress.update(cfg.train.batch_size, partial(note, state.step, order, result.loss, lr))
        if not result.finite:
            names = [source.names[index] for _, index in order.batch(state.step - 1)]
            log.bad_step(state, names, limit=cfg.train.max_bad_steps)
        if state.step % cfg.train.log_every == 0 or step_of_epoch == 0:
            log.step(state.step, epoch, result, lr)

        # ---- evaluation and checkpoints
        last_step = state.step == order.steps
        evaluated: Evaluated | None = None
        if last_step or (step_of_epoch == 0 and epoch % cfg.train.evaluate_every == 0):
            with clock.measure("evaluation"):
                evaluated = evaluate_fold(job, fold.number, epoch, state, predictors, val_batches)
            net.train()
            log.restart(state.step)
        due = cfg.train.save_every and state.step % cfg.train.save_every == 0
        if job.stop.asked(device) or due or step_of_epoch == 0 or last_step:
            state.seconds = time.perf_counter() - started
            with clock.measure("saving"):
                save_fold(job, state, entries, evaluated)
        job.background.check()
    with clock.measure("saving"):
        job.background.wait()
    progress.close()
    score, best_epoch = state.top[0] if state.top else (None, None)
    seconds = round(time.perf_counter() - started, 1)
    return {
        "miou": score,
        "epoch": best_epoch,
        "steps": state.step,
        "bad_steps": state.bad_steps,
        "seconds": seconds,
        "shares": clock.shares(),
    }


def begin_training(job: Job, fold: Fold) -> tuple[TrainState, Criterion, bool]:
    """Build a fold's training and load its saved state, if the run is resumed and has one.

    Returns:
        The training's state, its loss, and whether the state was loaded.
    """
    cfg, saved = job.cfg, job.run.load_last_state(fold.number) if job.resume else None
    state, criterion = build_training(
        cfg, len(job.data.source.classes), job.device,
        weights=cfg.model.weights if saved is None else None, initialize=saved is None,
    )  # fmt: skip
    if state.model.report is not None:
        job.say(state.model.report.summary())
    if cfg.train.average:
        total, every = fold.order.steps, fold.order.steps_per_epoch * cfg.train.evaluate_every
        window = max(1, round(cfg.train.average * total))
        state.window = WindowMean(state.model, window=window, every=every, total=total)
    if saved is not None:
        path = job.run.fold(fold.number) / "last.pt"
        state.load_state_dict(saved, path)
        if saved.get("teacher", []) != (job.teacher.digests if job.teacher else []):
            raise SegkitError(
                f"data.teacher: has other checkpoints than {path} began with; restore them, or "
                "start a new run with another --run-dir"
            )
        epochs = saved["config"]["train"]["epochs"]
        job.say(resumed_message(fold.number, state.step, fold.order, epochs))
    elif distributed.is_main():
        state.init = checkpoint.digest_tensors(checkpoint.merged(state.model.state_dict()))
    if terms := losses_per_micro_batch(criterion, cfg) if cfg.train.accumulate > 1 else []:
        job.say(
            f"train.accumulate={cfg.train.accumulate}: {', '.join(terms)}: the mean over the "
            "micro-batches, not the loss of the whole batch (see docs/training.md)"
        )
    return state, criterion, saved is not None


def checkpoint_entries(job: Job, fold: Fold) -> dict[str, Any]:
    """Return the entries of a fold's checkpoints that do not change."""
    source, order = job.data.source, fold.order
    trained_on = digests(source, [*order.indices, *order.extra]) if distributed.is_main() else []
    teacher = {}
    if job.teacher is not None:
        # The student learns from the labels that its teacher has learned from.
        trained_on = sorted({*trained_on, *job.teacher.trained_on})
        teacher = {"teacher": job.teacher.digests}
    return {
        "config": config.to_dict(job.cfg),
        "classes": list(source.classes),
        "fold": fold.number,
        "trained_on": trained_on,
        "pseudo_round": job.data.pseudo.round if job.data.pseudo else 0,
        **teacher,
    }


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
        device=device,
    )


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


class Trial(NamedTuple):
    """An average of the model's weights, evaluated; ``details`` if these are always wanted."""

    scores: Scores
    evaluation: Evaluation
    gallery: Gallery
    details: DetailCounter | None


def try_average(job: Job, predict: Predictor, batches: EvalBatches) -> Trial:
    """Evaluate an average of the model's weights."""
    source, cfg = job.data.validation, job.cfg
    predict.model.eval()
    distributed.share_buffers(predict.model)
    gallery = Gallery(source, batches.indices, size=cfg.track.images)
    always = cfg.infer.details == "always"
    details = DetailCounter(batches.indices, len(source.classes)) if always else None

    def look(index: int, mask: Tensor, truth: Tensor, counts: Tensor) -> None:
        gallery.add(index, mask, truth, counts)
        if details is not None:
            details.add(index, mask, truth, counts)

    with console.memory_advice(MEMORY_TO_EVALUATE.format(run=job.run.folder)):
        evaluation = evaluate(predict.mask, batches, device=job.device, callback=look)
    return Trial(scores(evaluation.matrix), evaluation, gallery, details)


def evaluate_fold(
    job: Job,
    fold: int,
    epoch: int,
    state: TrainState,
    predictors: Mapping[str, Predictor],
    batches: EvalBatches,
) -> Evaluated:
    """Evaluate and log the scores.

    Args:
        job: Everything that the folds share.
        fold: Number of the fold.
        epoch: Number of epochs done.
        state: Training state; the score is added to its ``top``.
        predictors: Predictors of the averages of the model, by name; the best is drawn and saved.
        batches: The images to evaluate on.
    """
    cfg, run, source = job.cfg, job.run, job.data.validation
    tried = {
        name: try_average(job, predict, batches)
        for name, predict in predictors.items()
        if name != "window" or (state.window and state.window.ends_at(state.step))
    }
    average = max(tried, key=lambda name: tried[name].scores.miou or 0.0)
    result, evaluation, gallery, details = tried[average]
    if result.miou is None:
        raise DataError(f"fold {fold}: no validation image has a labelled pixel")
    ranked = rank_best([*state.top, (result.miou, epoch)])
    more = {"details": details.result(job.device).to_dict()} if details else {}
    if distributed.is_main():
        run.log(
            event="evaluate", fold=fold, epoch=epoch, step=state.step, **result.to_dict(),
            interval=bootstrap_interval(evaluation.counts), average=average,
            averages={name: trial.scores.miou for name, trial in tried.items()}, **more,
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
    whose = f" of {average}" if len(tried) > 1 else ""
    job.say(f"fold {fold} epoch {epoch}: mIoU {result.miou:.4f}{whose} (best {ranked[0][0]:.4f})")
    if console.is_verbose():
        job.say(class_table(source.classes, result.iou))
    entries = {"epoch": epoch, "step": state.step, "score": result.miou, "iou": list(result.iou)}
    entries["average"] = average
    return Evaluated(entries, ranked, draw)


def save_fold(
    job: Job, state: TrainState, entries: dict[str, Any], evaluated: Evaluated | None
) -> None:
    """Save the state, and the evaluated model if it is among the best, while training goes on.

    Args:
        job: Everything that the folds share.
        state: Training state.
        entries: Entries of the checkpoints other than the state.
        evaluated: Evaluation after this step, if there was one.
    """
    if not distributed.is_main():
        return
    folder, keep = job.run.fold(entries["fold"]), job.cfg.train.keep
    job.background.wait()  # its job reads the copy that is overwritten now
    copied = job.host.take(state.state_dict())

    def write() -> None:
        saved = copied()
        if evaluated is not None:
            weights = checkpoint.weights(saved, evaluated.entries["average"])
            best = {**entries, "init": saved["init"], "model": weights}
            keep_best(folder, {**best, **evaluated.entries}, evaluated.ranked, keep)
        checkpoint.save({**entries, **saved}, folder / "last.pt", keep_previous=True)
        for draw in evaluated.draw if evaluated is not None else ():
            draw()

    job.background.start(write)


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


def check_components(cfg: Config) -> None:
    """Build every component once, without data or memory, so that errors are reported early."""
    if cfg.data.train is None:
        raise ConfigError("data.train: is missing; expected the labelled images to train on")
    for part in ("train", "val", "test", "test_labels", "pseudo"):
        if (spec := getattr(cfg.data, part)) is not None:
            config.bind(SOURCES, spec, f"data.{part}")
    if cfg.data.teacher is not None:
        teacher_checkpoints(cfg.data.teacher)
    build_pipeline(cfg)
    if (channels := cfg.model.backbone.get("in_channels", 3)) != 3:
        raise ConfigError(
            f"model.backbone.in_channels: is {channels}, but photographs are read with 3 channels; "
            "remove it, or train from Python with segkit.create_model"
        )
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
    parse_views(cfg.infer.tta)
    tracking.check(cfg.track.trackers)


def find_run(args: argparse.Namespace, cfg: Config) -> tuple[Config, Run, bool]:
    """Return the configuration, the run, whose folder may not exist yet, and whether to resume it.

    A setting that the configuration leaves open is that of the resumed run. With several ranks,
    only rank 0's run holds the lock of the folder.
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
        if resume and run.exists:
            cfg = as_recorded(cfg, run.read("config.json"))
        with console.naming_options(resume="--resume"):
            run.check(config.to_dict(cfg), resume=resume)
    cfg, folder, resume = distributed.broadcast((cfg, run and run.folder, resume))
    return cfg, run or Run(folder), resume


def log_data(job: Job) -> None:
    """Report what is read; report and log images left out, and pseudo labels."""
    pseudo = job.data.pseudo
    job.say(f"data.train: {describe(job.data.labelled)}")
    if job.data.validation is not job.data.labelled:
        job.say(f"data.val: {describe(job.data.validation)}")
    report_faults((job.data.source, job.data.validation), job.run, job.say)
    if pseudo is not None and distributed.is_main():
        job.run.log(event="pseudo", round=pseudo.round, images=len(pseudo.extra))


def report_faults(sources: Sequence[Source], run: Run, say: Callable[[str], None]) -> None:
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
