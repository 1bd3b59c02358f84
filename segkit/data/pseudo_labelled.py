"""Combination of labelled and pseudo-labelled images, with checks against data leaks."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor

from segkit.core.errors import DataError
from segkit.data.loader import digests
from segkit.data.source import Source


class PseudoLabelled:
    """A training source of labelled images, followed by images labelled by models.

    ``info`` of the pseudo labels' file lists the images that those models were trained on. Images
    used for validation or selection must be neither among these nor among the pseudo-labelled ones.

    Args:
        labelled: Labelled images; their indices do not change.
        pseudo: Pseudo-labelled images; their indices follow, and are in ``extra``.
        chooses: Digests of the images used for validation and selection.

    Raises:
        DataError: The classes differ, a pseudo-labelled image is labelled already, or the models
            that made the pseudo labels were trained on an image of ``chooses``.
    """

    labelled = True

    def __init__(self, labelled: Source, pseudo: Source, *, chooses: Collection[str]) -> None:
        if not pseudo.labelled or pseudo.classes != labelled.classes:
            raise DataError(
                f"data.pseudo: has the classes {', '.join(pseudo.classes)}; expected labels of "
                f"those of data.train: {', '.join(labelled.classes)}"
            )
        known = {*digests(labelled, range(len(labelled))), *chooses}
        added = digests(pseudo, range(len(pseudo)))
        again = [name for name, digest in zip(pseudo.names, added, strict=True) if digest in known]
        if again:
            raise DataError(
                f"data.pseudo: {len(again)} of its images are labelled already, such as "
                f"{again[0]}; make the pseudo labels again from other images"
            )
        info: dict[str, Any] = getattr(pseudo, "info", {})
        if leaked := set(chooses).intersection(info.get("trained_on", ())):
            raise DataError(
                f"data.pseudo: was made by models that trained on {len(leaked)} of the "
                f"{len(chooses)} images that choose in this run; use the same division of the "
                "data (train.seed, data.folds, data.selection), or make the pseudo labels again"
            )
        self._parts = labelled, pseudo
        self.round: int | None = info.get("round")
        self.classes = labelled.classes
        self.names = (*labelled.names, *pseudo.names)
        self.faults = (*labelled.faults, *pseudo.faults)
        self.extra = range(len(labelled), len(self.names))

    def __len__(self) -> int:
        return len(self.names)

    def path(self, i: int) -> Path:
        return self._call("path", i)

    def size(self, i: int) -> tuple[int, int]:
        return self._call("size", i)

    def image(self, i: int) -> Tensor:
        return self._call("image", i)

    def mask(self, i: int) -> Tensor:
        return self._call("mask", i)

    def label_digest(self, i: int) -> str:
        return self._call("label_digest", i)

    def _call(self, method: str, i: int) -> Any:
        """Call a method of the source that has image ``i``, with the image's index there."""
        first, second = self._parts
        source, index = (first, i) if i < len(first) else (second, i - len(first))
        return getattr(source, method)(index)
