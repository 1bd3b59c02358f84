"""Scores of candidates on labelled images, and their rows of scores.json."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from segkit.core import checkpoint
from segkit.inference.candidate_predictor import CandidatePredictor, Predictions
from segkit.inference.candidates import Candidate, possible_votes
from segkit.inference.trained_run import Images
from segkit.training.evaluate import Evaluation, count
from segkit.training.metrics import bootstrap_interval, paired_difference, scores


class Scorer:
    """Evaluates candidates, each once.

    Args:
        predictor: Predicts the candidates.
        votes: Kinds of vote to count whenever checkpoints vote: one pass serves all of them.
    """

    def __init__(self, predictor: CandidatePredictor, *, votes: Sequence[str] = ("soft",)) -> None:
        self.predictor, self._votes = predictor, votes
        # Soups, rows and differences to the final candidate ask for the same evaluations.
        self._evaluations: dict[tuple[Candidate, tuple[str, ...]], Evaluation] = {}

    def evaluation(self, candidate: Candidate, images: Images) -> Evaluation:
        """Return the counts of a candidate on labelled images."""
        key = _key(candidate, images)
        if key in self._evaluations:
            return self._evaluations[key]
        shown = f"{candidate.name}, {images.title}"
        if len(candidate.paths) == 1:
            masks = self.predictor.masks(candidate, images)
            self.record(candidate, images, self._count(masks, images, shown))
        else:
            possible = possible_votes(candidate.paths, self._votes)
            votes = dict.fromkeys([candidate.vote, *possible])
            ballots = self.predictor.cast(candidate, images, votes)
            for vote, ballot in zip(votes, ballots, strict=True):
                mine = enumerate(images.share())
                masks = ((i, ballot.result(at), images.truth(i)) for at, i in mine)
                counted = self._count(masks, images, shown)
                self.record(replace(candidate, vote=vote), images, counted)
        return self._evaluations[key]

    def evaluate(self, predict: Callable[[Tensor], Tensor], images: Images) -> Evaluation:
        """Return the counts of any model; ``predict`` maps images to masks."""
        return self._count(self.predictor.predictions(predict, images, labels=True), images)

    def evaluate_masks(
        self, candidate: Candidate, images: Images, mask: Callable[[str], Tensor]
    ) -> None:
        """Evaluate a candidate by masks that it has made before.

        Args:
            candidate: The candidate.
            images: With labels.
            mask: Returns the candidate's mask of an image's name.
        """
        names, truth = images.source.names, images.source.mask
        masks = ((i, mask(names[i]), truth(i)) for i in images.share())
        self.record(candidate, images, self._count(masks, images))

    def record(self, candidate: Candidate, images: Images, evaluation: Evaluation) -> None:
        """Keep a candidate's evaluation that was made elsewhere."""
        self._evaluations[_key(candidate, images)] = evaluation

    def row(
        self, candidate: Candidate, final: Candidate, columns: Sequence[Images]
    ) -> dict[str, Any]:
        """Return a candidate's row of ``scores.json``, with the final candidate's advantage."""
        row: dict[str, Any] = {"name": candidate.name, "views": [str(v) for v in candidate.views]}
        if candidate.fitted:
            row["view_weights"] = [
                self.predictor.view_coefficients(path, candidate.views) for path in candidate.paths
            ]
        states = [checkpoint.entries(path) for path in candidate.paths]
        row["soups"] = [state["soup"] for state in states if "soup" in state]
        trained_on = {mark for state in states for mark in state.get("trained_on", ())}
        for images in columns:
            own = self.evaluation(candidate, images)
            row[images.title] = {
                "miou": scores(own.matrix).miou,
                "interval": bootstrap_interval(own.counts),
                "per_class": scores(own.matrix).iou,
                "images": len(images.indices),
                "trained_on": len(trained_on.intersection(images.digests())),
            }
            if candidate is not final:
                last = self.evaluation(final, images)
                difference, *interval = paired_difference(own.counts, last.counts)
                row[images.title]["final_minus_this"] = {
                    "difference": difference,
                    "interval": interval,
                }
        return row

    def _count(
        self, masks: Predictions, images: Images, description: str = "evaluate"
    ) -> Evaluation:
        return count(
            masks,
            images.source,
            images.indices,
            device=self.predictor.device,
            description=description,
        )


def _key(candidate: Candidate, images: Images) -> tuple[Candidate, tuple[str, ...]]:
    return candidate.way, tuple(images.digests())


def mean_iou(evaluation: Evaluation) -> float:
    """Return the mean IoU, NaN if no class has a pixel."""
    value = scores(evaluation.matrix).miou
    return math.nan if value is None else value
