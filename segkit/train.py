"""Train a run: for each fold a model, its training steps and its evaluations.

python train.py --cfg demo
torchrun --nproc-per-node 4 train.py --cfg swin.json --folds 0
"""

import argparse
import shlex
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from segkit.augment.pipeline import build_pipeline
from segkit.commands import console, reference
from segkit.core import backend, config, distributed
from segkit.core.background import Background
from segkit.core.config import Config
from segkit.core.errors import DataError
from segkit.core.run import Run, find_run
from segkit.data import open_source
from segkit.data.loader import EvalBatches, TrainImages, train_batches
from segkit.data.memo import MEMO
from segkit.inference.model_file import build_predictor
from segkit.inference.predictor import Predictor
from segkit.inference.teacher import Teacher, open_teacher, teacher_checkpoints
from segkit.inference.tta import parse_views
from segkit.report import Gallery, class_table, record, score_table, write_run_page
from segkit.training import preparation, tracking
from segkit.training.build import dropout_seeds, parallelize, step_options
from segkit.training.defaults import as_recorded, set_channels
from segkit.training.details import DetailCounter
from segkit.training.evaluate import Evaluation, evaluate, validation_batches
from segkit.training.fold_checkpoints import (
    Evaluated,
    Saver,
    begin_training,
    checkpoint_entries,
    rank_best,
)
from segkit.training.fold_log import Clock, FoldLog
from segkit.training.metrics import Scores, bootstrap_interval, scores
from segkit.training.optim import build_schedule, set_lr
from segkit.training.preparation import Fold, TrainData
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
    cfg = set_channels(config.load(args.cfg, args.set))
    preparation.check_components(cfg)
    parse_views(cfg.infer.tta)
    if cfg.data.teacher is not None:
        teacher_checkpoints(cfg.data.teacher)
    backend.set_deterministic(cfg.train.deterministic)
    backend.keep_freed_memory()
    lost = console.end_without_peer
    with distributed.session(args.device, cfg.train.timeout, on_lost=lost) as device:
        say = console.printer(quiet=args.quiet, verbose=args.verbose)
        cfg, run, resume = open_run(args, cfg)
        cfg, data, folds, teacher = prepare(args, cfg, run, device, say)
        summary = {}
        with (
            run.recording(),
            tracking.Trackers(run, cfg.track.trackers) as trackers,
            console.Stop() as stop,
            Background() as background,
        ):
            before = run.read_or_default("summary.json", {})
            saver = Saver(background, cfg.train.keep)
            job = Job(cfg, run, data, teacher, device, resume, stop, say, trackers, saver)
            preparation.report_data(data, run, say)
            for fold in folds:
                with console.memory_advice(MEMORY_TO_TRAIN.format(run=run.folder)):
                    summary[f"fold{fold.number}"] = train_fold(job, fold)
                if stop.signal:
                    say(f"stopped by {stop.name}; go on with: --run-dir {run.folder} --resume")
                    sys.exit(130 if stop.signal == signal.SIGINT else 0)
            if distributed.is_main():
                run.write("summary.json", {**before, **summary})
                say(score_table(write_run_page(run)))
        say(f"done: {run.folder}\nits page: {run.folder / 'report.html'}")
        say(next_commands(cfg, run))


def open_run(args: argparse.Namespace, cfg: Config) -> tuple[Config, Run, bool]:
    """Return the configuration, the run, whose folder may not exist yet, and whether to resume it.

    A setting that the configuration leaves open is that of the resumed run. With several ranks,
    only rank 0's run holds the lock of the folder.
    """
    run, resume = None, False
    if distributed.is_main():
        run, resume = find_run(Path(args.cfg).stem, args.run_dir, resume=args.resume)
        if resume and run.exists:
            cfg = as_recorded(cfg, run.read("config.json"))
        with console.naming_options(resume="--resume"):
            run.check(config.to_dict(cfg), resume=resume)
    cfg, folder, resume = distributed.broadcast((cfg, run and run.folder, resume))
    return cfg, run or Run(folder), resume


def prepare(
    args: argparse.Namespace,
    cfg: Config,
    run: Run,
    device: torch.device,
    say: Callable[[str], None],
) -> tuple[Config, TrainData, list[Fold], Teacher | None]:
    """Read the data, check all that can fail before training, and create the run's folder.

    The configuration that is returned has the settings that were open.
    """
    with MEMO.kept_in(Path(cfg.data.cache)):
        labelled = open_source(cfg, "train")
        cfg = preparation.settled(cfg, labelled, say)
        validation = open_source(cfg, "val") if cfg.data.val else labelled
        split, files = preparation.split_data(cfg, labelled, validation, run, say)
        data = preparation.with_pseudo(cfg, TrainData(labelled, validation, split), say)
        if distributed.is_main():
            files |= preparation.check_data(run, data)
    numbers = preparation.chosen_folds(args.folds, len(split.folds))
    cfg, folds = preparation.plan_folds(cfg, data, numbers)
    teacher = open_teacher(cfg, data, folds, device, say)
    if device.type in CHECKED_FOR_MEMORY and not distributed.broadcast(run.exists):
        with console.memory_advice(MEMORY_TO_BEGIN):
            training = folds[0].order.indices
            preparation.check_memory(cfg, labelled, training, device, teacher=teacher)
    if distributed.is_main():
        run.begin(config.to_dict(cfg), files)
    return cfg, data, folds, teacher


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
    saver: Saver


