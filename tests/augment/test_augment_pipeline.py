"""The whole pipeline: one resampling, a pure function of its seed, equal for batches."""

import json
import pickle
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as tv

import segkit
from segkit.augment import OPERATIONS, Pipeline, generator
from segkit.augment.color import COLOR, CURVES
from segkit.augment.filters import FILTERS
from segkit.augment.geometry import GEOMETRY
from segkit.augment.mix import MIX
from segkit.augment.pipeline import build_pipeline
from segkit.core.config import load, parse
from segkit.core.errors import ConfigError, DataError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE = (65, 97)
CONFIGS = Path(__file__).parents[2] / "configs"

ARGUMENTS: dict[str, dict] = {
    "resize": {"size": [51, 70]},
    "scale": {"range": [0.5, 2.0]},
    "resized_crop": {"size": [48, 40]},
    "rotate": {"degrees": [-180, 180]},
    "crop": {"size": [48, 80], "max_class_share": 0.75},
    "pad": {"size": [80, 80]},
    "brightness": {"range": [0.8, 1.2]},
    "contrast": {"range": [0.8, 1.2]},
    "saturation": {"range": [0.5, 1.5]},
    "hue": {"degrees": [-20, 20]},
    "rgb_shift": {"levels": [-20, 20]},
    "gamma": {"range": [0.7, 1.4]},
}

WHOLE = [
    {"name": "scale", "range": [0.5, 2.0]},
    {"name": "rotate", "degrees": [-30, 30], "p": 0.5},
    {"name": "hflip"},
    {"name": "crop", "size": [48, 64], "max_class_share": 0.75},
    {"name": "photometric"},
    {"name": "gamma", "range": [0.7, 1.4], "p": 0.5},
    {"name": "blur", "p": 0.3},
    {"name": "noise", "p": 0.3},
    {"name": "rgb_shift", "levels": [-10, 10]},
]


