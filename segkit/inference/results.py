"""Result folder of an inference: written image by image, resumed, and combined into files."""

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from segkit.core import distributed
from segkit.data.images import open_image
from segkit.data.loader import digests
from segkit.data.source import Source
from segkit.inference.origin import update_origin
from segkit.inference.outputs import (
    SAFE,
    Color,
    comparison_image,
    overlay,
    result_names,
    save_jpeg,
    write_coco,
    write_confidence,
    write_mask,
    write_soft,
    write_submission,
)

NEED_PROBABILITIES = {"soft", "confidence"}
COMBINED_FILES = {"csv": "submission.csv", "coco": "coco.json"}
SUFFIXES = {
    "overlays": ".jpg",
    "sheets": ".jpg",
    "soft": ".npy",
    "confidence": ".png",
    "masks": ".png",
}


class Results:
    """A folder with the predicted masks of a source's images, and the files made from them.

    Args:
        folder: Contains ``masks/``, and the other outputs such as ``overlays/`` or ``coco.json``.
        indices: Indices of the images to predict; default: all.
        outputs: Outputs besides masks: ``overlays``, ``sheets``, ``soft``, ``confidence``,
            ``coco``, ``csv``.
        background: Index of a class that overlays do not color and COCO results omit, or None.
    """

    def __init__(
        self,
        folder: Path,
        source: Source,
        *,
        classes: Sequence[str],
        outputs: Collection[str],
        indices: Sequence[int] | None = None,
        background: int | None = 0,
        colors: Sequence[Color] = SAFE,
    ) -> None:
        self.folder, self.source, self.classes, self.outputs = folder, source, classes, outputs
        self.background, self.colors = background, colors
        self.indices = range(len(source)) if indices is None else indices
        self._names = dict(zip(source.names, result_names(source.names), strict=True))

    def start(self, origin: Mapping[str, Any], *, others: Sequence[str] = ()) -> list[int]:
        """Return the indices of the images still to predict; call it on every rank.

        ``origin.json`` records everything that the results depend on. If it is unchanged, existing
        results are kept, and an interrupted inference continues; else they are removed.
        The folder must be marked; see :func:`segkit.inference.origin.mark_folders`.

        ``others`` are names of further files that the caller writes to the folder.
        """
        missing: list[int] = []
        if distributed.is_main():
            images = hashlib.sha256()
            image_digests = digests(self.source, self.indices)
            for index, digest in zip(self.indices, image_digests, strict=True):
                images.update(f"{self.source.names[index]}\0{digest}\n".encode())
            kinds = [kind for kind in SUFFIXES if kind == "masks" or kind in self.outputs]
            files = {index: [self._path(kind, index) for kind in kinds] for index in self.indices}
            combined = [name for kind, name in COMBINED_FILES.items() if kind in self.outputs]
            listed = [*(path for paths in files.values() for path in paths), *combined, *others]
            update_origin(self.folder, {**origin, "images": images.hexdigest()}, listed)
            missing = [
                index
                for index, paths in files.items()
                if not all((self.folder / path).exists() for path in paths)
            ]
        return distributed.broadcast(missing)

    def write(self, index: int, mask: Tensor, probabilities: Tensor | None = None) -> None:
        """Write an image's results; :data:`NEED_PROBABILITIES` need those."""
        name = self._names[self.source.names[index]]
        if probabilities is not None and "soft" in self.outputs:
            write_soft(self.folder / "soft", name, probabilities)
        if probabilities is not None and "confidence" in self.outputs:
            write_confidence(self.folder / "confidence", name, probabilities)
        look: dict[str, Any] = {"colors": self.colors, "background": self.background}
        if "overlays" in self.outputs:
            picture = overlay(self.source.image(index), mask, classes=self.classes, **look)
            save_jpeg(picture, self.folder / "overlays", name)
        if "sheets" in self.outputs:
            truth = self.source.mask(index) if self.source.labelled else None
            picture = comparison_image(self.source.image(index), mask, truth, **look)
            save_jpeg(picture, self.folder / "sheets", name)
        write_mask(self.folder / "masks", name, mask, colors=self.colors)

    def mask(self, name: str) -> Tensor:
        """Return the mask read from the file of the image with this name."""
        with open_image(self.folder / "masks" / f"{self._names[name]}.png") as image:
            return torch.from_numpy(np.array(image))

    def finish(self, indices: Sequence[int], *, category_ids: Mapping[int, int] | None) -> None:
        """Write the files that combine the masks of these images, in their order.

        ``category_ids`` has the class index by category id of the training labels.
        """
        source = self.source
        names = [source.names[index] for index in indices]

        def masks() -> Iterator[tuple[str, Tensor]]:
            for name in distributed.Progress(names, "write", unit="image"):
                yield name, self.mask(name)

        if "csv" in self.outputs:
            write_submission(self.folder / COMBINED_FILES["csv"], masks())
        if "coco" in self.outputs:
            ids = getattr(source, "image_ids", range(len(source)))
            write_coco(
                self.folder / COMBINED_FILES["coco"],
                masks(),
                image_ids=dict(zip(source.names, ids, strict=True)),
                category_ids=category_ids or None,
                background=self.background,
            )

    def _path(self, kind: str, index: int) -> str:
        """Return the path of an image's result of a kind, relative to the folder."""
        return f"{kind}/{self._names[self.source.names[index]]}{SUFFIXES[kind]}"
