"""Train a run from top to bottom: folds, and for each a model, its steps, its evaluations.

python train.py --cfg demo
torchrun --nproc-per-node 4 train.py --cfg swin.json --folds 0
"""

import argparse
import gc
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from segkit.augment.pipeline import build_pipeline
from segkit.commands import console
from segkit.core import backend, checkpoint, config, distributed
from segkit.core.config import Config
from segkit.core.errors import ConfigError, DataError, SegkitError, shorten
from segkit.core.run import Run, new_folder, runs
from segkit.data import SOURCES, open_source
from segkit.data.folds import Split, class_pixels, make_folds, read_groups, shares, table
from segkit.data.loader import TrainImages, TrainOrder, digests, train_batches
from segkit.data.memo import MEMO
from segkit.data.pseudo_labelled import PseudoLabelled
from segkit.data.record import data_changes, data_record
from segkit.data.source import Source, positions
from segkit.inference.predictor import Predictor
from segkit.inference.tta import parse_views
from segkit.models.kernels.sync_batch_norm import convert_sync_batch_norm
from segkit.models.segmenter import build_model, check_weights
from segkit.report import Gallery, class_table, record, score_table, write_run_page
from segkit.training import tracking
from segkit.training.evaluate import evaluate
from segkit.training.losses import Criterion, build_loss
from segkit.training.metrics import bootstrap_interval, scores
from segkit.training.optim import EMA, build_optimizer, build_schedule, set_lr
from segkit.training.state import restore
from segkit.training.step import precision, recomputes, train_step

MEMORY_TO_BEGIN = (
    "set train.recompute=on or the backbone's checkpointing=true, raise train.accumulate, or lower "
    "train.batch_size or the crop (augment.size)"
)
MEMORY_TO_TRAIN = (
    f"{MEMORY_TO_BEGIN}, in a new run; with the same settings, what was saved goes on with "
    "--run-dir {run} --resume"
)
MEMORY_TO_EVALUATE = (
    "in an evaluation; lower infer.batch_size and go on with --run-dir {run} --resume, or set "
    "infer.tile in a new run"
)
"""What to do where the device's memory is too small."""

TELL_MEMORY = ("cuda",)
"""Devices that raise an error where memory runs out; a CPU's system kills the process."""


def main(argv: Sequence[str]) -> None:
    """Train the folds that the command line asks for."""
    args = parse_arguments(argv)
    cfg = config.load(args.cfg, args.set)
    check(cfg)
    lost = console.end_without_peer
    backend.set_deterministic(cfg.train.deterministic)
    with distributed.session(args.device, cfg.train.timeout, on_lost=lost) as device:
        say = console.voice(quiet=args.quiet, verbose=args.verbose)
        run, resume = find_run(args, cfg)

        # ---- what can be found out before a folder is made
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
        with run.recording(), follow as trackers, Stop() as stop:
            tell_faults((pseudo or train_source, val_source), run, say)
            if pseudo is not None and distributed.is_main():
                run.log(event="pseudo", round=pseudo.round, images=len(pseudo.extra))
            sources = train_source, val_source, pseudo
            job = Job(cfg, run, split, *sources, device, resume, stop, say, trackers)
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
    """What every fold of a run shares."""

    cfg: Config
    run: Run
    split: Split
    train_source: Source
    val_source: Source
    pseudo: PseudoLabelled | None
    device: torch.device
    resume: bool
    stop: "Stop"
    say: Callable[[str], None]
    trackers: tracking.Followers


