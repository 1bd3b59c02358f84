import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from segkit.core.errors import DataError
from segkit.inference import outputs


def a_mask(height: int = 65, width: int = 97, classes: int = 5) -> torch.Tensor:
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.integers(0, classes, (height, width), np.uint8))


# ----------------------------------------------------------------------------------- PNGs


def test_mask_png_round_trip(tmp_path: Path) -> None:
    mask = a_mask()
    mask[0, :3] = 255
    path = outputs.save(
        tmp_path, "batch_01/0007.png", outputs.mask_image(mask, colors=outputs.CONTEST)
    )
    assert path == tmp_path / "batch_01" / "0007.png"
    with Image.open(path) as image:
        assert image.mode == "P"
        assert torch.equal(torch.from_numpy(np.array(image)), mask)
        shown = np.array(image.convert("RGB"))
    assert tuple(shown[0, 0]) == outputs.IGNORED
    assert tuple(shown[1, 1]) == outputs.CONTEST[mask[1, 1]]
    assert [p.name for p in path.parent.iterdir()] == ["0007.png"]


def test_mask_of_int64_and_of_a_view(tmp_path: Path) -> None:
    mask = a_mask()
    path = outputs.save(tmp_path, "a.png", outputs.mask_image(mask.long().T))
    with Image.open(path) as image:
        assert torch.equal(torch.from_numpy(np.array(image)), mask.T)


def test_mask_never_leaves_its_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="leads out"):
        outputs.save(tmp_path / "masks", "../a.png", outputs.mask_image(a_mask()))
    assert not list(tmp_path.iterdir())


def test_results_of_no_two_images_share_a_name() -> None:
    names = ["a/b.jpg", "a/b.png", "a/b.jpg.png", "A/c.jpg", "a/C.png", "c.jpg", "d.v2.jpg"]
    expected = ["a/b.jpg", "a/b.png", "a/b.jpg.png", "A/c.jpg", "a/C.png", "c", "d.v2"]
    assert outputs.result_names(names) == expected
    assert outputs.result_names(["e.jpg", "E.jpg", "e.jpg-2"]) == ["e.jpg", "E.jpg-3", "e.jpg-2"]
    assert outputs.result_names(["plain", "f.jpg"]) == ["plain", "f"]


# ------------------------------------------------------------------------------- soft maps


def test_soft_map_is_mapped_half_precision(tmp_path: Path) -> None:
    probabilities = torch.rand(5, 65, 97, generator=torch.Generator().manual_seed(0)).softmax(0)
    path = outputs.save(tmp_path, "batch_01/0007.npy", probabilities.half().numpy())
    assert path == tmp_path / "batch_01" / "0007.npy"
    planes = np.load(path, mmap_mode="r")
    assert isinstance(planes, np.memmap)
    assert planes.dtype == np.float16
    assert torch.equal(torch.from_numpy(np.array(planes)), probabilities.half())
    assert [p.name for p in path.parent.iterdir()] == ["0007.npy"]
    with pytest.raises(DataError, match="leads out"):
        outputs.save(tmp_path / "soft", "../a.npy", probabilities.numpy())


# -------------------------------------------------------------------------------- overlays


def test_overlay_by_hand() -> None:
    image = torch.full((3, 5, 5), 100, dtype=torch.uint8)
    mask = torch.zeros(5, 5, dtype=torch.uint8)
    mask[1:4, 1:4] = 1
    mask[0, 4] = 255
    colors = [(0, 0, 0), (200, 0, 50)]
    shown = outputs.overlay(
        image, mask, classes=["ground", "cup"], colors=colors, opacity=0.25, legend=False
    )
    expected = np.full((5, 5, 3), 100)
    expected[1:4, 1:4] = (200, 0, 50)  # the outline
    expected[2, 2] = (125, 75, 88)  # 100 + (color - 100) / 4, halves to the even number
    np.testing.assert_array_equal(np.array(shown), expected)


def test_overlay_of_many_rows_equals_its_parts() -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 600, 7), dtype=torch.uint8, generator=generator)
    mask = torch.arange(600)[:, None].div(200, rounding_mode="floor").expand(600, 7)
    whole = np.array(outputs.overlay(image, mask, classes=["a", "b", "c"], legend=False))
    for rows in (slice(0, 300), slice(300, 600)):  # cut where no class ends
        part = outputs.overlay(image[:, rows], mask[rows], classes=["a", "b", "c"], legend=False)
        np.testing.assert_array_equal(whole[rows], np.array(part))