def train_fold(job: Job, fold: Fold) -> dict[str, Any]:
    """Train a fold from its first step, or from its saved state, to its last step."""
    cfg, device, source, teacher = job.cfg, job.device, job.data.source, job.teacher
    folder = job.run.fold(fold.number)
    folder.mkdir(exist_ok=True)

    # ---- model, optimizer, saved state, data
    state, criterion, saved = begin_training(
        cfg, job.run, fold, len(source.classes), device, job.say,
        resume=job.resume, teacher=teacher.digests if teacher else [],
    )  # fmt: skip
    order = replace(fold.order, start_step=state.step)
    images = TrainImages(
        source, [*order.indices, *order.extra], build_pipeline(cfg),
        seed=cfg.train.seed, render=cfg.augment.device == "cpu",
    )  # fmt: skip
    batches = train_batches(images, order, workers=cfg.data.workers, device=device)
    warmup = cfg.optim.warmup_steps or 0
    schedule = build_schedule(cfg.optim.schedule, total=order.steps, warmup=warmup)
    options = step_options(cfg, device)
    net = parallelize(state.model, cfg, device)
    # Graphs would hold memory that steps need.
    predictors = {
        name: build_predictor(model, cfg, device, graphs=False)
        for name, model in state.averages().items()
    }
    val_batches = validation_batches(cfg, job.data.validation, fold.validation, device)
    entries = checkpoint_entries(cfg, job.data, fold)
    entries = teacher.recorded_in(entries) if teacher else entries
    log = FoldLog(job.run, fold, source.names, cfg.train)
    log.begin(state, resume=job.resume, saved=saved)
    started, clock = time.perf_counter() - state.seconds, Clock()
    first_step, shapes = state.step + 1, list[torch.Size]()
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
                scaler=state.scaler, seeds=dropout_seeds(cfg, state.step), teacher=teacher,
                **options,
            )  # fmt: skip
        state.advance(result.finite)
        clock.start()
        if state.step == first_step:
            val_batches.start_workers()
            job.saver.reserve(state)
        log.step(state, result, lr=(cfg.optim.lr or 0.0) * factor)

        # ---- evaluation and checkpoints
        epoch, step_of_epoch = divmod(state.step, order.steps_per_epoch)
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
                job.saver.save(folder, state, entries, evaluated)
        job.saver.background.check()
    with clock.measure("saving"):
        job.saver.background.wait()
    log.close()
    seconds = round(time.perf_counter() - started, 1)
    return {**state.summary(), "seconds": seconds, "shares": clock.shares()}


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
    callbacks = [gallery.add] if details is None else [gallery.add, details.add]
    with console.memory_advice(MEMORY_TO_EVALUATE.format(run=job.run.folder)):
        evaluation = evaluate(predict.mask, batches, device=job.device, callbacks=callbacks)
    return Trial(scores(evaluation.matrix), evaluation, gallery, details)


def evaluate_fold(
    job: Job,
    fold: int,
    epoch: int,
    state: TrainState,
    predictors: Mapping[str, Predictor],
    batches: EvalBatches,
) -> Evaluated:
    """Evaluate the averages of the model; log and draw the best, and add it to ``state.top``."""
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
    return Evaluated({**entries, "average": average}, ranked, draw)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    bare = "give a configuration as --cfg NAME; segkit plan FOLDER writes one"
    parser = reference.parser("train", "Train the folds of a configuration.", bare=bare)
    console.add_config_options(parser)
    parser.add_argument("--folds", default="all", help="all, or numbers such as 0 or 0,2")
    parser.add_argument("--run-dir", type=Path, help="folder of the run; default runs/NAME-TIME")
    parser.add_argument(
        "--resume", action="store_true", help="resume --run-dir, or the newest run of NAME"
    )
    console.add_run_options(parser)
    return parser.parse_args(argv)


def next_commands(cfg: Config, run: Run) -> str:
    """Return the commands that a user may want after a training, one per line."""
    folder, cfg_file = (shlex.quote(str(x)) for x in (run.folder, run.folder / "config.json"))
    train, infer = f"segkit train --cfg {cfg_file}", f"segkit infer --run-dir {folder}"
    lines = ["next: predict photographs, the test set, or train on", f"{infer} --images PHOTO.jpg"]
    if cfg.data.test is not None:
        lines.append(f"{infer}{' --soup --tta' if len(run.folds()) > 1 else ' --tta'}")
    lines.append(f"{train} \\")
    lines.append(f"  --run-dir {folder} --resume --set train.epochs={2 * cfg.train.epochs}")
    return "\n  ".join(lines)


if __name__ == "__main__":
    console.run(main)
