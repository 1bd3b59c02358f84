"""The real photographs beside the repository: counts as their makers give them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from segkit.data import CocoSource, MaskSource
from segkit.data.folds import class_pixels, make_folds, read_groups
from segkit.data.source import unreadable


def trashbags(folder: Path, part: str) -> CocoSource:
    return CocoSource(
        annotations=str(folder / f"trashbags/annotations/{part}.json"),
        images=str(folder / "trashbags/images"),
    )


def camvid(folder: Path, part: str) -> MaskSource:
    return MaskSource(
        images=str(folder / "camvid/images" / part),
        masks=str(folder / "camvid/masks" / part),
        split=str(folder / f"camvid/{part}.txt"),
        classes=str(folder / "camvid/classes.txt"),
        ignore_index=11,
    )


@pytest.mark.parametrize(("part", "images"), [("train", 367), ("val", 101), ("test", 233)])
def test_camvid(shared_data: Path, part: str, images: int) -> None:
    source = camvid(shared_data, part)
    assert len(source) == images
    assert len(source.classes) == 11
    for i in range(0, images, 60):
        assert source.image(i).shape == (3, 360, 480)
        assert source.mask(i).shape == source.size(i) == (360, 480)
    seen = torch.cat([source.mask(i).unique() for i in range(0, images, 20)]).unique().tolist()
    assert seen == [*range(11), 255]


def test_trashbags_have_whole_groups(shared_data: Path) -> None:
    source = trashbags(shared_data, "train")
    assert source.classes == ("background", "general_trashbag", "other_trashbag")
    assert len(source) == 794
    groups = read_groups(str(shared_data / "trashbags/groups.json"), None, source.names)
    assert groups is not None
    # shares without reading: drawn from the names, for what counts here are the groups
    pixels = np.random.default_rng(0).integers(0, 100, (794, 3))
    split = make_folds(source.names, pixels, folds=5, selection=0.1, seed=0, groups=groups)
    owners = [{groups[name] for name in part} for part in (split.selection, *split.folds)]
    assert sum(map(len, owners)) == len(set.union(*owners)) == len(set(groups.values()))
    for i in range(0, 794, 100):
        assert source.image(i).shape[1:] == source.mask(i).shape == source.size(i)
        shown = {r.class_index for r in source.regions(i) if not r.crowd and r.class_index}
        assert set(source.mask(i).unique().tolist()) <= {0} | shown


def test_trashnet_folds_are_alike(shared_data: Path) -> None:
    """Even its rarest class, 3 % of the images, is in every fold and in the selection set."""
    source = CocoSource(
        annotations=str(shared_data / "trashnet/annotations/instances_train.json"),
        images=str(shared_data / "trashnet/images"),
    )
    assert len(source) == 396
    pixels = class_pixels(source, workers=2)
    assert (pixels.sum(1) == 384 * 512).all()
    split = make_folds(source.names, pixels, folds=5, selection=0.1, seed=0)
    place = {name: i for i, name in enumerate(source.names)}
    shown = [(pixels[[place[n] for n in fold]] > 0).mean(0) for fold in split.folds]
    assert np.min(shown) > 0
    assert np.ptp(shown, axis=0).max() < 0.04
    assert (pixels[[place[n] for n in split.selection]].sum(0) > 0).all()


@pytest.mark.slow
def test_all_photographs_are_sound(shared_data: Path) -> None:
    for source in (
        *(camvid(shared_data, part) for part in ("train", "val", "test")),
        *(trashbags(shared_data, part) for part in ("train", "test")),
    ):
        assert unreadable(source) == {}
