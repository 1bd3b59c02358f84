"""Ways to predict with trained runs: soups, views and votes, and what each is worth."""

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

from segkit.augment.pipeline import build_pipeline
from segkit.core import __version__, checkpoint, config, distributed
from segkit.core.config import Config
from segkit.core.errors import CheckpointError, SegkitError
from segkit.core.run import Run
from segkit.data import open_source
from segkit.data.folds import Split
from segkit.data.loader import TrainImages, TrainOrder, digests, train_batches
from segkit.data.source import Source, positions
from segkit.inference import soup
from segkit.inference.predictor import Predictor
from segkit.inference.tta import View, fit_weights, true_class_samples
from segkit.inference.voting import HardVote, SoftVote
from segkit.models.kernels.fuse import fuse_batch_norm
from segkit.models.segmenter import load_model
from segkit.training.evaluate import Evaluation, predictions, tally
from segkit.training.metrics import bootstrap_interval, paired_difference, scores
from segkit.training.step import precision

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
    """Some images of a source, and the column their scores stand in.

    Args:
        title: Of the column.
        source: Where the images are read from.
        indices: Their numbers in it.
        left_out: Takes a sentence for each image that cannot be read, by its number; without it
            the first such image is an error.
    """

    title: str
    source: Source
    indices: list[int]
    left_out: dict[int, str] | None = None


