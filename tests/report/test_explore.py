"""Statistics, near-duplicates and suspicious labels of a data set, and its page."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from made_run import Drawn
from PIL import Image, ImageOps

from segkit.commands.explore import main
from segkit.core import config
from segkit.core.errors import SegkitError
from segkit.report.data_page import data_page
from segkit.report.duplicates import near_duplicates
from segkit.report.survey import Part, color_statistics, connected_areas, find_problems


def test_areas_by_brute_force() -> None:
    rng = np.random.default_rng(0)
    mask = rng.choice(np.array([0, 1, 255], np.uint8), (23, 31))
    expected, seen = [], np.zeros(mask.shape, bool)
    for start in np.ndindex(mask.shape):
        if seen[start] or mask[start] == 255:
            continue
        places, stack = [], [start]
        seen[start] = True
        while stack:
            y, x = stack.pop()
            places.append((y, x))
            for v, u in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                inside = 0 <= v < 23 and 0 <= u < 31
                if inside and not seen[v, u] and mask[v, u] == mask[start]:
                    seen[v, u] = True
                    stack.append((v, u))
        ys, xs = zip(*places, strict=True)
        box = (min(xs), min(ys), max(xs) + 1, max(ys) + 1)
        expected.append((int(mask[start]), len(places), box))
    areas = [(area.class_index, area.area, area.box) for area in connected_areas(mask)]
    assert sorted(areas) == sorted(expected)


def test_near_duplicates_of_any_flip() -> None:
    rng = np.random.default_rng(0)
    base = np.stack([np.kron(rng.random((4, 4)), np.ones((8, 8))) * 255 for _ in range(40)])
    flips = [base[0], base[1][:, ::-1], base[2][::-1], base[3][::-1, ::-1]]
    copies = [np.clip(0.8 * flip + 20 + rng.normal(0, 2, flip.shape), 0, 255) for flip in flips]
    pairs = near_duplicates(np.stack([*base, *copies, np.full((32, 32), 7.0), np.zeros((32, 32))]))
    names = ["", "mirrored", "upside down", "turned by 180°"]
    assert {pair[:3] for pair in pairs} == {(i, 40 + i, name) for i, name in enumerate(names)}
    assert near_duplicates(base[:1]) == []


def test_color_statistics_are_those_of_the_pixels() -> None:
    source = Drawn(5)
    mean, std = color_statistics(Part("train", source).histogram)
    pixels = torch.stack([source.image(i) for i in range(5)]).double().div(255)
    np.testing.assert_allclose(mean, pixels.mean((0, 2, 3)), atol=1e-4)
    np.testing.assert_allclose(std, pixels.std((0, 2, 3), correction=0), atol=1e-4)


def test_counts_of_classes() -> None:
    source, cfg = Drawn(30), config.Config()
    part = Part("train", source)
    assert [len(part.objects(c)) for c in range(4)] == [0, 10, 10, 10]
    assert part.pixels[0].tolist() == [60 * 80 - 80 - 300, 300, 0, 0]
    page = data_page(cfg, [part], find_problems(cfg, [part]), title="drawn")
    assert re.search(r"bag</th><td[^>]*>10</td><td[^>]*>33.3 %</td><td[^>]*>10</td>", page)


# ------------------------------------------------------------------- real photographs


@pytest.fixture
def planted(shared_data: Path, tmp_path: Path) -> Path:
    """A copy of some real photographs of trash bags, with faults of every kind planted."""
    origin = shared_data / "trashbags"
    content = json.loads((origin / "annotations/train.json").read_text())
    groups = json.loads((origin / "groups.json").read_text())
    owned: dict[int, list] = {}
    for annotation in content["annotations"]:
        owned.setdefault(annotation["image_id"], []).append(annotation)
    images, seen = [], set()
    for image in content["images"]:  # the first with objects of each place
        group = str(groups[image["file_name"]])
        if group not in seen and owned.get(image["id"]):
            images.append(image)
            seen.add(group)
    images = images[:36]
    annotations = [annotation for image in images for annotation in owned[image["id"]]]
    (tmp_path / "copy").mkdir()
    for image in images:
        path = next(origin.rglob(Path(image["file_name"]).name))
        image["file_name"] = path.name
        shutil.copy(path, tmp_path / path.name)
    copies = []
    for n, change in enumerate(("smaller", "mirrored", "darker")):
        image = images[n]
        with Image.open(tmp_path / image["file_name"]) as photograph:
            copy = ImageOps.exif_transpose(photograph).convert("RGB")
        if change == "smaller":
            copy = copy.resize((copy.width * 2 // 3, copy.height * 2 // 3))
        elif change == "mirrored":
            copy = ImageOps.mirror(copy)
        else:
            copy = Image.eval(copy, lambda v: v * 3 // 4)
        name = f"copy/{change}.jpg"
        copy.save(tmp_path / name, quality=60)
        size = {"width": copy.width, "height": copy.height}
        copies.append({"id": 10**6 + n, "file_name": name, **size})
    categories = [category["id"] for category in content["categories"]]
    free = iter(range(10**7, 10**7 + 100))

    def add(image: dict, box: tuple[int, int, int, int], category: int) -> int:
        left, top, right, bottom = box
        annotations.append(
            {
                "id": (key := next(free)),
                "image_id": image["id"],
                "category_id": category,
                "segmentation": [[left, top, right, top, right, bottom, left, bottom]],
            }
        )
        return key

    def middle(image: dict) -> tuple[int, int, int, int]:
        width, height = image["width"], image["height"]
        return (width // 4, height // 4, width // 2, height // 2)

    edge, last = images[4]["width"], copies[2]
    expected = {
        "tiny": [add(images[3], (5, 5, 8, 8), categories[0])],
        "off-frame": [add(images[4], (edge - 30, 10, edge + 60, 90), categories[0])],
        "overlap": [add(images[3], middle(images[3]), category) for category in categories[:2]],
        "repeated": [add(images[5], middle(images[5]), categories[0]) for _ in range(2)],
        "pairs": [[images[n]["file_name"], copy["file_name"]] for n, copy in enumerate(copies)],
    }
    # an object of another class than the original's covers the darker copy
    own = owned[images[2]["id"]][0]["category_id"]
    add(last, (0, 0, last["width"], last["height"]), next(c for c in categories if c != own))
    content |= {"images": [*images, *copies], "annotations": annotations}
    (tmp_path / "train.json").write_text(json.dumps(content))
    (tmp_path / "expected.json").write_text(json.dumps(expected))
    return tmp_path


def test_planted_faults_are_reported(planted: Path, capsys: pytest.CaptureFixture) -> None:
    cfg = {"data": {"train": {"name": "coco", "annotations": str(planted / "train.json")}}}
    (planted / "cfg.json").write_text(json.dumps(cfg))
    out = planted / "explore.html"
    out.write_text("<p>mine</p>")
    with pytest.raises(SegkitError, match=r"explore\.html: exists already"):
        main(["--cfg", str(planted / "cfg.json"), "--out", str(out)])
    assert out.read_text() == "<p>mine</p>"
    out.unlink()
    main(["--cfg", str(planted / "cfg.json"), "--out", str(out), "--json"])
    findings = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    of_kind: dict[str, list[dict]] = {}
    for finding in findings:
        of_kind.setdefault(finding["kind"], []).append(finding)
    expected = json.loads((planted / "expected.json").read_text())
    pairs = of_kind["near-duplicate"]
    assert sorted(sorted(p["images"]) for p in pairs) == sorted(map(sorted, expected["pairs"]))
    flips = {pair["images"][-1]: pair["flip"] for pair in pairs}
    assert flips["copy/mirrored.jpg"] == "mirrored"
    for kind in ("tiny", "off-frame", "overlap", "repeated"):
        assert {f["annotation"] for f in of_kind[kind]} & set(expected[kind]), kind
    unlabelled = {finding["image"] for finding in of_kind["unlabelled"]}
    assert unlabelled == {"copy/smaller.jpg", "copy/mirrored.jpg"}
    assert any("copy/darker.jpg" in finding["reason"] for finding in of_kind["differs"])
    assert out.stat().st_size < 5e6
