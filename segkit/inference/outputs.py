"""Write results: index PNGs, overlays, probability maps, the contest's CSV, COCO results.

Files are written atomically: to a temporary file that is renamed when it is complete.
"""

import csv
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as coco_mask
from torch import Tensor

from segkit.core.files import atomic_write
from segkit.core.labels import IGNORE
from segkit.data.images import as_rgb
from segkit.data.inputs import inside

Color = tuple[int, int, int]
NamedMasks = Iterable[tuple[str, Tensor]]
"""The file name of each image and its mask, (H, W)."""

SUBMISSION_HEADER = ("image_id", "PredictionString")


def _colors(text: str) -> tuple[Color, ...]:
    return tuple((c[0], c[1], c[2]) for c in map(bytes.fromhex, text.split()))


CONTEST = _colors("000000 c00080 0080c0 008040 800000 400080 4000c0 c08040 c0c080 404080 8000c0")
"""The contest's colors for its 11 classes."""

SAFE = _colors(
    "000000 e69f00 56b4e9 009e73 f0e442 0072b2 d55e00 cc79a7 0000ff bfffaa 000080 801500 6a6aff "
    "bfffff 6a2a55 400055 55bf6a 1515bf 552a2a 95d4aa d4ff80 6a95ff 955540 004095 80d4ea d46a40 "
    "6a40ff 6a4080 4040bf 6a5555 aa4000 955580 aad46a bfffd4 556ad4 ea9540 40152a 401500 eaff15 "
    "55d4bf 15bf80"
)
"""Black and 40 colors that stay distinguishable with deuteranopia and protanopia.

The colors of Okabe and Ito (https://jfly.uni-koeln.de/color/). Each further color has the largest
CIELAB distance from all previous ones, taken as the smallest in normal vision and in both
deficiencies as simulated by Machado et al. 2009 (https://doi.org/10.1109/TVCG.2009.113).
"""

PALETTES = {"contest": CONTEST, "safe": SAFE}
IGNORED: Color = (224, 224, 224)
_GAP = 4  # pixels between the panels of a comparison image


def color_table(colors: Sequence[Color]) -> np.ndarray:
    """Return the color of each mask value, uint8 (256, 3); colors repeat for more classes."""
    table = np.array([colors[value % len(colors)] for value in range(256)], np.uint8)
    table[IGNORE] = IGNORED
    return table


def result_names(names: Sequence[str]) -> list[str]:
    """Return the base name of each image's results; each kind of result adds its own suffix.

    The base name is the image's file name without suffix if no other image has it, ignoring letter
    case, else the whole file name: ``a`` for ``a.jpg`` alone, but ``a.jpg`` and ``a.png`` if both
    exist. Whole names that differ in letter case only are numbered from the second: ``A.jpg-2``.
    """
    stems = [str(PurePosixPath(name).with_suffix("")) for name in names]
    pairs = list(zip(stems, names, strict=True))
    count = Counter(text.casefold() for pair in pairs for text in {*pair})
    chosen = [stem if count[stem.casefold()] == 1 else name for stem, name in pairs]
    taken: set[str] = set()
    for i, name in enumerate(chosen):
        number = 1
        while chosen[i].casefold() in taken or (number > 1 and chosen[i].casefold() in count):
            number += 1
            chosen[i] = f"{name}-{number}"
        taken.add(chosen[i].casefold())
    return chosen


def save(folder: Path, name: str, content: Image.Image | np.ndarray) -> Path:
    """Write a picture (``.jpg``, ``.png``) or an array (``.npy``) into a folder; return its path.

    ``numpy.load(path, mmap_mode="r")`` reads only parts of an array.
    """
    path = inside(folder, name)
    with atomic_write(path) as draft, draft.open("wb") as file:
        if isinstance(content, Image.Image):
            content.save(file, format="JPEG" if path.suffix == ".jpg" else "PNG", quality=90)
        else:
            np.save(file, content)
    return path


def mask_image(mask: Tensor, *, colors: Sequence[Color] = SAFE) -> Image.Image:
    """Return a mask, (H, W) of 0 to 255, as an index picture with a palette."""
    image = Image.fromarray(_pixels(mask))
    image.putpalette(color_table(colors).tobytes())  # changes the mode to palette
    return image


def confidence_image(probabilities: Tensor) -> Image.Image:
    """Return the probability of the most probable classes as a gray picture: 255 is certain."""
    return Image.fromarray(_pixels((probabilities.amax(0) * 255).round().clamp(0, 255)))


def overlay(
    image: Tensor,
    mask: Tensor,
    *,
    classes: Sequence[str],
    colors: Sequence[Color] = SAFE,
    opacity: float = 0.5,
    background: int | None = 0,
    legend: bool = True,
) -> Image.Image:
    """Return a photograph blended with its classes' colors, with outlines and a legend.

    Args:
        image: The photograph, uint8 (C, H, W), shown as :func:`segkit.data.images.as_rgb` does.
        mask: Class indices (H, W); ignored pixels are not colored.
        classes: Class names for the legend; its font has Latin letters only.
        colors: Colors of the classes.
        opacity: Opacity of the colors; 0 shows the photograph only. Outlines are opaque.
        background: Index of a class that is not colored, or None.
        legend: Add a legend below the image: the classes in the mask and their share of pixels.
    """
    pixels, values = as_rgb(image).permute(1, 2, 0).cpu().numpy(), _pixels(mask)
    if pixels.shape[:2] != values.shape:
        raise ValueError(f"the image is {pixels.shape[:2]} and its mask {values.shape}")
    table, edges = color_table(colors), outlines(values)
    blended = np.empty(pixels.shape, np.uint8)
    for top in range(0, len(values), 256):  # in bands: float copies of a whole image are too large
        rows = slice(top, top + 256)
        band, shown = values[rows], pixels[rows].astype(np.float32)
        alpha = np.where(edges[rows], np.float32(1), np.float32(opacity))
        alpha[(band == IGNORE) | (band == (-1 if background is None else background))] = 0
        blended[rows] = (shown + (table[band] - shown) * alpha[..., None]).round()
    result = Image.fromarray(blended)
    return _with_legend(result, values, classes, colors) if legend else result


