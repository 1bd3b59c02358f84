"""Result folder of an inference: written image by image, resumed, and combined into files."""

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
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
    confidence_image,
    mask_image,
    overlay,
    result_names,
    save,
    write_coco,
    write_submission,
)

NEED_PROBABILITIES = {"soft", "confidence"}
COMBINED_FILES = {"csv": "submission.csv", "coco": "coco.json"}
SUFFIXES = {"overlays": ".jpg", "sheets": ".jpg", "soft": ".npy", "confidence": ".png"}
SUFFIXES["masks"] = ".png"  # written last, so that an image with a mask has all its results


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
        self._kinds = [kind for kind in SUFFIXES if kind == "masks" or kind in outputs]
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
            names = [self.source.names[index] for index in self.indices]
            named = zip(names, digests(self.source, self.indices), strict=True)
            text = "".join(f"{name}\0{digest}\n" for name, digest in named)
            images = hashlib.sha256(text.encode()).hexdigest()
            files = {i: [self._path(kind, i) for kind in self._kinds] for i in self.indices}
            combined = [name for kind, name in COMBINED_FILES.items() if kind in self.outputs]
            listed = [*(path for paths in files.values() for path in paths), *combined, *others]
            update_origin(self.folder, {**origin, "images": images}, listed)
            for index, paths in files.items():
                if not all((self.folder / path).exists() for path in paths):
                    missing.append(index)
        return distributed.broadcast(missing)

    def write(self, index: int, mask: Tensor, probabilities: Tensor | None = None) -> None:
        """Write an image's results; :data:`NEED_PROBABILITIES` need those."""
        for kind in self._kinds:
            content = self._content(kind, index, mask, probabilities)
            save(self.folder, self._path(kind, index), content)

    def _content(
        self, kind: str, index: int, mask: Tensor, probabilities: Tensor | None
    ) -> Image.Image | np.ndarray:
        """Return an image's result of a kind."""
        if kind == "masks":
            return mask_image(mask, colors=self.colors)
        if kind in NEED_PROBABILITIES:
            assert probabilities is not None
            soft = kind == "soft"
            return probabilities.half().cpu().numpy() if soft else confidence_image(probabilities)
        look: dict[str, Any] = {"colors": self.colors, "background": self.background}
        image = self.source.image(index)
        if kind == "overlays":
            return overlay(image, mask, classes=self.classes, **look)
        truth = self.source.mask(index) if self.source.labelled else None
        return comparison_image(image, mask, truth, **look)

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
                self.folder / COMBINED_FILES["coco"], masks(),
                image_ids=dict(zip(source.names, ids, strict=True)),
                category_ids=category_ids or None, background=self.background,
            )  # fmt: skip

    def _path(self, kind: str, index: int) -> str:
        """Return the path of an image's result of a kind, relative to the folder."""
        return f"{kind}/{self._names[self.source.names[index]]}{SUFFIXES[kind]}"
