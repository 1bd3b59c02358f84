"""Draw a contact sheet of a configuration's augmentation, to inspect before training.

    segkit augment --cfg demo [--out sheet.png] [--images 6]

One row per operation alone, applied with probability 1, and one row for the whole list as
configured. Masks are drawn over the images.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from segkit.augment.mix import Others
from segkit.augment.pipeline import Pipeline, generator
from segkit.commands import console
from segkit.core import config
from segkit.core.errors import ConfigError, DataError
from segkit.core.files import atomic_write
from segkit.data import Source, open_source
from segkit.inference.origin import check_written_by_segkit
from segkit.inference.outputs import overlay
from segkit.training.defaults import set_augmentation, set_channels

_CELL, _MARGIN, _CAPTION = 192, 6, 18


def contact_sheet(cfg: config.Config, source: Source, *, images: int) -> Image.Image:
    """Draw the sheet of a configuration's augmentation, with evenly spaced ones of the images."""
    chosen = np.linspace(0, len(source) - 1, min(images, len(source))).astype(int).tolist()
    alone = [{**spec, "p": 1} for spec in cfg.augment.train or ()]
    rows: list[tuple[str, list, tuple[int, int] | None]] = [("as it is", [], None)]
    rows += [(str(spec.get("name")), [spec], None) for spec in alone]
    rows.append(("all of augment.train", list(cfg.augment.train or ()), cfg.augment.size))
    height = _CAPTION + _CELL + _MARGIN
    size = (_MARGIN + len(chosen) * (_CELL + _MARGIN), len(rows) * height)
    sheet, font = Image.new("RGB", size, "white"), ImageFont.load_default(12)
    draw = ImageDraw.Draw(sheet)

    def other(rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        index = int(rng.integers(len(source)))
        return source.image(index), source.mask(index)

    for row, (caption, operations, final) in enumerate(rows):
        pipeline = Pipeline(
            operations, size=final, mean=cfg.data.mean, std=cfg.data.std, path="augment.train"
        )
        draw.text((_MARGIN, row * height + 2), caption, fill="black", font=font)
        for column, index in enumerate(chosen):
            x = _MARGIN + column * (_CELL + _MARGIN)
            cell = _cell(cfg, pipeline, source, index, other)
            sheet.paste(cell, (x, row * height + _CAPTION))
    return sheet


def _cell(
    cfg: config.Config, pipeline: Pipeline, source: Source, index: int, other: Others
) -> Image.Image:
    rng = generator(cfg.train.seed, 0, index)
    image, mask = pipeline(source.image(index), source.mask(index), rng, other)
    assert mask is not None
    mean, std = torch.tensor([cfg.data.mean, cfg.data.std])[..., None, None]
    photograph = (std * image + mean).mul(255).round().clamp(0, 255).to(torch.uint8)
    cell = overlay(photograph, mask, classes=source.classes, opacity=0.4, legend=False)
    return ImageOps.pad(cell, (_CELL, _CELL), color="white")


def main(argv: list[str]) -> None:
    """Write the sheet and print its path."""
    parser = console.parser("augment", __doc__)
    console.add_config_options(parser)
    parser.add_argument("--out", type=Path, default=Path("sheet.png"), help="the PNG to write")
    parser.add_argument("--images", type=int, default=6, help="number of columns")
    args = parser.parse_args(argv)
    cfg = set_channels(config.load(args.cfg, args.set))
    if cfg.data.train is None:
        raise ConfigError("data.train: is missing; expected the labelled images to show")
    if args.images < 1:
        parser.error("--images: expected at least 1")
    check_written_by_segkit(args.out, b"Software\0segkit")
    source = open_source(cfg, "train", cached=False)
    if not len(source):
        raise DataError("data.train: holds no image; expected at least one to show")
    cfg = set_augmentation(cfg, source)
    about = PngInfo()
    about.add_text("Software", "segkit")
    sheet = contact_sheet(cfg, source, images=args.images)
    with atomic_write(args.out) as draft:
        sheet.save(draft, "PNG", pnginfo=about)
    print(args.out)
