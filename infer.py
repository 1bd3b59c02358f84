#!/usr/bin/env python
"""Predict: checkpoints → soup → views → vote → masks, overlays, a submission, and scores.

python infer.py
python infer.py --soup --tta
python infer.py --run-dir a --run-dir b --vote hard --images photographs/
"""

import argparse
import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import segkit
from segkit import checkpoint, command, config, distributed, soup
from segkit.config import Config
from segkit.data import open_source
from segkit.data.folds import Split
from segkit.data.loader import TrainImages, TrainOrder, digests, train_batches
from segkit.data.photos import PhotoSource
from segkit.data.source import Source, background_of, positions
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
from segkit.labels import IGNORE
from segkit.metrics import bootstrap_interval, paired_difference, scores
from segkit.output import PALETTES
from segkit.predict import Predictor
from segkit.pseudo import Confidence, confident, pseudo_file
from segkit.report import write_run_page
from segkit.results import Results
from segkit.run import Run
from segkit.tta import View, fit_weights, parse_views, true_class_samples

VOTES = ("soft", "hard", "weighted")
SOUPS = ("greedy", "uniform", "learned")
VIEWED = ", views"

Predictions = Iterator[tuple[int, Tensor, Tensor | None]]
"""Index of an image, its mask or probabilities, and its true mask where that is known."""


@dataclass(frozen=True)
class Candidate:
    """One way to predict: checkpoints that vote, and the views each is shown.

    Args:
        name: In the table.
        paths: Checkpoints, the best first.
        views: What each is shown.
        weighed: Whether views weigh what the selection set says, and not the same.
        vote: How several checkpoints decide.
    """

    name: str
    paths: tuple[Path, ...]
    views: tuple[View, ...] = ()
    weighed: bool = False
    vote: str = "soft"

    @property
    def way(self) -> "Candidate":
        """What decides the prediction, whatever its name."""
        return replace(self, name="", vote=self.vote if len(self.paths) > 1 else "")


@dataclass(frozen=True)
class Images:
    """Some images of a source, and the column their scores stand in."""

    title: str
    source: Source
    indices: list[int]


