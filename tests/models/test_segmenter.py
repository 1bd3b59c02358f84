"""Whole models: counts to the unit, seeds, weights from files and names, any image size."""

import math
import re
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from pyramids import PYRAMID_DECODERS
from ranks import run_ranks
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

from segkit.core import config, distributed
from segkit.core.errors import ConfigError
from segkit.models.backbones import BACKBONES
from segkit.models.backbones.beit import beit
from segkit.models.backbones.convnextv2 import ResponseNormBlock
from segkit.models.backbones.hrnet import HRNet
from segkit.models.backbones.mit import MiT
from segkit.models.backbones.seresnet import seresnet
from segkit.models.backbones.swin import Swin
from segkit.models.backbones.torchvision import convnext, convnext_of
from segkit.models.backbones.vit import vit
from segkit.models.decoders import DECODERS
from segkit.models.queries import QUERY_OUTPUTS
from segkit.models.segmenter import ON_ONE_MAP, Segmenter, build_model
from segkit.training.losses import build_loss

# arguments that make a decoder small enough for tests of whole models
SMALL: dict[str, dict] = {
    "deeplabv3": {"width": 16},
    "deeplabv3plus": {"width": 16},
    "mask2former": {"width": 16, "queries": 6, "heads": 2, "feedforward": 24},
    "ocrnet": {"width": 16, "key_width": 8},
    "pspnet": {"width": 16},
    "segformer": {"width": 16},
    "stlnet": {"width": 16},
    "unet": {},
    "unet3plus": {"width": 8, "deep_supervision": True, "presence": True},
    "unetplusplus": {"deep_supervision": True},
    "upernet": {"width": 16},
}


def small(name: str) -> dict[str, Any]:
    return {"name": name, **SMALL.get(name, {})}


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def image(batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, 65, 97, generator=torch.Generator().manual_seed(0))


def loss(outputs: dict[str, Tensor]) -> Tensor:
    return torch.stack([logits.float().square().mean() for logits in outputs.values()]).sum()


# ---- parameters, to the unit

