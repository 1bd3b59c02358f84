"""The folder of what an inference predicts: filled image by image, taken up again, gathered."""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from segkit import distributed
from segkit.data.images import open_image
from segkit.data.loader import digests
from segkit.data.source import Source
from segkit.files import regular, write_json
from segkit.output import (
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

SUFFIXES = {"overlays": ".jpg", "sheets": ".jpg", "soft": ".npy", "masks": ".png"}


class Results:
    """Masks of a source's images in a folder, and what is made of them.

    Args:
        folder: ``masks/``, ``overlays/``, ``soft/``, ``coco.json`` and ``submission.csv`` in it.
        source: The images.
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
        background: int | None = 0,
        colors: Sequence[Color] = SAFE,
    ) -> None:
        self.folder, self.source, self.classes, self.outputs = folder, source, classes, outputs
        self.background, self.colors = background, colors
        self._names = dict(zip(source.names, result_names(source.names), strict=True))

    def start(self, origin: Mapping[str, Any]) -> list[int]:
        """The images that have yet to be predicted; every rank calls it and gets the same.

        ``origin.json`` keeps what the results come from. Where it says the same of these images,
        an interrupted inference left the results that are there; otherwise they are removed first.

        Args:
            origin: Everything that predictions depend on besides the images; JSON can hold it.
        """
        missing: list[int] = []
        if distributed.is_main():
            everything = range(len(self.source))
            images = hashlib.sha256(" ".join(digests(self.source, everything)).encode())
            wanted = json.loads(json.dumps({**origin, "images": images.hexdigest()}))
            path = self.folder / "origin.json"
            if not path.exists() or json.loads(regular(path).read_text(encoding="utf-8")) != wanted:
                for index in everything:
                    for kind in SUFFIXES:
                        self._file(kind, index).unlink(missing_ok=True)
                write_json(path, wanted)
            kinds = [kind for kind in SUFFIXES if kind == "masks" or kind in self.outputs]
            missing = [
                index
                for index in everything
                if not all(self._file(kind, index).exists() for kind in kinds)
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

    def finish(self, *, category_ids: Mapping[int, int] | None) -> None:
        """Gather the masks, in the images' order, into the files that hold all of them.

        Args:
            category_ids: Class index of each category id of the labels that were trained on.
        """
        source = self.source
        with ExitStack() as files:
            writers = []
            if "csv" in self.outputs:
                path = self.folder / "submission.csv"
                writers.append(files.enter_context(submission(path, names=source.names)))
            if "coco" in self.outputs:
                ids = getattr(source, "image_ids", range(len(source)))
                writer = coco_results(
                    self.folder / "coco.json",
                    image_ids=dict(zip(source.names, ids, strict=True)),
                    category_ids=category_ids or None,
                    background=self.background,
                )
                writers.append(files.enter_context(writer))
            for name in distributed.Progress(source.names, "write", unit="image"):
                mask = self.mask(name)
                for write in writers:
                    write(name, mask)

    def _file(self, kind: str, index: int) -> Path:
        name = self._names[self.source.names[index]]
        return self.folder / kind / f"{name}{SUFFIXES[kind]}"