class Combiner:
    """Mixes and predicts what trained runs offer, and remembers every soup and score it made.

    Args:
        runs: Whose checkpoints predict; the first one's configuration reads the images.
        out: Folder of the soups, and of votes too large for memory.
        device: This rank's.
        overrides: Settings in place of the runs' own, as ``--set``.
        votes: The kinds of vote that are counted whenever models vote.
        allow_leak: Let images choose that were trained on; the soup records how many.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        out: Path,
        device: torch.device,
        *,
        overrides: Sequence[str] = (),
        votes: Sequence[str] = ("soft",),
        allow_leak: bool = False,
    ) -> None:
        self.runs, self.out, self.device = runs, out, device
        self._overrides, self._votes, self._allow_leak = overrides, votes, allow_leak
        self._configs: dict[Path, Config] = {}
        self._digests: dict[Path, str] = {}
        self._sources: dict[tuple[Path, str], Source] = {}
        self._soups: dict[tuple[Path, str], Path] = {}
        self._barriers: dict[Path, list[dict[str, Any]]] = {}
        self._view_weights: dict[tuple[Path, tuple[View, ...]], tuple[float, ...]] = {}
        self._evaluations: dict[tuple[Candidate, tuple[str, ...]], Evaluation] = {}
        out.mkdir(parents=True, exist_ok=True)

    def config(self, run: Run) -> Config:
        """A run's configuration with the overrides, read once."""
        if run.folder not in self._configs:
            self._configs[run.folder] = resolve(run, self._overrides)
        return self._configs[run.folder]

    # ---- candidates

    def candidate(
        self, *, kind: str | None, views: tuple[View, ...], weighed: bool, vote: str
    ) -> Candidate:
        """Each run's soup of a kind, or with ``None`` the best of its folds; several vote."""
        members = [
            path
            for run in self.runs
            for path in ([self.soup(run, kind)] if kind else best_of_folds(run))
        ]
        name = f"{kind} soup" if kind else "best checkpoint"
        name = name if len(members) == 1 else f"{vote} vote"
        name += VIEWED if views else ""
        name += " weighed" if views and weighed else ""
        return Candidate(name, best_first(members), views, bool(views) and weighed, vote)

    def rivals(
        self, final: Candidate, kinds: Collection[str], *, everything: bool
    ) -> list[Candidate]:
        """What else could have been done with these runs: folds, soups, votes, and with views.

        Args:
            final: Whose views are shown; it is not among the rivals.
            kinds: Of soups.
            everything: Show views to every rival, not only to the most telling ones.
        """
        alone, mixed, voters = [], [], []
        for run in self.runs:
            prefix = f"{run.folder.name} " if len(self.runs) > 1 else ""
            folds = best_of_folds(run)
            voters += folds
            alone += [Candidate(f"{prefix}{path.parent.name}", (path,)) for path in folds]
            for kind in kinds if len(folds) > 1 else ():
                if kind == "uniform" or self.selection([run]) is not None:
                    mixed.append(Candidate(f"{prefix}{kind} soup", (self.soup(run, kind),)))
        if len(voters) > 1:
            paths = best_first(voters)
            mixed += [Candidate(f"{vote} vote", paths, vote=vote) for vote in self.votes(paths)]
        shown = [*alone, *mixed] if everything else mixed or alone
        viewed = [
            replace(one, name=one.name + VIEWED, views=final.views)
            for one in shown
            if final.views and (everything or not one.name.endswith("uniform soup"))
        ]
        return [one for one in (*alone, *mixed, *viewed) if one.way != final.way]

    def votes(self, paths: Sequence[Path]) -> list[str]:
        """The kinds of vote these checkpoints can take part in; a single one is not questioned."""
        if len(self._votes) == 1:
            return list(self._votes)
        weighable = all("iou" in load_state(path) for path in paths)
        return [vote for vote in self._votes if vote != "weighted" or weighable]

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
            allow_leak = self._allow_leak or kind == "uniform"  # which chooses nothing
            leaked = soup.check_selection(paths, chooses, allow_leak=allow_leak)
        elif kind != "uniform":
            raise SegkitError(
                f"{run.folder}: held no selection set out, which a {kind} soup needs; "
                "train with data.selection above 0, or use --soup uniform"
            )
        path = self.out / f"{kind}-soup-of-{run.folder.name}.pt"
        origin = self._origin_of_soup(run, kind, paths, selection)
        known = _origin_of(path) if path.exists() else None
        if distributed.broadcast(known) == origin:
            return path  # an earlier inference made it of the same ingredients

        predict = self.predictor(paths[0], fuse=False)
        model = predict.model

        def settle(weights: dict[str, Tensor]) -> None:
            model.load_state_dict(weights)
            soup.reestimate_batchnorm(model, self._training_images(run))

        def count(images: Images) -> Evaluation:
            predict.model = fuse_batch_norm(model)  # to the bit as every checkpoint is scored
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
        cfg = config.to_dict(self.config(run))
        chooses = digests(selection.source, selection.indices) if selection else []
        files = [self.digest(path) for path in paths]
        everything = json.dumps([__version__, kind, files, chooses, cfg])
        return hashlib.sha256(everything.encode()).hexdigest()

    def _training_images(self, run: Run) -> Iterator[Tensor]:
        """Batches of training images as the folds saw them, to estimate BatchNorm from."""
        cfg = self.config(run)
        source = self.source(run, "train")
        split = Split.load(run.folder / "folds.json")
        names = {name for fold in range(len(split.folds)) for name in split.training(fold)}
        indices = positions(source, sorted(names))
        images = TrainImages(source, indices, build_pipeline(cfg), seed=cfg.train.seed)
        size = cfg.train.batch_size
        order = TrainOrder(indices, epochs=1, batch_size=size, accumulate=1, seed=cfg.train.seed)
        batches = train_batches(images, order, workers=cfg.data.workers, device=self.device)
        count = max(1, cfg.infer.batch_norm_images // size)
        shown = distributed.Progress(islice(batches, count), "BatchNorm", total=count, unit="batch")
        return (image for image, _ in shown)

    # ---- predictions

    def source(self, run: Run, part: str) -> Source:
        """A part of a run's data, opened once."""
        if (run.folder, part) not in self._sources:
            self._sources[run.folder, part] = open_source(self.config(run), part)
        return self._sources[run.folder, part]

    def labelled(self) -> set[str]:
        """Digests of the runs' labelled images: they train, validate or choose already."""
        known: set[str] = set()
        for run in self.runs:
            for part in ("train", "val"):
                if getattr(self.config(run).data, part) is not None:
                    source = self.source(run, part)
                    known.update(digests(source, range(len(source))))
        return known

    def digest(self, path: Path) -> str:
        """A checkpoint's digest; the file is read and verified once."""
        if path not in self._digests:
            self._digests[path] = checkpoint.digest(path)
        return self._digests[path]

    def predictor(
        self,
        path: Path,
        views: tuple[View, ...] = (),
        *,
        weighed: bool = False,
        fuse: bool = True,
    ) -> Predictor:
        """A checkpoint ready to predict, the way its own configuration says.

        Without ``fuse`` it keeps its BatchNorm, and so takes other weights.
        """
        self.digest(path)
        model, trained, _ = load_model(path, verify=False)
        cfg = config.override(trained, self._overrides)
        layout = torch.channels_last if cfg.train.channels_last else torch.contiguous_format
        model.to(self.device).to(memory_format=layout)
        return Predictor(
            fuse_batch_norm(model) if fuse else model,
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
                raise SegkitError(
                    "weighing views needs a selection set; train with data.selection above 0"
                )
            chooses = digests(images.source, images.indices)
            soup.check_selection([path], chooses, allow_leak=self._allow_leak)
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
                if index not in (images.left_out or ()):
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
                if index not in (images.left_out or ()):
                    yield index, vote.probabilities(place), None

    def origin(self, candidate: Candidate) -> dict[str, Any]:
        """All that a candidate's predictions depend on."""
        ways = []
        for path in candidate.paths:
            trained = config.parse(load_state(path)["config"], str(path))
            infer = asdict(config.override(trained, self._overrides).infer)
            del infer["outputs"], infer["tta"]
            weights = self.view_weights(path, candidate.views) if candidate.weighed else None
            ways.append({"sha256": self.digest(path), "infer": infer, "view_weights": weights})
        return {
            "segkit": __version__,
            "device": self.device.type,
            "models": ways,
            "views": [str(view) for view in candidate.views],
            "vote": candidate.way.vote,
        }

    def _predictions(
        self, predict: Callable[[Tensor], Tensor], images: Images, *, labels: bool
    ) -> Predictions:
        cfg = self.config(self.runs[0])
        return predictions(
            predict,
            images.source,
            images.indices,
            labels=labels,
            batch_size=cfg.infer.batch_size,
            workers=cfg.data.workers,
            left_out=images.left_out,
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
        cfg = self.config(run)
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

    def score(self, candidate: Candidate, images: Images, mask: Callable[[str], Tensor]) -> None:
        """Count a candidate's masks that were made already, so that it need not predict again.

        Args:
            candidate: Whose masks they are.
            images: With labels.
            mask: From an image's name.
        """
        names, truth = images.source.names, images.source.mask
        found = ((i, mask(names[i]), truth(i)) for i in share(images))
        counted = tally(found, images.source, images.indices, device=self.device)
        self._evaluations[key(candidate, images)] = counted

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


def resolve(run: Run, overrides: Sequence[str]) -> Config:
    """A run's configuration with settings in place of its own."""
    return config.override(config.parse(run.read("config.json"), str(run.folder)), overrides)


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
    order = sorted(range(len(paths)), key=lambda i: -(states[i].get("score") or 0.0))
    return tuple(paths[i] for i in order)


def load_state(path: Path, *needs: str) -> dict[str, Any]:
    """A checkpoint's entries, ``needs`` among them, its tensors left in the file."""
    return checkpoint.load(path, mmap=True, verify=False, needs=(*checkpoint.MODEL, *needs))


def _origin_of(path: Path) -> str | None:
    """Return what a soup's file says it was made of.

    Raises:
        CheckpointError: It is no soup, and so must not be overwritten.
    """
    about = load_state(path).get("soup")
    if about is None:
        raise CheckpointError(f"{path}: holds no soup, which is to be written here; move the file")
    return about.get("origin")


def miou(found: Evaluation) -> float:
    """Mean IoU, NaN where no class has a pixel."""
    value = scores(found.matrix).miou
    return math.nan if value is None else value
