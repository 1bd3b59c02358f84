"""Folds use every image once, are stratified, keep groups together, and depend on the seed."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from segkit.core.errors import ConfigError, DataError
from segkit.core.files import write_json
from segkit.data.folds import Split, class_pixels, make_folds, read_groups, repeat_factors, table


def example(images: int = 120, seed: int = 0) -> tuple[list[str], np.ndarray]:
    """Return names and pixel counts of a background and 5 classes of descending frequency."""
    rng = np.random.default_rng(seed)
    shown = rng.random((images, 6)) < [1, 0.6, 0.4, 0.2, 0.1, 0.05]
    pixels = shown * rng.integers(1, 5000, (images, 6))
    return [f"a/{i:04d}.jpg" for i in range(images)], pixels


def make(**changes: Any) -> Split:
    names, pixels = example()
    arguments: dict[str, Any] = {"folds": 5, "selection": 0.1, "seed": 0, **changes}
    return make_folds(names, pixels, **arguments)


def parts(split: Split) -> list[tuple[str, ...]]:
    return [split.selection, *split.folds]


def test_every_image_is_in_one_part() -> None:
    names, _ = example()
    split = make()
    together = [name for part in parts(split) for name in part]
    assert sorted(together) == names
    assert len(split.selection) == 12
    assert all(20 <= len(fold) <= 23 for fold in split.folds)
    for fold in range(5):
        training = set(split.training(fold))
        assert training == set(names) - set(split.selection) - set(split.folds[fold])


def test_hand_worked_split_of_two_classes() -> None:
    """Of 4 images with both classes and 4 with the first only, each of 2 folds gets 2 and 2."""
    names = [f"{i}" for i in range(8)]
    pixels = np.array([[50, 50]] * 4 + [[100, 0]] * 4)
    for seed in range(20):
        split = make_folds(names, pixels, folds=2, selection=0, seed=seed)
        assert split.selection == ()
        for fold in split.folds:
            assert len(fold) == 4
            assert len(set(fold) & set(names[:4])) == 2


def test_rare_class_is_spread() -> None:
    """A class in 5 of 100 images is in each of 5 folds once; at random, some folds have none."""
    names = [f"{i:03d}" for i in range(100)]
    pixels = np.zeros((100, 2), int)
    pixels[:, 0] = 100
    pixels[::20, 1] = 7
    for seed in range(10):
        split = make_folds(names, pixels, folds=5, selection=0, seed=seed)
        assert [sum(int(name) % 20 == 0 for name in fold) for fold in split.folds] == [1] * 5


def test_pixel_shares_are_spread_too() -> None:
    """All images have both classes; the second has a large, medium or small share."""
    names = [f"{i:02d}" for i in range(30)]
    share = np.repeat([1, 50, 99], 10)
    pixels = np.stack([100 - share, share], 1)
    split = make_folds(names, pixels, folds=5, selection=0, seed=3)
    for fold in split.folds:
        assert sorted(share[int(name)] for name in fold) == [1, 1, 50, 50, 99, 99]


def test_folds_are_more_similar_than_random_ones() -> None:
    names, pixels = example()
    place = {name: i for i, name in enumerate(names)}

    def spread(folds: list[list[int]]) -> float:
        return float(np.std([(pixels[fold] > 0).mean(0) for fold in folds], axis=0).mean())

    rng = np.random.default_rng(1)
    for seed in range(3):
        ours = spread([[place[name] for name in fold] for fold in make(seed=seed).folds])
        chance = [spread(np.array_split(rng.permutation(108), 5)) for _ in range(30)]
        assert ours < 0.6 * np.mean(chance)


def test_seed_decides_and_order_of_names_does_not() -> None:
    names, pixels = example()
    assert make() == make()
    assert make(seed=1) != make()
    mixed = np.random.default_rng(0).permutation(len(names))
    shuffled = make_folds([names[i] for i in mixed], pixels[mixed], folds=5, selection=0.1, seed=0)
    assert shuffled == make()


@pytest.mark.parametrize("seed", range(5))
def test_groups_are_never_divided(seed: int) -> None:
    names, pixels = example()
    groups = {name: int(name[2:6]) // 3 for name in names}
    split = make_folds(names, pixels, folds=5, selection=0.1, seed=seed, groups=groups)
    owners = [{groups[name] for name in part} for part in parts(split)]
    assert sum(map(len, owners)) == len(set.union(*owners)) == 40
    assert sorted(name for part in parts(split) for name in part) == names
    assert all(18 <= len(fold) <= 24 for fold in split.folds)
    assert 12 <= len(split.selection) <= 14


def test_largest_groups_are_placed_first() -> None:
    """With a group of 6 assigned after 6 single images, the folds would have 9 and 3."""
    names = [f"{i:02d}" for i in range(12)]
    groups = {name: max(5, i) for i, name in enumerate(names)}
    for seed in range(9):
        pixels = np.full((12, 1), 7)
        split = make_folds(names, pixels, folds=2, selection=0, seed=seed, groups=groups)
        assert [len(fold) for fold in split.folds] == [6, 6]


def test_images_without_any_class_are_divided_evenly() -> None:
    names = [f"{i}" for i in range(9)]
    split = make_folds(names, np.zeros((9, 3), int), folds=3, selection=0, seed=0)
    assert [len(fold) for fold in split.folds] == [3, 3, 3]


def test_at_random_groups_stay_together_and_classes_do_not_count() -> None:
    names, pixels = example()
    groups = {name: i // 3 for i, name in enumerate(names)}
    split = make(groups=groups, stratify=False)
    assert split != make(groups=groups)
    assert split == make_folds(
        names, pixels[::-1], folds=5, selection=0.1, seed=0, groups=groups, stratify=False
    )
    for part in parts(split):
        assert all(len({groups[name] for name in part} & {groups[n] for n in other}) == 0
                   for other in parts(split) if other is not part)  # fmt: skip
    assert max(len(fold) for fold in split.folds) - min(len(fold) for fold in split.folds) <= 3


def test_too_few_images_or_groups() -> None:
    names, pixels = example(4)
    with pytest.raises(DataError, match="4 images are too few for 5 folds"):
        make_folds(names, pixels, folds=5, selection=0, seed=0)
    with pytest.raises(DataError, match=r"2 groups of images are too few for 3 folds"):
        make_folds(
            names,
            pixels,
            folds=3,
            selection=0,
            seed=0,
            groups=dict.fromkeys(names[1:], 1) | {names[0]: 0},
        )
    with pytest.raises(DataError, match="a selection of 1e-09"):
        make_folds(names, pixels, folds=2, selection=1e-9, seed=0)


@pytest.mark.parametrize("changes", [{"folds": 1}, {"selection": 1.0}, {"selection": -0.1}])
def test_numbers_out_of_range(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="at least 2 folds and a selection of 0 to below 1"):
        make(**changes)


def test_saved_split_reads_back_equal(tmp_path: Path) -> None:
    fixed = Split(folds=(("v/1.png",),), selection=("v/1.png",), train=("t/1.png", "t/2.png"))
    for split in (make(), fixed):
        write_json(tmp_path / "folds.json", asdict(split))
        assert Split.load(tmp_path / "folds.json") == split
    assert fixed.training(0) == ("t/1.png", "t/2.png")


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        '{"folds": 3, "selection": []}',
        '{"folds": [["a"], 3], "selection": []}',
        '{"folds": [["a"]], "selection": [1]}',
        '{"folds": [["a"]]}',
        '{"folds": [["a"]], "selection": [], "train": "b"}',
        '{"folds": [["a"]], "sel',
        "[]",
    ],
)
def test_file_that_is_no_split(tmp_path: Path, content: str) -> None:
    (tmp_path / "folds.json").write_text(content)
    with pytest.raises(DataError, match=r"folds\.json"):
        Split.load(tmp_path / "folds.json")


class Masks:
    """A source of three masks."""

    classes = ("ground", "can", "bag")
    names = ("a", "b", "c")

    def __len__(self) -> int:
        return 3

    def path(self, i: int) -> Path:
        return Path(__file__)

    def label_digest(self, i: int) -> str:
        return f"{id(self)} {i}"

    def mask(self, i: int) -> Tensor:
        mask = torch.zeros(65, 97, dtype=torch.uint8)
        mask[:i, :10] = 1
        mask[-1] = 255
        return mask


@pytest.mark.parametrize("workers", [0, 2])
def test_pixels_of_each_class(workers: int) -> None:
    counts = class_pixels(Masks(), workers)  # type: ignore[arg-type]
    assert counts.dtype == np.int64
    assert counts.tolist() == [[64 * 97 - 10 * i, 10 * i, 0] for i in range(3)]


def test_table_by_hand() -> None:
    names = ["a", "b", "c", "d"]
    pixels = np.array([[90, 10], [100, 0], [50, 50], [0, 100]])
    split = Split(folds=(("a", "b"), ("d",)), selection=("c",))
    assert table(split, names, pixels, ("ground", "can")).splitlines() == [
        "                 selection    fold 0    fold 1",
        "images                   1         2         1",
        "                 img   px% img   px% img   px%",
        "ground           100  50.0 100  95.0   0   0.0",
        "can              100  50.0  50   5.0 100 100.0",
    ]


@pytest.mark.parametrize("folds", [2, 5, 12])
def test_table_is_80_wide(folds: int) -> None:
    names, pixels = example()
    classes = [f"class of a very long name {i}" for i in range(6)]
    text = table(make(folds=folds), names, pixels, classes)
    assert max(map(len, text.splitlines())) <= 80
    assert all(f"fold {fold}" in text for fold in range(folds))


def test_groups_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "groups.json"
    file.write_text(json.dumps({"a": 1, "b": "1", "c": "x", "of another file": 7}))
    assert read_groups(str(file), None, ["a", "b", "c"]) == {"a": "1", "b": "1", "c": "x"}
    assert read_groups(None, None, ["a"]) is None
    for wrong in ({}, {"a": None}, {"a": True}, {"a": [1]}):
        file.write_text(json.dumps(wrong))
        with pytest.raises(DataError, match=r"groups\.json gives 'a' no group"):
            read_groups(str(file), None, ["a"])


def test_groups_from_the_name() -> None:
    names = ["x/0001TP_1.jpg", "x/0001TP_2.jpg", "x/06_1.jpg"]
    groups = read_groups(None, r"/([^_]+)_", names)
    assert groups == dict(zip(names, ["0001TP", "0001TP", "06"], strict=True))
    with pytest.raises(DataError, match=r"'x/0001TP_1\.jpg' does not match"):
        read_groups(None, r"^(y)", names)
    for pattern, words in (("(", "is malformed"), ("a", "has 0 parenth"), ("(a)(b)", "has 2 par")):
        with pytest.raises(ConfigError, match=words):
            read_groups(None, pattern, names)
    with pytest.raises(ConfigError, match="not both"):
        read_groups("groups.json", "(a)", names)


def test_repeat_factors_by_hand() -> None:
    pixels = np.zeros((8, 3), int)
    pixels[:, 0] = 5  # in all images
    pixels[:4, 1] = 1  # in half of them
    pixels[7, 2] = 2  # in an eighth
    assert repeat_factors(pixels, 0.5) == (1,) * 7 + (2.0,)  # sqrt(0.5 / 0.125)
    assert repeat_factors(pixels, 0.1) == (1,) * 8
    assert repeat_factors(pixels, 1.0) == pytest.approx((2**0.5,) * 4 + (1,) * 3 + (8**0.5,))
