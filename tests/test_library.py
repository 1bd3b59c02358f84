"""The public API, used as its users would use it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import segkit
from segkit.core import checkpoint
from segkit.data.images import read_image

CLASSES = ("ground", "can", "bag")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a photograph, ``photo.jpg``, and a saved model, ``best.pt``."""
    home = tmp_path_factory.mktemp("home")
    noise = Image.effect_noise((97, 65), 80).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter turn
    noise.save(home / "photo.jpg", exif=exif)
    segkit.save(small_model(), home / "best.pt", classes=CLASSES)
    return home


@pytest.fixture(autouse=True)
def _at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)


def small_model() -> segkit.Segmenter:
    return segkit.create_model("fcn", "resnet18_half", num_classes=len(CLASSES))


class Bright(nn.Module):
    """Logits of the red channel's brightness, as a user's own module returns them."""

    def __init__(self, planes: int = 1, as_dict: bool = False) -> None:
        super().__init__()
        self.planes, self.as_dict = planes, as_dict

    def forward(self, image: Tensor) -> Tensor | dict[str, Tensor]:
        logits = torch.cat([(plane + 1) * image[:, :1] for plane in range(self.planes)], 1)
        return {"out": logits, "aux": logits[:, :, 0]} if self.as_dict else logits


def test_a_file_predicts_a_photograph() -> None:
    predictor = segkit.load("best.pt")
    result = predictor("photo.jpg")
    assert result.mask.shape == (97, 65)  # upright
    assert result.mask.dtype == torch.uint8
    assert result.probabilities.shape == (3, 97, 65)
    torch.testing.assert_close(result.probabilities.sum(0), torch.ones(97, 65))
    assert torch.equal(result.mask.long(), result.probabilities.argmax(0))
    assert result.classes == CLASSES
    picture = result.overlay(opacity=0.3)
    assert picture.width >= 65
    assert picture.height > 97  # the legend is below
    assert "image" not in repr(result)


def test_every_form_of_a_photograph_gives_the_same_mask() -> None:
    predictor = segkit.load(Path("best.pt"), device="cpu", views="flips")
    expected = predictor("photo.jpg").mask
    with Image.open("photo.jpg") as opened:
        forms = [Path("photo.jpg"), opened, read_image("photo.jpg")]
        forms += [read_image("photo.jpg").permute(1, 2, 0).numpy()]
        results = predictor(forms)
    assert isinstance(results, list)
    assert len(results) == 4
    for result in results:
        assert torch.equal(result.mask, expected)
    batch = predictor(torch.stack([read_image("photo.jpg")] * 2))
    assert batch.mask.shape == (2, 97, 65)
    assert batch.probabilities.shape == (2, 3, 97, 65)
    assert all(torch.equal(item.mask, expected) for item in batch)
    assert batch[1].overlay(legend=False).size == (65, 97)
    with pytest.raises(ValueError, match=r"prediction\[i\]"):
        batch.overlay()
    assert predictor([]) == []


def test_modes_of_pillow_images_are_converted_as_files_are(tmp_path: Path) -> None:
    predictor = segkit.load("best.pt")
    noise = Image.effect_noise((40, 33), 80)
    images = [noise.convert("RGB").convert(mode) for mode in ("L", "P", "RGBA", "CMYK")]
    images.append(Image.fromarray(np.asarray(noise).astype(np.uint16) * 257))
    for number, image in enumerate(images):
        path = tmp_path / f"{number}.{'tiff' if image.mode == 'CMYK' else 'png'}"
        image.save(path)
        with Image.open(path) as opened:
            assert torch.equal(predictor(opened).mask, predictor(path).mask)


def test_what_is_no_photograph_is_one_sentence() -> None:
    predictor = segkit.load("best.pt")
    with pytest.raises(segkit.DataError, match=r"missing\.jpg does not exist"):
        predictor("missing.jpg")
    with pytest.raises(ValueError, match="channels first as a tensor"):
        predictor(np.zeros((3, 8, 8), np.uint8))
    with pytest.raises(ValueError, match="uint8"):
        predictor(np.zeros((8, 8, 3), np.float32))
    with pytest.raises(ValueError, match=r"image: expected uint8 \(3, H, W\)"):
        predictor(torch.zeros(3, 8, 8))
    with pytest.raises(TypeError, match=r"photo: expected a path, .* got int"):
        predictor(3)


@pytest.mark.parametrize("as_dict", [False, True])
def test_any_module_predicts(as_dict: bool) -> None:
    predictor = segkit.Predictor(Bright(planes=4, as_dict=as_dict), views="flips")
    result = predictor(np.full((9, 11, 3), 255, np.uint8))
    assert result.mask.tolist() == [[3] * 11] * 9
    assert result.classes == ()
    assert result.overlay().size >= (11, 9)
    red = (1 - segkit.core.config.IMAGENET_MEAN[0]) / segkit.core.config.IMAGENET_STD[0]
    expected = torch.tensor([1.0, 2, 3, 4]).mul(red).softmax(0)
    torch.testing.assert_close(result.probabilities[:, 0, 0], expected)