def sample(size: tuple[int, int] = SIZE, seed: int = 0) -> tuple[Tensor, Tensor]:
    numbers = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (3, *size), generator=numbers).to(torch.uint8)
    patches = torch.randint(0, 11, (size[0] // 12 + 1, size[1] // 12 + 1), generator=numbers)
    mask = patches.repeat_interleave(12, 0).repeat_interleave(12, 1)[: size[0], : size[1]]
    return image, mask.to(torch.uint8).contiguous()


def others(rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    return sample((70, 60), seed=int(rng.integers(100)))


def pipeline(operations: list, size: tuple[int, int] | None = None) -> Pipeline:
    return Pipeline(operations, size=size, mean=MEAN, std=STD)


def levels(operations: list, size: tuple[int, int] | None = None) -> Pipeline:
    """Return a pipeline whose results are in 0..255."""
    return Pipeline(operations, size=size, mean=(0, 0, 0), std=(1 / 255,) * 3)


def normalized(image: Tensor) -> Tensor:
    return (image / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def test_nothing_to_do_is_the_image_bit_for_bit() -> None:
    image, mask = sample()
    result, same = levels([])(image, mask, generator(0, 0, 0))
    assert torch.equal(result, image.float())
    assert torch.equal(same, mask)
    same.fill_(7)
    assert not torch.equal(same, mask), "the mask given must not change with the one returned"
    result, none = pipeline([])(image, None, generator(0, 0, 0))
    torch.testing.assert_close(result, normalized(image))
    assert none is None


def test_flips_and_crops_are_copies() -> None:
    image, mask = sample()
    run = levels([{"name": "hflip", "p": 1}, {"name": "crop", "size": [64, 96]}])
    result, cropped = run(image, mask, generator(0, 0, 0))
    windows = [
        (image.flip(-1)[:, top : top + 64, left : left + 96].float(), mask.flip(-1)[top:, left:])
        for top in range(2)
        for left in range(2)
    ]
    masks = [labels[:64, :96] for pixels, labels in windows if torch.equal(result, pixels)]
    assert len(masks) == 1
    assert torch.equal(cropped, masks[0])


def test_padding_is_zero_and_ignored() -> None:
    image, mask = sample()
    operations = [
        {"name": "rotate", "degrees": [45, 45]},
        {"name": "blur", "sizes": [5]},
        {"name": "brightness", "range": [1.5, 1.5]},
        {"name": "pad", "size": [120, 130]},
    ]
    result, padded = pipeline(operations)(image, mask, generator(0, 0, 0))
    assert result.shape == (3, 120, 130)
    outside = padded == 255
    assert 0.4 < outside.float().mean() < 0.9
    assert (result[:, outside] == 0).all()
    assert (result[:, ~outside] != 0).float().mean() > 0.99


def test_every_sample_is_resized_to_size() -> None:
    run = pipeline([{"name": "scale", "range": [0.5, 2.0]}], size=(40, 56))
    for index in range(10):
        image, mask = run(*sample(), generator(0, 0, index))
        assert image.shape == (3, 40, 56)
        assert mask.shape == (40, 56)


def test_geometry_is_one_step_and_color_none_of_its_own() -> None:
    operations = [
        {"name": "brightness", "range": [1.1, 1.1]},
        {"name": "scale", "range": [1.2, 1.2]},
        {"name": "contrast", "range": [1.1, 1.1]},
        {"name": "rotate", "degrees": [5, 5]},
        {"name": "hflip", "p": 1},
    ]
    plan = pipeline(operations, size=(32, 32)).plan(SIZE, generator(0, 0, 0))
    assert [step.func.__name__ for step in plan.steps] == ["_warp"]
    assert not np.array_equal(plan.color, np.eye(4))


def test_filters_keep_their_place_in_the_list() -> None:
    operations = [
        {"name": "scale", "range": [1.2, 1.2]},
        {"name": "brightness", "range": [1.1, 1.1]},
        {"name": "gamma", "range": [2, 2]},
        {"name": "hflip", "p": 1},
        {"name": "contrast", "range": [1.1, 1.1]},
        {"name": "median_blur"},
        {"name": "contrast", "range": [1.1, 1.1]},
        {"name": "rotate", "degrees": [5, 5]},
        {"name": "cutmix"},
    ]
    plan = pipeline(operations).plan(SIZE, generator(0, 0, 0), others=others)
    names = [step.keywords.get("run", step).func.__name__ for step in plan.steps]
    section = ["_warp", "apply_matrix"]
    assert names == [*section, "apply_table", *section, "_median", *section, "_paste"]
    assert np.array_equal(plan.color, np.eye(4))


@pytest.mark.parametrize(
    "curve",
    [
        {"name": "posterize", "bits": 2},
        {"name": "solarize", "range": [128, 128]},
        {"name": "gamma", "range": [3, 3]},
    ],
    ids=lambda spec: spec["name"],
)
@pytest.mark.parametrize(
    "move",
    [{"name": "scale", "range": [0.5, 0.5]}, {"name": "rotate", "degrees": [30, 30]}],
    ids=lambda spec: spec["name"],
)
def test_geometry_after_a_curve_reads_what_the_curve_made(curve: dict, move: dict) -> None:
    image, mask = sample()
    result, moved = levels([curve, move])(image, mask, generator(0, 0, 0))
    curved, _ = levels([curve])(image, mask, generator(0, 0, 0))
    expected, labels = levels([move])(curved, mask, generator(0, 0, 0))
    torch.testing.assert_close(result, expected, atol=0.01, rtol=0)
    assert torch.equal(moved, labels)
    swapped, _ = levels([move, curve])(image, mask, generator(0, 0, 0))
    assert (result - swapped).abs().max() > 16


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_configurations_read_each_image_once(path: Path) -> None:
    cfg = load(path.stem)
    operations = [{**spec, "p": 1} for spec in cfg.augment.train]
    plan = pipeline(operations, cfg.augment.size).plan(SIZE, generator(0, 0, 0))
    assert [step.func.__name__ for step in plan.steps] == ["_warp"]


@pytest.mark.parametrize("blur", [{"sizes": [5]}, {"sigma": [1.5, 1.5]}])
def test_colors_before_a_blur_are_applied_after_it_with_equal_results(blur: dict) -> None:
    name = "blur" if "sizes" in blur else "gaussian_blur"
    colors = [{"name": "contrast", "range": [0.6, 0.6]}, {"name": "hue", "degrees": [20, 20]}]
    run = pipeline([*colors, {"name": name, **blur}])
    assert len(run.plan(SIZE, generator(0, 0, 0)).steps) == 1
    image, _ = sample()
    result, _ = run(image, None, generator(0, 0, 0))
    colored, _ = levels(colors)(image, None, generator(0, 0, 0))
    expected, _ = pipeline([{"name": name, **blur}])(colored, None, generator(0, 0, 0))
    torch.testing.assert_close(result, expected)


def test_order_of_color_and_curve_matters() -> None:
    image, _ = sample()
    bright, gamma = {"name": "brightness", "range": [0.5, 0.5]}, {"name": "gamma", "range": [2, 2]}
    bright_first, _ = levels([bright, gamma])(image, None, generator(0, 0, 0))
    gamma_first, _ = levels([gamma, bright])(image, None, generator(0, 0, 0))
    value = image.float() / 255
    torch.testing.assert_close(bright_first, (0.5 * value) ** 2 * 255, atol=0.05, rtol=0)
    torch.testing.assert_close(gamma_first, 0.5 * value**2 * 255, atol=0.05, rtol=0)


def test_probabilities_are_kept() -> None:
    run = pipeline([{"name": "hflip"}, {"name": "rotate", "degrees": [90, 90], "p": 0.2}])
    flipped = turned = 0
    for index in range(500):
        plan = run.plan((64, 64), generator(3, 0, index))
        matrix = plan.steps[0].keywords["matrix"] if plan.steps else np.eye(3)
        turned += abs(matrix[0, 0]) < 0.5
        flipped += np.linalg.det(matrix) < 0
    assert 0.42 < flipped / 500 < 0.58
    assert 0.14 < turned / 500 < 0.26


def test_max_class_share_limits_the_largest_class() -> None:
    mask = torch.zeros((200, 200), dtype=torch.uint8)
    mask[90:130, 90:130] = 1
    image = mask.expand(3, -1, -1)
    shares = []
    for cap in (1.0, 0.75):
        crop = {"name": "crop", "size": [64, 64], "max_class_share": cap}
        run = pipeline([{"name": "blur"}, {"name": "hflip"}, crop])
        parts = [run(image, mask, generator(0, 0, index))[1] for index in range(60)]
        shares.append(float(np.mean([(part == 0).float().mean() for part in parts])))
    assert shares[1] < shares[0] - 0.1


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(9, 90),
    width=st.integers(9, 90),
    names=st.lists(st.sampled_from(sorted({**GEOMETRY, **COLOR, **FILTERS})), max_size=5),
    seed=st.integers(0, 2**31),
)
def test_any_list_runs_on_any_size(height: int, width: int, names: list[str], seed: int) -> None:
    operations = [{"name": name, "p": 0.8, **ARGUMENTS.get(name, {})} for name in names]
    image, mask = sample((height, width))
    run = pipeline(operations)
    plan = run.plan((height, width), generator(seed, 0, 0), mask)
    result, moved = run(image, mask, generator(seed, 0, 0))
    assert result.dtype == torch.float32
    assert moved.dtype == torch.uint8
    assert result.shape[1:] == moved.shape == plan.size
    assert torch.isfinite(result).all()
    assert set(moved.unique().tolist()) <= {0, 255, *mask.unique().tolist()}
    low, high = normalized(torch.zeros(3, 1, 1)), normalized(torch.full((3, 1, 1), 255.0))
    assert (result >= low - 1e-5).all()
    assert (result <= high + 1e-5).all()


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_operations_are_built_from_json_and_repeat(name: str) -> None:
    spec = json.loads(json.dumps({"name": name, "p": 1, **ARGUMENTS.get(name, {})}))
    image, mask = sample()
    first = pipeline([spec])(image, mask, generator(1, 2, 3), others)
    again = pipeline([spec])(image, mask, generator(1, 2, 3), others)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert torch.equal(image, sample()[0])
    assert torch.equal(mask, sample()[1])


EXPECTED = {
    "blur": (127.49, 15.11, 4.71),
    "brightness": (107.61, 62.24, 4.71),
    "classmix": (127.38, 66.03, 4.74),
    "closing": (230.57, 14.11, 4.71),
    "contrast": (127.45, 62.24, 4.71),
    "copy_paste": (127.49, 72.8, 4.74),
    "crop": (127.63, 73.73, 5.07),
    "cutmix": (127.46, 66.97, 5.14),
    "gamma": (143.34, 69.95, 4.71),
    "gaussian_blur": (127.44, 32.34, 4.71),
    "grayscale": (127.73, 49.02, 4.71),
    "hflip": (127.44, 73.71, 4.71),
    "hue": (127.46, 72.98, 4.71),
    "jpeg": (127.42, 52.05, 4.71),
    "median_blur": (127.49, 25.05, 4.71),
    "noise": (127.38, 73.79, 4.71),
    "opening": (24.75, 14.54, 4.71),
    "pad": (103.54, 83.0, 51.64),
    "perspective": (125.27, 53.23, 9.09),
    "photometric": (141.06, 55.96, 4.71),
    "posterize": (119.9, 73.56, 4.71),
    "quarter_turn": (127.44, 73.71, 4.71),
    "resize": (127.38, 36.93, 4.74),
    "resized_crop": (126.5, 45.77, 4.59),
    "rgb_shift": (120.69, 73.72, 4.71),
    "rotate": (100.88, 67.95, 56.66),
    "saturation": (127.55, 56.97, 4.71),
    "scale": (127.38, 33.07, 4.68),
    "sharpen": (127.43, 78.19, 4.71),
    "shear": (124.39, 62.62, 10.41),
    "shift": (116.61, 55.63, 25.23),
    "solarize": (64.64, 38.49, 4.71),
    "vflip": (127.44, 73.71, 4.71),
    "whole": (89.92, 33.23, 30.74),
}
"""Mean and standard deviation of the image (0..255) and mean of the mask after each operation."""


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_results_are_those_of_earlier_versions(name: str) -> None:
    """Changed random draws or arithmetic would give other trainings from the same seed."""
    alone = [{"name": name, "p": 1, **ARGUMENTS.get(name, {})}]
    run = levels(WHOLE if name == "whole" else alone)
    image, mask = run(*sample(), generator(1, 2, 3), others)
    numbers = float(image.mean()), float(image.std()), float(mask.float().mean())
    assert numbers == pytest.approx(EXPECTED[name], abs=0.05)


def test_every_kind_is_in_the_registry() -> None:
    kinds = (GEOMETRY, COLOR, CURVES, FILTERS, MIX)
    assert sum(len(kind) for kind in kinds) == len(OPERATIONS)
    assert {*EXPECTED} == {*OPERATIONS, "whole"}


def digest(index: int) -> int:
    image, mask = pipeline(WHOLE)(*sample(), generator(7, 1, index))
    return zlib.crc32(image.numpy().tobytes() + mask.numpy().tobytes())


def test_another_process_makes_the_same_bytes() -> None:
    script = "from test_augment_pipeline import digest; print([digest(i) for i in range(6)])"
    command = [sys.executable, "-c", f"import torch; torch.set_num_threads(1); {script}"]
    path = [entry for entry in sys.path if entry]
    code = f"import sys; sys.path[:0] = {[*path, str(__import__('pathlib').Path(__file__).parent)]}"
    command[2] = f"{code}; {command[2]}"
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == [digest(index) for index in range(6)]
    assert len({digest(index) for index in range(6)}) == 6


def test_a_batch_equals_its_samples() -> None:
    run = pipeline(
        [{"name": "copy_paste", "p": 0.5}, *WHOLE, {"name": "jpeg", "p": 0.3}], size=(48, 64)
    )
    pairs = [sample((65 + index, 97 - index), seed=index) for index in range(6)]
    plans = [
        run.plan(tuple(image.shape[1:]), generator(0, 0, index), mask, others)
        for index, (image, mask) in enumerate(pairs)
    ]
    plans = pickle.loads(pickle.dumps(plans))
    images, masks = run.render(*map(list, zip(*pairs, strict=True)), plans)
    assert images.shape == (6, 3, 48, 64)
    for index, (image, mask) in enumerate(pairs):
        alone, labels = run(image, mask, generator(0, 0, index), others)
        torch.testing.assert_close(images[index], alone, atol=1e-3, rtol=0)
        assert torch.equal(masks[index], labels)


def test_pickled_pipelines_are_equal() -> None:
    run = pipeline(WHOLE)
    copy = pickle.loads(pickle.dumps(run))
    assert torch.equal(
        run(*sample(), generator(0, 0, 5))[0], copy(*sample(), generator(0, 0, 5))[0]
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "rotat", "degrees": [0, 1]}, r"operations\[0\]\.name.*rotate"),
        ({"name": "rotate", "degree": [0, 1]}, r"operations\[0\]\.degree.*degrees"),
        ({"name": "rotate", "degrees": [30, -30]}, r"operations\[0\].*degrees.*low then high"),
        ({"name": "rotate", "degrees": "30"}, r"operations\[0\]\.degrees"),
        ({"name": "hflip", "p": 1.5}, r"operations\[0\]\.p.*0 to 1"),
        ({"name": "hflip", "p": True}, r"operations\[0\]\.p"),
        ({"p": 0.5}, r"operations\[0\]\.name"),
    ],
)
def test_invalid_operations_are_named_with_their_path(spec: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pipeline([spec])


def test_mixing_operations_need_other_images() -> None:
    with pytest.raises(ConfigError, match="other labelled images"):
        pipeline(["cutmix"])(*sample(), generator(0, 0, 0))


def test_a_configurations_errors_name_its_key() -> None:
    broken = parse({"augment": {"train": ["hflip", {"name": "rotat"}]}})
    with pytest.raises(ConfigError, match=r"augment\.train\[1\]\.name.*rotate"):
        build_pipeline(broken)


def test_filters_of_the_mask_do_without_a_mask() -> None:
    image, _ = sample()
    run = levels([{"name": "closing", "on": "mask", "classes": [1]}])
    result, mask = run(image, None, generator(0, 0, 0))
    assert torch.equal(result, image.float())
    assert mask is None


def test_numpy_images_and_masks_need_no_other_argument() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (65, 97, 3), dtype=np.uint8)
    mask = rng.integers(0, 11, (65, 97), dtype=np.uint8)
    augment = segkit.Pipeline([{"name": "crop", "size": [48, 64]}, "hflip", "photometric"])
    pixels, labels = augment(image, mask)
    assert (pixels.shape, pixels.dtype) == ((3, 48, 64), torch.float32)
    assert (labels.shape, labels.dtype) == ((48, 64), torch.uint8)
    draws = {augment(image, mask)[0].numpy().tobytes() for _ in range(5)}
    assert len(draws) == 5, "each call draws new numbers"


