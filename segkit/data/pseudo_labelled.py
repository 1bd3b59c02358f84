"""Pseudo-labelled images beside labelled ones, and what must not come in that way."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor

from segkit.core.errors import DataError
from segkit.data.loader import digests
from segkit.data.source import Source


class PseudoLabelled:
    """Labelled images, and after them others that models have labelled: one source to train on.

    The models' file tells by its ``info`` what they trained on; an image that chooses or validates
    must not come in, as itself or as one that those models learned from.

    Args:
        labelled: Its images keep their numbers.
        pseudo: Numbered after them; ``extra`` are its numbers.
        chooses: Digests of the images that choose between the models to be trained.

    Raises:
        DataError: The classes differ, an image is labelled already, or an image that chooses was
            trained on by the models that made the pseudo labels.
    """

    labelled = True

    def __init__(self, labelled: Source, pseudo: Source, *, chooses: Collection[str]) -> None:
        if not pseudo.labelled or pseudo.classes != labelled.classes:
            raise DataError(
                f"data.pseudo: has the classes {', '.join(pseudo.classes)}; expected labels of "
                f"those of data.train: {', '.join(labelled.classes)}"
            )
        known = {*digests(labelled, range(len(labelled))), *chooses}
        found = digests(pseudo, range(len(pseudo)))
        again = [name for name, one in zip(pseudo.names, found, strict=True) if one in known]
        if again:
            raise DataError(
                f"data.pseudo: {len(again)} of its images are labelled already, such as "
                f"{again[0]}; make the pseudo labels anew from other images"
            )
        info: dict[str, Any] = getattr(pseudo, "info", {})
        if leaked := set(chooses).intersection(info.get("trained_on", ())):
            raise DataError(
                f"data.pseudo: was made by models that trained on {len(leaked)} of the "
                f"{len(chooses)} images that choose in this run; divide the data as theirs "
                "(train.seed, data.folds, data.selection), or make the pseudo labels anew"
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
        source, at = self._find(i)
        return source.path(at)

    def size(self, i: int) -> tuple[int, int]:
        source, at = self._find(i)
        return source.size(at)

    def image(self, i: int) -> Tensor:
        source, at = self._find(i)
        return source.image(at)

    def mask(self, i: int) -> Tensor:
        source, at = self._find(i)
        return source.mask(at)

    def label_digest(self, i: int) -> str:
        source, at = self._find(i)
        return source.label_digest(at)

    def _find(self, i: int) -> tuple[Source, int]:
        first, second = self._parts
        return (first, i) if i < len(first) else (second, i - len(first))
