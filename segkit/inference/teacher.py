"""The teacher of a distillation: a vote of trained models, which gives the soft labels of batches.

Hinton et al. 2015, https://arxiv.org/abs/1503.02531
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from segkit.core import checkpoint
from segkit.core.config import Config
from segkit.core.errors import ConfigError, DataError, SegkitError
from segkit.core.run import Run
from segkit.data.loader import digests
from segkit.inference import soup
from segkit.inference.model_file import load
from segkit.inference.trained_run import TrainedRun
from segkit.training.preparation import Fold, TrainData


class Teacher:
    """The mean of the probabilities of several models, for normalized batches of a training.

    It predicts the augmented images themselves, so its soft labels fit any augmentation. It uses no
    random numbers.

    Args:
        paths: Checkpoints of the models.
        mean, std: Normalization of the batches; each model has its own.
        device: Of the models and the batches.

    Shape:
        images: (B, 3, H, W), normalized
        returns: (B, C, H, W), float32
    """

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
    ) -> None:
        self.digests = [checkpoint.digest(path) for path in paths]
        states = [checkpoint.entries(path) for path in paths]
        self.trained_on = soup.trained_on(states)  # as far as recorded
        self._models = [
            load(path, device=device, overrides=["infer.graphs=false"], verify=False)
            for path in paths
        ]
        self._mean, self._std = (
            255 * torch.tensor(values, device=device).view(-1, 1, 1) for values in (mean, std)
        )

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        pixels = torch.addcmul(self._mean, images.float(), self._std)
        first, *others = self._models
        total = first.batch_probabilities(pixels)
        for model in others:
            total += model.batch_probabilities(pixels)
        return total / len(self._models)

    def recorded_in(self, entries: Mapping[str, Any]) -> dict[str, Any]:
        """Return a student's checkpoint entries; it learns the labels that its teacher learned."""
        trained_on = sorted({*entries["trained_on"], *self.trained_on})
        return {**entries, "trained_on": trained_on, "teacher": self.digests}


def teacher_checkpoints(names: str | Sequence[str]) -> list[Path]:
    """Return the checkpoints that ``data.teacher`` names: files, and each run's best ones."""
    paths = []
    for name in [names] if isinstance(names, str) else names:
        try:
            run = () if Path(name).is_file() else TrainedRun(Run.open(name)).best_checkpoints()
        except SegkitError as error:
            raise ConfigError(f"data.teacher: {error}") from error
        paths += run or [Path(name)]
    if not paths:
        raise ConfigError("data.teacher: is empty; expected a trained run, or null")
    return paths


def open_teacher(
    cfg: Config,
    data: TrainData,
    folds: Sequence[Fold],
    device: torch.device,
    say: Callable[[str], None],
) -> Teacher | None:
    """Return the teacher that ``data.teacher`` names, or None without any.

    Images that choose between models may not have taught it. Those that validate a fold may, with a
    warning: the soft labels are only of the student's own training images.
    """
    if cfg.data.teacher is None:
        return None
    paths, classes = teacher_checkpoints(cfg.data.teacher), data.labelled.classes
    for path in paths:
        state = checkpoint.entries(path)
        if list(state["classes"]) != list(classes):
            raise DataError(
                f"data.teacher: {path} has the classes {', '.join(state['classes'])}; expected "
                f"those of data.train: {', '.join(classes)}"
            )
        if "trained_on" not in state:
            say(
                f"warning: data.teacher: {path} does not record which images it trained on; scores "
                "on those that validate or choose in this run will be too high"
            )
    teacher = Teacher(paths, mean=cfg.data.mean, std=cfg.data.std, device=device)
    if leaked := teacher.trained_on.intersection(chooses := data.chooses()):
        raise DataError(
            f"data.teacher: trained on {len(leaked)} of the {len(chooses)} images that choose in "
            "this run; use the same division of the data (train.seed, data.folds, "
            "data.selection), or another teacher"
        )
    validate = {str(fold.number): digests(data.validation, fold.validation) for fold in folds}
    seen = [number for number, images in validate.items() if teacher.trained_on & {*images}]
    say(f"data.teacher: {', '.join(map(str, paths))}")
    if seen:
        say(
            f"warning: data.teacher: trained on validation images of fold {', '.join(seen)}, so "
            "the student's scores on them may be too high; those on the selection set are not"
        )
    return teacher
