"""segkit.create_model and the lists of names, as a user calls them."""

import inspect
from pathlib import Path

import pytest
import torch
from torch import nn

import segkit
from segkit.core import checkpoint
from segkit.models.backbones.inputs import adapt_rgb, first_convolution

FAMILIES = [
    *("resnet18", "resnet50_v1c", "resnext50_32x4d", "wide_resnet50_2", "regnet_y_400mf"),
    *("mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "efficientnet_lite0"),
    *("efficientnet_v2_s", "convnext_tiny", "convnext_v2_atto", "swin_t", "swin_v2_t"),
    *("mit_b0", "vit_s_dinov2", "hrnet_w18", "se_resnet50", "unet"),
]


def test_two_names_make_a_model() -> None:
    model = segkit.create_model("unet", "resnet18", num_classes=5)
    logits = model(torch.rand(2, 3, 65, 97))["out"]
    assert logits.shape == (2, 5, 65, 97)
    assert isinstance(model, nn.Module)
    assert model.training


def test_arguments_of_the_decoder_and_of_the_backbone() -> None:
    model = segkit.create_model(
        "deeplabv3plus",
        {"name": "resnet18_half", "output_stride": 8},
        num_classes=2,
        width=16,
        rates=(2, 4, 6),
    )
    assert model.backbone.strides == (2, 4, 8, 8, 8)
    assert model.decoder.rates == (2, 4, 6)
    assert model.decoder.classifier.in_channels == 16


def test_the_default_backbone_is_resnet50() -> None:
    with torch.device("meta"):
        model = segkit.create_model("fcn", num_classes=2)
        other = segkit.create_model("fcn", "resnet50", num_classes=2)
    assert [*model.state_dict()] == [*other.state_dict()]


def test_each_call_initializes_equally_and_leaves_the_random_state() -> None:
    torch.manual_seed(3)
    first = segkit.create_model("unet", "resnet18_half", num_classes=2).state_dict()
    drawn = torch.rand(1)
    second = segkit.create_model("unet", "resnet18_half", num_classes=2).state_dict()
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (
            ("resnet18", "unetplusplus"),
            "decoder: 'resnet18' is a backbone; the decoder is the first argument: "
            "create_model('unetplusplus', 'resnet18', ...)",
        ),
        (
            ("swin_t",),
            "decoder: 'swin_t' is a backbone; the decoder is the first argument: "
            "create_model('unet', 'swin_t', ...)",
        ),
        (
            ("unet", "fcn"),
            "backbone: 'fcn' is a decoder; expected a name of list_backbones(), such as 'resnet50'",
        ),
        (("unetpluplus",), "decoder: unknown 'unetpluplus'; did you mean 'unetplusplus'?"),
        (("UNet++",), "decoder: unknown 'UNet++'; did you mean 'unetplusplus'?"),
        (("fcn", "resnet-50"), "backbone: unknown 'resnet-50'; did you mean 'resnet50'?"),
        (("fcn", "EfficientNet-B5"), "backbone: unknown 'EfficientNet-B5'; did you mean 'effic"),
    ],
)
def test_wrong_names_are_one_sentence(names: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(segkit.ConfigError) as caught:
        segkit.create_model(*names, num_classes=2)
    assert str(caught.value).startswith(sentence)


def test_unet_is_a_decoder_and_a_backbone() -> None:
    with torch.device("meta"):
        model = segkit.create_model("unet", "unet", num_classes=2)
    assert model(torch.rand(1, 3, 32, 48, device="meta"))["out"].shape == (1, 2, 32, 48)


def test_other_errors_name_the_arguments() -> None:
    with pytest.raises(
        segkit.ConfigError, match=r"^decoder\.wdith: 'upernet' has no .* 'width'\?$"
    ):
        segkit.create_model("upernet", "resnet18", num_classes=2, wdith=3)
    with pytest.raises(segkit.ConfigError, match=r"^backbone\.window: 'resnet18' has no such arg"):
        segkit.create_model("fcn", {"name": "resnet18", "window": 3}, num_classes=2)
    with pytest.raises(segkit.ConfigError, match=r"^weights: there is no file 'imagnet'; did you"):
        segkit.create_model("fcn", "resnet18", num_classes=2, weights="imagnet")
    with pytest.raises(segkit.ConfigError, match=r"^num_classes: expected at least 1, got 0"):
        segkit.create_model("fcn", "resnet18", num_classes=0)
    with pytest.raises(segkit.ConfigError, match="in_channels: expected 1 to 1024, got 0"):
        segkit.create_model("fcn", "resnet18", num_classes=2, in_channels=0)
    with pytest.raises(TypeError):
        segkit.create_model("fcn", "resnet18", 2)  # type: ignore[misc]


def test_lists_of_names() -> None:
    assert set(segkit.list_decoders()) == set(segkit.DECODERS)
    assert set(segkit.list_backbones()) == set(segkit.BACKBONES)
    assert segkit.list_decoders("deeplab") == ["deeplabv3", "deeplabv3plus"]
    assert segkit.list_decoders("unet*") == ["unet", "unet3plus", "unetplusplus"]
    assert segkit.list_backbones("resnet5?") == ["resnet50"]
    assert segkit.list_backbones("swin_v2") == ["swin_v2_t", "swin_v2_s", "swin_v2_b"]
    assert segkit.list_backbones("vgg") == []


# ---- images with other channels than RGB


@pytest.mark.parametrize("in_channels", [1, 2, 4])
def test_any_number_of_channels(in_channels: int) -> None:
    model = segkit.create_model("fcn", "resnet18_half", num_classes=2, in_channels=in_channels)
    logits = model(torch.rand(2, in_channels, 33, 47))["out"]
    logits.square().mean().backward()
    assert logits.shape == (2, 2, 33, 47)
    gradient = model.backbone.conv1.weight.grad
    assert gradient is not None
    assert gradient.shape == (64, in_channels, 7, 7)
    assert (gradient.abs().sum((0, 2, 3)) > 0).all()


@pytest.mark.parametrize("name", segkit.list_backbones())
def test_every_backbone_has_the_argument_in_channels(name: str) -> None:
    parameter = inspect.signature(segkit.BACKBONES[name]).parameters["in_channels"]
    assert parameter.default == 3


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_takes_any_number_of_channels(name: str) -> None:
    with torch.random.fork_rng(), torch.device("meta"):
        rgb = segkit.BACKBONES[name]().to("meta")
        backbone = segkit.BACKBONES[name](in_channels=5).to("meta")
        maps = backbone(torch.rand(1, 5, 64, 96))
        assert [x.shape for x in maps] == [x.shape for x in rgb(torch.rand(1, 3, 64, 96))]
    assert (rgb.in_channels, backbone.in_channels) == (3, 5)
    shapes = {key: value.shape for key, value in backbone.state_dict().items()}
    before = {key: value.shape for key, value in rgb.state_dict().items()}
    [changed] = [key for key in before if before[key] != shapes[key]]
    assert changed == f"{first_convolution(rgb)}.weight"
    assert list(shapes) == list(before)
    outputs, _, *kernel = before[changed]
    assert shapes[changed] == (outputs, 5, *kernel)


@pytest.mark.parametrize("name", ["resnet18_half", "swin_t", "convnext_tiny", "regnet_y_400mf"])
def test_a_new_first_convolution_is_initialized(name: str) -> None:
    with torch.random.fork_rng():
        backbone = segkit.BACKBONES[name](in_channels=2)
    conv = backbone.get_submodule(first_convolution(backbone))
    assert isinstance(conv, nn.Conv2d)
    fan_out = conv.weight.shape[0] * conv.weight[0, 0].numel()
    assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)


