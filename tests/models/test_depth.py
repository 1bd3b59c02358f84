"""Depth of parameters: every backbone's layers are all of it, in the order they run."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from segkit.core.errors import ConfigError
from segkit.models.backbones import BACKBONES
from segkit.models.backbones.beit import beit
from segkit.models.backbones.depth import depths, first_stages, layers
from segkit.models.backbones.mit import MiT
from segkit.models.backbones.vit import vit
from segkit.models.segmenter import Segmenter, build_model
from segkit.training.optim import build_optimizer


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return BACKBONES[name]()


LARGE = ("regnet_x_8gf", "regnet_x_16gf", "regnet_x_32gf", "regnet_y_8gf", "regnet_y_16gf")
LARGE += ("regnet_y_32gf", "regnet_y_128gf")  # torchvision cannot build them on the device meta


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in LARGE)) for name in BACKBONES],
)
def test_every_parameter_is_in_a_layer_or_behind_the_last(name: str) -> None:
    """A new family lists its stages; only norms and necks of feature maps are outside of them."""
    backbone = on_meta(name)
    known, count = depths(backbone)
    assert set(known) == {parameter for parameter, _ in backbone.named_parameters()}
    assert set(known.values()) >= set(range(count))
    assert count >= 7
    behind = tuple(f"{module}." for module in (*getattr(backbone, "output_modules", ()), "neck"))
    for parameter, depth in known.items():
        assert depth < count or parameter.startswith(behind), parameter


SMALLEST = (
    *("resnet18", "resnet50_v1c", "regnet_x_400mf", "mobilenet_v2", "mobilenet_v3_small"),
    *("efficientnet_b0", "convnext_tiny", "swin_t", "swin_v2_t", "se_resnet50", "unet"),
    *("vit_s_dinov2", "mit_b0", "convnext_v2_atto", "efficientnet_lite0"),
)


@pytest.mark.parametrize("name", SMALLEST)
def test_layers_run_in_the_order_of_their_depth(name: str) -> None:
    backbone = BACKBONES[name]().eval()
    called: list[str] = []
    for layer in layers(backbone):
        hook = lambda *_, name=layer[0]: called.append(name)  # noqa: E731
        backbone.get_submodule(layer[0]).register_forward_pre_hook(hook)
    with torch.no_grad():
        backbone(torch.zeros(1, 3, 32, 32))
    assert called == [layer[0] for layer in layers(backbone)]


def test_layers_of_a_resnet_by_hand() -> None:
    blocks = [[f"layer{stage}.{block}"] for stage in (1, 2, 3, 4) for block in (0, 1)]
    assert layers(on_meta("resnet18")) == [["conv1", "bn1"], *blocks]
    known, count = depths(on_meta("resnet18"))
    assert (known["bn1.bias"], known["layer2.0.downsample.1.weight"], count) == (0, 3, 9)


def test_merging_is_a_layer_and_a_map_s_norm_is_behind_all() -> None:
    known, count = depths(on_meta("swin_t"))
    assert count == 1 + 2 + 1 + 2 + 1 + 6 + 1 + 2
    assert known["features.0.0.weight"] == 0
    assert known["features.1.1.attn.relative_position_bias_table"] == 2
    assert known["features.2.reduction.weight"] == 3
    assert known["norm0.weight"] == count


def test_the_rate_falls_by_the_decay_from_each_layer_to_the_one_before() -> None:
    """Of resnet18's 9 layers the last has 0.5 of the rate, the stem 0.5 ** 9."""
    with torch.device("meta"):
        model = build_model("resnet18", "fcn", num_classes=2)
    optimizer = build_optimizer(model, lr=1.0, backbone_lr_factor=0.25, layer_decay=0.5)
    rates = {id(p): group["base_lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in model.parameters()} == set(rates)

    def rate(name: str) -> float:
        return rates[id(model.get_parameter(name))]

    assert rate("backbone.conv1.weight") == rate("backbone.bn1.bias") == 0.25 * 0.5**9
    assert rate("backbone.layer1.0.conv1.weight") == 0.25 * 0.5**8
    assert rate("backbone.layer4.1.bn2.weight") == 0.25 * 0.5
    assert {rate(f"decoder.{name}") for name, _ in model.decoder.named_parameters()} == {1.0}


VIT = {"patch_embed.proj.bias": 5, "cls_token": 5, "pos_embed": 5, "blocks.0.attn.qkv.weight": 4}
VIT |= {"blocks.3.ls2.gamma": 1, "norm.weight": 1, "neck.levels.1.weight": 0}
BEIT = {"cls_token": 13, "blocks.0.attn.relative_position_bias_table": 12}
BEIT |= {"blocks.11.mlp.fc2.bias": 1, "neck.levels.0.1.weight": 0}
MIT = {
    "levels.0.embed.weight": 9,
    "levels.0.embed_norm.bias": 9,
    "levels.0.blocks.0.attn.q.bias": 8,
}
MIT |= {"levels.2.blocks.0.attn.kv.weight": 4, "levels.2.blocks.1.attn.kv.weight": 3}
MIT |= {"levels.3.embed.bias": 2, "levels.3.blocks.0.mlp.dwconv.weight": 1}
MIT |= {"levels.3.norm.bias": 1}


@pytest.mark.parametrize(
    ("backbone", "exponents"),
    [
        (partial(vit, 16, 4, 2, patch=8, positions=4), VIT),
        (partial(beit, 16, 12, 2, 0.1), BEIT),
        (partial(MiT, (8, 16, 40, 64), (1, 1, 2, 1)), MIT),
    ],
    ids=["vit", "beit", "mit"],
)
def test_the_rate_of_transformers_falls_block_by_block(
    backbone: Callable[[], nn.Module], exponents: dict[str, int]
) -> None:
    model = Segmenter(backbone(), nn.Conv2d(1, 1, 1))
    optimizer = build_optimizer(model, lr=1.0, backbone_lr_factor=0.25, layer_decay=0.5)
    rates = {id(p): group["base_lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, exponent in exponents.items():
        rate = rates[id(model.backbone.get_parameter(name))]
        assert rate == 0.25 * 0.5**exponent, name


def test_layer_decay_needs_stages() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.decoder = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

    build_optimizer(Bare(), lr=0.1)
    with pytest.raises(ConfigError, match="Conv2d has no attribute 'stages'"):
        build_optimizer(Bare(), lr=0.1, layer_decay=0.9)


# ---- frozen stages


def test_first_stages_are_those_before_the_first_maps() -> None:
    backbone = on_meta("resnet18")
    assert first_stages(backbone, 1) == ["conv1.weight", "bn1.weight", "bn1.bias"]
    two = first_stages(backbone, 2)
    assert {name.split(".")[0] for name in two} == {"conv1", "bn1", "layer1"}
    assert not [name for name in first_stages(on_meta("swin_t"), 4) if name.startswith("norm")]
    with pytest.raises(ConfigError, match="at most 5, the backbone's stages, got 6"):
        first_stages(backbone, 6)


@pytest.mark.parametrize("what", [2, ("backbone.conv1.*", "backbone.bn1.*", "backbone.layer1.*")])
def test_frozen_stages_neither_learn_nor_count(what: object) -> None:
    model = build_model("resnet18_half", "fcn", num_classes=2, freeze=what)  # type: ignore[arg-type]
    optimizer = build_optimizer(model, lr=0.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.eval().train()
    outputs = model(torch.randn(2, 3, 32, 32))
    sum(x.square().mean() for x in outputs.values()).backward()  # type: ignore[union-attr]
    optimizer.step()
    frozen = ("backbone.conv1.", "backbone.bn1.", "backbone.layer1.")
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith(frozen), name


def test_freezing_refuses_what_is_not_there_and_all_there_is() -> None:
    with pytest.raises(ConfigError, match=r"model\.freeze: no parameter is called 'layer1\.\*'"):
        build_model("resnet18_half", "fcn", num_classes=2, freeze=["layer1.*"])
    with pytest.raises(ConfigError, match=r"model\.freeze: expected at most 5"):
        build_model("resnet18_half", "fcn", num_classes=2, freeze=9)
    model = build_model("resnet18_half", "fcn", num_classes=2, freeze=["*"])
    with pytest.raises(ConfigError, match="no parameter is left to train"):
        build_optimizer(model, lr=0.1)