UNET3PLUS = {"name": "unet3plus", "bias": True}
MMSEG_DEEPLAB = {"name": "deeplabv3plus", "layout": "mmsegmentation", "width": 512, "aux": True}
PARAMETERS: list[tuple[Any, Any, int, int]] = [
    ("swin_t", "upernet", 11, 59_834_832),
    ("swin_t", "upernet", 150, 59_941_862),
    ("swin_b", "upernet", 11, 121_172_686),
    ("swin_b", "upernet", 150, 121_279_716),
    ({"name": "swin_b", "window": 12}, "upernet", 11, 121_308_046),
    ({"name": "swin_b", "window": 12}, "upernet", 150, 121_415_076),
    ("swin_l", "upernet", 11, 233_652_906),
    ("swin_l", "upernet", 150, 233_759_936),
    ({"name": "swin_l", "window": 12}, "upernet", 11, 233_855_946),
    ({"name": "swin_l", "window": 12}, "upernet", 150, 233_962_976),
    ("swin_t", "mask2former", 150, 47_439_633),
    ({"name": "swin_b", "window": 12}, "mask2former", 150, 106_922_191),
    ({"name": "swin_l", "window": 12}, "mask2former", 150, 215_488_779),
    ("resnet50_v1c", "upernet", 11, 66_409_078),
    ("resnet50_v1c", "upernet", 150, 66_516_108),
    ("resnet101_v1c", "upernet", 11, 85_401_206),
    ("resnet101_v1c", "upernet", 150, 85_508_236),
    ("efficientnet_b0", "unetplusplus", 11, 6_158_871),
    ("efficientnet_b4", "unetplusplus", 11, 20_008_163),
    ("efficientnet_b5", "unetplusplus", 11, 30_858_859),
    ("efficientnet_b7", "unetplusplus", 11, 66_521_483),
    ("resnet34", "unetplusplus", 11, 26_080_059),
    ("resnet50", "unetplusplus", 11, 48_987_195),
    ("resnet101", "unetplusplus", 11, 67_979_323),
    ("resnet50", "fcn", 21, 35_322_218),
    ("resnet101", "fcn", 21, 54_314_346),
    ("resnet50", "fcn", 11, 35_314_518),
    ("resnet101", "fcn", 11, 54_306_646),
    ("resnet50", {"name": "fcn", "aux": False}, 11, 32_951_883),
    ("resnet101", {"name": "fcn", "aux": False}, 11, 51_944_011),
    ("resnet50_v1c", {"name": "fcn", "layout": "mmsegmentation"}, 11, 49_491_574),
    ("resnet50_v1c", {"name": "fcn", "layout": "mmsegmentation"}, 150, 49_598_604),
    ("resnet101_v1c", {"name": "fcn", "layout": "mmsegmentation"}, 11, 68_483_702),
    ("resnet101_v1c", {"name": "fcn", "layout": "mmsegmentation"}, 150, 68_590_732),
    ("resnet50", "deeplabv3", 21, 42_004_074),
    ("resnet101", "deeplabv3", 21, 60_996_202),
    ("se_resnet152", "deeplabv3plus", 11, 67_944_971),
    ("resnet50", "deeplabv3plus", 11, 26_680_155),
    ("resnet101", "deeplabv3plus", 11, 45_672_283),
    ("efficientnet_b5", "deeplabv3plus", 11, 28_442_315),
    ("resnet50_v1c", MMSEG_DEEPLAB, 11, 43_583_718),
    ("resnet101_v1c", MMSEG_DEEPLAB, 11, 62_575_846),
    ("hrnet_w48", "ocrnet", 11, 70_362_806),
    ("hrnet_w48", "ocrnet", 19, 70_372_678),
    ("hrnet_w48", "ocrnet", 150, 70_534_332),
    ("hrnet_w48", {"name": "ocrnet", "bias": False}, 11, 70_361_574),
    ("hrnet_w48", {"name": "ocrnet", "bias": False}, 150, 70_533_100),
    ("mit_b0", "segformer", 150, 3_752_694),
    ("mit_b5", {"name": "segformer", "width": 768}, 150, 84_708_694),
    ("unet", UNET3PLUS, 1, 26_971_777),
    ("unet", UNET3PLUS, 11, 27_000_587),
    ("unet", UNET3PLUS | {"deep_supervision": True}, 1, 26_989_637),
    ("unet", UNET3PLUS | {"deep_supervision": True}, 11, 27_197_047),
]


@pytest.mark.parametrize(("backbone", "decoder", "num_classes", "parameters"), PARAMETERS)
def test_parameters(backbone: Any, decoder: Any, num_classes: int, parameters: int) -> None:
    with torch.device("meta"):
        model = build_model(backbone, decoder, num_classes=num_classes)
    assert count(model) == parameters


ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.json"))
DOCUMENTED = (ROOT / "docs" / "models.md").read_text()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_configuration_builds_and_its_loss_fits_its_outputs(path: Path) -> None:
    settings = config.load(path)
    with torch.device("meta"):
        model = build_model(settings.model.backbone, settings.model.decoder, num_classes=11)
        outputs = model(torch.empty(2, 3, 64, 96))
    row = re.search(rf"^\| {path.stem} \| ([\d,]+) \|", DOCUMENTED, re.MULTILINE)
    assert row is None or int(row[1].replace(",", "")) == count(model)
    criterion = build_loss(settings.loss.terms, num_classes=11, aux_weight=settings.loss.aux_weight)
    maps = {key: torch.zeros(x.shape, requires_grad=True) for key, x in outputs.items()}
    total = criterion(maps, torch.zeros(2, 64, 96, dtype=torch.uint8))
    total.backward()
    assert total.isfinite()
    supervised = QUERY_OUTPUTS if "query_masks" in maps else maps
    assert all(maps[key].grad is not None for key in supervised)


# ---- any backbone with any decoder


def branches() -> list[nn.Module]:
    """Small backbones with parts that serve a single map."""
    return [Swin(width=8, depths=(1, 1, 1, 2), heads=(1, 1, 2, 2)), HRNet(width=4)]


