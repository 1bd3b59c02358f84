"""COCO files are rendered as expected by hand, or refused with the faulty annotation."""

import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from segkit.core.errors import DataError
from segkit.data import coco, inputs
from segkit.data.coco import CocoSource

HEIGHT, WIDTH = 6, 8


def box(x: float, y: float, width: float, height: float) -> list[float]:
    return [x, y, x + width, y, x + width, y + height, x, y + height]


def annotation(key: int, segmentation: Any, **changes: Any) -> dict[str, Any]:
    record = {"id": key, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": 9.0}
    return {**record, "segmentation": segmentation, **changes}


def content(*annotations: dict[str, Any], **changes: Any) -> dict[str, Any]:
    whole: dict[str, Any] = {
        "images": [{"id": 1, "file_name": "a.png", "height": HEIGHT, "width": WIDTH}],
        "categories": [{"id": 1, "name": "can"}, {"id": 7, "name": "bag"}],
        "annotations": list(annotations),
    }
    return {**whole, **changes}


def save(folder: Path, whole: Any, *, width: int = WIDTH, height: int = HEIGHT) -> str:
    Image.new("RGB", (width, height), (9, 8, 7)).save(folder / "a.png")
    path = folder / "some.json"
    path.write_text(json.dumps(whole))
    return str(path)


def source(folder: Path, *annotations: dict[str, Any], **arguments: Any) -> CocoSource:
    return CocoSource(annotations=save(folder, content(*annotations)), **arguments)


def fault(folder: Path, whole: Any) -> str:
    """Return the sentence of the only fault in ``whole``; ``"skip"`` lists the same fault."""
    path = save(folder, whole)
    with pytest.raises(DataError) as caught:
        CocoSource(annotations=path)
    sentence = str(caught.value)
    assert sentence.startswith(path)
    assert "\n" not in sentence
    assert len(sentence) < 400
    try:
        assert [
            fault.sentence for fault in CocoSource(annotations=path, on_error="skip").faults
        ] == [sentence]
    except DataError as error:
        assert sentence in str(error)  # noqa: PT017  (no image was left)
    return sentence


def test_polygon_covers_the_pixels_whose_centers_it_holds(tmp_path: Path) -> None:
    opened = source(tmp_path, annotation(5, [box(1, 1, 4, 2)]))
    expected = torch.zeros(HEIGHT, WIDTH, dtype=torch.uint8)
    expected[1:3, 1:5] = 1
    assert torch.equal(opened.mask(0), expected)
    assert opened.mask(0).dtype == torch.uint8
    assert opened.mask(0).is_contiguous()
    assert opened.classes == ("background", "can", "bag")
    assert opened.names == ("a.png",)
    assert opened.size(0) == (HEIGHT, WIDTH)
    assert opened.image(0).shape == (3, HEIGHT, WIDTH)
    assert opened.path(0) == tmp_path / "a.png"


def test_category_ids_map_in_ascending_order(tmp_path: Path) -> None:
    categories = [{"id": 90, "name": "z"}, {"id": -3, "name": "y"}, {"id": 12, "name": "x"}]
    shapes = [annotation(1, [box(0, 0, 2, 2)], category_id=90, area=4)]
    opened = CocoSource(annotations=save(tmp_path, content(*shapes, categories=categories)))
    assert opened.classes == ("background", "y", "x", "z")
    assert opened.category_ids == {-3: 1, 12: 2, 90: 3}
    assert opened.mask(0)[0, 0] == 3


def test_id_0_is_a_class_unless_it_is_named_background(tmp_path: Path) -> None:
    shapes = [annotation(1, [box(0, 0, 2, 2)], category_id=4), annotation(2, [box(4, 4, 2, 2)])]
    named = [{"id": 0, "name": "zero"}, {"id": 1, "name": "can"}, {"id": 4, "name": "BackGround"}]
    opened = CocoSource(annotations=save(tmp_path, content(*shapes, categories=named)))
    assert opened.classes == ("background", "zero", "can")
    assert opened.category_ids == {0: 1, 1: 2, 4: 0}
    assert opened.mask(0).unique().tolist() == [0, 2]
    assert [region.class_index for region in opened.regions(0)] == [0, 2]
    ground = CocoSource(annotations=save(tmp_path, content(categories=named)), background="zero")
    assert ground.classes == ("zero", "can", "BackGround")


def test_painting_order_is_area_descending_then_id(tmp_path: Path) -> None:
    """Of three boxes on a pixel, the smallest is visible; of equal areas, the larger id."""
    small = annotation(1, [box(2, 2, 1, 1)], area=1, category_id=7)
    large = annotation(9, [box(0, 0, 6, 6)], area=36)
    assert source(tmp_path, small, large).mask(0)[2, 2] == 2
    assert source(tmp_path, large, small).mask(0)[2, 2] == 2
    first, second = (
        annotation(3, [box(0, 0, 4, 4)], category_id=7),
        annotation(4, [box(0, 0, 4, 4)]),
    )
    for order in ((first, second), (second, first)):
        assert source(tmp_path, *order).mask(0)[2, 2] == 1
    # the file's area counts, not the shape's
    assert source(tmp_path, {**small, "area": 99}, large).mask(0)[2, 2] == 1


def test_without_an_area_the_shape_gives_it(tmp_path: Path) -> None:
    small = annotation(1, [box(2, 2, 1, 1)], category_id=7)
    large = annotation(9, [box(0, 0, 6, 6)])
    for record in (small, large):
        del record["area"]
    assert source(tmp_path, small, large).mask(0)[2, 2] == 2


def test_several_polygons_are_one_object(tmp_path: Path) -> None:
    """Overlapping polygons are joined by OR, not XOR."""
    opened = source(tmp_path, annotation(1, [box(0, 0, 3, 3), box(2, 2, 3, 3)]))
    expected = torch.zeros(HEIGHT, WIDTH, dtype=torch.uint8)
    expected[0:3, 0:3] = 1
    expected[2:5, 2:5] = 1
    assert torch.equal(opened.mask(0), expected)


@pytest.mark.parametrize("kind", ["polygon", "runs", "string"])
def test_all_kinds_of_segmentation_give_the_same_mask(tmp_path: Path, kind: str) -> None:
    drawn = np.zeros((HEIGHT, WIDTH), np.uint8)
    drawn[1:4, 2:4] = 1
    # by columns: 2 empty ones and a row, then 3 pixels, 3 others, 3 pixels, the rest
    runs = [13, 3, 3, 3, 26]
    packed = coco_mask.encode(np.asfortranarray(drawn))["counts"].decode()
    size = [HEIGHT, WIDTH]
    kinds: dict[str, Any] = {
        "polygon": [box(2, 1, 2, 3)],
        "runs": {"size": size, "counts": runs},
        "string": {"size": size, "counts": packed},
    }
    opened = source(tmp_path, annotation(1, kinds[kind]))
    assert torch.equal(opened.mask(0), torch.from_numpy(drawn))


@pytest.mark.parametrize(
    ("crowd", "expected"), [("ignore", [0, 1, 255]), ("paint", [0, 1, 2]), ("skip", [0, 1])]
)
def test_crowds(tmp_path: Path, crowd: Any, expected: list[int]) -> None:
    many = annotation(
        1, {"size": [HEIGHT, WIDTH], "counts": [24, 24]}, iscrowd=1, area=24, category_id=7
    )
    opened = source(tmp_path, many, annotation(2, [box(0, 0, 2, 2)], area=4), crowd=crowd)
    assert opened.mask(0).unique().tolist() == expected
    assert [region.crowd for region in opened.regions(0)] == [True, False]


def test_images_without_annotations_are_background(tmp_path: Path) -> None:
    whole = content(annotation(1, [box(0, 0, 2, 2)]))
    whole["images"].append({"id": 2, "file_name": "b.png", "height": 65, "width": 97})
    opened = CocoSource(annotations=save(tmp_path, whole))
    assert torch.equal(opened.mask(1), torch.zeros(65, 97, dtype=torch.uint8))
    assert opened.image_ids == (1, 2)


def test_file_without_annotations_is_unlabelled(tmp_path: Path) -> None:
    whole = content()
    for absent in (("annotations",), ("annotations", "categories"), ()):
        some = {key: value for key, value in whole.items() if key not in absent}
        opened = CocoSource(annotations=save(tmp_path, some))
        assert not opened.labelled
        assert opened.image(0).shape == (3, HEIGHT, WIDTH)
        with pytest.raises(DataError, match="no annotations"):
            opened.mask(0)


def test_images_may_lie_in_another_folder(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    path = save(tmp_path, content(annotation(1, [box(0, 0, 2, 2)])))
    (tmp_path / "a.png").rename(tmp_path / "photos/a.png")
    opened = CocoSource(annotations=path, images=str(tmp_path / "photos"))
    assert opened.image(0).shape == (3, HEIGHT, WIDTH)


def test_pickled_source_is_the_same(tmp_path: Path) -> None:
    opened = source(tmp_path, annotation(1, [box(0, 0, 2, 2)]))
    again = pickle.loads(pickle.dumps(opened))
    assert torch.equal(again.mask(0), opened.mask(0))
    assert again.names == opened.names


def test_figure_of_eight_has_an_area(tmp_path: Path) -> None:
    """Its signed area is 0, but it is accepted."""
    opened = source(tmp_path, annotation(1, [[0, 0, 6, 6, 6, 0, 0, 6]]))
    assert opened.mask(0).sum() > 6


def test_overhanging_polygons_are_clipped(tmp_path: Path) -> None:
    opened = source(tmp_path, annotation(1, [box(-2, -2, 4, 4)]))
    assert opened.mask(0).nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


NAN, INFINITE = float("nan"), float("inf")
RUNS = {"size": [HEIGHT, WIDTH]}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"segmentation": [[1, 1, 4, 1]]}, "polygon 0 has 2 points; expected at least 3"),
        ({"segmentation": [[]]}, "polygon 0 has 0 points"),
        ({"segmentation": [[1, 1, 4, 1, 4, 3, 2]]}, "polygon 0 has 7 coordinates"),
        (
            {"segmentation": [box(1, 1, 2, 2), [1, 1, NAN, 1, 4, 3]]},
            "polygon 1 reaches from nan, 1 to nan, 3; expected finite",
        ),
        ({"segmentation": [[1, 1, INFINITE, 1, 4, 3]]}, "polygon 0 reaches from 1, 1 to inf, 3"),
        ({"segmentation": [[1, 1, -INFINITE, 1, 4, 3]]}, "polygon 0 reaches from -inf, 1 to"),
        (
            {"segmentation": [[1, 1, 10**400, 1, 4, 3]]},
            "polygon 0 reaches from inf, inf to inf, inf",
        ),
        ({"segmentation": [[1, 1, 1e9, 1, 4, 3]]}, r"reaches from 1, 1 to 1e\+09, 3"),
        ({"segmentation": [[1, 1, "4", 1, 4, 3]]}, "polygon 0 is .* a list of numbers"),
        ({"segmentation": [[1, 1, True, 1, 4, 3]]}, "polygon 0 is .* a list of numbers"),
        ({"segmentation": [[[1, 1], [4, 1], [4, 3]]]}, "polygon 0 is .* a list of numbers"),
        ({"segmentation": [1, 1, 4, 1, 4, 3]}, "polygon 0 is 1; expected a list of numbers"),
        ({"segmentation": [[1, 1, 3, 2, 5, 3]]}, "have no area"),
        ({"segmentation": [[2, 2, 2, 2, 2, 2]]}, "have no area"),
        ({"segmentation": [box(9, 1, 2, 2)]}, "lies outside the image, which is 8 × 6"),
        ({"segmentation": [box(1, -4, 2, 3)]}, "lies outside the image"),
        ({"segmentation": []}, r"segmentation is \[\]; expected polygons or an RLE"),
        ({"segmentation": None}, "segmentation is None"),
        ({"segmentation": {**RUNS, "counts": [13, 3]}}, "add up to 16; expected 48 = 6 × 8"),
        ({"segmentation": {**RUNS, "counts": []}}, "add up to 0; expected 48"),
        ({"segmentation": {**RUNS, "counts": [58, -10]}}, "negative or huge"),
        ({"segmentation": {**RUNS, "counts": [10**30]}}, "negative or huge"),
        ({"segmentation": {**RUNS, "counts": [2**32 + 24, 24]}}, "negative or huge"),
        ({"segmentation": {**RUNS, "counts": [24.0, 24.0]}}, "expected integers or a string"),
        ({"segmentation": {**RUNS, "counts": [48]}}, "RLE has no area"),
        ({"segmentation": {**RUNS}}, "has counts None"),
        (
            {"segmentation": {"size": [8, 6], "counts": [24, 24]}},
            r"size \[8, 6\]; expected \[6, 8\]",
        ),
        ({"segmentation": {"counts": [24, 24]}}, "RLE has size None"),
        ({"segmentation": {**RUNS, "counts": ""}}, "malformed counts"),
        ({"segmentation": {**RUNS, "counts": "é1"}}, "malformed counts"),
        ({"segmentation": {**RUNS, "counts": " 1"}}, "malformed counts"),
        ({"segmentation": {**RUNS, "counts": "PPPP"}}, "malformed counts"),
        ({"segmentation": {**RUNS, "counts": "oooooooooooo1"}}, "malformed counts"),
        ({"segmentation": {**RUNS, "counts": "h0h0h0"}}, "add up to"),
        # the runs 50, -4, 2: their sum is right
        ({"segmentation": {**RUNS, "counts": "b1L2"}}, "add up to 48; .* none of them negative"),
        ({"area": 0}, "area is 0; expected more than 0"),
        ({"area": -4.0}, "area is -4"),
        ({"area": NAN}, "area is nan"),
        ({"area": INFINITE}, "area is inf"),
        ({"area": "9"}, "area is '9'"),
        ({"iscrowd": 2}, "iscrowd is 2; expected 0 or 1"),
        ({"category_id": 3}, "category 3 is not in the file"),
        ({"category_id": [1]}, r"category \[1\] is not in the file"),
        ({"category_id": True}, "category True is not in the file"),
        ({"image_id": 99}, "image 99 is not in the file"),
        ({"image_id": None}, "image None is not in the file"),
        ({"id": "5"}, "annotation '5' of a.png: expected a unique integer id"),
        ({"id": None}, "annotation None of a.png: expected a unique integer id"),
    ],
)
def test_faulty_annotations(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    sound = annotation(4, [box(0, 0, 2, 2)])
    sentence = fault(tmp_path, content(sound, {**annotation(5, [box(1, 1, 4, 2)]), **changes}))
    assert re.search(words, sentence), sentence
    if changes.keys() & {"segmentation", "area"}:
        assert "annotation 5 of a.png: " in sentence


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"file_name": "../a.png"}, "leads out of the data folder"),
        ({"file_name": "/a.png"}, "leads out of the data folder"),
        ({"file_name": "a\0.png"}, "is not valid"),
        ({"file_name": "\ud800"}, "is not valid"),
        ({"file_name": 3}, "needs an integer id and a file_name"),
        ({"id": "2"}, "needs an integer id and a file_name"),
        ({"id": 1}, "two images have id 1"),
        ({"file_name": "a.png"}, "two images are named 'a.png'"),
        ({"width": None}, "height 6 and width None"),
        ({"width": 0}, "height 6 and width 0"),
        ({"width": -8}, "height 6 and width -8"),
        ({"width": 8.5}, "height 6 and width 8.5"),
        ({"width": True}, "height 6 and width True"),
        ({"width": 10**12}, "expected at most 400,000,000"),
        ({"width": 10**4000, "height": 10**4000}, "expected at most 400,000,000"),
    ],
)
def test_faulty_images(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    """Annotations of a faulty image are no further faults."""
    whole = content(annotation(1, [box(0, 0, 2, 2)]))
    other = {"id": 2, "file_name": "b.png", "height": HEIGHT, "width": WIDTH, **changes}
    whole["annotations"].append(annotation(2, [box(0, 0, 2, 2)], image_id=other["id"]))
    if not isinstance(other["id"], int):
        whole["annotations"].pop()  # it would belong to no image: another fault
    whole["images"].append(other)
    assert words in fault(tmp_path, whole)


def test_repeated_annotation_id(tmp_path: Path) -> None:
    twice = [annotation(5, [box(0, 0, 2, 2)]), annotation(5, [box(3, 3, 2, 2)])]
    assert "annotation 5 of a.png: expected a unique integer id" in fault(tmp_path, content(*twice))


@pytest.mark.parametrize(
    ("whole", "words"),
    [
        ([], "contains a JSON list"),
        ({}, "has no 'images'"),
        ({"images": 3}, "'images' is 3; expected a list"),
        ({"images": [3]}, r"images\[0\] is 3; expected an object"),
        (content(images=[]), "lists no usable image"),
        (content(annotations=None), "'annotations' is None; expected a list"),
        (content(annotations=[[]]), r"annotations\[0\] is \[\]; expected an object"),
        (content(annotation(1, [box(0, 0, 2, 2)]), categories=[]), "but no categories"),
        (content(categories=[{"id": 1}]), "needs an integer id and a name"),
        (content(categories=[{"id": "one", "name": "a"}]), "needs an integer id and a name"),
        (content(categories=[{"id": 1, "name": "a"}] * 2), "two categories have id 1"),
        (
            content(categories=[{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]),
            "'a' is that of 2 classes; rename it",
        ),
        (content(categories=[{"id": 1, "name": " "}]), "' ' is empty"),
        (content(categories=[{"id": 1, "name": "a\nb"}]), "control characters"),
        (content(categories=[{"id": i, "name": f"{i}"} for i in range(300)]), "gives 301 classes"),
    ],
)
def test_faulty_files(tmp_path: Path, whole: Any, words: str) -> None:
    assert re.search(words, fault(tmp_path, whole))


def test_254_categories_are_the_most(tmp_path: Path) -> None:
    categories = [{"id": i, "name": f"{i}"} for i in range(255)]
    last = annotation(1, [box(0, 0, 2, 2)], category_id=253)
    opened = CocoSource(annotations=save(tmp_path, content(last, categories=categories[:254])))
    assert opened.mask(0)[0, 0] == 254
    with pytest.raises(DataError, match="gives 256 classes; expected 1 to 255"):
        CocoSource(annotations=save(tmp_path, content(last, categories=categories)))


def test_truncated_json(tmp_path: Path) -> None:
    path = Path(save(tmp_path, content(annotation(1, [box(0, 0, 2, 2)]))))
    path.write_text(path.read_text()[:-20])
    with pytest.raises(DataError, match=r"some\.json is not valid JSON"):
        CocoSource(annotations=str(path))


def test_huge_json(tmp_path: Path, monkeypatch) -> None:
    path = save(tmp_path, content())
    monkeypatch.setattr(inputs, "MAX_BYTES", 100)
    with pytest.raises(DataError, match=r"some\.json has \d+ bytes; expected at most 100"):
        CocoSource(annotations=path)


def test_overlong_outline(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(coco, "MAX_OUTLINE", 11)
    assert "its outline is 12 pixels long; expected at most 11" in fault(
        tmp_path, content(annotation(1, [box(0, 0, 2, 4)]))
    )


def test_size_that_differs_from_the_files(tmp_path: Path) -> None:
    path = save(tmp_path, content(annotation(1, [box(0, 0, 2, 2)])), width=HEIGHT, height=WIDTH)
    with pytest.raises(DataError, match=r"a\.png is 6 wide and 8 high, but .* says 8 and 6"):
        CocoSource(annotations=path).image(0)


def test_size_is_that_of_the_upright_image(tmp_path: Path) -> None:
    path = save(tmp_path, content(annotation(1, [box(0, 0, 2, 2)])))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (HEIGHT, WIDTH)).save(tmp_path / "a.png", exif=exif)
    assert CocoSource(annotations=path).image(0).shape == (3, HEIGHT, WIDTH)


def test_symbolic_link_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    path = save(tmp_path / "data", content(annotation(1, [box(0, 0, 2, 2)])))
    (tmp_path / "data/a.png").rename(tmp_path / "secret.png")
    (tmp_path / "data/a.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(DataError, match="symbolic link out of the data folder"):
        CocoSource(annotations=path).image(0)


def test_skip_keeps_valid_images_and_lists_the_faults(tmp_path: Path) -> None:
    """Image 1 keeps an annotation, the rest is ignored; 2 is missing, 3 cut, 4 valid."""
    whole = content(
        annotation(1, [box(0, 0, 2, 2)]),
        annotation(2, [[0, 0, 1]]),
        annotation(4, [box(4, 4, 2, 2)], image_id=4, category_id=7),
    )
    for key, name in ((2, "b.png"), (3, "c.png"), (4, "d.png"), (5, "../e.png")):
        whole["images"].append({"id": key, "file_name": name, "height": HEIGHT, "width": WIDTH})
    path = save(tmp_path, whole)
    sound = (tmp_path / "a.png").read_bytes()
    (tmp_path / "c.png").write_bytes(sound[:50])
    (tmp_path / "d.png").write_bytes(sound)
    opened = CocoSource(annotations=path, on_error="skip")
    assert opened.names == ("a.png", "d.png")
    assert opened.image_ids == (1, 4)
    assert [opened.mask(i).unique().tolist() for i in range(2)] == [[1, 255], [0, 2]]
    assert [(fault.file, fault.annotation) for fault in opened.faults] == [
        ("../e.png", None),
        ("a.png", 2),
        ("b.png", None),
        ("c.png", None),
    ]
    with pytest.raises(DataError, match=r"e\.png.*\(and 1 more\)"):
        CocoSource(annotations=path)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1), st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_own_reading_of_compressed_runs_is_that_of_pycocotools(
    height: int, width: int, seed: int, share: float
) -> None:
    drawn = (np.random.default_rng(seed).random((width, height)) < share).astype(np.uint8).T
    packed = coco_mask.encode(np.asfortranarray(drawn))["counts"].decode()
    runs = coco._decompress(packed)
    filled = np.repeat(np.arange(len(runs)) % 2, runs).reshape(width, height).T
    assert np.array_equal(filled, drawn)


def test_long_runs_are_read(tmp_path: Path) -> None:
    drawn = np.zeros((4096, 4096), np.uint8)
    drawn[:, 4000:] = 1
    drawn[5, 3] = 1
    packed = coco_mask.encode(np.asfortranarray(drawn))["counts"].decode()
    assert coco._decompress(packed).tolist() == [
        3 * 4096 + 5,
        1,
        4000 * 4096 - 3 * 4096 - 6,
        96 * 4096,
    ]


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=20,
)


@given(
    st.sampled_from(["images", "categories", "annotations"]),
    st.sampled_from(
        [
            *("id", "file_name", "height", "width", "name", "image_id", "category_id"),
            *("iscrowd", "area", "segmentation", "counts", "size"),
        ]
    ),
    VALUES,
)
@settings(max_examples=300, deadline=None)
def test_any_value_anywhere_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, part: str, key: str, value: Any
) -> None:
    folder = tmp_path_factory.getbasetemp()
    runs = {"size": [HEIGHT, WIDTH], "counts": [24, 24]}
    whole = content(annotation(1, [box(0, 0, 2, 2)]), annotation(2, runs))
    target = runs if key in ("counts", "size") else whole[part][0]
    target[key] = value
    try:
        read = CocoSource(annotations=save(folder, whole))
        if read.labelled:
            read.mask(0)
        read.image(0)
    except DataError:
        pass


