"""Mixing operations: pixels are pasted with their labels, rare classes first."""

import pytest
import torch
from torch import Tensor

from segkit.augment import Pipeline, generator

SIZE = (64, 96)


def flat(label: int, size: tuple[int, int] = SIZE) -> tuple[Tensor, Tensor]:
    """Return an image of one class whose color is its label times 20."""
    return show(torch.full(size, label, dtype=torch.uint8))


def show(mask: Tensor) -> tuple[Tensor, Tensor]:
    return (mask * 20).expand(3, -1, -1).contiguous(), mask


def scene(_: object = None) -> tuple[Tensor, Tensor]:
    """Return background 0 with two objects of class 3, one of class 5 and an ignored border."""
    mask = torch.zeros((60, 80), dtype=torch.uint8)
    mask[5:20, 5:20] = 3
    mask[5:20, 50:70] = 3
    mask[35:55, 20:40] = 5
    mask[:, 78:] = 255
    return show(mask)


def mixed(spec: dict, seed: int, others=scene, base=None) -> tuple[Tensor, Tensor]:
    pipeline = Pipeline([spec], size=None, mean=(0, 0, 0), std=(1 / 255,) * 3)
    return pipeline(*(base or flat(1)), generator(seed, 0, 0), others)


@pytest.mark.parametrize("name", ["copy_paste", "cutmix", "classmix"])
def test_pixels_and_labels_come_together(name: str) -> None:
    pasted = 0
    for seed in range(12):
        image, mask = mixed({"name": name}, seed)
        assert image.shape == (3, *SIZE)
        assert set(mask.unique().tolist()) <= {0, 1, 3, 5, 255}
        known = mask != 255
        wrong = (image[0] - mask.float() * 20).abs()[known] > 1
        assert wrong.float().mean() < 0.06, "only edges may be between two labels"
        pasted += bool((mask != 1).any())
    assert pasted >= 8


def test_copy_paste_brings_objects_and_no_background() -> None:
    for seed in range(12):
        _, mask = mixed({"name": "copy_paste", "objects": [1, 1], "scale": [1, 1]}, seed)
        assert len({*mask.unique().tolist()} - {1}) <= 1
        assert not ((mask == 0) | (mask == 255)).any()


def test_copy_paste_takes_rare_classes_first() -> None:
    spec = {"name": "copy_paste", "objects": [1, 1], "scale": [1, 1], "rare": [5]}
    seen = {label for seed in range(12) for label in mixed(spec, seed)[1].unique().tolist()}
    assert seen == {1, 5}


def test_copy_paste_takes_one_object_at_a_time() -> None:
    spec = {"name": "copy_paste", "objects": [1, 1], "scale": [1, 1], "rare": [3]}
    areas = {int((mixed(spec, seed)[1] == 3).sum()) for seed in range(30)}
    assert max(areas) <= 20 * 15
    assert {15 * 15, 20 * 15} <= areas


def test_copy_paste_of_nothing_changes_nothing() -> None:
    image, mask = mixed({"name": "copy_paste"}, 0, others=lambda _: flat(0))
    assert torch.equal(mask, flat(1)[1])
    assert torch.equal(image, flat(1)[0].float())


def test_cutmix_replaces_one_rectangle_of_its_area() -> None:
    for seed in range(10):
        image, mask = mixed({"name": "cutmix", "area": [0.25, 0.25]}, seed, lambda _: flat(4))
        rows, columns = (mask == 4).any(1), (mask == 4).any(0)
        assert rows.sum() * columns.sum() == (mask == 4).sum() == 64 * 96 / 4
        assert torch.equal(image[0], mask.float() * 20)


def test_classmix_pastes_half_of_the_classes() -> None:
    def halves(_: object) -> tuple[Tensor, Tensor]:
        mask = torch.full(SIZE, 2, dtype=torch.uint8)
        mask[:, 48:] = 4
        return show(mask)

    seen = set()
    for seed in range(12):
        _, mask = mixed({"name": "classmix", "scale": [1, 1]}, seed, halves)
        labels = set(mask.unique().tolist())
        assert labels in ({1, 2}, {1, 4})
        assert (mask == 1).sum() == 64 * 48
        seen |= labels
    assert seen == {1, 2, 4}


def test_pasting_onto_padding_shows() -> None:
    """Pixels pasted onto padding are part of the image."""
    spec = [{"name": "pad", "size": [96, 128]}, {"name": "cutmix", "area": [1, 1]}]
    pipeline = Pipeline(spec, size=None, mean=(0, 0, 0), std=(1 / 255,) * 3)
    image, mask = pipeline(*flat(1), generator(0, 0, 0), lambda _: flat(4))
    assert (mask == 4).all()
    assert (image == 80).all()


def test_without_a_mask_only_the_image_changes() -> None:
    pipeline = Pipeline(["cutmix"], size=None, mean=(0, 0, 0), std=(1 / 255,) * 3)
    image, mask = pipeline(flat(1)[0], None, generator(0, 0, 0), scene)
    assert mask is None
    assert not torch.equal(image, flat(1)[0].float())