def test_nothing_to_do_normalizes_as_torchvision_does() -> None:
    image = np.random.default_rng(0).integers(0, 256, (33, 41, 3), dtype=np.uint8)
    expected = tv.normalize(tv.to_tensor(image), MEAN, STD)
    for picture in (image, Image.fromarray(image), image[:, ::-1][:, ::-1]):
        pixels, none = segkit.Pipeline([])(picture)
        torch.testing.assert_close(pixels, expected)
        assert none is None


def test_long_masks_suit_the_losses_of_torch() -> None:
    image = np.zeros((16, 20, 3), np.uint8)
    mask = np.full((16, 20), 2)
    pixels, labels = segkit.Pipeline([{"name": "pad", "size": [20, 20]}])(image, mask, long=True)
    assert labels.dtype == torch.int64
    logits = pixels.new_zeros(1, 3, 20, 20)
    loss = torch.nn.functional.cross_entropy(logits, labels[None], ignore_index=255)
    assert loss == pytest.approx(np.log(3))
    assert labels.unique().tolist() == [2, 255]


def test_masks_may_be_bools_or_pil_images() -> None:
    image, mask = np.zeros((16, 20, 3), np.uint8), np.eye(16, 20, dtype=bool)
    for labelled in (mask, Image.fromarray(mask.astype(np.uint8))):
        _, labels = segkit.Pipeline([])(image, labelled)
        assert np.array_equal(labels.numpy(), mask)