ERROR: Color = (255, 45, 85)


def comparison_image(
    image: Tensor,
    mask: Tensor,
    truth: Tensor | None = None,
    *,
    colors: Sequence[Color] = SAFE,
    background: int | None = 0,
) -> Image.Image:
    """Return panels side by side: photograph, truth (if it is known), prediction, errors."""
    draw = partial(overlay, image, classes=(), legend=False)
    masks = [mask] if truth is None else [truth, mask]
    panels = [Image.fromarray(as_rgb(image).permute(1, 2, 0).cpu().numpy())]
    panels += [draw(shown, colors=colors, background=background) for shown in masks]
    if truth is not None:
        wrong = (mask.cpu() != truth.cpu()) & (truth.cpu() != IGNORE)
        panels.append(draw(wrong.to(torch.uint8), colors=(ERROR, ERROR)))
    width, height = panels[0].size
    result = Image.new("RGB", (len(panels) * (width + _GAP) - _GAP, height), "white")
    for position, panel in enumerate(panels):
        result.paste(panel, (position * (width + _GAP), 0))
    return result


def outlines(values: np.ndarray) -> np.ndarray:
    """Return True for pixels with a neighbor of another class above, below, left or right."""
    edges = np.zeros(values.shape, bool)
    down, across = values[1:] != values[:-1], values[:, 1:] != values[:, :-1]
    edges[1:] |= down
    edges[:-1] |= down
    edges[:, 1:] |= across
    edges[:, :-1] |= across
    return edges


def _with_legend(
    image: Image.Image, values: np.ndarray, classes: Sequence[str], colors: Sequence[Color]
) -> Image.Image:
    counts = np.bincount(values.ravel(), minlength=256)
    present = [c for c in np.argsort(-counts, kind="stable") if counts[c] and c < len(classes)]
    font, row = ImageFont.load_default(12), 16
    result = Image.new("RGB", (max(image.width, 160), image.height + row * len(present)), "white")
    result.paste(image)
    draw = ImageDraw.Draw(result)
    for position, c in enumerate(present):
        top = image.height + row * position
        draw.rectangle((3, top + 3, 13, top + 13), fill=colors[c % len(colors)], outline="black")
        text = f"{classes[c]} {100 * counts[c] / values.size:.1f} %"
        draw.text((18, top + 1), text, fill="black", font=font)
    return result


def write_submission(path: Path, masks: NamedMasks, *, size: int = 256) -> None:
    """Write the contest's CSV: ``image_id,PredictionString``, one line per image.

    Each mask is sampled to ``size`` rows and columns: row i is the mask's row floor(i * H / size),
    and columns likewise. For 512 pixels that is ``mask[::2, ::2]``, as in the contest's own code;
    a smaller mask is enlarged.

    ``masks`` are in the order of the test file, and are read one at a time.
    """
    with atomic_write(path) as draft, draft.open("w", encoding="utf-8", newline="") as file:
        write = csv.writer(file, lineterminator="\n").writerow
        write(SUBMISSION_HEADER)
        for name, mask in masks:
            write((name, " ".join(map(str, _sampled(_pixels(mask), size).ravel().tolist()))))


def write_coco(
    path: Path,
    masks: NamedMasks,
    *,
    image_ids: Mapping[str, int],
    category_ids: Mapping[int, int] | None = None,
    background: int | None = 0,
) -> None:
    """Write COCO results: a list of compressed RLEs, one per class and image.

    https://cocodataset.org/#format-results; each has the score 1, which COCO's tools require.

    Args:
        image_ids: Image id by file name.
        category_ids: Class index by category id; default: the class index is the id.
        background: Index of a class to leave out, or None; ignored pixels are always left out.
    """
    categories = {c: category for category, c in (category_ids or {}).items()}
    separator = "[\n"
    with atomic_write(path) as draft, draft.open("w", encoding="utf-8") as file:
        for name, mask in masks:
            for c in mask.unique().tolist():
                if c in (background, IGNORE):
                    continue
                ids = {
                    "image_id": image_ids[name],
                    "category_id": categories[c] if categories else c,
                }
                region = {"segmentation": encode_rle(mask == c), "score": 1.0}
                file.write(separator + json.dumps(ids | region))
                separator = ",\n"
        file.write("[]\n" if separator == "[\n" else "\n]\n")


def encode_rle(region: Tensor) -> dict[str, Any]:
    """Return the compressed RLE of a mask (H, W) of zeros and ones, JSON-serializable."""
    encoded = coco_mask.encode(np.asfortranarray(_pixels(region)))
    return {"size": encoded["size"], "counts": encoded["counts"].decode("ascii")}


def _pixels(mask: Tensor) -> np.ndarray:
    return mask.to("cpu", torch.uint8).contiguous().numpy()


def _sampled(values: np.ndarray, size: int) -> np.ndarray:
    height, width = values.shape
    at = np.arange(size)
    return values[np.ix_(at * height // size, at * width // size)]