def train_fold(job: Job, fold: int) -> dict[str, Any]:
    """One fold, from its first step or from where it stopped, to its last."""
    cfg, run, device, say = job.cfg, job.run, job.device, job.say
    train_source, val_source = job.train_source, job.val_source

    # ---- data
    training = positions(train_source, job.split.training(fold))
    validation = positions(val_source, job.split.folds[fold])
    train_source, extra = (job.pseudo, job.pseudo.extra) if job.pseudo else (train_source, ())
    pipeline = build_pipeline(cfg)

    # ---- model, loss, optimizer
    folder = run.fold(fold)
    folder.mkdir(exist_ok=True)
    state = run.last(fold) if job.resume else None
    classes = list(train_source.classes)
    model = build_model(
        cfg.model.backbone,
        cfg.model.decoder,
        num_classes=len(classes),
        weights=cfg.model.weights if state is None else None,
        freeze_batch_norm=cfg.model.freeze_batch_norm,
        seed=cfg.train.seed,
        initialize=state is None,
    )
    if model.report is not None:
        say(model.report.summary())
    first = distributed.is_main() and state is None
    init = checkpoint.digest_tensors(model.state_dict()) if first else ""
    layout = torch.channels_last if cfg.train.channels_last else torch.contiguous_format
    model.to(device).to(memory_format=layout)
    if cfg.train.sync_batch_norm:
        convert_sync_batch_norm(model, device)
    criterion = build_loss(
        cfg.loss.terms, aux_weight=cfg.loss.aux_weight, num_classes=len(classes)
    ).to(device)
    if cfg.train.accumulate > 1 and (apart := per_part(criterion, cfg)):
        say(
            f"train.accumulate={cfg.train.accumulate}: {', '.join(apart)}: the mean over the "
            "parts, not the loss of the whole batch (see docs/training.md)"
        )
    optimizer = build_optimizer(
        model, cfg.optim.optimizer, lr=cfg.optim.lr, backbone_lr_factor=cfg.optim.backbone_lr_factor
    )
    amp = precision(cfg.train.amp, device)
    scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
    ema = EMA(model, decay=cfg.train.ema) if cfg.train.ema is not None else None

    # ---- where to go on
    step, bad_in_row, bad_steps, seconds = 0, 0, 0, 0.0
    top: list[tuple[float, int]] = []
    if state is not None:
        restore(folder / "last.pt", state, model, optimizer, scaler, ema)
        step, init, seconds = state["step"], state["init"], state["seconds"]
        bad_in_row, bad_steps = state["bad_in_row"], state["bad_steps"]
        top = [(score, epoch) for score, epoch in state["top"]]
    order = train_order(cfg, training, extra, start_step=step)
    if state is not None:
        say(going_on(fold, step, order, state["config"]["train"]["epochs"]))
    if distributed.is_main():
        if job.resume:
            run.rewind(fold, step if state is not None else -1)
        if step < order.steps:
            run.reopen(fold)
        run.log(
            event="start" if state is None else "resume", fold=fold, step=step,
            steps_per_epoch=order.steps_per_epoch,
            parameters=sum(one.numel() for one in model.parameters()),
            images=len(training), validation=len(validation),
        )  # fmt: skip
    schedule = build_schedule(cfg.optim.schedule, total=order.steps, warmup=cfg.optim.warmup_steps)
    batches = train_batches(
        TrainImages(
            train_source,
            [*training, *extra],
            pipeline,
            seed=cfg.train.seed,
            render=cfg.augment.device == "cpu",
        ),
        order,
        workers=cfg.data.workers,
        device=device,
    )
    net = wrap(model, cfg, device)
    predict = Predictor(
        ema.model if ema is not None else model,
        mean=cfg.data.mean,
        std=cfg.data.std,
        size=cfg.infer.size,
        tile=cfg.infer.tile,
        overlap=cfg.infer.overlap,
        amp=amp,
        channels_last=cfg.train.channels_last,
    )
    about = {
        "config": config.to_dict(cfg),
        "classes": classes,
        "fold": fold,
        "trained_on": digests(train_source, [*training, *extra]) if distributed.is_main() else [],
        "pseudo_round": job.pseudo.round if job.pseudo else 0,
        "init": init,
    }

    def save_last() -> None:
        if distributed.is_main():
            last = {
                **about,
                "model": model.state_dict(),
                "ema": ema.state_dict() if ema is not None else None,
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
                "step": step,
                "seconds": seconds + time.perf_counter() - started,
                "top": [list(one) for one in top],
                "bad_in_row": bad_in_row,
                "bad_steps": bad_steps,
            }
            checkpoint.save(last, folder / "last.pt", keep_previous=True)

    # ---- steps
    def note() -> str:
        epochs = f"epoch {step / order.steps_per_epoch:.3g} of {cfg.train.epochs}"
        return f"{epochs}, loss {float(result.loss):.4g}, lr {cfg.optim.lr * factor:.3g}"

    progress = distributed.Progress(
        None, f"fold {fold}", total=order.steps * cfg.train.batch_size,
        initial=step * cfg.train.batch_size, unit="image", parts=cfg.train.epochs, delay=0,
    )  # fmt: skip
    started = since = time.perf_counter()
    since_step = step
    shapes: list[torch.Size] = []
    net.train()
    while step < order.steps:
        parts = list(islice(batches, cfg.train.accumulate))
        set_lr(optimizer, factor := schedule(step))
        shapes, last_shapes = [images.shape for images, _ in parts], shapes
        with backend.cudnn_autotuning(shapes == last_shapes):
            result = train_step(
                net, criterion, optimizer, parts,
                amp=amp, scaler=scaler, clip_norm=cfg.optim.clip_norm,
                recompute=recomputes(cfg.train.recompute, device),
                seeds=dropout_seeds(cfg, step), exact=cfg.train.accumulate_exact,
            )  # fmt: skip
        step += 1
        epoch = step // order.steps_per_epoch
        ends_epoch = step % order.steps_per_epoch == 0
        progress.update(cfg.train.batch_size, note)
        if result.finite:
            bad_in_row = 0
            if ema is not None:
                ema.update(model)
        else:
            bad_in_row, bad_steps = bad_in_row + 1, bad_steps + 1
            names = [train_source.names[index] for _, index in order.batch(step - 1)]
            if distributed.is_main():
                run.log(event="non-finite", fold=fold, step=step, images=names)
            if bad_in_row >= cfg.train.max_bad_steps:
                raise SegkitError(
                    f"fold {fold}: loss or gradient was not finite in {bad_in_row} steps in a row, "
                    f"the last on {', '.join(names[:4])}; lower optim.lr, or set optim.clip_norm"
                )
        if distributed.is_main() and (step % cfg.train.log_every == 0 or ends_epoch):
            now = time.perf_counter()
            rate = (step - since_step) * cfg.train.batch_size / (now - since)
            since, since_step = now, step
            terms = {name: round(float(part), 6) for name, part in result.parts.items()}
            loss = round(float(result.loss), 6)
            run.log(
                event="step", fold=fold, epoch=epoch, step=step, loss=loss, parts=terms,
                lr=cfg.optim.lr * factor,
                gradient_norm=float(result.gradient_norm), images_per_s=round(rate, 2),
            )  # fmt: skip

        # ---- evaluations
        last_step = step == order.steps
        if last_step or (ends_epoch and epoch % cfg.train.evaluate_every == 0):
            predict.model.eval()
            distributed.share_buffers(predict.model)
            gallery = Gallery(val_source, validation, size=cfg.track.images)
            with console.memory_advice(MEMORY_TO_EVALUATE.format(run=run.folder)):
                evaluation = evaluate(
                    predict.mask, val_source, validation, device=device, watch=gallery.add,
                    batch_size=cfg.infer.batch_size, workers=cfg.data.workers,
                )  # fmt: skip
            found = scores(evaluation.matrix)
            if found.miou is None:
                raise DataError(f"fold {fold}: no validation image has a labelled pixel")
            top = rank_best([*top, (found.miou, epoch)])
            if distributed.is_main():
                best = {**about, "model": predict.model.state_dict(), "epoch": epoch, "step": step}
                best |= {"score": found.miou, "iou": list(found.iou)}
                keep_best(folder, best, top, cfg.train.keep)
                run.log(
                    event="evaluate", fold=fold, epoch=epoch, step=step, **found.to_dict(),
                    interval=bootstrap_interval(evaluation.counts),
                )  # fmt: skip
            if top[0][1] == epoch:
                job.trackers.pictures(step, record(run, fold, step, evaluation, gallery))
            if distributed.is_main():
                write_run_page(run)
            top = top[: cfg.train.keep]
            say(f"fold {fold} epoch {epoch}: mIoU {found.miou:.4f} (best {top[0][0]:.4f})")
            if console.is_verbose():
                say(class_table(classes, found.iou))
            net.train()
            since, since_step = time.perf_counter(), step
        asked = cfg.train.save_every and step % cfg.train.save_every == 0
        if job.stop.asked(device) or asked or ends_epoch or last_step:
            save_last()
        if job.stop.signal:
            break
    progress.close()
    seconds += time.perf_counter() - started
    best_score, best_epoch = top[0] if top else (None, None)
    return {
        "miou": best_score,
        "epoch": best_epoch,
        "steps": step,
        "bad_steps": bad_steps,
        "seconds": round(seconds, 1),
    }


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="segkit train",
        description="Train the folds of a configuration.",
        epilog=config.describe(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--cfg", required=True, metavar="NAME", help="a path, or a name in configs/"
    )
    parser.add_argument("--folds", default="all", help="all, or numbers such as 0 or 0,2")
    parser.add_argument("--run-dir", type=Path, help="the run's folder; default runs/NAME-TIME")
    parser.add_argument(
        "--resume", action="store_true", help="go on where --run-dir, or NAME's newest run, stopped"
    )
    console.add_run_options(parser)
    return parser.parse_args(argv)


