"""Geometry equals plain references: copies bit for bit, resampling within one level of 255."""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from segkit.augment import Pipeline, generator
from segkit.augment.geometry import (
    GEOMETRY,
    IDENTITY,
    Canvas,
    crop,
    flip_matrix,
    perspective,
    quarter_turn,
    resize_matrix,
    resized_crop,
    rotate,
    scale,
    scale_matrix,
    shear,
    shift,
    shift_matrix,
)
from segkit.augment.warp import warp
from segkit.core.errors import ConfigError

SIZE = (65, 97)


def noise(size: tuple[int, int] = SIZE) -> Tensor:
    return torch.randint(0, 256, (3, *size), generator=torch.Generator().manual_seed(0)).to(
        torch.uint8
    )


def smooth(size: tuple[int, int] = SIZE) -> Tensor:
    coarse = torch.rand((1, 3, 6, 8), generator=torch.Generator().manual_seed(1)) * 255
    image = F.interpolate(coarse, size, mode="bicubic", align_corners=False)[0]
    return image.clamp(0, 255).round().to(torch.uint8)


def labels(size: tuple[int, int] = SIZE) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 11, size, generator=generator).to(torch.uint8)


def run(name: str, **arguments) -> Canvas:
    return GEOMETRY[name](Canvas(SIZE), np.random.default_rng(0), **arguments)


def by_pixels(image: Tensor, matrix: np.ndarray, size: tuple[int, int]) -> Tensor:
    """Sample a mask with nearest neighbor by a loop over pixels; 255 outside."""
    result = torch.full(size, 255, dtype=torch.uint8)
    for row in range(size[0]):
        for column in range(size[1]):
            x, y, w = matrix @ [column + 0.5, row + 0.5, 1]
            x, y = math.floor(x / w), math.floor(y / w)
            if 0 <= x < image.shape[1] and 0 <= y < image.shape[0]:
                result[row, column] = image[y, x]
    return result


def well_inside(inside: Tensor) -> Tensor:
    """Return pixels away from padding and edges, where other libraries blend with a fill color."""
    outside = F.pad(1 - inside[None], (1, 1, 1, 1), value=1.0)
    return F.max_pool2d(outside, 3, 1)[0] == 0


def test_identity_is_the_image() -> None:
    image, mask = noise(), labels()
    same, same_mask, inside = warp(image, mask, IDENTITY, SIZE)
    assert same.dtype == torch.uint8
    assert torch.equal(same, image)
    assert torch.equal(same_mask, mask)
    assert inside is None


def test_flips_are_copies() -> None:
    image, mask = noise(), labels()
    for name, dim in (("hflip", -1), ("vflip", -2)):
        canvas = run(name)
        flipped, flipped_mask, inside = warp(image, mask, canvas.matrix, canvas.size)
        assert torch.equal(flipped, image.flip(dim))
        assert torch.equal(flipped_mask, mask.flip(dim))
        assert inside is None


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_quarter_turns_are_copies(turns: int) -> None:
    image, mask = noise(), labels()
    canvas = quarter_turn(Canvas(SIZE), np.random.default_rng(0), turns=(turns,))
    turned, turned_mask, _ = warp(image, mask, canvas.matrix, canvas.size)
    assert torch.equal(turned, image.rot90(turns, (-2, -1)))
    assert torch.equal(turned_mask, mask.rot90(turns, (-2, -1)))


def test_copies_compose() -> None:
    """A quarter turn, a flip and a crop together copy pixels once."""
    canvas = quarter_turn(Canvas(SIZE), np.random.default_rng(0), turns=(1,))
    canvas = canvas.then(flip_matrix(canvas.size[1])).then(shift_matrix(5, 7), (40, 30))
    image = noise()
    result, _, _ = warp(image, None, canvas.matrix, canvas.size)
    assert torch.equal(result, image.rot90(1, (-2, -1)).flip(-1)[:, 7:47, 5:35])


def test_four_rotations_by_ninety_degrees_copy() -> None:
    """Cosines of 1e-17 in place of 0 do not blur."""
    canvas = Canvas((64, 64))
    for _ in range(3):
        canvas = rotate(canvas, np.random.default_rng(0), degrees=(90.0, 90.0))
    image = noise((64, 64))
    assert torch.equal(warp(image, None, canvas.matrix, (64, 64))[0], image.rot90(3, (-2, -1)))