@pytest.mark.slow
def test_mutated_files_are_read_or_refused(tmp_path: Path) -> None:
    """Bytes are changed in 20,000 files, and compressed runs in 20,000 more."""
    drawn = np.random.default_rng(1).random((HEIGHT, WIDTH)) < 0.3
    packed = coco_mask.encode(np.asfortranarray(drawn.astype(np.uint8)))["counts"].decode()
    rle = {"size": [HEIGHT, WIDTH], "counts": packed}
    path = Path(save(tmp_path, content(annotation(1, [box(0, 0, 2, 2)]), annotation(2, rle))))
    whole = path.read_bytes()
    start = whole.index(packed.encode())
    rng = np.random.default_rng(0)
    read = 0
    for number in range(40_000):
        mutated = bytearray(whole)
        low, high = (0, len(whole)) if number % 2 else (start, start + len(packed))
        for at in rng.integers(low, high, rng.integers(1, 4)):
            mutated[at] = rng.integers(48, 112) if rng.random() < 0.8 else rng.integers(256)
        path.write_bytes(mutated)
        try:
            opened = CocoSource(annotations=str(path))
            if opened.labelled:
                opened.mask(0)
            read += 1
        except DataError:
            continue
    assert 0 < read < 40_000


@pytest.mark.parametrize("written", ["sub\\a b.png", "sub/a%20b.png", "sub%2Fa%20b.png"])
def test_names_of_windows_and_the_web(tmp_path: Path, written: str) -> None:
    whole = content(annotation(1, [box(0, 0, 2, 2)]))
    whole["images"][0]["file_name"] = written
    path = save(tmp_path, whole)
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.png").rename(tmp_path / "sub/a b.png")
    opened = CocoSource(annotations=path)
    assert opened.names == ("sub/a b.png",)
    assert opened.image(0).shape == (3, HEIGHT, WIDTH)