def main(argv: Sequence[str]) -> None:
    args = parse_arguments(argv)
    runs = [Run.open(name) for name in args.run_dir or [None]]
    cfg = resolve(runs[0], args)
    views = parse_views(args.tta or cfg.infer.tta) if args.tta is not None else ()
    say = command.voice(quiet=args.quiet, verbose=args.verbose)
    if args.weigh_views and cfg.infer.merge != "mean":
        raise ConfigError("infer.merge: --weigh-views weighs the mean of probabilities; use 'mean'")
    with distributed.session(args.device) as device:
        photos = open_photos(args, cfg)
        job = Job(args, cfg, runs, args.out or runs[0].folder / "infer", device)

        # ---- what predicts
        members = [path for run in runs for path in job.members(run)]
        name = f"{args.soup} soup" if args.soup else "best checkpoint"
        name = name if len(members) == 1 else f"{args.vote} vote"
        name += VIEWED if views else ""
        name += " weighed" if views and args.weigh_views else ""
        paths = best_first(members)
        final = Candidate(name, paths, views, bool(views) and args.weigh_views, args.vote)

        # ---- the result, and what it and its rivals are worth where labels can tell
        results = job.write_results(final, photos)
        if args.pseudo:
            job.write_pseudo(final, photos)
        truth = open_truth(args, cfg, photos)
        if truth is not None:
            job.score_written(final, truth, results)
        columns = [one for one in (job.selection(runs), truth) if one is not None]
        compares = args.compare or (truth is not None and not args.brief)
        rivals = job.rivals(views) if columns and compares else []
        rivals = [one for one in rivals if one.way != final.way]
        rows = [job.row(one, final, columns) for one in [*rivals, final]] if columns else []
        if distributed.is_main():
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
        runs: Whose checkpoints predict.
        out: Folder of the results.
        device: This rank's.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        cfg: Config,
        runs: Sequence[Run],
        out: Path,
        device: torch.device,
    ) -> None:
        self.args, self.cfg, self.runs, self.out, self.device = args, cfg, runs, out, device
        self._digests: dict[Path, str] = {}
        self._sources: dict[tuple[Path, str], Source] = {}
        self._soups: dict[tuple[Path, str], Path] = {}
        self._barriers: dict[Path, list[dict[str, Any]]] = {}
        self._view_weights: dict[tuple[Path, tuple[View, ...]], tuple[float, ...]] = {}
        self._evaluations: dict[tuple[Candidate, tuple[str, ...]], Evaluation] = {}
        out.mkdir(parents=True, exist_ok=True)

    # ---- candidates

    def members(self, run: Run) -> list[Path]:
        """The checkpoints of a run that predict: its soup, or the best of each fold."""
        return [self.soup(run, self.args.soup)] if self.args.soup else best_of_folds(run)

    def rivals(self, views: tuple[View, ...]) -> list[Candidate]:
        """What else could have been done with these runs; with ``--compare`` all of it."""
        alone, mixed, everything = [], [], []
        kinds = SOUPS if self.args.compare else ["uniform", "greedy", self.args.soup]
        for run in self.runs:
            prefix = f"{run.folder.name} " if len(self.runs) > 1 else ""
            folds = best_of_folds(run)
            everything += folds
            alone += [Candidate(f"{prefix}{path.parent.name}", (path,)) for path in folds]
            for kind in dict.fromkeys(kinds) if len(folds) > 1 else ():
                if kind == "uniform" or (kind and self.selection([run]) is not None):
                    mixed.append(Candidate(f"{prefix}{kind} soup", (self.soup(run, kind),)))
        if len(everything) > 1:
            paths = best_first(everything)
            mixed += [Candidate(f"{vote} vote", paths, vote=vote) for vote in self.votes(paths)]
        shown = [*alone, *mixed] if self.args.compare else mixed or alone
        viewed = [
            replace(one, name=one.name + VIEWED, views=views)
            for one in shown
            if views and (self.args.compare or not one.name.endswith("uniform soup"))
        ]
        return [*alone, *mixed, *viewed]

    def votes(self, paths: Sequence[Path]) -> tuple[str, ...]:
        """The kinds of vote that are compared."""
        if not self.args.compare:
            return (self.args.vote,)
        weighable = all("iou" in load_state(path) for path in paths)
        return tuple(vote for vote in VOTES if vote != "weighted" or weighable)

    # ---- soups

    def soup(self, run: Run, kind: str) -> Path:
        """A run's folds mixed into one checkpoint, made once."""
        if (run.folder, kind) not in self._soups:
            paths = best_of_folds(run)
            self._soups[run.folder, kind] = self._mix(run, kind, paths) if paths[1:] else paths[0]
        return self._soups[run.folder, kind]

    def _mix(self, run: Run, kind: str, paths: list[Path]) -> Path:
        selection = self.selection([run])
        leaked = 0
        if selection is not None:
            chooses = digests(selection.source, selection.indices)
            allow_leak = self.args.allow_leak or kind == "uniform"  # which chooses nothing
            leaked = soup.check_selection(paths, chooses, allow_leak=allow_leak)
        elif kind != "uniform":
            raise SegkitError(
                f"{run.folder}: held no selection set out, which a {kind} soup needs; "
                "train with data.selection above 0, or use --soup uniform"
            )
        path = self.out / f"{kind}-soup-of-{run.folder.name}.pt"
        origin = self._origin_of_soup(run, kind, paths, selection)
        known = load_state(path)["soup"].get("origin") if path.exists() else None
        if distributed.broadcast(known) == origin:
            return path  # an earlier inference made it of the same ingredients

        predict = self.predictor(paths[0])
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

        barriers: list[dict[str, Any]] = []
        if selection is not None:
            own = [miou(self.evaluation(Candidate("", (one,)), selection)) for one in paths]
            if run.folder not in self._barriers:
                self._barriers[run.folder] = soup.check_barriers(paths, score, scores=own)
            barriers = self._barriers[run.folder]
        if kind == "uniform":
            mixed = soup.uniform(paths)
        else:
            mix = soup.greedy if kind == "greedy" else soup.learned
            mixed = mix(paths, score, scores=own)
        if len(mixed.members) > 1:
            settle(mixed.model)
            mixed = replace(mixed, model=model.state_dict())
        recipe = {**mixed.recipe, "barriers": barriers, "leaked": leaked, "origin": origin}
        state = soup.as_checkpoint(replace(mixed, recipe=recipe))
        if selection is not None:
            model.load_state_dict(mixed.model)
            found = count(selection)
            state |= {"score": miou(found), "iou": list(scores(found.matrix).iou)}
            self._evaluations[key(Candidate("", (path,)), selection)] = found
        if distributed.is_main():
            checkpoint.save(state, path)
        distributed.barrier()
        return path

    def _origin_of_soup(
        self, run: Run, kind: str, paths: Sequence[Path], selection: Images | None
    ) -> str:
        """A digest of all that a soup depends on."""
        cfg = config.to_dict(resolve(run, self.args))
        chooses = digests(selection.source, selection.indices) if selection else []
        files = [self.digest(path) for path in paths]
        everything = json.dumps([segkit.__version__, kind, files, chooses, cfg])
        return hashlib.sha256(everything.encode()).hexdigest()

    def _training_images(self, run: Run) -> Iterator[Tensor]:
        """Batches of training images as the folds saw them, to estimate BatchNorm from."""
        cfg = resolve(run, self.args)
        source = self.source(run, "train")
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

    def source(self, run: Run, part: str) -> Source:
        """A part of a run's data, opened once."""
        if (run.folder, part) not in self._sources:
            self._sources[run.folder, part] = open_source(resolve(run, self.args), part)
        return self._sources[run.folder, part]

    def digest(self, path: Path) -> str:
        """A checkpoint's digest; the file is read and verified once."""
        if path not in self._digests:
            self._digests[path] = checkpoint.digest(path)
        return self._digests[path]

    def predictor(
        self, path: Path, views: tuple[View, ...] = (), *, weighed: bool = False
    ) -> Predictor:
        """A checkpoint ready to predict, the way its own configuration says."""
        self.digest(path)
        model, trained, _ = load_model(path, verify=False)
        cfg = config.override(trained, self.args.set)
        layout = torch.channels_last if cfg.train.channels_last else torch.contiguous_format
        return Predictor(
            model.to(self.device).to(memory_format=layout),
            mean=cfg.data.mean,
            std=cfg.data.std,
            size=cfg.infer.size,
            views=views,
            merge=cfg.infer.merge,
            weights=self.view_weights(path, views) if weighed else None,
            tile=cfg.infer.tile,
            overlap=cfg.infer.overlap,
            amp=precision(cfg.train.amp, self.device),
            channels_last=cfg.train.channels_last,
        )

    def view_weights(self, path: Path, views: tuple[View, ...]) -> tuple[float, ...]:
        """What each view is worth to a checkpoint, by the true classes of the selection set."""
        if (path, views) not in self._view_weights:
            images = self.selection(self.runs)
            if images is None:
                raise SegkitError("--weigh-views needs a selection set; train with data.selection")
            chooses = digests(images.source, images.indices)
            soup.check_selection([path], chooses, allow_leak=self.args.allow_leak)
            row = {index: number for number, index in enumerate(images.indices)}
            predict = self.predictor(path)
            found = torch.zeros(len(views), len(row), 1024)
            for number, view in enumerate(views):
                predict.views = (view,)
                for index, scored, mask in self._predictions(predict, images, labels=True):
                    assert mask is not None
                    found[number, row[index]] = true_class_samples(scored, mask).cpu()
            found = distributed.all_reduce(found.to(self.device)).cpu().flatten(1)
            known = found[:, ~found[0].isnan()]
            self._view_weights[path, views] = tuple(fit_weights(known))
        return self._view_weights[path, views]

    def masks(self, candidate: Candidate, images: Images) -> Predictions:
        """The candidate's masks of this rank's share of the images."""
        if len(candidate.paths) == 1:
            predict = self.predictor(candidate.paths[0], candidate.views, weighed=candidate.weighed)
            yield from self._predictions(predict.mask, images, labels=images.source.labelled)
        else:
            (vote,) = self._cast(candidate, images, [candidate.vote])
            for place, index in enumerate(share(images)):
                yield index, vote.result(place), truth_of(images, index)

    def probabilities(self, candidate: Candidate, images: Images) -> Predictions:
        """The candidate's probabilities of this rank's share of the images."""
        if len(candidate.paths) == 1:
            predict = self.predictor(candidate.paths[0], candidate.views, weighed=candidate.weighed)
            yield from self._predictions(predict, images, labels=False)
        else:
            (vote,) = self._cast(candidate, images, [candidate.vote])
            if not isinstance(vote, SoftVote):
                raise SegkitError(
                    "a hard vote has no probabilities, which --pseudo and the output 'soft' need; "
                    "use --vote soft or weighted"
                )
            for place, index in enumerate(share(images)):
                yield index, vote.probabilities(place), None

    def _predictions(
        self, predict: Callable[[Tensor], Tensor], images: Images, *, labels: bool
    ) -> Predictions:
        return predictions(
            predict,
            images.source,
            images.indices,
            labels=labels,
            batch_size=self.cfg.infer.batch_size,
            workers=self.cfg.data.workers,
        )

    def _cast(
        self, candidate: Candidate, images: Images, votes: Collection[str]
    ) -> list[HardVote | SoftVote]:
        """The models' votes on this rank's share, counted in several ways in one pass."""
        states = [load_state(path) for path in candidate.paths]
        if any(state["classes"] != states[0]["classes"] for state in states):
            raise SegkitError("the runs have different classes, so they cannot vote together")
        if "weighted" in votes and (unknown := [one for one in states if "iou" not in one]):
            raise SegkitError(
                f"{candidate.paths[states.index(unknown[0])]}: records no IoU of its classes to "
                "weigh its vote by; hold out a selection set (data.selection), or let it vote "
                "soft or hard"
            )
        mine = share(images)
        shapes, classes = [images.source.size(index) for index in mine], len(states[0]["classes"])
        worth = torch.tensor([[one or 0.0 for one in state.get("iou", ())] for state in states])
        ballots: list[HardVote | SoftVote] = [
            HardVote(shapes, classes, folder=self.out)
            if vote == "hard"
            else SoftVote(
                shapes, classes, weights=worth if vote == "weighted" else None, folder=self.out
            )
            for vote in votes
        ]
        place = {index: number for number, index in enumerate(mine)}
        for voter, path in enumerate(candidate.paths):
            predict = self.predictor(path, candidate.views, weighed=candidate.weighed)
            for index, scored, _ in self._predictions(predict, images, labels=False):
                for ballot in ballots:
                    ballot.add(place[index], scored, voter=voter)
        return ballots

    # ---- scores

    def selection(self, runs: Sequence[Run]) -> Images | None:
        """The images that choose: those of the run, or those that every run held out."""
        sets = [self._selection_of(run) for run in runs]
        first = sets[0]
        if any(one is None for one in sets) or first is None:
            return None
        marks = [set(digests(one.source, one.indices)) for one in sets[1:] if one is not None]
        own = zip(first.indices, digests(first.source, first.indices), strict=True)
        indices = [index for index, mark in own if all(mark in other for other in marks)]
        return replace(first, indices=indices) if indices else None

    def _selection_of(self, run: Run) -> Images | None:
        """A run's selection set, or its fixed validation images."""
        cfg = resolve(run, self.args)
        split = Split.load(run.folder / "folds.json")
        part, names = ("val", split.folds[0]) if cfg.data.val else ("train", split.selection)
        if not names:
            return None
        source = self.source(run, part)
        return Images("selection", source, positions(source, names))

    def evaluation(self, candidate: Candidate, images: Images) -> Evaluation:
        """Counts of a candidate on labelled images, made once; of all kinds of vote together."""
        if key(candidate, images) not in self._evaluations:
            options: dict[str, Any] = {
                "device": self.device,
                "description": f"{candidate.name}, {images.title}",
            }
            if len(candidate.paths) == 1:
                found = tally(
                    self.masks(candidate, images), images.source, images.indices, **options
                )
                self._evaluations[key(candidate, images)] = found
            else:
                votes = dict.fromkeys([candidate.vote, *self.votes(candidate.paths)])
                for vote, ballot in zip(votes, self._cast(candidate, images, votes), strict=True):
                    mine = enumerate(share(images))
                    masks = ((i, ballot.result(at), truth_of(images, i)) for at, i in mine)
                    found = tally(masks, images.source, images.indices, **options)
                    self._evaluations[key(replace(candidate, vote=vote), images)] = found
        return self._evaluations[key(candidate, images)]

    def row(
        self, candidate: Candidate, final: Candidate, columns: Sequence[Images]
    ) -> dict[str, Any]:
        """A candidate's line of ``scores.json``, and what the final one is better by."""
        row: dict[str, Any] = {"name": candidate.name, "views": [str(v) for v in candidate.views]}
        if candidate.weighed:
            weights = [self.view_weights(path, candidate.views) for path in candidate.paths]
            row["view_weights"] = weights
        states = [load_state(path) for path in candidate.paths]
        row["soups"] = [state["soup"] for state in states if "soup" in state]
        seen = {one for state in states for one in state.get("trained_on", ())}
        for images in columns:
            found = self.evaluation(candidate, images)
            row[images.title] = {
                "miou": scores(found.matrix).miou,
                "interval": bootstrap_interval(found.counts),
                "per_class": scores(found.matrix).iou,
                "images": len(images.indices),
                "trained_on": len(seen.intersection(digests(images.source, images.indices))),
            }
            if candidate is not final:
                last = self.evaluation(final, images)
                difference, *interval = paired_difference(found.counts, last.counts)
                row[images.title]["final_minus_this"] = {
                    "difference": difference,
                    "interval": interval,
                }
        return row

    # ---- files

    def write_results(self, candidate: Candidate, photos: Images) -> Results:
        """Predict and write the images that are not there yet, every rank its share."""
        run, outputs = self.runs[0], self.cfg.infer.outputs
        classes = load_state(candidate.paths[0])["classes"]
        known = run.read("classes.json")["category_ids"]
        results = Results(
            self.out,
            photos.source,
            classes=classes,
            outputs=outputs,
            background=background_of(classes, known),
            colors=PALETTES[self.cfg.infer.palette],
        )
        missing = replace(photos, indices=results.start(self._origin(candidate)))
        soft = "soft" in outputs
        found = (self.probabilities if soft else self.masks)(candidate, missing)
        total = len(share(missing))
        for index, one, _ in distributed.progress(found, "predict", total=total, unit="image"):
            mask = one.max(0).indices.to(torch.uint8) if soft else one
            results.write(index, mask, one if soft else None)
        distributed.barrier()
        if distributed.is_main():
            category_ids = {int(key): one for key, one in (known or {}).items()}
            results.finish(category_ids=category_ids)
        return results

    def _origin(self, candidate: Candidate) -> dict[str, Any]:
        """All that a candidate's predictions depend on."""
        ways = []
        for path in candidate.paths:
            trained = config.parse(load_state(path)["config"], str(path))
            infer = asdict(config.override(trained, self.args.set).infer)
            del infer["outputs"], infer["tta"]
            weights = self.view_weights(path, candidate.views) if candidate.weighed else None
            ways.append({"sha256": self.digest(path), "infer": infer, "view_weights": weights})
        return {
            "segkit": segkit.__version__,
            "device": self.device.type,
            "models": ways,
            "views": [str(view) for view in candidate.views],
            "vote": candidate.way.vote,
        }

    def score_written(self, candidate: Candidate, truth: Images, results: Results) -> None:
        """Score the masks just written, so that they need not be predicted again."""
        names = truth.source.names
        found = ((i, results.mask(names[i]), truth.source.mask(i)) for i in share(truth))
        counted = tally(found, truth.source, truth.indices, device=self.device)
        self._evaluations[key(candidate, truth)] = counted

    def write_pseudo(self, candidate: Candidate, photos: Images) -> None:
        """Write what the candidate is sure of as labels to train on, and links to the images."""
        folder, source = self.args.pseudo, photos.source
        states = [load_state(path) for path in candidate.paths]
        classes = states[0]["classes"]
        known = self._labelled()
        marks = zip(photos.indices, digests(source, photos.indices), strict=True)
        images = replace(photos, indices=[index for index, mark in marks if mark not in known])
        thresholds = self._thresholds(candidate, images, len(classes))
        labels = Results(folder, source, classes=classes, outputs=())
        for index, scored, _ in self.probabilities(candidate, images):
            labels.write(index, confident(scored, thresholds))
        distributed.barrier()
        if not distributed.is_main():
            return
        info = {
            "round": 1 + max(state.get("pseudo_round") or 0 for state in states),
            "candidate": candidate.name,
            "models": [self.digest(path) for path in candidate.paths],
            "thresholds": thresholds,
            "trained_on": sorted({one for state in states for one in state["trained_on"]}),
        }
        kept = 0
        with pseudo_file(folder / "pseudo.json", classes=classes, info=info) as add:
            for index in images.indices:
                name = source.names[index]
                mask = labels.mask(name)
                if (mask != IGNORE).any():
                    checkpoint.link(source.path(index), folder / "images" / name)
                    add(name, mask)
                    kept += 1
        left = len(photos.indices) - len(images.indices)
        spec = {
            "name": "coco",
            "annotations": str(folder / "pseudo.json"),
            "images": str(folder / "images"),
            "background": classes[0],
        }
        print(
            f"pseudo labels of {kept} images ({left} are labelled already): {folder}\n"
            f"train on them too with: --set 'data.pseudo={json.dumps(spec)}'"
        )

    def _labelled(self) -> set[str]:
        """Digests of the runs' labelled images: they train, validate or choose already."""
        known: set[str] = set()
        for run in self.runs:
            cfg = resolve(run, self.args)
            for part in ("train", "val"):
                if getattr(cfg.data, part) is not None:
                    source = self.source(run, part)
                    known.update(digests(source, range(len(source))))
        return known

    def _thresholds(self, candidate: Candidate, images: Images, classes: int) -> list[float]:
        """The probability from which each class is believed."""
        given = self.args.quantile or self.args.confidence
        if len(given) not in (1, classes):
            raise SegkitError(
                f"{len(given)} thresholds were given for {classes} classes; give one, or one each"
            )
        each = given * classes if len(given) == 1 else given
        if not self.args.quantile:
            return each
        count = Confidence(classes)
        for _, scored, _ in self.probabilities(candidate, images):
            count.add(scored)
        count.counts = distributed.all_reduce(count.counts.to(self.device)).cpu()
        return count.thresholds(each)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="infer.py", description="Predict with trained runs.")
    parser.add_argument(
        "--run-dir", action="append", metavar="DIR", help="a run; several vote; default the newest"
    )
    parser.add_argument(
        "--soup", nargs="?", const="greedy", choices=SOUPS,
        help="mix each run's folds into one model; default greedy",
    )  # fmt: skip
    parser.add_argument(
        "--tta", nargs="*", metavar="VIEW", help="show views; default those of infer.tta"
    )
    parser.add_argument(
        "--weigh-views", action="store_true",
        help="weigh each view by what it is worth on the selection set",
    )  # fmt: skip
    parser.add_argument(
        "--vote", default="soft", choices=VOTES, help="how several models decide; default soft"
    )
    parser.add_argument(
        "--images", nargs="+", metavar="PATH", help="photographs or folders, not the test set"
    )
    parser.add_argument("--out", type=Path, help="folder of the results; default infer in the run")
    parser.add_argument(
        "--pseudo",
        type=Path,
        metavar="DIR",
        help="write sure predictions as labels to train on",
    )
    sure = parser.add_mutually_exclusive_group()
    sure.add_argument(
        "--confidence", nargs="+", type=fraction, default=[0.9], metavar="P",
        help="least probability of a pseudo label, one or one a class; default 0.9",
    )  # fmt: skip
    sure.add_argument(
        "--quantile", nargs="+", type=fraction, metavar="Q",
        help="the share of each class's pixels that is too unsure, in place of --confidence",
    )  # fmt: skip
    compare = parser.add_mutually_exclusive_group()
    compare.add_argument(
        "--compare", action="store_true",
        help="score every fold, soup and vote, with views and without; where the test labels are "
        "known, the most telling of them are scored by default",
    )  # fmt: skip
    compare.add_argument("--brief", action="store_true", help="score the result only")
    parser.add_argument(
        "--allow-leak", action="store_true", help="choose by images that were trained on"
    )
    command.add_run_options(parser)
    return parser.parse_args(argv)


