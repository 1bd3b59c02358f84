"""The folder of what an inference predicts: filled image by image, taken up again, gathered."""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from segkit.core import distributed
from segkit.data.images import open_image
from segkit.data.loader import digests
from segkit.data.source import Source
from segkit.inference.origin import renew
from segkit.inference.outputs import (
    SAFE,
    Color,
    coco_results,
    overlay,
    result_names,
    save_jpeg,
    sheet,
    submission,
    write_mask,
    write_soft,
)

GATHERED = {"csv": "submission.csv", "coco": "coco.json"}
SUFFIXES = {"overlays": ".jpg", "sheets": ".jpg", "soft": ".npy", "masks": ".png"}


class Results:
    """Masks of a source's images in a folder, and what is made of them.

    Args:
        folder: ``masks/``, ``overlays/``, ``soft/``, ``coco.json`` and ``submission.csv`` in it.
        source: The images.
        indices: Those of them that are predicted; default all.
        classes: Class names, for the overlays.
        outputs: Wanted besides masks: ``overlays``, ``sheets``, ``soft``, ``coco``, ``csv``.
        background: The class that is no thing to show, if there is one.
        colors: Of the classes.
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
        """The images that have yet to be predicted; every rank calls it and gets the same.

        ``origin.json`` keeps what the results come from. Where it says the same of these images,
        an interrupted inference left the results that are there; otherwise they are removed first.
        The folder must be claimed; see :mod:`segkit.inference.origin`.

        Args:
            origin: Everything that predictions depend on besides the images; JSON can hold it.
            others: Further files that the caller writes into the folder.
        """
        missing: list[int] = []
        if distributed.is_main():
            about, marks = hashlib.sha256(), digests(self.source, self.indices)
            for index, digest in zip(self.indices, marks, strict=True):
                about.update(f"{self.source.names[index]}\0{digest}\n".encode())
            kinds = [kind for kind in SUFFIXES if kind == "masks" or kind in self.outputs]
            files = {index: [self._path(kind, index) for kind in kinds] for index in self.indices}
            gathered = [name for kind, name in GATHERED.items() if kind in self.outputs]
            listed = [*(path for paths in files.values() for path in paths), *gathered, *others]
            renew(self.folder, {**origin, "images": about.hexdigest()}, listed)
            missing = [
                index
                for index, paths in files.items()
                if not all((self.folder / path).exists() for path in paths)
            ]
        return distributed.broadcast(missing)

    def write(self, index: int, mask: Tensor, probabilities: Tensor | None = None) -> None:
        """Write an image's results; ``probabilities`` are needed for ``soft`` only."""
        name = self._names[self.source.names[index]]
        if probabilities is not None and "soft" in self.outputs:
            write_soft(self.folder / "soft", name, probabilities)
        look: dict[str, Any] = {"colors": self.colors, "background": self.background}
        if "overlays" in self.outputs:
            picture = overlay(self.source.image(index), mask, classes=self.classes, **look)
            save_jpeg(picture, self.folder / "overlays", name)
        if "sheets" in self.outputs:
            truth = self.source.mask(index) if self.source.labelled else None
            picture = sheet(self.source.image(index), mask, truth, **look)
            save_jpeg(picture, self.folder / "sheets", name)
        write_mask(self.folder / "masks", name, mask, colors=self.colors)

    def mask(self, name: str) -> Tensor:
        """The mask in the file of the image of this name."""
        with open_image(self.folder / "masks" / f"{self._names[name]}.png") as image:
            return torch.from_numpy(np.array(image))

    def finish(self, indices: Sequence[int], *, category_ids: Mapping[int, int] | None) -> None:
        """Gather the masks, in the images' order, into the files that hold all of them.

        Args:
            indices: The images that have masks.
            category_ids: Class index of each category id of the labels that were trained on.
        """
        source = self.source
        names = [source.names[index] for index in indices]
        with ExitStack() as files:
            writers = []
            if "csv" in self.outputs:
                path = self.folder / GATHERED["csv"]
                writers.append(files.enter_context(submission(path, names=names)))
            if "coco" in self.outputs:
                ids = getattr(source, "image_ids", range(len(source)))
                writer = coco_results(
                    self.folder / GATHERED["coco"],
                    image_ids=dict(zip(source.names, ids, strict=True)),
                    category_ids=category_ids or None,
                    background=self.background,
                )
                writers.append(files.enter_context(writer))
            for name in distributed.Progress(names, "write", unit="image"):
                mask = self.mask(name)
                for write in writers:
                    write(name, mask)

    def _path(self, kind: str, index: int) -> str:
        """Return the path of an image's result of a kind, in the folder."""
        return f"{kind}/{self._names[self.source.names[index]]}{SUFFIXES[kind]}"