def check(cfg: Config) -> None:
    """Build every component once, without data or memory, so that a mistake is told at once."""
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
    """The run's folder, which may have to be made yet, and whether it is one to go on with.

    Of several ranks, rank 0's run holds the folder's lock.
    """
    run, resume = None, False
    if distributed.is_main():
        name = Path(args.cfg).stem
        known = [Run(args.run_dir)] if args.run_dir else runs(name)
        interrupted = bool(known) and known[0].interrupted_here()
        resume = args.resume or interrupted
        if not args.run_dir and not interrupted:
            known = [run for run in known if args.resume and run.resumable()]
        run = known[0] if known else Run(new_folder(name))
        run.check(config.to_dict(cfg), resume=resume)
    folder, resume = distributed.broadcast((run and run.folder, resume))
    return run or Run(folder), resume


def divide(
    cfg: Config, train_source: Source, val_source: Source, run: Run, say: Callable[[str], None]
) -> tuple[Split, dict[str, Any]]:
    """The run's folds and selection set, and what a new run keeps of the data.

    They are made once, and then read from the run's ``folds.json``.

    Returns:
        The split, and on rank 0 the contents of JSON files of the run's folder by their names.
    """
    if train_source.classes != val_source.classes:
        raise DataError("data.val: has other classes than data.train; it needs the same ones")
    split: Split | None = None
    files: dict[str, Any] = {}
    path = run.folder / "folds.json"
    if distributed.is_main() and run.exists and path.exists():
        split = Split.load(path)
    elif distributed.is_main():
        names = train_source.names
        # Reads every mask, so that a value that is no class ends the run before it begins.
        pixels = class_pixels(train_source, workers=cfg.data.workers)
        if val_source is not train_source:
            class_pixels(val_source, workers=cfg.data.workers)
            split = Split(folds=(val_source.names,), train=names)
        else:
            split = make_folds(
                names,
                pixels,
                folds=cfg.data.folds,
                selection=cfg.data.selection,
                seed=cfg.train.seed,
                groups=read_groups(cfg.data.groups, cfg.data.group_pattern, names),
            )
            say(table(split, names, pixels, train_source.classes))
            files["shares.json"] = [one._asdict() for one in shares(split, names, pixels)]
        category_ids = getattr(train_source, "category_ids", None)
        files["folds.json"] = asdict(split)
        files["classes.json"] = {"classes": train_source.classes, "category_ids": category_ids}
    return distributed.broadcast(split), files