def test_overlay_colors_the_first_class_where_it_is_no_background() -> None:
    image = torch.zeros(3, 4, 6, dtype=torch.uint8)
    shown = outputs.overlay(
        image,
        torch.zeros(4, 6, dtype=torch.uint8),
        classes=["sky"],
        colors=[(80, 160, 240)],
        background=None,
        legend=False,
    )
    assert np.array(shown).reshape(-1, 3).tolist() == [[40, 80, 120]] * 24


def test_a_sheet_shows_photograph_truth_prediction_and_errors() -> None:
    image = torch.full((3, 5, 6), 100, dtype=torch.uint8)
    truth, mask = torch.zeros(5, 6, dtype=torch.uint8), torch.zeros(5, 6, dtype=torch.uint8)
    truth[1:4, 1:4] = 1
    truth[4, 5] = 255
    mask[1:4, 2:5] = 1
    mask[4, 5] = 1
    shown = np.array(outputs.comparison_image(image, mask, truth))
    assert shown.shape == (5, 4 * 6 + 3 * 4, 3)
    photograph, true, predicted, errors = (shown[:, at : at + 6] for at in (0, 10, 20, 30))
    assert (photograph == 100).all()
    for panel, values in ((true, truth), (predicted, mask)):
        assert ((panel != 100).any(-1) == (values == 1).numpy()).all()
    wrong = (truth != mask).numpy()
    wrong[4, 5] = False
    assert ((errors != 100).any(-1) == wrong).all()
    assert outputs.comparison_image(image, mask).size == (6 * 2 + 4, 5)


def test_legend_lists_what_is_there() -> None:
    image, mask = torch.zeros(3, 40, 200, dtype=torch.uint8), torch.zeros(40, 200)
    mask[:10] = 2
    mask[10] = 255
    names = ["ground", "unseen", "cup"]
    colors = [(1, 2, 3), (4, 5, 6), (7, 8, 9)]
    shown = np.array(outputs.overlay(image, mask, classes=names, colors=colors))
    assert shown.shape == (40 + 2 * 16, 200, 3)
    assert shown[40 + 8, 8].tolist() == [1, 2, 3]  # the most common first
    assert shown[40 + 16 + 8, 8].tolist() == [7, 8, 9]
    assert (shown[40:, 18:] < 128).any()  # and their names


def test_overlay_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(4, 6\) and its mask \(6, 4\)"):
        outputs.overlay(torch.zeros(3, 4, 6, dtype=torch.uint8), torch.zeros(6, 4), classes=["a"])


def test_colors_repeat_but_never_for_ignored_pixels() -> None:
    table = outputs.color_table([(1, 1, 1), (2, 2, 2)])
    assert table[:4, 0].tolist() == [1, 2, 1, 2]
    assert tuple(table[255]) == outputs.IGNORED


def test_contest_palette() -> None:
    assert len(outputs.CONTEST) == 11
    assert outputs.CONTEST[1] == (192, 0, 128)
    assert outputs.CONTEST[10] == (128, 0, 192)