def test_a_generator_repeats_a_call_and_equals_tensors() -> None:
    image, mask = sample()
    augment = segkit.Pipeline(WHOLE)
    first = augment(image, mask, generator(1, 2, 3))
    again = augment(image.permute(1, 2, 0).numpy(), mask.numpy(), generator(1, 2, 3))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


@pytest.mark.parametrize(
    ("image", "mask", "message"),
    [
        (np.zeros((8, 9, 3)), None, r"image: is float64 of shape \(8, 9, 3\); expected uint8"),
        (np.zeros((8, 9), np.uint8), None, r"image: .*\(8, 9\); expected uint8 \(H, W, 3\)"),
        (torch.zeros(8, 9, 3), None, r"image: has shape \(8, 9, 3\); a tensor is \(3, H, W\)"),
        (np.zeros((8, 9, 3), np.uint8), np.zeros((8, 9)), "mask: is float64"),
        (np.zeros((8, 9, 3), np.uint8), np.full((8, 9), -1), "mask: has values -1 to -1"),
        (np.zeros((8, 9, 3), np.uint8), np.zeros((9, 8), np.uint8), r"mask: has shape \(9, 8\)"),
    ],
)
def test_bad_images_and_masks_are_refused(image: np.ndarray, mask: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        segkit.Pipeline([])(image, mask)


def test_augmentations_are_listed() -> None:
    assert segkit.list_augmentations() == sorted(OPERATIONS)
    assert segkit.list_augmentations("flip") == ["hflip", "vflip"]
    assert segkit.list_augmentations("*_blur") == ["gaussian_blur", "median_blur"]
    assert segkit.list_augmentations("no such") == []