def test_rgb_filters_for_other_channels_by_hand() -> None:
    weight = torch.tensor([[1.0, 10, 100], [2, 20, 200]])[:, :, None, None]
    assert adapt_rgb(weight, 1).flatten(1).tolist() == [[111], [222]]
    assert adapt_rgb(weight, 2).flatten(1).tolist() == [[1.5, 15], [3, 30]]
    assert adapt_rgb(weight, 6).flatten(1).tolist() == [
        [0.5, 5, 50, 0.5, 5, 50],
        [1, 10, 100, 1, 10, 100],
    ]
    assert adapt_rgb(weight.half(), 1).dtype == torch.float16


@pytest.mark.parametrize("in_channels", [1, 4])
@pytest.mark.parametrize("name", ["resnet18_half", "mobilenet_v2", "hrnet_w18", "swin_t"])
def test_pretrained_rgb_weights_are_adapted(name: str, in_channels: int, tmp_path: Path) -> None:
    rgb = segkit.create_model("fcn", name, num_classes=2)
    path = tmp_path / "rgb.pth"
    torch.save(rgb.backbone.state_dict(), path)
    model = segkit.create_model("fcn", name, num_classes=2, in_channels=in_channels, weights=path)
    first = f"{first_convolution(rgb.backbone)}.weight"
    loaded, file = model.backbone.state_dict(), rgb.backbone.state_dict()
    assert torch.equal(loaded[first], adapt_rgb(file[first], in_channels))
    assert all(torch.equal(loaded[key], file[key]) for key in file if key != first)
    assert model.report is not None
    assert f"RGB filters of '{first}' adapted to {in_channels} channels" in model.report.notes


