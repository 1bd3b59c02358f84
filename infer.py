#!/usr/bin/env python
"""Predict: checkpoints → soup → views → vote → masks, overlays, a submission, and scores.

python infer.py
python infer.py --soup --tta
python infer.py --run-dir a --run-dir b --vote hard --images photographs/
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from segkit import checkpoint, command, config, distributed, soup
from segkit.config import Config
from segkit.data import open_source
from segkit.data.folds import Split
from segkit.data.loader import TrainImages, TrainOrder, digests, train_batches
from segkit.data.photos import PhotoSource
from segkit.data.source import Source, positions
from segkit.engine import (
    Evaluation,
    build_pipeline,
    load_model,
    precision,
    predictions,
    tally,
)
from segkit.ensemble import HardVote, SoftVote
from segkit.errors import ConfigError, SegkitError
from segkit.files import write_json
from segkit.metrics import bootstrap_interval, scores
from segkit.output import (
    PALETTES,
    coco_results,
    overlay,
    save_jpeg,
    sheet,
    submission,
    write_mask,
)
from segkit.predict import Predictor
from segkit.report import write_run_page
from segkit.run import Run
from segkit.tta import View, parse_views


@dataclass(frozen=True)
class Candidate:
    """One way to predict: checkpoints that vote, and the views each is shown."""

    name: str
    paths: tuple[Path, ...]
    views: tuple[View, ...] = ()


@dataclass(frozen=True)
class Images:
    """Some images of a source, and the column their scores stand in."""

    title: str
    source: Source
    indices: list[int]


VIEWED = ", views"


def main(argv: Sequence[str]) -> None:
    args = parse_arguments(argv)
    runs = [Run.open(name) for name in args.run_dir or [None]]
    cfg = resolve(runs[0], args)
    views = parse_views(args.tta or cfg.infer.tta) if args.tta is not None else ()
    say = command.voice(quiet=args.quiet, verbose=args.verbose)
    with distributed.session(args.device) as device:
        photos = open_photos(args, cfg)
        job = Job(args, cfg, args.out or runs[0].folder / "infer", device)
        category_ids = runs[0].read("classes.json")["category_ids"] or {}

        # ---- what predicts
        members = [path for run in runs for path in job.members(run)]
        name = f"{args.soup} soup" if args.soup else "best checkpoint"
        name = name if len(members) == 1 else f"{args.vote} vote"
        final = Candidate(name + (VIEWED if views else ""), best_first(members), views)

        # ---- the result, and what it and its rivals are worth where labels can tell
        job.write_masks(final, photos)
        truth = open_truth(args, cfg, photos)
        if truth is not None:
            job.score_written(final, truth)
        columns = [one for one in (job.selection(runs), truth) if one is not None]
        compares = args.compare or (truth is not None and not args.brief)
        rivals = job.rivals(runs, views) if columns and compares else []
        rivals = [one for one in rivals if (one.paths, one.views) != (final.paths, final.views)]
        rows = [job.row(one, columns) for one in [*rivals, final]] if columns else []
        if distributed.is_main():
            job.write_results(photos, {int(k): c for k, c in category_ids.items()})
            write_json(job.out / "scores.json", rows)
            write_run_page(runs[0])
            if rows:
                say(table(rows, columns))
            say(f"written: {job.out}")


class Job:
    """Predicts candidates, and remembers their scores.

    Args:
        args: Of the command line.
        cfg: Of the first run, with ``--set``.
        out: Folder of the results.
        device: This rank's.
    """

    def __init__(
        self, args: argparse.Namespace, cfg: Config, out: Path, device: torch.device
    ) -> None:
        self.args, self.cfg, self.out, self.device = args, cfg, out, device
        self._soups: dict[tuple[Path, str], Path] = {}
        self._evaluations: dict[tuple[Candidate, str], Evaluation] = {}
        out.mkdir(parents=True, exist_ok=True)

    # ---- candidates

    def members(self, run: Run) -> list[Path]:
        """The checkpoints of a run that predict: its soup, or the best of each fold."""
        return [self.soup(run, self.args.soup)] if self.args.soup else best_of_folds(run)

    def rivals(self, runs: Sequence[Run], views: tuple[View, ...]) -> list[Candidate]:
        """What else could have been done with these runs."""
        alone, mixed, everything = [], [], []
        for run in runs:
            prefix = f"{run.folder.name} " if len(runs) > 1 else ""
            folds = best_of_folds(run)
            everything += folds
            alone += [Candidate(f"{prefix}{path.parent.name}", (path,)) for path in folds]
            kinds = {"uniform": None, "greedy": None, self.args.soup: None}
            for kind in kinds if len(folds) > 1 else ():
                if kind == "uniform" or (kind and self.selection([run]) is not None):
                    mixed.append(Candidate(f"{prefix}{kind} soup", (self.soup(run, kind),)))
        if len(everything) > 1:
            mixed.append(Candidate(f"{self.args.vote} vote", best_first(everything)))
        viewed = [
            replace(one, name=one.name + VIEWED, views=views)
            for one in mixed or alone
            if views and not one.name.endswith("uniform soup")
        ]
        return [*alone, *mixed, *viewed]

    def soup(self, run: Run, kind: str) -> Path:
        """A run's folds mixed into one checkpoint, made once."""
        if (run.folder, kind) not in self._soups:
            paths = best_of_folds(run)
            self._soups[run.folder, kind] = self._mix(run, kind, paths) if paths[1:] else paths[0]
        return self._soups[run.folder, kind]

    def _mix(self, run: Run, kind: str, paths: list[Path]) -> Path:
        predict = self.predictor(paths[0], ())
        model = predict.model

        def settle(weights: dict[str, Tensor]) -> None:
            model.load_state_dict(weights)
            soup.reestimate_batchnorm(model, self._training_images(run))

        def count(images: Images) -> Evaluation:
            predicted = self._predictions(predict.mask, images, labels=True)
            return tally(predicted, images.source, images.indices, device=self.device)

        def score(weights: dict[str, Tensor]) -> float:
            assert selection is not None
            settle(weights)
            return miou(count(selection))

        selection = self.selection([run])
        if kind == "uniform":
            mixed = soup.uniform(paths)
        else:
            if selection is None:
                raise SegkitError(
                    f"{run.folder}: held no selection set out, which a {kind} soup needs; "
                    "train with data.selection above 0, or use --soup uniform"
                )
            chooses = digests(selection.source, selection.indices)
            soup.check_selection(paths, chooses, allow_leak=self.args.allow_leak)
            own = [miou(self.evaluation(Candidate(p.parent.name, (p,)), selection)) for p in paths]
            mixed = {"greedy": soup.greedy, "learned": soup.learned}[kind](paths, score, scores=own)
        if len(mixed.members) > 1:
            settle(mixed.model)
            mixed = replace(mixed, model=model.state_dict())
        path = self.out / f"{kind}-soup-of-{run.folder.name}.pt"
        state = soup.as_checkpoint(mixed)
        if selection is not None:
            model.load_state_dict(mixed.model)
            found = count(selection)
            state |= {"score": miou(found), "iou": list(scores(found.matrix).iou)}
            self._evaluations[Candidate("", (path,)), selection.title] = found
        if distributed.is_main():
            checkpoint.save(state, path)
        distributed.barrier()
        return path

    def _training_images(self, run: Run) -> Iterator[Tensor]:
        """Batches of training images as the folds saw them, to estimate BatchNorm from."""
        cfg = resolve(run, self.args)
        source = open_source(cfg, "train")
        split = Split.load(run.folder / "folds.json")
        names = {name for fold in range(len(split.folds)) for name in split.training(fold)}
        indices = positions(source, sorted(names))
        images = TrainImages(source, indices, build_pipeline(cfg), seed=cfg.train.seed)
        size = cfg.train.batch_size
        order = TrainOrder(indices, epochs=1, batch_size=size, accumulate=1, seed=cfg.train.seed)
        batches = train_batches(images, order, workers=cfg.data.workers, device=self.device)
        count = max(1, cfg.infer.batch_norm_images // size)
        shown = distributed.progress(islice(batches, count), "BatchNorm", total=count, unit="batch")
        return (image for image, _ in shown)

    # ---- predictions

    def predictor(self, path: Path, views: tuple[View, ...]) -> Predictor:
        """A checkpoint ready to predict, the way its own configuration says."""
        model, trained, _ = load_model(path)
        cfg = config.override(trained, self.args.set)
        layout = torch.channels_last if cfg.train.channels_last else torch.contiguous_format
        return Predictor(
            model.to(self.device).to(memory_format=layout),
            mean=cfg.data.mean,
            std=cfg.data.std,
            size=cfg.infer.size,
            views=views,
            merge=cfg.infer.merge,
            tile=cfg.infer.tile,
            overlap=cfg.infer.overlap,
            amp=precision(cfg.train.amp, self.device),
            channels_last=cfg.train.channels_last,
        )

    def masks(
        self, candidate: Candidate, images: Images
    ) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """This rank's share of the images: index, mask, and the true mask where it is known."""
        source, labels = images.source, images.source.labelled
        if len(candidate.paths) == 1:
            predict = self.predictor(candidate.paths[0], candidate.views)
            yield from self._predictions(predict.mask, images, labels=labels)
            return
        mine = images.indices[distributed.rank() :: distributed.world_size()]
        place = {index: number for number, index in enumerate(mine)}
        vote = self._ballot(candidate, [source.size(index) for index in mine])
        for voter, path in enumerate(candidate.paths):
            predict = self.predictor(path, candidate.views)
            for index, probabilities, _ in self._predictions(predict, images, labels=False):
                vote.add(place[index], probabilities, voter=voter)
        for index in mine:
            yield index, vote.result(place[index]), source.mask(index) if labels else None

    def _predictions(
        self, predict: Callable[[Tensor], Tensor], images: Images, *, labels: bool
    ) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        return predictions(
            predict,
            images.source,
            images.indices,
            labels=labels,
            batch_size=self.cfg.infer.batch_size,
            workers=self.cfg.data.workers,
        )

    def _ballot(self, candidate: Candidate, shapes: list[tuple[int, int]]) -> Any:
        states = [load_state(path) for path in candidate.paths]
        if any(state["classes"] != states[0]["classes"] for state in states):
            raise SegkitError("the runs have different classes, so they cannot vote together")
        classes = len(states[0]["classes"])
        if self.args.vote == "hard":
            return HardVote(shapes, classes, folder=self.out)
        weights = None
        if self.args.vote == "weighted":
            if unknown := [path for path in candidate.paths if "iou" not in load_state(path)]:
                raise SegkitError(
                    f"{unknown[0]}: records no IoU of its classes to weigh its vote by; "
                    "hold out a selection set (data.selection), or let it vote soft or hard"
                )
            weights = torch.tensor([[value or 0.0 for value in state["iou"]] for state in states])
        return SoftVote(shapes, classes, weights=weights, folder=self.out)

    # ---- scores

    def selection(self, runs: Sequence[Run]) -> Images | None:
        """The images that choose: the run's selection set, or its fixed validation images."""
        cfg = resolve(runs[0], self.args)
        split = Split.load(runs[0].folder / "folds.json")
        part, names = ("val", split.folds[0]) if cfg.data.val else ("train", split.selection)
        if len(runs) > 1 or not names:
            return None
        source = open_source(cfg, part)
        return Images("selection", source, positions(source, names))

    def evaluation(self, candidate: Candidate, images: Images) -> Evaluation:
        """Counts of a candidate on labelled images, made once."""
        key = (replace(candidate, name=""), images.title)
        if key not in self._evaluations:
            self._evaluations[key] = tally(
                self.masks(candidate, images), images.source, images.indices,
                device=self.device, description=f"{candidate.name}, {images.title}",
            )  # fmt: skip
        return self._evaluations[key]

    def row(self, candidate: Candidate, columns: Sequence[Images]) -> dict[str, Any]:
        """A candidate's line of ``scores.json``."""
        row: dict[str, Any] = {"name": candidate.name, "views": [str(v) for v in candidate.views]}
        for images in columns:
            found = self.evaluation(candidate, images)
            row[images.title] = {
                "miou": scores(found.matrix).miou,
                "interval": bootstrap_interval(found.counts),
                "per_class": scores(found.matrix).iou,
                "images": len(images.indices),
            }
        return row

    # ---- files

    def write_masks(self, candidate: Candidate, photos: Images) -> None:
        """Predict and write each image's mask and overlay, every rank its share."""
        classes = load_state(candidate.paths[0])["classes"]
        share = len(photos.indices[distributed.rank() :: distributed.world_size()])
        masks = self.masks(candidate, photos)
        outputs, colors = self.cfg.infer.outputs, PALETTES[self.cfg.infer.palette]
        for index, mask, true in distributed.progress(masks, "predict", total=share, unit="image"):
            name = photos.source.names[index]
            write_mask(self.out / "masks", name, mask, colors=colors)
            if "overlays" in outputs:
                shown = overlay(photos.source.image(index), mask, classes=classes, colors=colors)
                save_jpeg(shown, self.out / "overlays", name)
            if "sheets" in outputs:
                shown = sheet(photos.source.image(index), mask, true, colors=colors)
                save_jpeg(shown, self.out / "sheets", name)
        distributed.barrier()

    def written(self, name: str) -> Tensor:
        """The mask in the file of an image of this name."""
        path = (self.out / "masks" / name).with_suffix(".png")
        with Image.open(path) as image:
            return torch.from_numpy(np.array(image))

    def score_written(self, candidate: Candidate, truth: Images) -> None:
        """Score the masks just written, so that they need not be predicted again."""
        source = truth.source
        mine = truth.indices[distributed.rank() :: distributed.world_size()]
        found = ((index, self.written(source.names[index]), source.mask(index)) for index in mine)
        key = (replace(candidate, name=""), truth.title)
        self._evaluations[key] = tally(found, source, truth.indices, device=self.device)

    def write_results(self, photos: Images, category_ids: dict[int, int]) -> None:
        """Gather the masks into the files that hold all images in order; rank 0 only."""
        source, outputs = photos.source, self.cfg.infer.outputs
        with ExitStack() as files:
            writers = []
            if "csv" in outputs:
                path = self.out / "submission.csv"
                writers.append(files.enter_context(submission(path, names=source.names)))
            if "coco" in outputs:
                ids = getattr(source, "image_ids", range(len(source)))
                writer = coco_results(
                    self.out / "coco.json",
                    image_ids=dict(zip(source.names, ids, strict=True)),
                    category_ids=category_ids or None,
                )
                writers.append(files.enter_context(writer))
            for name in distributed.progress(source.names, "write", unit="image"):
                mask = self.written(name)
                for write in writers:
                    write(name, mask)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="infer.py", description="Predict with trained runs.")
    parser.add_argument(
        "--run-dir", action="append", metavar="DIR", help="a run; several vote; default the newest"
    )
    parser.add_argument(
        "--soup", nargs="?", const="greedy", choices=["greedy", "uniform", "learned"],
        help="mix each run's folds into one model; default greedy",
    )  # fmt: skip
    parser.add_argument(
        "--tta", nargs="*", metavar="VIEW", help="show views; default those of infer.tta"
    )
    parser.add_argument(
        "--vote", default="soft", choices=["soft", "hard", "weighted"],
        help="how several models decide; default soft",
    )  # fmt: skip
    parser.add_argument(
        "--images", nargs="+", metavar="PATH", help="photographs or folders, not the test set"
    )
    parser.add_argument("--out", type=Path, help="folder of the results; default infer in the run")
    compare = parser.add_mutually_exclusive_group()
    compare.add_argument(
        "--compare", action="store_true",
        help="score every fold, soup and vote too; default where the test labels are known",
    )  # fmt: skip
    compare.add_argument("--brief", action="store_true", help="score the result only")
    parser.add_argument(
        "--allow-leak", action="store_true", help="choose by images that were trained on"
    )
    command.add_run_options(parser)
    return parser.parse_args(argv)


