"""A candidate: checkpoints, views and vote used together to predict."""

import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from segkit.core import checkpoint
from segkit.core.errors import SegkitError
from segkit.inference.trained_run import TrainedRun, common_selection
from segkit.inference.tta import View

VOTES = ("soft", "hard", "weighted")
SOUPS = ("greedy", "uniform", "learned", "stock", "pruned", "partwise")
WITHOUT_SELECTION = ("uniform", "stock")
"""Kinds of soup that choose nothing, so that they need no selection set."""
VIEWED = ", views"

SoupOf = Callable[[TrainedRun, str], Path]
"""Returns the checkpoint of a run's soup of a kind; see ``segkit.inference.run_soups``."""


@dataclass(frozen=True)
class Candidate:
    """A way to predict: checkpoints that vote, and the views that each predicts.

    Args:
        name: In the table.
        paths: Checkpoints, the best first.
        views: Empty for the image as it is.
        fitted: True if each checkpoint's view coefficients are fitted on the selection set; else
            they are equal.
        vote: How several checkpoints decide, one of :data:`VOTES`.
        calibrated: True if each voter's probabilities are calibrated before the vote, by a
            temperature that is fitted on the selection set.
    """

    name: str
    paths: tuple[Path, ...]
    views: tuple[View, ...] = ()
    fitted: bool = False
    vote: str = "soft"
    calibrated: bool = False

    @property
    def cache_key(self) -> "Candidate":
        """Cache key: without the name, and without what only voters have if there is no vote."""
        if len(self.paths) > 1:
            return replace(self, name="")
        return replace(self, name="", vote="", calibrated=False)


def final_candidate(
    runs: Sequence[TrainedRun],
    *,
    kind: str | None,
    views: tuple[View, ...],
    fitted: bool,
    vote: str,
    soup_of: SoupOf,
) -> Candidate:
    """Return the candidate that makes the results.

    ``kind`` is that of each run's soup; with ``None`` the best checkpoints of all folds vote.
    """
    voters = [[soup_of(run, kind)] if kind else run.best_checkpoints() for run in runs]
    paths = best_first([path for of_run in voters for path in of_run])
    name = f"{kind} soup" if kind else "best checkpoint"
    name = name if len(paths) == 1 else f"{vote} vote"
    if views:
        name += f"{VIEWED} fitted" if fitted else VIEWED
    return Candidate(name, paths, views, fitted and bool(views), vote)


def comparison_candidates(
    runs: Sequence[TrainedRun],
    final: Candidate,
    *,
    kinds: Collection[str],
    votes: Sequence[str],
    views_for_all: bool,
    soup_of: SoupOf,
) -> list[Candidate]:
    """Return other candidates of the same runs: folds, soups, votes, and these with views.

    ``final``, the candidate to compare with, is not among them; its views are used, with
    ``views_for_all`` for every candidate, else for soups and votes.
    """
    alone, mixed, voters = [], [], []
    for run in runs:
        prefix = f"{run.folder.name} " if len(runs) > 1 else ""
        folds = run.best_checkpoints()
        voters += folds
        alone += [Candidate(f"{prefix}{path.parent.name}", (path,)) for path in folds]
        for kind in kinds if len(folds) > 1 else ():
            if _can_make(run, kind):
                mixed.append(Candidate(f"{prefix}{kind} soup", (soup_of(run, kind),)))
    paths = best_first(voters)
    for vote in possible_votes(paths, votes) if len(paths) > 1 else ():
        mixed.append(Candidate(f"{vote} vote", paths, vote=vote))
    shown = [*alone, *mixed] if views_for_all else mixed or alone
    viewed = [
        replace(candidate, name=candidate.name + VIEWED, views=final.views)
        for candidate in shown
        if final.views and (views_for_all or not candidate.name.endswith("uniform soup"))
    ]
    return [each for each in (*alone, *mixed, *viewed) if each.cache_key != final.cache_key]


def _can_make(run: TrainedRun, kind: str) -> bool:
    """Return whether a run has what a kind of soup needs; warn if its start is not known."""
    if kind == "stock":
        try:
            run.initial_weights()
        except SegkitError as error:
            warnings.warn(f"no stock soup is compared: {error}", stacklevel=3)
            return False
    return kind in WITHOUT_SELECTION or common_selection([run]) is not None


def possible_votes(paths: Sequence[Path], votes: Sequence[str]) -> list[str]:
    """Return the kinds of vote that these checkpoints can take part in.

    A single kind is returned unchecked; predicting raises if it is impossible.
    """
    if len(votes) == 1:
        return list(votes)
    have_iou = all("iou" in checkpoint.entries(path) for path in paths)
    return [vote for vote in votes if vote != "weighted" or have_iou]


def best_first(paths: Sequence[Path]) -> tuple[Path, ...]:
    """Return checkpoints in order of the scores they recorded: voters by rank."""
    return tuple(sorted(paths, key=lambda path: -(checkpoint.entries(path).get("score") or 0.0)))