@pytest.mark.parametrize("name", PYRAMID_DECODERS)
def test_every_trainable_parameter_gets_a_gradient(name: str) -> None:
    torch.manual_seed(0)
    for backbone in branches():
        decoder = DECODERS[name](
            channels=backbone.channels,
            strides=backbone.strides,
            num_classes=3,
            **SMALL.get(name, {}),
        )
        model = Segmenter(backbone, decoder)
        outputs = model(image())
        loss(outputs).backward()
        for key, logits in outputs.items():
            if key in QUERY_OUTPUTS:
                continue
            assert logits.shape == ((1, 3) if key == "aux_presence" else (1, 3, 65, 97))
        for key, parameter in model.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, key


def test_only_parts_of_maps_that_nobody_uses_are_frozen() -> None:
    swin, hrnet = branches()
    for backbone in (swin, hrnet):
        decoder = DECODERS["fcn"](
            channels=backbone.channels, strides=backbone.strides, num_classes=3
        )
        Segmenter(backbone, decoder)
    assert {key for key, p in swin.named_parameters() if not p.requires_grad} == {
        f"norm{level}.{kind}" for level in (0, 1) for kind in ("weight", "bias")
    }
    frozen = {key for key, p in hrnet.named_parameters() if not p.requires_grad}
    assert {key.split(".0.weight")[0][:22] for key in frozen} == {
        "stage4.2.fuse_layers.0",
        "stage4.2.fuse_layers.1",
    }


FAMILIES = (
    {"name": "resnet18", "output_stride": 8},
    "mobilenet_v2",
    {"name": "mobilenet_v3_small", "output_stride": 16},
    "efficientnet_b0",
    "efficientnet_lite0",
    "regnet_x_400mf",
    "convnext_tiny",
    "convnext_v2_atto",
    "swin_t",
    "swin_v2_t",
    "mit_b0",
    "vit_s_dinov3",
    "hrnet_w18",
    "se_resnet50",
    {"name": "unet", "width": 8},
)


@pytest.mark.slow
@pytest.mark.parametrize("decoder", PYRAMID_DECODERS)
@pytest.mark.parametrize("backbone", FAMILIES, ids=str)
def test_every_decoder_takes_every_family(backbone: Any, decoder: str) -> None:
    model = build_model(backbone, small(decoder), num_classes=3)
    outputs = model(image())
    loss(outputs).backward()
    assert all(logits.isfinite().all() for logits in outputs.values())
    for key, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, key
    with torch.no_grad():
        outputs = model.eval()(image(2))
    assert {key: tuple(x.shape) for key, x in outputs.items()} == {"out": (2, 3, 65, 97)}


@pytest.mark.parametrize("decoder", PYRAMID_DECODERS)
def test_one_constant_image_trains(decoder: str) -> None:
    model = build_model("mobilenet_v2", small(decoder), num_classes=3)
    outputs = model(torch.zeros(1, 3, 65, 97))
    loss(outputs).backward()
    assert all(logits.isfinite().all() for logits in outputs.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def _convnext() -> nn.Module:
    widths = (8, 16, 32, 64)
    stages = [CNBlockConfig(*pair, 1) for pair in zip(widths, (*widths[1:], None), strict=True)]
    return convnext(partial(ConvNeXt, stages), drop_path=0.1)


TINY: dict[str, Callable[[], nn.Module]] = {
    "ResNet": partial(BACKBONES["resnet18_half"], output_stride=8),
    "RegNet": BACKBONES["regnet_x_400mf"],
    "MobileNet": BACKBONES["mobilenet_v3_small"],
    "EfficientNet": BACKBONES["efficientnet_b0"],
    "EfficientNet-Lite": BACKBONES["efficientnet_lite0"],
    "ConvNeXt": _convnext,
    "ConvNeXt V2": partial(
        convnext, convnext_of(8, 1, 1, 1, 1, block=ResponseNormBlock), drop_path=0.1
    ),
    "Swin": partial(Swin, width=8, depths=(1, 1, 1, 2), heads=(1, 1, 2, 2)),
    "Swin V2": partial(Swin, width=8, depths=(1, 1, 1, 2), heads=(1, 1, 2, 2), version=2),
    "MiT": partial(MiT, widths=(8, 16, 20, 32), depths=(1, 1, 1, 1)),
    "ViT": partial(vit, width=8, depth=4, heads=1, patch=14, positions=3),
    "ViT with rotary positions": partial(
        vit, width=8, depth=4, heads=1, patch=16, positions=0, registers=2, gated=True
    ),
    "BEiT": partial(beit, width=8, depth=12, heads=2, window=2),
    "HRNet": partial(HRNet, width=4),
    "SE-ResNet": partial(seresnet, 1, 1, 1, 1),
    "UNet": partial(BACKBONES["unet"], width=4),
}
"""A network of each family, as small as the family goes."""


@pytest.mark.parametrize("family", TINY)
def test_every_family_is_finite_in_bfloat16(family: str) -> None:
    torch.manual_seed(0)
    backbone = TINY[family]()
    with torch.autocast("cpu", torch.bfloat16):
        features = backbone(image(2))
    torch.stack([x.float().square().mean() for x in features]).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in backbone.parameters())
    with torch.no_grad():
        features = backbone.to(torch.bfloat16).eval()(image().bfloat16())
    assert all(x.dtype == torch.bfloat16 and x.isfinite().all() for x in features)