def add_pseudo(
    cfg: Config,
    train_source: Source,
    val_source: Source,
    split: Split,
    say: Callable[[str], None],
) -> PseudoLabelled | None:
    """The training images with ``data.pseudo`` after them; none of these chooses or validates."""
    if cfg.data.pseudo is None:
        return None
    names = split.selection if val_source is train_source else val_source.names
    chooses = digests(val_source, positions(val_source, names))
    joined = PseudoLabelled(train_source, open_source(cfg, "pseudo"), chooses=chooses)
    say(f"pseudo labels, round {joined.round}: {len(joined.extra)} images")
    return joined


def check_folds(
    cfg: Config,
    folds: Sequence[int],
    split: Split,
    train_source: Source,
    val_source: Source,
    pseudo: PseudoLabelled | None,
) -> None:
    """Find out whether each fold has its images, whole batches of them, and steps to warm up in."""
    extra, warmup = pseudo.extra if pseudo else (), cfg.optim.warmup_steps
    steps = []
    for fold in folds:
        positions(val_source, split.folds[fold])
        order = train_order(cfg, positions(train_source, split.training(fold)), extra)
        build_schedule(cfg.optim.schedule, total=order.steps, warmup=warmup)
        steps.append(order.steps)
    if warmup >= min(steps) and distributed.is_main():
        warnings.warn(
            f"optim.warmup_steps: is {warmup}, but there are {min(steps)} steps, so the learning "
            "rate never reaches optim.lr; lower it, or train longer",
            stacklevel=2,
        )


