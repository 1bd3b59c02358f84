"""Predicting images with a candidate: its checkpoints, views and vote."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from segkit.core import __version__, checkpoint, config, distributed
from segkit.core.errors import ArgumentError, SegkitError
from segkit.data.loader import EvalBatches
from segkit.inference import soup
from segkit.inference.calibration import TemperatureFit
from segkit.inference.candidates import Candidate
from segkit.inference.model_file import load
from segkit.inference.predictor import Predictor
from segkit.inference.trained_run import Images, TrainedRun, common_selection
from segkit.inference.tta import View, fit_coefficients, true_class_samples
from segkit.inference.voting import HardVote, SoftVote, Vote

Predictions = Iterator[tuple[int, Tensor, Tensor | None]]
"""Index of an image, its mask or probabilities, and its true mask if labels were asked for."""


class CandidatePredictor:
    """Predicts images with any candidate of some runs.

    Args:
        runs: Trained runs; view coefficients and temperatures are fitted on their common selection
            set. The first run's configuration sets the batch size and the workers.
        folder: Folder of temporary files, for votes too large for memory.
        allow_leak: Fit even on images that a checkpoint trained on.
    """

    def __init__(
        self,
        runs: Sequence[TrainedRun],
        device: torch.device,
        *,
        folder: Path,
        allow_leak: bool = False,
    ) -> None:
        self.runs, self.device, self.folder = runs, device, folder
        self._allow_leak = allow_leak
        folder.mkdir(parents=True, exist_ok=True)
        # Cached: verifying reads the whole file; fitting predicts once per view.
        self._digests: dict[Path, str] = {}
        self._view_coefficients: dict[tuple[Path, tuple[View, ...]], tuple[float, ...]] = {}
        self._temperatures: dict[Candidate, float] = {}

    def predict(
        self, candidate: Candidate, images: Images, *, soft: bool = False, labels: bool = False
    ) -> Predictions:
        """Yield masks of this rank's images, or probabilities, which a hard vote lacks."""
        if len(candidate.paths) == 1:
            predictor = self._predictor(candidate, candidate.paths[0])
            function = predictor.probabilities if soft else predictor.mask
            yield from self.predictions(function, images, labels=labels)
            return
        if soft and candidate.vote == "hard":
            raise ArgumentError(
                "a hard vote has no probabilities, which pseudo labels, calibration and the "
                "outputs 'soft' and 'confidence' need",
                vote=["soft", "weighted"],
            )
        (vote,) = self.votes(candidate, images, [candidate.vote])
        result = vote.probabilities if soft and isinstance(vote, SoftVote) else vote.result
        for position, index in enumerate(images.rank_indices()):
            if index not in (images.left_out or ()):
                yield index, result(position), images.source.mask(index) if labels else None

    def votes(self, candidate: Candidate, images: Images, kinds: Collection[str]) -> list[Vote]:
        """Return the checkpoints' votes on this rank's images, of several kinds in one pass.

        They need equal classes; for a weighted vote each needs the IoU of its classes.
        """
        states = [checkpoint.entries(path) for path in candidate.paths]
        if any(state["classes"] != states[0]["classes"] for state in states):
            raise SegkitError("the runs have different classes, so they cannot vote together")
        for path, state in zip(candidate.paths, states, strict=True):
            if "weighted" in kinds and "iou" not in state:
                raise ArgumentError(
                    f"{path}: has no IoU of its classes, the coefficients of a weighted vote",
                    "train with data.selection above 0",
                    vote=["soft", "hard"],
                )
        mine, folder = images.rank_indices(), self.folder
        shapes, classes = [images.source.size(index) for index in mine], len(states[0]["classes"])
        votes: list[Vote] = []
        for kind in kinds:
            coefficients = None
            if kind == "weighted":
                coefficients = torch.tensor([[x or 0.0 for x in state["iou"]] for state in states])
            maker = HardVote if kind == "hard" else SoftVote
            votes.append(maker(shapes, classes, coefficients=coefficients, folder=folder))
        positions = {index: number for number, index in enumerate(mine)}
        batches = self._batches(images, labels=False)
        for voter, path in enumerate(candidate.paths):
            predictor = self._predictor(candidate, path)
            for batch in batches:
                for top, scores in predictor.probability_bands(batch.images):
                    for index, band in zip(batch.indices, scores, strict=True):
                        for vote in votes:
                            vote.add(positions[index], band, voter=voter, top=top)
        return votes

    def origin(self, candidate: Candidate) -> dict[str, Any]:
        """Return all that a candidate's predictions depend on, JSON-serializable."""
        models = []
        for path in candidate.paths:
            trained = config.parse(checkpoint.entries(path)["config"], str(path))
            infer = asdict(config.override(trained, self.runs[0].overrides).infer)
            del infer["outputs"], infer["tta"], infer["details"]
            coefficients, temperature = self._fitted(candidate, path)
            fitted = {"view_weights": coefficients, "temperature": temperature}
            models.append({"sha256": self.digest(path), "infer": infer, **fitted})
        return {
            "segkit": __version__,
            "device": self.device.type,
            "models": models,
            "views": [str(view) for view in candidate.views],
            "vote": candidate.cache_key.vote,
        }

    def digest(self, path: Path) -> str:
        """Return a checkpoint's digest; the file is read and verified once."""
        if path not in self._digests:
            self._digests[path] = checkpoint.digest(path)
        return self._digests[path]

    def load(self, path: Path, **options: Any) -> Predictor:
        """Return a checkpoint's predictor; see :func:`segkit.inference.model_file.load`."""
        self.digest(path)
        overrides = self.runs[0].overrides
        return load(path, device=self.device, overrides=overrides, verify=False, **options)

    def view_coefficients(self, path: Path, views: tuple[View, ...]) -> tuple[float, ...]:
        """Return a checkpoint's coefficient for each view, fitted on the selection set."""
        if (path, views) in self._view_coefficients:
            return self._view_coefficients[path, views]
        images = self._selection("view coefficients", [path])
        row = {index: number for number, index in enumerate(images.indices)}
        samples = torch.zeros(len(views), len(row), 1024)
        predictor = self.load(path)
        for number, view in enumerate(views):
            predictor.views = (view,)
            predicted = self.predictions(predictor.probabilities, images, labels=True)
            for index, scored, mask in predicted:
                assert mask is not None
                samples[number, row[index]] = true_class_samples(scored, mask).cpu()
        samples = distributed.all_reduce(samples.to(self.device)).cpu().flatten(1)
        fitted = tuple(fit_coefficients(samples[:, ~samples[0].isnan()]))
        self._view_coefficients[path, views] = fitted
        return fitted

    def temperature(self, candidate: Candidate) -> float:
        """Return the temperature of a candidate's probabilities, fitted on the selection set."""
        key = candidate.cache_key
        if key not in self._temperatures:
            images = self._selection("temperatures", candidate.paths)
            fit = TemperatureFit(images.indices)
            for index, scored, mask in self.predict(candidate, images, soft=True, labels=True):
                assert mask is not None
                fit.add(index, scored, mask)
            self._temperatures[key] = fit.temperature(self.device)
        return self._temperatures[key]

    def _selection(self, fitted: str, paths: Sequence[Path]) -> Images:
        """Return the images to fit something on, of which no checkpoint trained on any."""
        images = common_selection(self.runs)
        if images is None:
            raise SegkitError(
                f"{fitted} are fitted on a selection set; train with data.selection above 0"
            )
        soup.check_selection(paths, images.digests(), allow_leak=self._allow_leak)
        return images

    def predictions(
        self, predict: Callable[[Tensor], Tensor], images: Images, *, labels: bool
    ) -> Predictions:
        """Yield ``predict`` of this rank's images, and true masks with ``labels``."""
        for batch in self._batches(images, labels=labels):
            masks = batch.masks if batch.masks is not None else [None] * len(batch.indices)
            yield from zip(batch.indices, predict(batch.images), masks, strict=True)

    def _batches(self, images: Images, *, labels: bool) -> EvalBatches:
        # The predictor pads each view to infer.pad. Padding before a flip would change the result,
        # so that only validation, which has no views, may pad and combine images of other sizes.
        cfg = self.runs[0].config
        return EvalBatches(
            images.source, images.indices, labels=labels, batch_size=cfg.infer.batch_size,
            workers=cfg.data.workers, device=self.device, left_out=images.left_out,
        )  # fmt: skip

    def _predictor(self, candidate: Candidate, path: Path) -> Predictor:
        coefficients, temperature = self._fitted(candidate, path)
        predictor = self.load(path, views=candidate.views, coefficients=coefficients)
        predictor.temperature = temperature
        return predictor

    def _fitted(self, candidate: Candidate, path: Path) -> tuple[tuple[float, ...] | None, float]:
        """Return a voter's view coefficients, ``None`` if they are equal, and its temperature."""
        fitted = self.view_coefficients(path, candidate.views) if candidate.fitted else None
        calibrated = candidate.cache_key.calibrated
        return fitted, self.temperature(replace(candidate, paths=(path,))) if calibrated else 1.0