def test_safe_colors_stay_apart_for_color_blind_eyes() -> None:
    """CIELAB distances, as seen by normal, protanopic and deuteranopic eyes (Machado 2009)."""
    rgb = np.array(outputs.SAFE) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    protanopia = [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216]]
    protanopia.append([-0.003882, -0.048116, 1.051998])
    deuteranopia = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413]]
    deuteranopia.append([-0.011820, 0.042940, 0.968881])
    to_xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750]]
    to_xyz.append([0.0193339, 0.1191920, 0.9503041])
    nearest = []
    for eye in (np.eye(3), np.array(protanopia), np.array(deuteranopia)):
        seen = np.clip(linear @ eye.T, 0, 1)
        xyz = seen @ np.array(to_xyz).T
        xyz = xyz / (0.95047, 1, 1.08883)
        f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
        lab = np.stack([116 * f[:, 1], 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)
        distance = np.linalg.norm(lab[:, None] - lab, axis=-1) + 1e3 * np.eye(len(lab))
        nearest.append([distance[:n, :n].min() for n in (12, 41)])
    first, all_of_them = np.min(nearest, 0)
    assert len(outputs.SAFE) == 41
    assert first > 17  # Okabe and Ito's own nearest two
    assert all_of_them > 12


# ------------------------------------------------------------------------------ submission


def test_submission_byte_for_byte(tmp_path: Path) -> None:
    mask = torch.arange(16, dtype=torch.uint8).view(4, 4)
    masks = [("b/1.jpg", mask), ("b/0.jpg", torch.full((2, 2), 10))]
    outputs.write_submission(tmp_path / "a.csv", masks, size=2)
    expected = b"image_id,PredictionString\nb/1.jpg,0 2 8 10\nb/0.jpg,10 10 10 10\n"
    assert (tmp_path / "a.csv").read_bytes() == expected


def submitted(path: Path, mask: torch.Tensor, size: int = 256) -> torch.Tensor:
    """Write a submission of one mask and return what its line holds."""
    outputs.write_submission(path, [("0.jpg", mask)], size=size)
    _, line = path.read_text().splitlines()
    name, values = line.split(",")
    assert name == "0.jpg"
    return torch.tensor([int(value) for value in values.split()]).view(size, size)


def test_submission_of_the_contest_s_size_takes_every_second_pixel(tmp_path: Path) -> None:
    mask = a_mask(512, 512, 11)
    assert torch.equal(submitted(tmp_path / "a.csv", mask), mask[::2, ::2].long())


@pytest.mark.parametrize(("height", "width"), [(65, 97), (7, 300), (256, 256)])
def test_submission_samples_any_size(tmp_path: Path, height: int, width: int) -> None:
    mask = a_mask(height, width)
    read = submitted(tmp_path / "a.csv", mask, size=30)
    for i in range(30):
        for j in range(30):
            assert read[i, j] == mask[i * height // 30, j * width // 30]


@pytest.mark.parametrize(
    "write", [outputs.write_submission, partial(outputs.write_coco, image_ids={"a": 0})]
)
def test_an_interrupted_file_is_not_there(write: Any, tmp_path: Path) -> None:
    def masks() -> Iterator[tuple[str, torch.Tensor]]:
        yield "a", a_mask()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "a", masks())
    assert not list(tmp_path.iterdir())  # no half of a file, and no draft


# ---------------------------------------------------------------------------- COCO results


def test_coco_results_load_in_pycocotools(tmp_path: Path) -> None:
    masks = {"a.jpg": a_mask(), "b.jpg": a_mask(7, 9, 2)}
    masks["a.jpg"][:5] = 255
    ids, categories = {"a.jpg": 17, "b.jpg": 4}, {30: 1, 10: 2, 20: 3, 5: 4}
    path = tmp_path / "new" / "results.json"
    outputs.write_coco(path, masks.items(), image_ids=ids, category_ids=categories)
    truth = COCO()
    truth.dataset = {
        "images": [{"id": i} for i in ids.values()],
        "categories": [{"id": i} for i in categories],
        "annotations": [],
    }
    truth.createIndex()
    results = truth.loadRes(str(path))
    for name, mask in masks.items():
        read = np.zeros(mask.shape, np.uint8)
        for annotation in results.loadAnns(results.getAnnIds(imgIds=[ids[name]])):
            inside = coco_mask.decode(annotation["segmentation"]) == 1
            assert not read[inside].any()
            read[inside] = categories[annotation["category_id"]]
        assert np.array_equal(read, np.where(mask == 255, 0, mask))


@pytest.mark.parametrize("masks", [[], [torch.zeros(4, 4)]])
def test_coco_results_without_any(tmp_path: Path, masks: list[torch.Tensor]) -> None:
    outputs.write_coco(tmp_path / "a.json", [("a", mask) for mask in masks], image_ids={"a": 0})
    assert json.loads((tmp_path / "a.json").read_text()) == []


def test_coco_results_of_a_set_without_background(tmp_path: Path) -> None:
    masks = [("a", torch.tensor([[0, 255]]))]
    outputs.write_coco(tmp_path / "a.json", masks, image_ids={"a": 0}, background=None)
    [result] = json.loads((tmp_path / "a.json").read_text())
    assert result["category_id"] == 0
    assert coco_mask.decode(result["segmentation"]).tolist() == [[1, 0]]