def check_data(
    run: Run,
    split: Split,
    train_source: Source,
    val_source: Source,
    pseudo: PseudoLabelled | None,
) -> dict[str, Any]:
    """Make sure that a run goes on with the data that it began with.

    Returns:
        The record of the data as a file of the run, where the run has none yet.

    Raises:
        DataError: Classes, images or labels are others.
    """
    names = {"train": split.training(0), "val": split.folds[0]}
    if val_source is train_source:
        names = {"train": (*names["train"], *names["val"], *split.selection)}
    sources = {"train": train_source, "val": val_source}
    parts: dict[str, tuple[Source, Sequence[int]]]
    parts = {part: (sources[part], positions(sources[part], names[part])) for part in names}
    if pseudo is not None:
        parts["pseudo"] = pseudo, pseudo.extra
    record = data_record(parts)
    if not run.exists or not (run.folder / "classes.json").exists():
        return {"data.json": record}
    known = run.optional("data.json", None)
    before = known if known and known["format"] == record["format"] else {"images": {}}
    if changes := data_changes({**before, **run.read("classes.json")}, record):
        raise DataError(
            f"{run.folder}: began with other data than this ({'; '.join(changes)}); bring that "
            "back, or start a new run with another --run-dir"
        )
    return {} if before["images"] else {"data.json": record}


def check_memory(
    cfg: Config, source: Source, training: Sequence[int], device: torch.device
) -> None:
    """Take two steps with a model of their own, so that too little memory is known at once.

    The second one has the optimizer's state beside it. Every part of a step is the first training
    image, as often as a rank's part holds images.
    """
    sample = TrainImages(source, training, build_pipeline(cfg), seed=cfg.train.seed)[0, training[0]]
    if isinstance(sample, DataError):
        raise sample
    share = cfg.train.batch_size // (cfg.train.accumulate * distributed.world_size())
    images, masks = (one.to(device).expand(share, *one.shape).contiguous() for one in sample[:2])
    classes = len(source.classes)
    with device:
        model = build_model(
            cfg.model.backbone,
            cfg.model.decoder,
            num_classes=classes,
            freeze_batch_norm=cfg.model.freeze_batch_norm,
        )
    layout = torch.channels_last if cfg.train.channels_last else torch.contiguous_format
    model.to(device).to(memory_format=layout)
    if cfg.train.sync_batch_norm:
        convert_sync_batch_norm(model, device)
    criterion = build_loss(cfg.loss.terms, aux_weight=cfg.loss.aux_weight, num_classes=classes)
    optimizer = build_optimizer(model, cfg.optim.optimizer, lr=cfg.optim.lr)
    ema = EMA(model, decay=cfg.train.ema) if cfg.train.ema is not None else None
    amp = precision(cfg.train.amp, device)
    scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
    net = wrap(model, cfg, device)
    for _ in range(2):
        train_step(
            net, criterion.to(device), optimizer, [(images, masks)] * min(2, cfg.train.accumulate),
            amp=amp, scaler=scaler, clip_norm=cfg.optim.clip_norm,
            recompute=recomputes(cfg.train.recompute, device),
            exact=cfg.train.accumulate_exact,
        )  # fmt: skip
    del ema, net, model, criterion, optimizer
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def train_order(
    cfg: Config, training: Sequence[int], extra: Sequence[int], *, start_step: int = 0
) -> TrainOrder:
    """The order of a fold's training images."""
    return TrainOrder(
        indices=training,
        epochs=cfg.train.epochs,
        batch_size=cfg.train.batch_size,
        accumulate=cfg.train.accumulate,
        seed=cfg.train.seed,
        start_step=start_step,
        extra=extra,
        extra_share=cfg.data.pseudo_weight,
    )