def test_a_gray_image_of_a_gray_model_is_an_rgb_image_of_the_rgb_model(tmp_path: Path) -> None:
    rgb = segkit.create_model("unet", "resnet18_half", num_classes=2).eval()
    checkpoint.save({"model": rgb.state_dict(), "classes": ["a", "b"]}, tmp_path / "rgb.pt")
    gray = segkit.create_model(
        "unet", "resnet18_half", num_classes=2, in_channels=1, weights=tmp_path / "rgb.pt"
    ).eval()
    image = torch.rand(1, 1, 65, 97, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = rgb(image.expand(-1, 3, -1, -1))["out"]
        torch.testing.assert_close(gray(image)["out"], expected)


def test_weights_of_other_channels_than_the_models_are_refused(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        backbone = segkit.BACKBONES["resnet18"](in_channels=4)
    torch.save(backbone.state_dict(), tmp_path / "x.pth")
    segkit.create_model("fcn", "resnet18", num_classes=2, in_channels=4, weights=tmp_path / "x.pth")
    sentence = (
        r"'conv1.weight' has shape \(64, 4, 7, 7\), the backbone expects \(64, 3, 7, 7\) "
        r"\(ResNet\); choose the backbone it fits: resnet18 \(in_channels 4\)$"
    )
    with pytest.raises(segkit.CheckpointError, match=sentence):
        segkit.create_model("fcn", "resnet18", num_classes=2, weights=tmp_path / "x.pth")


@pytest.mark.parametrize("in_channels", [3, 4])
def test_a_checkpoint_rebuilds_the_model_and_records_only_other_channels(
    in_channels: int, tmp_path: Path
) -> None:
    model = segkit.create_model("fcn", "resnet18_half", num_classes=2, in_channels=in_channels)
    assert model.config is not None
    assert ("in_channels" in model.config["backbone"]) == (in_channels != 3)
    state = {
        "model": model.state_dict(),
        "classes": ["a", "b"],
        "config": {"model": model.config},
    }
    checkpoint.save(state, tmp_path / "best.pt")
    again, config, others = segkit.load_model(tmp_path / "best.pt")
    assert others["classes"] == ["a", "b"]
    assert config.model.backbone == model.config["backbone"]
    image = torch.rand(1, in_channels, 33, 47)
    with torch.no_grad():
        assert torch.equal(again(image)["out"], model.eval()(image)["out"])


def test_a_model_of_other_channels_is_exported(tmp_path: Path) -> None:
    model = segkit.create_model("fcn", "resnet18_half", num_classes=2, in_channels=4).eval()
    model.export(tmp_path / "model.pt2")
    image = torch.rand(1, 4, 65, 97)
    with torch.no_grad():
        exported = torch.export.load(tmp_path / "model.pt2").module()(image)["out"]
        torch.testing.assert_close(exported, model(image)["out"])
