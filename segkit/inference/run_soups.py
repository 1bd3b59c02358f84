"""Soups of a run's folds: ingredients, selection, BatchNorm, and the file."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from segkit.core import __version__, checkpoint, config, distributed
from segkit.core.errors import ArgumentError, CheckpointError
from segkit.inference import soup
from segkit.inference.candidates import WITHOUT_SELECTION, Candidate
from segkit.inference.scoring import Scorer, mean_iou
from segkit.inference.trained_run import Images, TrainedRun
from segkit.models.kernels.fuse_relu import for_prediction
from segkit.training.evaluate import Evaluation
from segkit.training.metrics import scores


class RunSoups:
    """Makes soups of runs' folds, as files in a folder.

    Args:
        scorer: Scores ingredients and soups.
        folder: Where the soups are saved.
        allow_leak: Choose even by images that an ingredient trained on; the soup's recipe has
            their number.
    """

    def __init__(self, scorer: Scorer, folder: Path, *, allow_leak: bool = False) -> None:
        self._scorer, self._folder, self._allow_leak = scorer, folder, allow_leak
        folder.mkdir(parents=True, exist_ok=True)
        # Shared by all kinds of soups, as each needs an evaluation of a midpoint.
        self._barriers: dict[Path, list[dict[str, Any]]] = {}

    def soup(self, run: TrainedRun, kind: str) -> Path:
        """Return the checkpoint of a run's soup. With one fold, return that fold's checkpoint.

        A soup that is in the folder already, of the same ingredients and settings, is kept.

        Args:
            run: Its best checkpoints are the ingredients, which may not have trained on images of
                the selection set.
            kind: One of :data:`segkit.inference.candidates.SOUPS`.
        """
        paths = run.best_checkpoints()
        if len(paths) == 1:
            return paths[0]
        selection, leaked = run.selection(), 0
        if selection is not None:
            allow_leak = self._allow_leak or kind in WITHOUT_SELECTION
            leaked = soup.check_selection(paths, selection.digests(), allow_leak=allow_leak)
        elif kind not in WITHOUT_SELECTION:
            raise ArgumentError(
                f"{run.folder}: held no selection set out, which a {kind} soup needs",
                "train with data.selection above 0",
                kind=[*WITHOUT_SELECTION],
            )
        path = self._folder / f"{kind}-soup-of-{run.folder.name}.pt"
        digests = [self._scorer.predictor.digest(ingredient) for ingredient in paths]
        chosen_by = selection.digests() if selection else []
        depends_on = [__version__, kind, digests, chosen_by, config.to_dict(run.config)]
        origin = hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()
        known = checkpoint.entries(path).get("soup") if path.exists() else {}
        if known is None:
            raise CheckpointError(
                f"{path}: holds no soup, which is to be written here; move the file"
            )
        if distributed.broadcast(known.get("origin")) != origin:
            state = self._make(run, kind, paths, selection, Candidate(f"{kind} soup", (path,)))
            state["soup"] |= {"leaked": leaked, "origin": origin}
            if distributed.is_main():
                checkpoint.save(state, path)
            distributed.barrier()
        return path

    def _make(
        self,
        run: TrainedRun,
        kind: str,
        paths: Sequence[Path],
        selection: Images | None,
        result: Candidate,
    ) -> dict[str, Any]:
        """Return a soup's checkpoint, and record its evaluation for ``result``."""
        evaluator = _MixtureEvaluator(self._scorer, run, paths[0], selection)
        alone: list[float] = []
        if selection is not None:
            folds = [Candidate(path.parent.name, (path,)) for path in paths]
            alone = [mean_iou(self._scorer.evaluation(fold, selection)) for fold in folds]
            if run.folder not in self._barriers:
                barriers = soup.check_barriers(paths, evaluator.score, scores=alone)
                self._barriers[run.folder] = barriers
        if kind == "uniform":
            mixed = soup.uniform(paths)
        elif kind == "stock":
            mixed = soup.stock(paths, run.initial_weights())
        elif kind == "partwise":
            parts = _parts_of(evaluator.model)
            mixed = soup.partwise(paths, evaluator.counts, parts=parts, scores=alone)
        else:
            mixed = getattr(soup, kind)(paths, evaluator.score, scores=alone)
        if len(mixed.members) > 1:
            evaluator.load(mixed.weights)
            mixed = replace(mixed, weights=evaluator.model.state_dict())
        state = soup.as_checkpoint(mixed)
        state["soup"] |= {"barriers": self._barriers.get(run.folder, [])}
        if selection is not None:
            evaluator.model.load_state_dict(mixed.weights)
            counted = evaluator.evaluate(record=result)
            state |= {"score": mean_iou(counted), "iou": list(scores(counted.matrix).iou)}
        return state


class _MixtureEvaluator:
    """Evaluates mixtures by loading their weights into one model."""

    def __init__(
        self, scorer: Scorer, run: TrainedRun, path: Path, selection: Images | None
    ) -> None:
        self._scorer, self._run, self._selection = scorer, run, selection
        self._predictor = scorer.predictor.load(path, fuse=False)
        self.model = self._predictor.model

    def load(self, weights: soup.State) -> None:
        """Load weights and estimate the BatchNorm statistics that belong to them."""
        self.model.load_state_dict(weights)
        batches = self._run.training_batches(self._scorer.predictor.device)
        soup.reestimate_batchnorm(self.model, batches)

    def score(self, weights: soup.State) -> float:
        """Return the mean IoU of weights on the selection set."""
        self.load(weights)
        return mean_iou(self.evaluate())

    def counts(self, weights: soup.State) -> Tensor:
        """Return the pixel counts of weights on each image of the selection set."""
        self.load(weights)
        return self.evaluate().counts

    def evaluate(self, *, record: Candidate | None = None) -> Evaluation:
        """Return the counts of the model on the selection set."""
        assert self._selection is not None
        # Fused as every checkpoint is when it is scored, so that the scores are equal to the bit.
        self._predictor.model = for_prediction(self.model, self._predictor.amp)
        predictions = self._scorer.predictor.predictions
        masks = predictions(self._predictor.mask, self._selection, labels=True)
        return self._scorer.count(masks, self._selection, record=record)


def _parts_of(model: nn.Module) -> dict[str, list[str]]:
    """Return the modules of a model's parts: the stages of its backbone, and its decoder."""
    stages = getattr(model.get_submodule("backbone"), "stages", None)
    if stages is None:
        return {"backbone": ["backbone"], "decoder": ["decoder"]}
    named = enumerate([f"backbone.{module}" for module in stage] for stage in stages)
    return {**{f"stage {i}": modules for i, modules in named}, "decoder": ["decoder"]}