def resolve(run: Run, args: argparse.Namespace) -> Config:
    """A run's configuration with ``--set``."""
    return config.override(config.parse(run.read("config.json"), str(run.folder)), args.set)


def open_photos(args: argparse.Namespace, cfg: Config) -> Images:
    """What to predict."""
    if args.images:
        source: Source = PhotoSource(paths=tuple(args.images))
    elif cfg.data.test is not None:
        source = open_source(cfg, "test")
    else:
        raise ConfigError("data.test: is missing, so there is nothing to predict; add --images")
    return Images("test", source, list(range(len(source))))


def open_truth(args: argparse.Namespace, cfg: Config, photos: Images) -> Images | None:
    """The labels of what was predicted, if they are known."""
    if args.images or (cfg.data.test_labels is None and not photos.source.labelled):
        return None
    source = open_source(cfg, "test_labels") if cfg.data.test_labels else photos.source
    return Images("test", source, positions(source, photos.source.names))


def best_of_folds(run: Run) -> list[Path]:
    """The best checkpoint of every fold that has one."""
    paths = [run.fold(number) / "best.pt" for number in run.folds()]
    if not paths:
        raise SegkitError(f"{run.folder}: has no best.pt in any fold yet; let it train on")
    return paths


def best_first(paths: Sequence[Path]) -> tuple[Path, ...]:
    """Checkpoints in order of the scores they recorded: voters by rank."""
    states = [load_state(path) for path in paths]
    order = sorted(range(len(paths)), key=lambda i: -(states[i]["score"] or 0.0))
    return tuple(paths[i] for i in order)


def load_state(path: Path) -> dict[str, Any]:
    """A checkpoint's entries, its tensors left in the file."""
    return checkpoint.load(path, mmap=True, verify=False)


def miou(found: Evaluation) -> float:
    value = scores(found.matrix).miou
    return float("nan") if value is None else value


def table(rows: Sequence[dict[str, Any]], columns: Sequence[Images]) -> str:
    """The candidates' mean IoU with 95 % intervals, in 80 columns."""
    titles = [f"{one.title} ({len(one.indices)} images)" for one in columns]
    lines = ["mean IoU".ljust(28) + "".join(title.rjust(26) for title in titles)]
    for row in rows:
        cells = []
        for one in columns:
            value, (low, high) = row[one.title]["miou"], row[one.title]["interval"]
            cells.append(f"{value:.3f} [{low:.3f}, {high:.3f}]".rjust(26))
        lines.append(row["name"][:28].ljust(28) + "".join(cells))
    return "\n".join([*lines[:-1], "-" * len(lines[0]), command.bold(lines[-1])])


if __name__ == "__main__":
    command.run(main)
