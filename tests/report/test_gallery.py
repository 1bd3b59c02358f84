"""Selection and layers of the pictures on the page of a run."""

import base64
import io

import numpy as np
import pytest
import torch
from made_run import Drawn, evaluated
from PIL import Image
from ranks import run_ranks

from segkit.core import distributed
from segkit.data.loader import EvalBatches
from segkit.inference.outputs import ERROR, SAFE
from segkit.report import Gallery
from segkit.training.evaluate import evaluate
from segkit.training.metrics import per_image_miou


def test_half_are_the_worst_and_half_evenly_spread() -> None:
    source, indices = Drawn(40), list(range(3, 40))
    evaluation, gallery = evaluated(source, indices, size=8)
    pictures = gallery.pictures()
    ious = per_image_miou(evaluation.counts).numpy()
    ranked = [source.names[indices[k]] for k in np.lexsort((indices, ious))]
    assert [picture.name for picture in pictures if picture.worst] == ranked[:4]
    assert sum(not picture.worst for picture in pictures) == 4
    spread = {source.names[indices[k]] for k in (0, 12, 24, 36)}
    assert len(spread & {picture.name for picture in pictures}) >= 3
    assert [picture.miou for picture in pictures] == sorted(picture.miou for picture in pictures)
    assert pictures[0].miou == pytest.approx(ious.min())


@pytest.mark.parametrize("size", [0, 1, 100])
def test_a_gallery_of_any_size(size: int) -> None:
    _, gallery = evaluated(Drawn(5), list(range(5)), size=size)
    assert len(gallery.pictures()) == min(size, 5)


def test_layers_show_the_masks() -> None:
    source = Drawn(3)
    _, gallery = evaluated(source, [2], size=1)
    [picture] = gallery.pictures()
    shown = gallery.to_json(picture, SAFE)

    def pixels(layer: str) -> np.ndarray:
        data = base64.b64decode(shown[layer].partition(",")[2])
        return np.array(Image.open(io.BytesIO(data)).convert("RGBA")).astype(int)

    mask, guess = source.mask(2).numpy(), source.guess(2).numpy()
    truth = pixels("truth")
    assert (truth[..., 3] > 0).tolist() == np.isin(mask, (1, 2, 3)).tolist()
    assert tuple(truth[20, 30, :3]) == SAFE[mask[20, 30]]
    errors = pixels("errors")
    wrong = (mask != guess) & (mask != 255)
    assert (errors[..., :3] == ERROR).all(-1)[wrong].all()
    assert (errors[..., 3] == 0).tolist() == (~wrong & (mask != 255)).tolist()
    assert shown["iou"].keys() == {0, 3}


@pytest.mark.parametrize(("size", "small"), [((600, 900), (213, 320)), ((1100, 2), (320, 1))])
def test_large_masks_are_sampled(size: tuple[int, int], small: tuple[int, int]) -> None:
    source = Drawn(1, size)
    _, gallery = evaluated(source, [0], size=1)
    [picture] = gallery.pictures()
    assert picture.image.size == small[::-1]
    assert picture.truth.shape == small
    row, column = small[0] // 3, small[1] // 3
    y, x = (2 * row + 1) * size[0] // (2 * small[0]), (2 * column + 1) * size[1] // (2 * small[1])
    assert picture.truth[row, column] == source.mask(0)[y, x]


def selected_names() -> list[str]:
    source, indices = Drawn(20), list(range(20))
    gallery = Gallery(source, indices, size=6)
    evaluate(
        lambda images: torch.zeros(len(images), *images.shape[2:], dtype=torch.uint8),
        EvalBatches(source, indices, labels=True),
        device=torch.device("cpu"),
        callbacks=[gallery.add],
    )
    gallery.gather()
    pictures = gallery.pictures()
    assert bool(pictures) == distributed.is_main()
    return [picture.name for picture in pictures]


def test_two_ranks_select_as_one_process() -> None:
    assert run_ranks(selected_names, 2) == [selected_names(), []]
