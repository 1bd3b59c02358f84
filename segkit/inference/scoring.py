"""Scores of candidates on labelled images, and their rows of scores.json."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from segkit.core import checkpoint
from segkit.inference import soup
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
        key = candidate.cache_key, tuple(images.digests())
        if key in self._evaluations:
            return self._evaluations[key]
        title = f"{candidate.name}, {images.title}"
        if len(candidate.paths) == 1:
            masks = self.predictor.predict(candidate, images, labels=True)
            self.record(candidate, images, self.count(masks, images, title))
        else:
            possible = possible_votes(candidate.paths, self._votes)
            kinds = dict.fromkeys([candidate.vote, *possible])
            votes = self.predictor.votes(candidate, images, kinds)
            for kind, vote in zip(kinds, votes, strict=True):
                ranked, mask = enumerate(images.rank_indices()), images.source.mask
                masks = ((index, vote.result(i), mask(index)) for i, index in ranked)
                counted = self.count(masks, images, title)
                self.record(replace(candidate, vote=kind), images, counted)
        return self._evaluations[key]

    def count(
        self, masks: Predictions, images: Images, description: str = "evaluate"
    ) -> Evaluation:
        """Return the counts of this rank's masks, summed over the ranks."""
        device = self.predictor.device
        return count(masks, images.source, images.indices, device=device, description=description)

    def record(self, candidate: Candidate, images: Images, evaluation: Evaluation) -> None:
        """Store an evaluation computed by the caller."""
        self._evaluations[candidate.cache_key, tuple(images.digests())] = evaluation

    def row(
        self, candidate: Candidate, final: Candidate, eval_sets: Sequence[Images]
    ) -> dict[str, Any]:
        """Return a row of ``scores.json``, with its difference to the final candidate."""
        row: dict[str, Any] = {"name": candidate.name, "views": [str(v) for v in candidate.views]}
        if candidate.fitted:
            row["view_weights"] = [
                self.predictor.view_coefficients(path, candidate.views) for path in candidate.paths
            ]
        states = [checkpoint.entries(path) for path in candidate.paths]
        row["soups"] = [state["soup"] for state in states if "soup" in state]
        trained_on = soup.trained_on(states)
        for images in eval_sets:
            evaluation = self.evaluation(candidate, images)
            row[images.title] = {
                "miou": scores(evaluation.matrix).miou,
                "interval": bootstrap_interval(evaluation.counts),
                "per_class": scores(evaluation.matrix).iou,
                "images": len(images.indices),
                "trained_on": len(trained_on.intersection(images.digests())),
            }
            if candidate is not final:
                last = self.evaluation(final, images)
                difference, *interval = paired_difference(evaluation.counts, last.counts)
                row[images.title]["final_minus_this"] = {
                    "difference": difference,
                    "interval": interval,
                }
        return row


def mean_iou(evaluation: Evaluation) -> float:
    """Return the mean IoU, NaN if no class has a pixel."""
    value = scores(evaluation.matrix).miou
    return math.nan if value is None else value