def test_crop_beyond_the_border_is_padding() -> None:
    image, mask = noise((4, 5)), labels((4, 5))
    result, padded, inside = warp(image, mask, shift_matrix(-2, -1), (7, 9))
    assert torch.equal(result[:, 1:5, 2:7], image)
    assert torch.equal(padded[1:5, 2:7], mask)
    expected = torch.zeros(7, 9)
    expected[1:5, 2:7] = 1
    assert torch.equal(inside, expected)
    assert (padded[expected == 0] == 255).all()


@pytest.mark.parametrize("size", [(33, 50), (20, 97), (65, 31)])
def test_shrinking_equals_pillow(size: tuple[int, int]) -> None:
    image = noise()
    canvas = run("resize", size=size)
    result, _, _ = warp(image, None, canvas.matrix, canvas.size)
    photo = Image.fromarray(image.permute(1, 2, 0).numpy())
    expected = np.asarray(photo.resize(size[::-1], Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    assert np.abs(result.float().numpy() - expected).max() <= 1


@pytest.mark.parametrize("size", [(85, 127), (130, 194)])
def test_enlarging_equals_torch(size: tuple[int, int]) -> None:
    image = noise()
    result, _, _ = warp(image, None, resize_matrix(SIZE, size), size)
    expected = F.interpolate(image[None].float(), size, mode="bilinear", align_corners=False)[0]
    assert (result - expected).abs().max() <= 1  # bytes are rounded along each axis


@pytest.mark.parametrize("size", [(33, 50), (85, 127), (65, 31)])
def test_resized_masks_are_nearest(size: tuple[int, int]) -> None:
    mask = labels()
    matrix = resize_matrix(SIZE, size)
    _, result, inside = warp(noise(), mask, matrix, size)
    assert torch.equal(result, by_pixels(mask, matrix, size))
    assert inside is None


def test_resized_crop_equals_torchvision() -> None:
    image = smooth((120, 90))
    for seed in range(5):
        rng, again = np.random.default_rng(seed), np.random.default_rng(seed)
        operation = partial(resized_crop, size=(48, 40), area=(0.3, 0.9))
        canvas = operation(Canvas((120, 90)), rng)
        left, top = (canvas.matrix @ [0, 0, 1])[:2]
        right, bottom = (canvas.matrix @ [40, 48, 1])[:2]
        box = [round(value) for value in (top, left, bottom - top, right - left)]
        expected = tv.resized_crop(image, *box, [48, 40], antialias=True)
        result, _, _ = warp(image, None, canvas.matrix, canvas.size)
        assert (result.float() - expected.float()).abs().max() <= 1.01
        assert np.array_equal(canvas.matrix, operation(Canvas((120, 90)), again).matrix)


@pytest.mark.parametrize(("size", "edge"), [((48, 40), 0.11), ((200, 180), 0.5)])
def test_a_resized_crop_shifts_its_border_no_more_than_documented(
    size: tuple[int, int], edge: float
) -> None:
    """Only a crop's outermost pixels are shifted inwards: by 0.1 pixel shrunk, by 0.5 enlarged.

    Each pixel of the image has its own x as its value.
    """
    image = (torch.arange(90.0) + 0.5).expand(3, 120, 90)
    for seed in range(20):
        operation = partial(resized_crop, size=size, area=(0.3, 0.9))
        matrix = operation(Canvas((120, 90)), np.random.default_rng(seed)).matrix
        step = matrix[0, 0]
        expected = torch.from_numpy((np.arange(size[1]) + 0.5) * step + matrix[0, 2])
        off = (warp(image, None, matrix, size)[0][0] - expected) / max(step, 1)
        border = math.ceil(1 / min(step, 1))
        assert off[:, border:-border].abs().max() < 0.05  # of a pixel, by the filter's few taps
        assert off[:, :border].max() <= edge
        assert off[:, -border:].min() >= -edge


@pytest.mark.parametrize("degrees", [-33.0, 12.5, 77.0, 180.0])
def test_rotation_equals_torchvision(degrees: float) -> None:
    image, mask = smooth(), labels()
    canvas = rotate(Canvas(SIZE), np.random.default_rng(0), degrees=(degrees, degrees))
    result, turned, inside = warp(image, mask, canvas.matrix, canvas.size)
    expected = tv.rotate(image.float(), degrees, InterpolationMode.BILINEAR)
    deep = well_inside(torch.ones(SIZE) if inside is None else inside)
    assert deep.float().mean() > 0.4
    assert (result.float() - expected).abs()[:, deep].max() <= 1
    agree = turned == by_pixels(mask, canvas.matrix, SIZE)
    assert agree.float().mean() > 0.999  # float32 may fall on the other side of a pixel's edge


@pytest.mark.parametrize("name", sorted(GEOMETRY))
def test_image_and_mask_stay_together(name: str) -> None:
    """Pixels have their label times 20 as value: away from edges, the results agree too."""
    arguments: dict[str, dict] = {
        "resize": {"size": (51, 120)},
        "scale": {"range": (1.3, 1.3)},
        "resized_crop": {"size": (45, 51)},
        "rotate": {"degrees": (-40.0, 40.0)},
        "crop": {"size": (80, 60)},
        "pad": {"size": (80, 60)},
    }
    patches = torch.randint(0, 11, (5, 7), generator=torch.Generator().manual_seed(3))
    mask = patches.repeat_interleave(13, 0).repeat_interleave(14, 1)[:, :97].to(torch.uint8)
    image = (mask * 20)[None].repeat(3, 1, 1)
    for seed in range(8):
        rng = np.random.default_rng(seed)
        canvas = GEOMETRY[name](Canvas(SIZE), rng, **arguments.get(name, {}))
        result, moved, _ = warp(image, mask, canvas.matrix, canvas.size)
        assert result.shape[1:] == moved.shape == canvas.size
        assert set(moved.unique().tolist()) <= {*mask.unique().tolist(), 255}
        level = moved.float()[None, None]
        flat = F.max_pool2d(level, 5, 1, 2) == -F.max_pool2d(-level, 5, 1, 2)
        flat = flat[0, 0] & (moved != 255)
        assert flat.float().mean() > 0.1
        torch.testing.assert_close(
            result.float()[0][flat], moved.float()[flat] * 20, atol=0.51, rtol=0
        )


def test_perspective_moves_the_corners_inwards() -> None:
    for seed in range(20):
        canvas = perspective(Canvas(SIZE), np.random.default_rng(seed), amount=(0.5, 0.5))
        inverse = np.linalg.inv(canvas.matrix)
        for x, y in ((0, 0), (97, 0), (97, 65), (0, 65)):
            u, v, w = inverse @ [x, y, 1]
            assert abs(u / w - x) <= 97 / 4 + 1e-6
            assert abs(v / w - y) <= 65 / 4 + 1e-6
            assert -1e-6 <= u / w <= 97 + 1e-6


def test_perspective_equals_torchvision() -> None:
    image = smooth()
    canvas = perspective(Canvas(SIZE), np.random.default_rng(1), amount=(0.3, 0.3))
    result, _, inside = warp(image, labels(), canvas.matrix, canvas.size)
    (a, b, c), (d, e, f), (p, q, r) = canvas.matrix / canvas.matrix[2, 2]
    assert r == 1
    x, y = np.arange(97) + 0.5, np.arange(65)[:, None] + 0.5
    w = p * x + q * y + 1
    grid = np.stack(
        [(a * x + b * y + c) / w / 97 * 2 - 1, (d * x + e * y + f) / w / 65 * 2 - 1], -1
    )
    expected = F.grid_sample(
        image[None].float(), torch.from_numpy(grid)[None].float(), align_corners=False
    )[0]
    deep = well_inside(inside)
    assert (result - expected).abs()[:, deep].max() < 1


def wild_perspectives(count: int) -> list[np.ndarray]:
    """Return matrices of perspectives whose horizon crosses the canvas."""
    operation, matrices = partial(perspective, amount=(0.9, 0.9)), []
    for seed in range(count):
        matrix = operation(Canvas(SIZE), np.random.default_rng(seed)).matrix
        w = [matrix[2] @ [x, y, 1] for x in (0, 97) for y in (0, 65)]
        if min(w) < 0 < max(w):
            matrices.append(matrix)
    assert len(matrices) > count / 10
    return matrices


def test_perspective_loses_nothing_where_the_horizon_crosses_the_canvas() -> None:
    columns, rows = (np.arange(97) + 0.5)[None], (np.arange(65) + 0.5)[:, None]
    image, mask = smooth(), labels()
    for matrix in wild_perspectives(60):
        points = np.stack(np.broadcast_arrays(columns, rows, 1.0)).reshape(3, -1)
        x, y, w = matrix @ points
        x, y = (x / w).reshape(SIZE), (y / w).reshape(SIZE)
        visible = torch.from_numpy((x >= 0) & (x < 97) & (y >= 0) & (y < 65))
        result, moved, inside = warp(image, mask, matrix, SIZE)
        expected = torch.full(SIZE, 255, dtype=torch.uint8)
        at = (torch.from_numpy(line).long().clamp(min=0) for line in (y, x))
        expected[visible] = mask[tuple(line[visible] for line in at)]
        agree = (moved == expected) & ((inside > 0) == visible)
        assert agree.float().mean() > 0.99  # float32 may fall on the other side of a pixel's edge
        grid = torch.from_numpy(np.stack([x / 97 * 2 - 1, y / 65 * 2 - 1], -1))[None].float()
        read = F.grid_sample(image[None].float(), grid, padding_mode="border", align_corners=False)[
            0
        ]
        assert (result - read).abs()[:, visible].mean() < 12  # what shrinks is averaged first


def test_shift_and_shear_by_hand() -> None:
    canvas = shift(Canvas((50, 100)), np.random.default_rng(0), x=(0.1, 0.1), y=(-0.2, -0.2))
    np.testing.assert_allclose(canvas.matrix, shift_matrix(-10, 10))
    canvas = shear(Canvas((50, 100)), np.random.default_rng(0), x=(45.0, 45.0))
    np.testing.assert_allclose(canvas.matrix @ [50, 25, 1], [50, 25, 1])
    np.testing.assert_allclose(canvas.matrix @ [50, 0, 1], [25, 0, 1])


@pytest.mark.parametrize(("x", "y"), [(20.0, 0.0), (0.0, -15.0), (-25.0, 10.0)])
def test_shear_equals_torchvision(x: float, y: float) -> None:
    image = smooth()
    canvas = shear(Canvas(SIZE), np.random.default_rng(0), x=(x, x), y=(y, y))
    result, _, inside = warp(image, None, canvas.matrix, canvas.size)
    bilinear = InterpolationMode.BILINEAR
    expected = tv.affine(image.float(), 0, [0, 0], 1, [x, y], interpolation=bilinear)
    deep = well_inside(inside)
    assert deep.float().mean() > 0.4
    assert (result - expected).abs()[:, deep].max() <= 1


def test_shrinking_does_not_alias() -> None:
    """A checkerboard of single pixels becomes gray at a third of its size, rotated or not."""
    board = ((torch.arange(96)[:, None] + torch.arange(96)) % 2 * 255).to(torch.uint8)
    image = board.expand(3, -1, -1)
    turn = rotate(Canvas((96, 96)), np.random.default_rng(0), degrees=(20.0, 20.0)).matrix
    for matrix in (scale_matrix(3, 3), turn @ scale_matrix(3, 3)):
        result, _, _ = warp(image, None, matrix, (32, 32))
        assert (result[:, 8:24, 8:24].float() - 127.5).abs().max() < 8


def test_scale_then_crop_reads_whole_pixels_of_the_scaled_image() -> None:
    image = noise((64, 96))
    canvas = scale(Canvas((64, 96)), np.random.default_rng(0), range=(0.75, 0.75))
    canvas = canvas.then(shift_matrix(5, 7), (20, 30))
    expected = F.interpolate(image[None], (48, 72), mode="bilinear", antialias=True)[0]
    result, _, _ = warp(image, None, canvas.matrix, canvas.size)
    assert torch.equal(result, expected[:, 7:27, 5:35])


def test_crop_stays_within_and_reaches_every_place() -> None:
    places = set()
    for seed in range(300):
        canvas = crop(Canvas((5, 6)), np.random.default_rng(seed), size=(3, 4))
        places.add((int(canvas.matrix[1, 2]), int(canvas.matrix[0, 2])))
    assert places == {(top, left) for top in range(3) for left in range(3)}


def test_crop_of_a_smaller_canvas_keeps_all_of_it() -> None:
    mask = labels((5, 6))
    for seed in range(20):
        canvas = crop(Canvas((5, 6)), np.random.default_rng(seed), size=(9, 8))
        _, result, _ = warp(noise((5, 6)), mask, canvas.matrix, canvas.size)
        assert (result != 255).sum() == 30


def test_an_aimed_crop_shows_rare_classes_as_often_as_others() -> None:
    mask = torch.zeros(64, 96, dtype=torch.uint8)
    mask[40:44, 70:76] = 3
    mask[:, :2] = 255

    def share(aim: float) -> float:
        shown = 0
        for seed in range(300):
            canvas = Canvas((64, 96), source=mask)
            canvas = crop(canvas, np.random.default_rng(seed), size=(16, 16), aim=aim)
            left, top = canvas.matrix[0, 2], canvas.matrix[1, 2]
            assert 0 <= top <= 64 - 16
            assert 0 <= left <= 96 - 16
            shown += bool((mask[int(top) :, int(left) :][:16, :16] == 3).any())
        return shown / 300

    # of 49 x 81 crops, those from 25 to 43 and from 55 to 75 show the object
    by_chance = 19 * 21 / (49 * 81)
    assert share(0.0) == pytest.approx(by_chance, abs=0.06)
    assert share(1.0) > 0.5  # one of two classes, and others by chance
    assert share(0.5) == pytest.approx((share(0.0) + share(1.0)) / 2, abs=0.08)


def test_a_crop_aims_at_nothing_in_an_image_without_labels() -> None:
    empty = torch.full((64, 96), 255, dtype=torch.uint8)
    for source in (empty, None):
        canvas = Canvas((64, 96), source=source)
        canvas = crop(canvas, np.random.default_rng(0), size=(16, 16), aim=1.0)
        assert canvas.size == (16, 16)


def test_crop_avoids_one_class() -> None:
    """A second class covers 5 % of the mask; crops with a limit contain it far more often."""
    mask = torch.zeros((200, 200), dtype=torch.uint8)
    mask[90:130, 90:130] = 1
    share = {}
    for cap in (1.0, 0.75):
        hits = 0
        for seed in range(60):
            canvas = Canvas((200, 200), source=mask)
            canvas = scale(canvas, np.random.default_rng(seed), range=(0.8, 1.2))
            canvas = crop(canvas, np.random.default_rng(seed), size=(64, 64), max_class_share=cap)
            _, part, _ = warp(noise((200, 200)), mask, canvas.matrix, canvas.size)
            hits += int((part == 0).float().mean() <= 0.78)
        share[cap] = hits / 60
    assert share[1.0] < 0.3
    assert share[0.75] > 0.6


def test_largest_class_share_by_hand() -> None:
    mask = torch.zeros((64, 64), dtype=torch.uint8)
    mask[:16] = 3
    mask[48:] = 255
    canvas = Canvas((64, 64), source=mask)
    assert canvas.largest_class_share(0, 0, (64, 64)) == pytest.approx(32 / 48)
    assert canvas.largest_class_share(0, 0, (32, 64)) == pytest.approx(0.5)
    assert canvas.largest_class_share(48, 0, (16, 64)) == 1.0
    assert canvas.largest_class_share(200, 200, (16, 64)) == 1.0


def test_entirely_outside_is_padding() -> None:
    turn = rotate(Canvas(SIZE), np.random.default_rng(0), degrees=(20.0, 20.0)).matrix
    for matrix in (shift_matrix(500, 0), shift_matrix(500, 0) @ turn):
        result, mask, inside = warp(noise(), labels(), matrix, (20, 30))
        assert torch.isfinite(result.float()).all()
        assert (mask == 255).all()
        assert not inside.any()


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("scale", {"range": (2.0, 0.5)}, "low then high"),
        ("scale", {"range": (0.0, 0.5)}, "above 0"),
        ("scale", {"range": (1.0, math.inf)}, "finite number"),
        ("crop", {"size": (0, 5)}, "at least 1"),
        ("crop", {"size": (5, 5), "max_class_share": 0.0}, "max_class_share"),
        ("quarter_turn", {"turns": (4,)}, "turns"),
        ("resized_crop", {"size": (5, 5), "area": (0.5, 1.5)}, "at most 1"),
        ("shear", {"x": (-90.0, 0.0)}, "at least -60"),
    ],
)
def test_bad_arguments_are_refused(name: str, arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Pipeline([{"name": name, **arguments}])


def test_generator_is_a_function_of_three_numbers() -> None:
    assert generator(1, 2, 3).random() == generator(1, 2, 3).random()
    assert len({generator(*key).random() for key in ((1, 2, 3), (1, 3, 2), (2, 2, 3))}) == 3