def tell_faults(sources: Sequence[Source], run: Run, say: Callable[[str], None]) -> None:
    """Say what was left out of the data, and log what no earlier start has logged."""
    logged = {event["sentence"] for event in run.events() if event["event"] == "fault"}
    for fault in dict.fromkeys(fault for source in sources for fault in source.faults):
        say(f"left out: {fault.sentence}")
        if distributed.is_main() and fault.sentence not in logged:
            run.log(event="fault", file=fault.file, sentence=fault.sentence)


def chosen_folds(text: str, count: int) -> list[int]:
    """Fold numbers from ``--folds``."""
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
    """What a resumed fold does, in a sentence; ``epochs`` are those it was to have before."""
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


def wrap(model: nn.Module, cfg: Config, device: torch.device) -> nn.Module:
    """The model as the steps call it: compiled if asked for, in step with the other ranks."""
    if cfg.train.compile:
        model.compile()
    if distributed.world_size() == 1:
        return model
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )


def rank_best(found: list[tuple[float, int]]) -> list[tuple[float, int]]:
    """(score, epoch) from best to worst; of equals the earlier one first."""
    return sorted(found, key=lambda one: (-one[0], one[1]))


def keep_best(
    folder: Path, state: dict[str, Any], ranked: list[tuple[float, int]], keep: int
) -> None:
    """Save a checkpoint if its epoch is among the ``keep`` best, in place of the one that left.

    ``best.pt`` is another name of the best epoch's file.
    """
    epoch = state["epoch"]
    if epoch in [one for _, one in ranked[:keep]]:
        checkpoint.save(state, epoch_file(folder, epoch))
        if ranked[0][1] == epoch:
            checkpoint.link(epoch_file(folder, epoch), folder / "best.pt")
    for _, one in ranked[keep:]:
        path = epoch_file(folder, one)
        if path.is_file() and checkpoint.stored_digest(path):  # segkit wrote it
            path.unlink()


def epoch_file(folder: Path, epoch: int) -> Path:
    """Return the file of an epoch's checkpoint."""
    return folder / f"epoch{epoch:04d}.pt"


def per_part(criterion: Criterion, cfg: Config) -> list[str]:
    """Names of the losses that are computed on each part of a step alone."""
    sums = [] if cfg.train.accumulate_exact else criterion.sharing("sums")
    return [*sums, *criterion.sharing("nothing")]


def dropout_seeds(cfg: Config, step: int) -> list[int]:
    """A seed for each part of a step on this rank: there is no random state to save.

    Parts are numbered over all ranks, so that 4 parts on one rank draw as 2 on each of two do.
    """
    world_size, rank = distributed.world_size(), distributed.rank()
    parts = range(cfg.train.accumulate)
    return [mix(cfg.train.seed, step, part * world_size + rank) for part in parts]


def mix(*numbers: int) -> int:
    """One seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


class Stop:
    """Within its block, SIGTERM or SIGINT ends the run, saved, after the step under way.

    A second one ends it at once. torchrun passes on what it gets, so a rank that is in a process
    group with it gets each signal twice: within two seconds they count once.
    """

    def __init__(self) -> None:
        self.signal = 0
        self.pending = 0
        self._time = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: Any) -> None:
        now = time.monotonic()
        if not self.pending:
            self.pending, self._time = number, now
        elif not dist.is_torchelastic_launched() or now - self._time > 2:
            console.end("interrupted", 130)

    @property
    def name(self) -> str:
        return signal.Signals(self.signal).name

    def asked(self, device: torch.device) -> bool:
        """Whether any rank was asked to stop; all ranks call it after the same step."""
        if distributed.world_size() == 1:
            self.signal = self.pending
        else:
            asked = torch.tensor([self.pending], device=device)
            self.signal = int(distributed.maximum(asked))
        return self.signal > 0


if __name__ == "__main__":
    console.run(main)
