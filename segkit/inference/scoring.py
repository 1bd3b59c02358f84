"""Scores of candidates on labelled images, and their rows of scores.json."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from segkit.core import checkpoint
from segkit.inference import soup
from segkit.inference.calibration import CalibrationCounter, sharpened
from segkit.inference.candidate_predictor import CandidatePredictor, Predictions
from segkit.inference.candidates import Candidate, possible_votes
from segkit.inference.trained_run import Images
from segkit.training.details import DetailCounter
from segkit.training.evaluate import Evaluation, count
from segkit.training.metrics import bootstrap_interval, paired_difference, scores


class Scorer:
    """Evaluates candidates, each once.

    Args:
        votes: Kinds of vote to count whenever checkpoints vote: one pass serves all of them.
        details: Count boundaries and objects too.
    """

    def __init__(
        self,
        predictor: CandidatePredictor,
        *,
        votes: Sequence[str] = ("soft",),
        details: bool = True,
    ) -> None:
        self.predictor, self._votes, self._details = predictor, votes, details
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
            self.count(masks, images, title, record=candidate)
        else:
            possible = possible_votes(candidate.paths, self._votes)
            kinds = dict.fromkeys([candidate.vote, *possible])
            votes = self.predictor.votes(candidate, images, kinds)
            for kind, vote in zip(kinds, votes, strict=True):
                ranked, mask = enumerate(images.rank_indices()), images.source.mask
                masks = ((index, vote.result(i), mask(index)) for i, index in ranked)
                self.count(masks, images, title, record=replace(candidate, vote=kind))
        return self._evaluations[key]

    def count(
        self,
        masks: Predictions,
        images: Images,
        description: str = "evaluate",
        *,
        record: Candidate | None = None,
    ) -> Evaluation:
        """Return the counts of this rank's masks, summed over the ranks.

        They are stored as the evaluation of a candidate. Without one, the evaluation only chooses,
        and leaves boundaries and objects out.
        """
        device, indices = self.predictor.device, images.indices
        counter = DetailCounter(indices, len(images.source.classes))
        wanted = self._details and record is not None
        counted = count(
            masks, images.source, indices,
            device=device, description=description, callbacks=[counter.add] if wanted else (),
        )  # fmt: skip
        if wanted:
            counted = replace(counted, details=counter.result(device))
        if record is not None:
            self._evaluations[record.cache_key, tuple(images.digests())] = counted
        return counted

    def calibration(self, candidate: Candidate, images: Images) -> dict[str, Any]:
        """Return a candidate's calibration error and Brier score, without and with temperature."""
        temperature = self.predictor.temperature(candidate)
        counters = [CalibrationCounter(images.indices, len(images.source.classes)) for _ in "ab"]
        predicted = self.predictor.predict(candidate, images, soft=True, labels=True)
        for index, scored, mask in predicted:
            assert mask is not None
            counters[0].add(index, scored, mask)
            counters[1].add(index, sharpened(scored, temperature), mask)
        before, after = (counter.result(self.predictor.device) for counter in counters)
        return {**after, **{f"{key}_before": value for key, value in before.items()}}

    def row(
        self,
        candidate: Candidate,
        final: Candidate,
        eval_sets: Sequence[Images],
        *,
        calibrate: bool = False,
    ) -> dict[str, Any]:
        """Return a row of ``scores.json``, with its difference to the final candidate.

        With ``calibrate``, it has the temperature and the scores of the probabilities.
        """
        calibrate = calibrate and candidate.cache_key.vote != "hard"
        row: dict[str, Any] = {"name": candidate.name, "views": [str(v) for v in candidate.views]}
        if candidate.fitted:
            row["view_weights"] = [
                self.predictor.view_coefficients(path, candidate.views) for path in candidate.paths
            ]
        states = [checkpoint.entries(path) for path in candidate.paths]
        row["soups"] = [state["soup"] for state in states if "soup" in state]
        trained_on = soup.trained_on(states)
        if calibrate:
            row["temperature"] = self.predictor.temperature(candidate)
        for images in eval_sets:
            evaluation = self.evaluation(candidate, images)
            scored = scores(evaluation.matrix)
            row[images.title] = {
                "miou": scored.miou,
                "interval": bootstrap_interval(evaluation.counts),
                "per_class": scored.iou,
                "images": len(images.indices),
                "trained_on": len(trained_on.intersection(images.digests())),
                "details": evaluation.details.to_dict() if evaluation.details else {},
            }
            if calibrate:
                row[images.title]["details"] |= self.calibration(candidate, images)
            if candidate is not final:
                last = self.evaluation(final, images)
                difference, *interval = paired_difference(evaluation.counts, last.counts)
                better = {"difference": difference, "interval": interval}
                row[images.title]["final_minus_this"] = better
        return row


def mean_iou(evaluation: Evaluation) -> float:
    """Return the mean IoU, NaN if no class has a pixel."""
    value = scores(evaluation.matrix).miou
    return math.nan if value is None else value