def _two_steps_of_everything() -> dict[str, float]:
    sums = {}
    for (family, backbone), name in product(TINY.items(), PYRAMID_DECODERS):
        torch.manual_seed(0)
        encoder = backbone()
        decoder = DECODERS[name](
            channels=encoder.channels,
            strides=encoder.strides,
            num_classes=3,
            **SMALL.get(name, {}),
        )
        model = nn.parallel.DistributedDataParallel(Segmenter(encoder, decoder))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for step in range(2):
            generator = torch.Generator().manual_seed(2 * step + distributed.rank())
            optimizer.zero_grad()
            loss(model(torch.randn(1, 3, 65, 97, generator=generator))).backward()
            optimizer.step()
        sums[f"{name} on {family}"] = sum(p.detach().double().sum() for p in model.parameters())
    return {key: float(value) for key, value in sums.items()}


@pytest.mark.slow
def test_two_ranks_find_no_parameter_unused_in_any_pair() -> None:
    # the second step fails where the first left a parameter without a gradient
    first, second = run_ranks(_two_steps_of_everything, 2)
    assert len(first) == len(TINY) * len(PYRAMID_DECODERS)
    assert all(math.isfinite(total) for total in first.values())
    assert first == second


# ---- Segmenter


class Flat(nn.Module):
    """A backbone and a decoder of nothing, to see what is around them."""

    channels, strides = (3,), (2,)

    def __init__(self, *, align_corners: bool | None = None) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        if align_corners is not None:
            self.align_corners = align_corners

    def forward(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            return [self.norm(x)[..., ::2, ::2]]
        return {"out": x[0], "aux_presence": x[0].mean((2, 3))}


@pytest.mark.parametrize("aligned", [None, False, True])
def test_logits_are_resized_once_the_way_the_decoder_says(aligned: bool | None) -> None:
    model = Segmenter(Flat(), Flat(align_corners=aligned)).eval()
    with torch.no_grad():
        outputs = model(image())
        expected = nn.functional.interpolate(
            model.backbone(image())[0], (65, 97), mode="bilinear", align_corners=bool(aligned)
        )
    assert torch.equal(outputs["out"], expected)
    assert outputs["aux_presence"].shape == (1, 3)


def test_frozen_batch_norm_neither_learns_nor_counts() -> None:
    model = build_model("mobilenet_v3_small", "fcn", num_classes=3, freeze_batch_norm=True)
    norms = [m for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [norm.running_mean.clone() for norm in norms]  # type: ignore[union-attr]
    loss(model.eval().train()(image(2))).backward()
    for norm, mean in zip(norms, before, strict=True):
        assert torch.equal(norm.running_mean, mean)  # type: ignore[arg-type]
        assert norm.weight.grad is None
        assert not norm.training
    assert model.decoder.classifier[1].training  # type: ignore[union-attr, index]
    assert model.decoder.classifier[1].num_batches_tracked == 1  # type: ignore[union-attr, index]


# ---- build_model


def test_equal_seeds_start_equal_whatever_was_random_before() -> None:
    def build(seed: int) -> dict[str, Tensor]:
        return build_model("resnet18", small("upernet"), num_classes=3, seed=seed).state_dict()

    torch.manual_seed(1)
    first, after = build(7), torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(3)), "the global generator was touched"
    other = build(7)
    assert all(torch.equal(first[key], other[key]) for key in first)
    different = build(8)
    for part in ("backbone.conv1.weight", "decoder.classifier.weight"):
        assert not torch.equal(first[part], different[part])


def test_arguments_reach_the_parts() -> None:
    backbone = {"name": "resnet18", "output_stride": 8}
    model = build_model(backbone, {"name": "fcn", "aux": False}, num_classes=3)
    assert model.backbone.strides == (2, 4, 8, 8, 8)
    assert list(model(image(2))) == ["out"]


@pytest.mark.parametrize(
    ("backbone", "decoder", "sentence"),
    [
        ("resnet51", "fcn", "model.backbone.name: unknown 'resnet51'; did you mean 'resnet"),
        ("resnet18", "upernett", "model.decoder.name: .* did you mean 'upernet'"),
        ({"name": "resnet18", "stride": 8}, "fcn", "model.backbone.stride: .* no such argument"),
        (
            {"name": "resnet18", "output_stride": 4},
            "fcn",
            "model.backbone.output_stride: expected one of 8, 16, 32, got 4",
        ),
        (
            {"name": "swin_t", "output_stride": 8},
            "fcn",
            "model.backbone: output_stride: Swin cannot be dilated",
        ),
        ("resnet18", {"name": "fcn", "channels": [3]}, "model.decoder.channels: .* no such"),
        ("resnet18", {"name": "fcn", "width": True}, "model.decoder.width: expected"),
        ("resnet18", {"name": "unet", "widths": [8]}, "model.decoder: widths: expected 4"),
    ],
)
def test_mistakes_are_told_with_their_path(backbone: Any, decoder: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        build_model(backbone, decoder, num_classes=3)


# ---- weights: tests/test_pretrained.py


def test_a_backbone_without_published_weights_says_so() -> None:
    with pytest.raises(ConfigError, match="torchvision has no weights for 'hrnet_w18'"):
        build_model("hrnet_w18", "fcn", num_classes=3, weights="imagenet")


@pytest.mark.parametrize("backbone", ["resnet18", "swin_v2_t", "hrnet_w18"])
def test_a_model_without_values_is_whole_once_they_are_loaded(
    backbone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = {"name": "upernet", "width": 8}
    whole = build_model(backbone, decoder, num_classes=3)
    drawn = []
    with monkeypatch.context() as patch:
        for name in ("normal_", "uniform_"):
            patch.setattr(torch.Tensor, name, lambda x, *_, **__: drawn.append(x) or x)
        bare = build_model(backbone, decoder, num_classes=3, initialize=False)
        assert drawn == []
    bare.load_state_dict(whole.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(whole.buffers(), bare.buffers(), strict=True))
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(whole.eval()(image)["out"], bare.eval()(image)["out"])
    again = build_model(backbone, decoder, num_classes=3).state_dict()
    for name, value in whole.state_dict().items():
        assert torch.equal(again[name], value), name


@pytest.mark.parametrize("decoder", list(DECODERS))
@pytest.mark.parametrize("output", ["map", "tokens"])
def test_outputs_of_a_vit_fit_the_decoder_or_are_refused(decoder: str, output: str) -> None:
    backbone = {"name": "vit_s_dinov3", "output": output}
    fits = decoder == "eomt" if output == "tokens" else decoder in ON_ONE_MAP
    with torch.device("meta"):
        if fits:
            model = build_model(backbone, decoder, num_classes=3)
            assert model(torch.empty(2, 3, 64, 48))["out"].shape == (2, 3, 64, 48)
        else:
            with pytest.raises(ConfigError, match=r"decoder: .*(does not work on|needs a)"):
                build_model(backbone, decoder, num_classes=3)