def test_modules_that_return_something_else_are_named() -> None:
    class Classifier(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return image.mean((2, 3))

    class Wrapped(nn.Module):
        def forward(self, image: Tensor) -> dict[str, Tensor]:
            return {"logits": image}

    image = torch.zeros(3, 40, 40, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"model: returned logits \(1, 3\) for images"):
        segkit.Predictor(Classifier())(image)
    with pytest.raises(TypeError, match="model: returned dict with logits; expected"):
        segkit.Predictor(Wrapped())(image)


def test_images_of_other_channels() -> None:
    predictor = segkit.Predictor(Bright(planes=2), mean=[0.5] * 4, std=[0.25] * 4)
    assert predictor(torch.full((4, 5, 6), 255, dtype=torch.uint8)).mask.sum() == 30


@pytest.mark.parametrize("views", ["", "flips", "scale1.5"])
def test_one_plane_of_logits_is_binary(views: str) -> None:
    views_or_none = views or ()
    predictor = segkit.Predictor(
        Bright(), mean=[0.5] * 3, std=[0.5] * 3, classes=["bag"], views=views_or_none
    )
    image = torch.zeros(3, 40, 50, dtype=torch.uint8)
    image[0, :, 25:] = 255  # logits of -1 and 1
    result = predictor(image)
    assert result.probabilities.shape == (2, 40, 50)
    assert result.probabilities[1, 0, -1] == pytest.approx(1 / (1 + np.exp(-1)))
    assert result.probabilities[1, 0, 0] == pytest.approx(1 / (1 + np.exp(1)))
    assert torch.equal(result.mask, (result.probabilities[1] > 0.5).to(torch.uint8))
    assert result.mask[:, 30:].all()
    assert not result.mask[:, :20].any()
    assert result.classes == ("background", "bag")
    named = segkit.Predictor(Bright(), classes=["street", "bag"])
    assert named(image).classes == ("street", "bag")


def test_a_logit_of_zero_is_background() -> None:
    predictor = segkit.Predictor(Bright(), mean=[0.0] * 3, std=[1.0] * 3)
    assert not predictor(torch.zeros(3, 33, 33, dtype=torch.uint8)).mask.any()


def test_saved_and_loaded_is_the_same_model(tmp_path: Path) -> None:
    model = segkit.build_model(
        {"name": "resnet18_half"}, {"name": "unetplusplus"}, num_classes=1, freeze_batch_norm=True
    )
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    segkit.save(model, tmp_path / "bag.pt", classes=["bag"], mean=mean, std=std)
    predictor = segkit.load(tmp_path / "bag.pt", device="cpu", overrides=["train.amp=off"])
    image = read_image("photo.jpg")
    expected = segkit.Predictor(model, mean=mean, std=std, classes=["bag"])(image)
    result = predictor(image)
    torch.testing.assert_close(result.probabilities, expected.probabilities, atol=1e-4, rtol=0)
    assert result.classes == ("background", "bag")
    again, _, _ = segkit.load_model(tmp_path / "bag.pt")
    assert again.freeze_batch_norm
    segkit.save(again, tmp_path / "again.pt", classes=["bag"], mean=mean, std=std)
    states = [checkpoint.load(tmp_path / name) for name in ("bag.pt", "again.pt")]
    assert states[0]["config"] == states[1]["config"]


def test_what_cannot_be_saved_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(segkit.CheckpointError, match=r"model: Bright .*segkit\.create_model"):
        segkit.save(Bright(), tmp_path / "a.pt", classes=["bag"])
    with pytest.raises(segkit.CheckpointError, match=r"classes: 2 names do not fit the model"):
        segkit.save(small_model(), tmp_path / "a.pt", classes=["can", "bag"])
    with pytest.raises(segkit.CheckpointError, match=r"mean: expected 3 numbers, .* got 1"):
        segkit.save(small_model(), tmp_path / "a.pt", classes=CLASSES, mean=[0.5])
    assert not list(tmp_path.iterdir())


def test_models_of_other_channels_are_saved_and_loaded(tmp_path: Path) -> None:
    model = segkit.create_model("fcn", "resnet18_half", num_classes=2, in_channels=4)
    mean, std = [0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]
    segkit.save(model, tmp_path / "a.pt", classes=["ground", "bag"], mean=mean, std=std)
    image = torch.randint(0, 256, (4, 40, 50), dtype=torch.uint8)
    expected = segkit.Predictor(model, mean=mean, std=std)(image).probabilities
    predictor = segkit.load(tmp_path / "a.pt", device="cpu", overrides=["train.amp=off"])
    torch.testing.assert_close(predictor(image).probabilities, expected, atol=1e-4, rtol=0)
    with pytest.raises(segkit.CheckpointError, match=r"std: expected 4 numbers, .* got 3"):
        segkit.save(model, tmp_path / "b.pt", classes=["ground", "bag"], mean=mean)


def test_settings_of_a_file_can_be_replaced() -> None:
    predictor = segkit.load("best.pt", overrides=["infer.tile=32", "infer.merge=max"])
    assert predictor.tile == 32
    assert predictor.merge == "max"
    with pytest.raises(segkit.ConfigError, match="did you mean 'vflip'"):
        segkit.load("best.pt", views="flip")
    with pytest.raises(segkit.CheckpointError, match="no such checkpoint"):
        segkit.load("worst.pt")