def test_percent_signs_of_a_name_that_is_there_stay(tmp_path: Path) -> None:
    whole = content(annotation(1, [box(0, 0, 2, 2)]))
    whole["images"][0]["file_name"] = "50%25 \\ %s.png"
    path = save(tmp_path, whole)
    (tmp_path / "a.png").rename(tmp_path / "50%25 \\ %s.png")
    assert CocoSource(annotations=path).image(0).shape == (3, HEIGHT, WIDTH)


def test_escaped_names_may_not_leave_the_folder(tmp_path: Path) -> None:
    whole = content(annotation(1, [box(0, 0, 2, 2)]))
    whole["images"][0]["file_name"] = "%2e%2e/secret.png"
    folder = tmp_path / "data"
    folder.mkdir()
    path = save(folder, whole)
    (folder / "a.png").rename(tmp_path / "secret.png")
    with pytest.raises(DataError, match="leads out of the data folder"):
        CocoSource(annotations=path)


def test_a_missing_image_is_named_with_the_file_that_is_there(tmp_path: Path) -> None:
    path = save(tmp_path, content(annotation(1, [box(0, 0, 2, 2)])))
    (tmp_path / "a.png").rename(tmp_path / "A.PNG")
    with pytest.raises(DataError, match=r"a\.png does not exist; A\.PNG is there: correct"):
        CocoSource(annotations=path).image(0)