def fraction(text: str) -> float:
    """A number from 0 to 1 on the command line."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, not {text}")
    return value


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


def share(images: Images) -> list[int]:
    """This rank's share of the images."""
    return images.indices[distributed.rank() :: distributed.world_size()]


def key(candidate: Candidate, images: Images) -> tuple[Candidate, tuple[str, ...]]:
    """Under which an evaluation is remembered."""
    return candidate.way, tuple(digests(images.source, images.indices))


def truth_of(images: Images, index: int) -> Tensor | None:
    """The true mask of an image, where it is known."""
    return images.source.mask(index) if images.source.labelled else None


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
    return math.nan if value is None else value


def table(rows: Sequence[dict[str, Any]], columns: Sequence[Images]) -> str:
    """The candidates' mean IoU with 95 % intervals, in 80 columns.

    A sign says whether a line is better or worse than the last one on the same images, or whether
    these are too few to tell (a paired bootstrap: what makes a set easy falls on both).
    """
    titles = [f"{one.title} ({len(one.indices)} images)  " for one in columns]
    lines = ["mean IoU".ljust(28) + "".join(title.rjust(26) for title in titles)]
    for row in rows:
        cells = []
        for one in columns:
            found = row[one.title]
            low, high = found["interval"]
            cells.append(f"{found['miou']:.3f} [{low:.3f}, {high:.3f}] {_sign(found)}".rjust(26))
        lines.append(row["name"][:28].ljust(28) + "".join(cells))
    notes = ["> better, < worse, = not told apart from the last line (paired bootstrap, 95 %)"]
    for one in columns:
        if trained := max(row[one.title]["trained_on"] for row in rows):
            notes.append(f"up to {trained} of the {one.title} images were trained on")
    width = len(lines[0].rstrip())
    return "\n".join(
        [*lines[:-1], "-" * width, command.bold(lines[-1]), *(notes if rows[1:] else notes[1:])]
    )


def _sign(found: dict[str, Any]) -> str:
    if "final_minus_this" not in found:
        return " "
    low, high = found["final_minus_this"]["interval"]
    return "<" if low > 0 else ">" if high < 0 else "="


if __name__ == "__main__":
    command.run(main)
