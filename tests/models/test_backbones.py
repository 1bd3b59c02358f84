"""Backbones: torchvision's numbers and names, any size, dilation, checkpointing."""

import math
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.swin_transformer import (
    PatchMerging,
    PatchMergingV2,
    ShiftedWindowAttention,
    ShiftedWindowAttentionV2,
    SwinTransformer,
)
from torchvision.ops import SqueezeExcitation

from segkit.core.errors import ConfigError
from segkit.models.backbones import BACKBONES
from segkit.models.backbones.beit import RelativeAttention, beit, relative_offsets
from segkit.models.backbones.convnextv2 import GlobalResponseNorm, ResponseNormBlock
from segkit.models.backbones.hrnet import Exchange, HRNet
from segkit.models.backbones.mit import MiT, ReducedAttention
from segkit.models.backbones.stages import dilate
from segkit.models.backbones.swin import (
    Merging,
    MergingV2,
    ShiftMask,
    Swin,
    WindowAttention,
    WindowAttentionV2,
    shift_mask,
)
from segkit.models.backbones.torchvision import SameConv2d, convnext
from segkit.models.backbones.vit import PlainTransformer, resized, vit
from segkit.models.segmenter import build_model
from segkit.models.transformer import rotary_positions, rotate

FAMILIES = (
    "resnet18",
    "regnet_x_400mf",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "efficientnet_lite0",
    "convnext_tiny",
    "convnext_v2_atto",
    "swin_t",
    "swin_v2_t",
    "mit_b0",
    "hrnet_w18",
    "se_resnet50",
    "unet",
    "vit_s_dinov2",
    "vit_s_plus_dinov3",
)
CHAIN = (2, 4, 8, 16, 32)
PATCHES = (4, 8, 16, 32)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def convs(module: nn.Module) -> list[nn.Conv2d]:
    return [m for m in module.modules() if isinstance(m, nn.Conv2d)]


def image(height: int, width: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


def small_swin(**options: object) -> Swin:
    return Swin(width=16, depths=(2, 2, 2, 2), heads=(1, 2, 4, 8), **options)  # type: ignore[arg-type]


def small_mit(**options: object) -> MiT:
    return MiT(widths=(8, 16, 20, 32), depths=(2, 2, 2, 2), **options)  # type: ignore[arg-type]


def small_beit(**options: Any) -> PlainTransformer:
    return beit(**{"width": 16, "depth": 12, "heads": 2, "window": 3} | options)


def small_convnext(**options: object) -> nn.Module:
    widths = (8, 16, 32, 64)
    stages = [CNBlockConfig(*pair, 2) for pair in zip(widths, (*widths[1:], None), strict=True)]
    return convnext(partial(ConvNeXt, stages), **({"drop_path": 0.1} | options))


def small_vit(**options: Any) -> PlainTransformer:
    return vit(**{"width": 16, "depth": 4, "heads": 2, "patch": 14, "positions": 5} | options)


# ---- the contract


@pytest.mark.parametrize("name", FAMILIES)
def test_maps_have_the_promised_channels_and_sizes(name: str) -> None:
    backbone = BACKBONES[name]().eval()
    with torch.no_grad():
        features = backbone(image(65, 97))
    assert len(features) == len(backbone.channels) == len(backbone.strides)
    for feature, channels, stride in zip(
        features, backbone.channels, backbone.strides, strict=True
    ):
        assert feature.shape[:2] == (1, channels)
        for side, whole in zip(feature.shape[-2:], (65, 97), strict=True):
            assert whole // stride <= side <= -(-whole // stride)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in BACKBONES if "regnet" not in name])
def test_every_name_builds_and_doubles_its_strides(name: str) -> None:
    with torch.device("meta"):
        strides = BACKBONES[name]().strides
    assert all(deep == 2 * shallow for shallow, deep in pairwise(strides))


# ---- parameters, to the unit


def slow(*values: object) -> object:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "options", "parameters", "channels", "strides"),
    [
        ("efficientnet_b0", {}, 3_595_388, (32, 24, 40, 112, 320), CHAIN),
        slow("efficientnet_b4", {}, 16_742_216, (48, 32, 56, 160, 448), CHAIN),
        ("efficientnet_lite0", {}, 2_958_848, (32, 24, 40, 112, 320), CHAIN),
        ("efficientnet_lite2", {}, 4_357_952, (32, 24, 48, 120, 352), CHAIN),
        ("efficientnet_b5", {}, 27_288_112, (48, 40, 64, 176, 512), CHAIN),
        slow("efficientnet_b7", {}, 62_143_440, (64, 48, 80, 224, 640), CHAIN),
        ("resnet50", {}, 23_508_032, (64, 256, 512, 1024, 2048), CHAIN),
        slow("resnet101", {}, 42_500_160, (64, 256, 512, 1024, 2048), CHAIN),
        ("resnet50_v1c", {}, 23_527_264, (64, 256, 512, 1024, 2048), CHAIN),
        slow("resnet101_v1c", {}, 42_519_392, (64, 256, 512, 1024, 2048), CHAIN),
        ("swin_t", {}, 27_520_698, (96, 192, 384, 768), PATCHES),
        ("swin_b", {}, 86_745_016, (128, 256, 512, 1024), PATCHES),
        ("swin_b", {"window": 12}, 86_880_376, (128, 256, 512, 1024), PATCHES),
        ("swin_l", {}, 194_998_164, (192, 384, 768, 1536), PATCHES),
        ("swin_l", {"window": 12}, 195_201_204, (192, 384, 768, 1536), PATCHES),
        ("mit_b0", {}, 3_319_392, (32, 64, 160, 256), PATCHES),
        ("mit_b1", {}, 13_151_424, (64, 128, 320, 512), PATCHES),
        ("mit_b2", {}, 24_196_288, (64, 128, 320, 512), PATCHES),
        ("mit_b3", {}, 44_072_128, (64, 128, 320, 512), PATCHES),
        ("mit_b4", {}, 60_842_688, (64, 128, 320, 512), PATCHES),
        ("mit_b5", {}, 81_443_008, (64, 128, 320, 512), PATCHES),
        ("convnext_xlarge", {}, 348_143_872, (256, 512, 1024, 2048), PATCHES),
        ("convnext_v2_atto", {}, 3_386_760, (40, 80, 160, 320), PATCHES),
        ("convnext_v2_femto", {}, 4_847_472, (48, 96, 192, 384), PATCHES),
        ("convnext_v2_pico", {}, 8_552_256, (64, 128, 256, 512), PATCHES),
        ("convnext_v2_nano", {}, 14_981_520, (80, 160, 320, 640), PATCHES),
        ("convnext_v2_tiny", {}, 27_864_960, (96, 192, 384, 768), PATCHES),
        ("convnext_v2_base", {}, 87_690_752, (128, 256, 512, 1024), PATCHES),
        ("convnext_v2_large", {}, 196_416_768, (192, 384, 768, 1536), PATCHES),
        ("convnext_v2_huge", {}, 657_467_008, (352, 704, 1408, 2816), PATCHES),
        ("beit_b", {}, 85_769_664 + 12 * 768**2 + 5 * 768, (768,) * 4, PATCHES),
        ("beit_l", {}, 303_428_096 + 12 * 1024**2 + 5 * 1024, (1024,) * 4, PATCHES),
        ("hrnet_w48", {}, 65_325_120, (48, 96, 192, 384), PATCHES),
        ("se_resnet152", {}, 64_772_848, (64, 256, 512, 1024, 2048), CHAIN),
        ("unet", {}, 18_851_136, (64, 128, 256, 512, 1024), (1, 2, 4, 8, 16)),
        # Meta's, without the mask token; a neck has 12 C^2 + 5 C
        ("vit_s_dinov2", {"output": "map"}, 22_056_192, (384,), (14,)),
        ("vit_b_dinov2", {"output": "map"}, 86_579_712, (768,), (14,)),
        ("vit_l_dinov2_reg", {"output": "map"}, 304_371_712, (1024,), (14,)),
        ("vit_s_dinov3", {"output": "map"}, 21_600_768, (384,), (16,)),
        ("vit_s_plus_dinov3", {"output": "map"}, 28_697_088, (384,), (16,)),
        ("vit_b_dinov3", {"output": "map"}, 85_668_864, (768,), (16,)),
        ("vit_l_dinov3", {}, 303_153_152 + 12 * 1024**2 + 5 * 1024, (1024,) * 4, PATCHES),
    ],
)
def test_parameters_channels_and_strides(
    name: str,
    options: dict[str, int],
    parameters: int,
    channels: tuple[int, ...],
    strides: tuple[int, ...],
) -> None:
    with torch.device("meta"):
        backbone = BACKBONES[name](**options)
    assert count(backbone) == parameters
    assert backbone.channels == channels
    assert backbone.strides == strides


def test_parameters_of_hrnet_by_part() -> None:
    with torch.device("meta"):
        hrnet = BACKBONES["hrnet_w48"]()
    parts = {name: count(part) for name, part in hrnet.named_children() if count(part)}
    assert parts == {
        "conv1": 1_728,
        "bn1": 128,
        "conv2": 36_864,
        "bn2": 128,
        "layer1": 286_208,
        "transition1": 332_064,
        "stage2": 878_112,
        "transition2": 166_272,
        "stage3": 15_335_040,
        "transition3": 664_320,
        "stage4": 47_624_256,
    }


# ---- torchvision's own networks


@pytest.mark.parametrize(
    ("name", "dropped"),
    [
        ("resnet18", ("fc.",)),
        ("regnet_x_400mf", ("fc.",)),
        ("mobilenet_v2", ("features.18.", "classifier.")),
        ("mobilenet_v3_small", ("features.12.", "classifier.")),
        ("efficientnet_b0", ("features.8.", "classifier.")),
        slow("efficientnet_v2_s", ("features.7.", "classifier.")),
        ("convnext_tiny", ("classifier.",)),
    ],
)
def test_names_are_torchvisions_and_the_deepest_map_is_too(
    name: str, dropped: tuple[str, ...]
) -> None:
    torch.manual_seed(0)
    whole = models.get_model(name, weights=None).eval()
    backbone = BACKBONES[name]().eval()
    kept = {key: x for key, x in whole.state_dict().items() if not key.startswith(dropped)}
    backbone.load_state_dict(kept, strict=True)
    x = image(65, 97)
    with torch.no_grad():
        expected = whole(x)
        deepest = backbone(x)[-1]
        if hasattr(whole, "fc"):
            logits = whole.fc(whole.avgpool(deepest).flatten(1))
        elif name == "convnext_tiny":
            logits = whole.classifier(whole.avgpool(deepest))
        else:
            head = whole.features[len(backbone.features) :]
            logits = whole.classifier(F.adaptive_avg_pool2d(head(deepest), 1).flatten(1))
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("name", ["swin_t", slow("swin_v2_t")])
def test_swin_is_torchvisions_with_a_norm_for_each_map(name: str) -> None:
    torch.manual_seed(0)
    whole = models.get_model(name, weights=None).eval()
    backbone = BACKBONES[name]().eval()
    state = {key: x for key, x in whole.state_dict().items() if key.startswith("features.")}
    missing, unexpected = backbone.load_state_dict(state, strict=False)
    assert not unexpected
    assert {key.split(".")[0] for key in missing} == set(backbone.output_modules)
    backbone.norm3.load_state_dict(whole.norm.state_dict())
    with torch.no_grad():
        deepest = backbone(image(64, 96))[-1]
        logits = whole.head(deepest.mean((2, 3)))
        torch.testing.assert_close(logits, whole(image(64, 96)))


def test_deep_stem_has_three_convolutions_the_first_with_the_stride() -> None:
    with torch.device("meta"):
        stem = BACKBONES["resnet50_v1c"]().conv1
    assert [(conv.stride, conv.weight.shape[:2]) for conv in convs(stem)] == [
        ((2, 2), (32, 3)),
        ((1, 1), (32, 32)),
        ((1, 1), (64, 32)),
    ]


def test_parameters_of_efficientnet_b5_by_part() -> None:
    with torch.device("meta"):
        backbone = BACKBONES["efficientnet_b5"]()
    assert [count(part) for part in backbone.features] == [
        1_392,
        5_352,
        122_846,
        329_514,
        1_632_464,
        3_286_344,
        12_165_292,
        9_744_908,
    ]


def test_large_efficientnets_normalize_as_published() -> None:
    with torch.device("meta"):
        backbone = BACKBONES["efficientnet_b5"]()
    norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, 0.01)}


# ---- Swin


def test_swin_pads_the_image_to_whole_patches() -> None:
    swin = small_swin().eval()
    x = image(65, 97)
    with torch.no_grad():
        padded = swin(F.pad(x, (0, 3, 0, 3)))
        for own, whole in zip(swin(x), padded, strict=True):
            assert torch.equal(own, whole)


@pytest.mark.parametrize(("window", "rows"), [(7, 169), (12, 529)])
def test_swin_windows_set_the_bias_tables(window: int, rows: int) -> None:
    with torch.device("meta"):
        state = BACKBONES["swin_b"](window=window).state_dict()
    tables = {
        tuple(x.shape) for key, x in state.items() if key.endswith("relative_position_bias_table")
    }
    assert tables == {(rows, heads) for heads in (4, 8, 16, 32)}


@pytest.mark.parametrize("window", [7, 12])
def test_swin_looks_up_the_bias_of_a_distance(window: int) -> None:
    attention = WindowAttention(2, [window, window], [0, 0], 1)
    at = torch.arange(window)
    row, column = at.repeat_interleave(window), at.repeat(window)
    down, across = row[:, None] - row, column[:, None] - column
    expected = (down + window - 1) * (2 * window - 1) + across + window - 1
    assert torch.equal(attention.relative_position_index, expected.flatten())


def attention_and_torchvisions(version: int, window: int, shift: int) -> tuple[Any, nn.Module]:
    """Window attention with the same random weights here and in torchvision."""
    own, reference = {
        1: (WindowAttention, ShiftedWindowAttention),
        2: (WindowAttentionV2, ShiftedWindowAttentionV2),
    }[version]
    torch.manual_seed(0)
    attention = own(8, [window, window], [shift, shift], 2)
    if version == 1:
        nn.init.normal_(attention.relative_position_bias_table)
    theirs = reference(8, [window, window], [shift, shift], 2)
    theirs.load_state_dict(attention.state_dict())
    return attention, theirs


# one window, several, whole ones, a single row of them; padded at the right, below, and both
@pytest.mark.parametrize("size", [(3, 5), (7, 7), (14, 21), (7, 20), (15, 14), (13, 29)])
@pytest.mark.parametrize("shift", [0, 3])
@pytest.mark.parametrize("version", [1, 2])
def test_attention_is_torchvisions(version: int, shift: int, size: tuple[int, int]) -> None:
    attention, theirs = attention_and_torchvisions(version, 7, shift)
    x = torch.randn(2, *size, 8)
    torch.testing.assert_close(attention(x), theirs(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("version", [1, 2])
@torch.no_grad()
def test_attention_in_large_windows_is_torchvisions(version: int) -> None:
    """Without gradients it is PyTorch's fused attention on the CPU, too."""
    attention, theirs = attention_and_torchvisions(version, 12, 6)
    x = torch.randn(2, 20, 30, 8)
    torch.testing.assert_close(attention(x), theirs(x), rtol=0, atol=1e-6)


def test_attention_is_the_same_by_pytorchs_fused_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices other than the CPU use it in training, too."""

    def fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)

    swin = small_swin(drop_path=0.0)
    x, ours, theirs = image(97, 65), {}, {}
    for gradients in (ours, theirs):
        sum(features.square().mean() for features in swin(x)).backward()
        gradients |= {name: p.grad.clone() for name, p in swin.named_parameters()}
        swin.zero_grad()
        monkeypatch.setattr("segkit.models.backbones.swin._attention", fused)
    for name, gradient in ours.items():
        torch.testing.assert_close(theirs[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_attention_between_regions_has_no_subnormal_numbers() -> None:
    """exp(-100) is one, and products of such numbers are slow on Intel's processors."""
    swin, seen = small_swin(drop_path=0.0), []
    for module in swin.modules():
        if isinstance(module, WindowAttention):
            module.proj.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    swin(image(65, 65))
    smallest = torch.finfo(torch.float32).tiny
    assert seen
    assert not any(((x != 0) & (x.abs() < smallest)).any() for x in seen)


def test_a_shift_mask_is_made_once_for_a_stage_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def counted(*arguments: Any) -> Tensor:
        made.append(arguments[:2])
        return shift_mask(*arguments)

    monkeypatch.setattr("segkit.models.backbones.swin.shift_mask", counted)
    swin = Swin(width=8, depths=(4, 4, 2, 2), heads=(1, 1, 1, 1), drop_path=0.0)
    with torch.inference_mode():
        swin(image(128, 128))
    assert made == [(5, 5), (3, 3), (2, 2)]  # the last stage is one window
    sum(features.mean() for features in swin(image(128, 128))).backward()  # made in inference mode
    assert len(made) == 3
    swin(image(128, 160))
    assert made[3:] == [(5, 6)]  # 20 x 16 patches and fewer need no other windows


def test_a_shift_mask_made_during_the_capture_of_a_cuda_graph_is_not_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its memory belongs to the graph, and a later graph may use it for other tensors."""
    like: Any = SimpleNamespace(is_cuda=True, device=torch.device("cpu"), dtype=torch.float32)
    mask = ShiftMask(-math.inf)
    arguments = 2, 2, 4, (2, 2), like
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    captured = mask(*arguments)
    assert mask(*arguments) is not captured
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    kept = mask(*arguments)
    assert kept is not captured
    assert mask(*arguments) is kept
    assert torch.equal(kept, captured)


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (1, 2)])
def test_merging_is_torchvisions(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    for own, reference in ((Merging, PatchMerging), (MergingV2, PatchMergingV2)):
        merging, theirs = own(4), reference(4)
        theirs.load_state_dict(merging.state_dict())
        x = torch.randn(2, *size, 4)
        assert torch.equal(merging(x), theirs(x))


def test_swin_drops_paths_more_and_more() -> None:
    with torch.device("meta"):
        swin = BACKBONES["swin_b"](drop_path=0.3)
    rates = [m.stochastic_depth.p for m in swin.modules() if hasattr(m, "stochastic_depth")]
    assert rates == pytest.approx([0.3 * i / 23 for i in range(24)])


def test_patch_merging_takes_the_left_column_first() -> None:
    merging = Merging(1).eval()
    with torch.no_grad():
        merging.reduction.weight.copy_(torch.tensor([[1.0, 10, 100, 1000], [0, 0, 0, 0]]))
        merging.norm = nn.Identity()
        out = merging(torch.tensor([[1.0, 2], [3, 4]]).reshape(1, 2, 2, 1))
    # offsets (row, column) in the order (0, 0), (1, 0), (0, 1), (1, 1)
    assert out.flatten().tolist() == [1 + 30 + 200 + 4000, 0]


def test_swin_parameters_without_the_segmentation_norms() -> None:
    with torch.device("meta"):
        swin = small_swin()
        network = SwinTransformer([4, 4], 16, [2, 2, 2, 2], [1, 2, 4, 8], [7, 7], num_classes=1)
    assert count(swin) == count(network.features) + 30 * 16


# ---- MiT


def test_attention_with_reduced_keys_by_hand() -> None:
    """Keys and values of a 5 x 7 map are four of 2 x 2 patches: row 5 and column 7 are in none."""
    torch.manual_seed(0)
    attention = ReducedAttention(8, 2, 2).double()
    x = torch.randn(1, 5, 7, 8, dtype=torch.float64)
    weight = attention.reduce.weight
    patches = [
        torch.einsum("ijc,ocij->o", x[0, r : r + 2, c : c + 2], weight) + attention.reduce.bias
        for r in (0, 2)
        for c in (0, 2, 4)
    ]
    reduced = F.layer_norm(torch.stack(patches), (8,))
    query, (key, value) = attention.q(x).reshape(35, 8), attention.kv(reduced).split(8, 1)
    heads = [
        (query[:, at] @ key[:, at].T / 2).softmax(1) @ value[:, at]  # the root of 4 channels
        for at in (slice(4), slice(4, 8))
    ]
    expected = attention.proj(torch.cat(heads, 1)).reshape(1, 5, 7, 8)
    torch.testing.assert_close(attention(x), expected)


@pytest.mark.parametrize("size", [(1, 1), (16, 90)])
def test_mit_of_an_image_smaller_than_a_key(size: tuple[int, int]) -> None:
    """Keys of the first stage are of 32 x 32 pixels."""
    mit = small_mit().eval()
    with torch.no_grad():
        features = mit(image(*size))
    for feature, stride in zip(features, mit.strides, strict=True):
        assert feature.shape[-2:] == tuple(-(-side // stride) for side in size)
        assert feature.isfinite().all()


def test_mit_drops_paths_more_and_more() -> None:
    rates = [m.drop_path.p for m in small_mit(drop_path=0.3).modules() if hasattr(m, "drop_path")]
    assert rates == pytest.approx([0.3 * i / 7 for i in range(8)])


# ---- BEiT


def test_a_relative_position_bias_by_hand() -> None:
    """A 2 x 2 grid has 3 x 3 offsets, by rows from (-1, -1); then the pairs of the class token."""
    attention = RelativeAttention(4, 1, 2)
    with torch.no_grad():
        attention.relative_position_bias_table.copy_(torch.arange(12.0)[:, None])
    expected = [
        [11, 9, 9, 9, 9],
        [10, 4, 3, 1, 0],
        [10, 5, 4, 2, 1],
        [10, 7, 6, 4, 3],
        [10, 8, 7, 5, 4],
    ]
    grid = relative_offsets(2, 2, torch.zeros(()))
    assert attention.bias(*grid).tolist() == [[expected]]


def test_relative_position_biases_of_another_grid_are_resized() -> None:
    """A window of 2 on a grid of 1 x 3: of 3 x 3 biases the middle row, resized to 5."""
    attention = RelativeAttention(4, 1, 2)
    with torch.no_grad():
        attention.relative_position_bias_table[3:6, 0] = torch.tensor([0.0, 1.0, 5.0])
    resized = F.interpolate(torch.tensor([[[0.0, 1.0, 5.0]]]), 5, mode="linear")[0, 0]
    grid = relative_offsets(1, 3, torch.zeros(()))
    expected = torch.stack([resized[2 + at - torch.arange(3)] for at in range(3)])
    torch.testing.assert_close(attention.bias(*grid)[0, 0, 1:, 1:], expected)


@pytest.mark.parametrize("size", [(65, 97), (16, 16)])
def test_beit_of_any_size(size: tuple[int, int]) -> None:
    beit = small_beit()
    features = beit(image(*size, batch=2))
    for feature, stride in zip(features, beit.strides, strict=True):
        assert feature.shape == (2, 16, *(-(-side // stride) for side in size))
    torch.stack([feature.square().mean() for feature in features]).sum().backward()
    for name, parameter in beit.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    beit.eval()
    pair = image(*size, batch=2)
    with torch.no_grad():
        for together, alone in zip(beit(pair), beit(pair[1:]), strict=True):
            torch.testing.assert_close(together[1:], alone)


def test_beits_pyramid_is_of_the_authors_blocks() -> None:
    assert small_beit().outputs == [4, 6, 8, 12]
    assert small_beit(depth=24).outputs == [8, 12, 16, 24]


# ---- HRNet and SE-ResNet


def test_hrnet_has_the_published_names_and_shapes() -> None:
    with torch.device("meta"):
        state = BACKBONES["hrnet_w48"]().state_dict()
    shapes = {
        "layer1.0.downsample.0.weight": (256, 64, 1, 1),
        "transition1.0.0.weight": (48, 256, 3, 3),
        "transition1.1.0.0.weight": (96, 256, 3, 3),
        "stage2.0.branches.0.0.conv1.weight": (48, 48, 3, 3),
        "stage2.0.fuse_layers.0.1.0.weight": (48, 96, 1, 1),
        "stage2.0.fuse_layers.1.0.0.0.weight": (96, 48, 3, 3),
        "stage4.0.fuse_layers.3.0.0.0.weight": (48, 48, 3, 3),
        "stage4.0.fuse_layers.3.0.1.0.weight": (48, 48, 3, 3),
        "stage4.0.fuse_layers.3.0.2.0.weight": (384, 48, 3, 3),
        "transition2.2.0.0.weight": (192, 96, 3, 3),
        "transition3.3.0.0.weight": (384, 192, 3, 3),
    }
    assert {key: tuple(state[key].shape) for key in shapes} == shapes
    assert not [key for key in state if "bias" in key and "bn" not in key and "conv" in key]


def test_hrnet_upsamples_as_asked() -> None:
    def finest(**options: object) -> Tensor:
        torch.manual_seed(0)
        hrnet = HRNet(width=4, **options).eval()  # type: ignore[arg-type]
        with torch.no_grad():
            return hrnet(image(65, 97))[0]

    aligned, centered = finest(), finest(align_corners=False)
    nearest = finest(upsampling="nearest")
    assert not torch.allclose(aligned, centered)
    assert not torch.allclose(centered, nearest)


def openmmlab(branches: list[Tensor], exchange: Exchange) -> list[Tensor]:
    """mmsegmentation's forward of one exchange: twice bilinear, by a factor and to the size."""
    seen = [blocks(x) for blocks, x in zip(exchange.branches, branches, strict=True)]
    out = []
    for i, paths in enumerate(exchange.fuse_layers):
        total = torch.zeros(())
        for j, x in enumerate(seen):
            y = paths[j](x)
            if j > i:
                y = F.interpolate(y, scale_factor=2 ** (j - i), mode="bilinear")
                y = F.interpolate(y, seen[i].shape[2:], mode="bilinear")
            total = total + y
        out.append(total.relu())
    return out


@pytest.mark.parametrize("size", [(64, 96), (65, 97), (90, 40)])
def test_hrnet_upsamples_as_mmsegmentation(size: tuple[int, int]) -> None:
    """By a factor, then to the size: the same as at once only where 32 divides the sides."""
    options: Any = {"width": 4, "align_corners": False}
    torch.manual_seed(0)
    hrnet = HRNet(upsampling="bilinear_by_factor", **options).double().eval()
    at_once = HRNet(**options).double().eval()
    at_once.load_state_dict(hrnet.state_dict())
    with torch.no_grad():
        x = hrnet.relu(hrnet.bn1(hrnet.conv1(image(*size).double())))
        x = hrnet.layer1(hrnet.relu(hrnet.bn2(hrnet.conv2(x))))
        expected = [move(x) for move in hrnet.transition1]
        for i, stage in ((2, hrnet.stage2), (3, hrnet.stage3), (4, hrnet.stage4)):
            if i > 2:
                last = hrnet.get_submodule(f"transition{i - 1}.{i - 1}")
                expected = [*expected, last(expected[-1])]
            for exchange in stage:
                expected = openmmlab(expected, exchange)
        features = hrnet(image(*size).double())
        torch.testing.assert_close(features, expected)
        whole = all(side % 32 == 0 for side in size)
        assert torch.allclose(features[0], at_once(image(*size).double())[0]) == whole


def test_se_resnet_pools_without_padding() -> None:
    backbone = BACKBONES["se_resnet50"]().eval()
    with torch.no_grad():
        for side, pooled in ((256, 64), (254, 63), (128, 32)):
            stem = backbone.layer0(torch.zeros(1, 3, side, 32))
            assert stem.shape[2] == pooled, side


def test_se_resnet_has_the_published_names() -> None:
    with torch.device("meta"):
        state = BACKBONES["se_resnet50"]().state_dict()
    assert state["layer0.conv1.weight"].shape == (64, 3, 7, 7)
    assert state["layer1.0.se_module.fc1.weight"].shape == (16, 256, 1, 1)
    assert state["layer3.5.se_module.fc2.bias"].shape == (1024,)
    assert state["layer2.0.downsample.1.running_mean"].shape == (512,)
    assert not any(key.startswith("last_linear") for key in state)


def test_se_resnet_strides_in_the_first_convolution() -> None:
    with torch.device("meta"):
        block = BACKBONES["se_resnet50"]().layer2[0]
    assert [conv.stride for conv in (block.conv1, block.conv2, block.conv3)] == [
        (2, 2),
        (1, 1),
        (1, 1),
    ]


# ---- dilation


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "regnet_x_400mf"])
def test_dilation_keeps_every_value_where_it_was(name: str, output_stride: int) -> None:
    torch.manual_seed(0)
    strided = BACKBONES[name]().eval()
    dilated = BACKBONES[name](output_stride=output_stride).eval()
    dilated.load_state_dict(strided.state_dict())
    assert dilated.strides == tuple(min(stride, output_stride) for stride in strided.strides)
    with torch.no_grad():
        pairs = zip(strided(image(65, 97)), dilated(image(65, 97)), strict=True)
    for stride, (coarse, fine) in zip(strided.strides, pairs, strict=True):
        step = max(1, stride // output_stride)
        torch.testing.assert_close(fine[..., ::step, ::step], coarse, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("output_stride", [8, 16])
def test_dilated_resnet_is_torchvisions(output_stride: int) -> None:
    replaced = [False, output_stride == 8, True]
    with torch.device("meta"):
        own = BACKBONES["resnet50"](output_stride=output_stride)
        reference = models.resnet50(replace_stride_with_dilation=replaced)

    def geometry(network: nn.Module) -> list[tuple]:
        return [(conv.stride, conv.dilation, conv.padding) for conv in convs(network)]

    assert geometry(own) == geometry(reference)


def test_dilated_se_resnet_dilates_from_its_first_3x3() -> None:
    with torch.device("meta"):
        layer4 = BACKBONES["se_resnet50"](output_stride=16).layer4
    wide = [conv for conv in convs(layer4) if conv.kernel_size == (3, 3)]
    assert len(wide) == 3
    assert {(c.stride, c.dilation, c.padding) for c in wide} == {((1, 1), (2, 2), (2, 2))}
    assert {conv.stride for conv in convs(layer4)} == {(1, 1)}


@pytest.mark.parametrize("name", ["efficientnet_b0", "mobilenet_v3_small"])
@pytest.mark.parametrize("output_stride", [8, 16])
def test_dilated_maps_have_the_promised_size(name: str, output_stride: int) -> None:
    backbone = BACKBONES[name](output_stride=output_stride).eval()
    with torch.no_grad():
        features = backbone(image(65, 97))
    for feature, stride in zip(features, backbone.strides, strict=True):
        assert feature.shape[-2:] == (-(-65 // stride), -(-97 // stride))


def test_dilate_keeps_the_size_of_any_odd_kernel() -> None:
    conv = nn.Conv2d(1, 1, 5, stride=2, padding=2)
    after = nn.Conv2d(1, 1, (3, 5), padding=(1, 2))
    assert dilate([conv, after], 2) == 4
    assert (conv.stride, conv.dilation, conv.padding) == ((1, 1), (2, 2), (4, 4))
    assert (after.stride, after.dilation, after.padding) == ((1, 1), (4, 4), (4, 8))


@pytest.mark.parametrize(
    "name", ["swin_t", "swin_v2_t", "mit_b0", "convnext_tiny", "hrnet_w18", "unet"]
)
def test_families_without_dilation_name_those_with_it(name: str) -> None:
    with pytest.raises(ConfigError, match=r"output_stride: .* got 8; ResNet, .* EfficientNet can"):
        BACKBONES[name](output_stride=8)


def test_an_impossible_output_stride_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected 8, 16 or 32, got 4"):
        BACKBONES["resnet18"](output_stride=4)


# ---- checkpointing


@pytest.mark.parametrize("name", ["swin", "mit", "hrnet", "convnext", "vit", "beit"])
def test_checkpointing_changes_no_gradient(name: str) -> None:
    def gradients(checkpointing: bool) -> tuple[list[Tensor], int]:
        torch.manual_seed(0)
        backbone: nn.Module
        if name == "swin":
            backbone = small_swin(drop_path=0.5, checkpointing=checkpointing)
        elif name == "mit":
            backbone = small_mit(drop_path=0.5, checkpointing=checkpointing)
        elif name == "hrnet":
            backbone = HRNet(width=4, checkpointing=checkpointing)
        elif name == "beit":
            backbone = small_beit(drop_path=0.5, checkpointing=checkpointing)
        elif name == "vit":
            backbone = small_vit(drop_path=0.5, checkpointing=checkpointing)
        else:
            backbone = small_convnext(drop_path=0.5, checkpointing=checkpointing)
        saved = 0

        def pack(x: Tensor) -> Tensor:
            nonlocal saved
            saved += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = sum(feature.square().mean() for feature in backbone(image(33, 47, batch=2)))
        loss.backward()
        return [p.grad for p in backbone.parameters() if p.grad is not None], saved

    plain, kept = gradients(False)
    checkpointed, kept_less = gradients(True)
    assert kept_less < 0.8 * kept
    assert len(plain) == len(checkpointed)
    for expected, actual in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(actual, expected)


# ---- as other projects have them


@pytest.mark.parametrize(("contract", "first"), [(True, (1, 2)), (False, (2, 4))])
def test_contracted_dilation(contract: bool, first: tuple[int, int]) -> None:
    with torch.device("meta"):
        backbone = BACKBONES["resnet50"](output_stride=8, contract_dilation=contract)
    for name, dilation, others in zip(("layer3", "layer4"), first, (2, 4), strict=True):
        wide = [m for m in convs(backbone.get_submodule(name)) if m.kernel_size == (3, 3)]
        assert [m.dilation[0] for m in wide] == [dilation] + [others] * (len(wide) - 1)


def test_a_convolution_padded_as_tensorflow_pads_by_hand() -> None:
    ones = nn.Conv2d(1, 1, 3, stride=2, bias=False)
    nn.init.ones_(ones.weight)
    image = torch.ones(1, 1, 4, 4)
    assert SameConv2d(ones, 4)(image).tolist() == [[[[9, 6], [6, 4]]]]  # right and bottom only
    odd = SameConv2d(ones, 5)  # 5 to 3: all around
    assert odd.around == (1, 1)
    assert odd(image).tolist() == [[[[4, 6], [6, 9]]]]


@torch.no_grad()
def test_an_efficientnet_like_others() -> None:
    torch.manual_seed(0)
    plain, tensorflow, smp = (
        BACKBONES["efficientnet_b0"](like=like).eval()
        for like in ("torchvision", "tensorflow", "smp")
    )
    for other in (tensorflow, smp):
        other.load_state_dict(plain.state_dict())
        assert other.channels == plain.channels
        assert {m.eps for m in other.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-3}
    picture = image(64, 96)
    for i, (early, late) in enumerate(zip(smp(picture), tensorflow(picture), strict=True)):
        assert torch.equal(early, late) == (i != 3), i
    fifth = smp(picture)[3]
    for block in (smp.features[5][1], smp.features[5][2]):
        fifth = block(fifth)
    assert torch.equal(fifth, tensorflow(picture)[3])
    assert [f.shape[-2:] for f in smp(image(65, 97))] == [
        (32, 48),
        (16, 24),
        (8, 12),
        (4, 6),
        (2, 3),
    ]
    with pytest.raises(ConfigError, match="like: EfficientNet V2 has only 'torchvision', got"):
        BACKBONES["efficientnet_v2_s"](like="smp")


def test_an_efficientnet_lite_is_an_efficientnet_with_other_activations() -> None:
    """Without squeezing; padded as an image of its own side, as the weights' project does."""
    lite = BACKBONES["efficientnet_lite0"]()
    kinds = {type(module) for module in lite.modules()}
    assert nn.ReLU6 in kinds
    assert not {SqueezeExcitation, nn.SiLU} & kinds
    assert lite.like == "smp"
    assert {m.eps for m in lite.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-3}
    strided = [m for m in lite.modules() if isinstance(m, SameConv2d)]
    assert [m.around for m in strided] == [(0, 1), (0, 1), (1, 2), (0, 1), (1, 2)]


@pytest.mark.parametrize("name", ["efficientnet_b0", "se_resnet50", "regnet_y_400mf"])
def test_the_gradient_of_an_average_has_the_layout_of_its_map(name: str) -> None:
    squeezes = [m for m in BACKBONES[name]().modules() if isinstance(m, SqueezeExcitation)]
    assert squeezes
    channels = squeezes[0].fc1.in_channels
    x = torch.randn(2, channels, 6, 5).contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    average = squeezes[0].avgpool(x)
    torch.testing.assert_close(average, F.adaptive_avg_pool2d(x, 1))
    (gradient,) = torch.autograd.grad(average.square().sum(), x)
    assert gradient.is_contiguous(memory_format=torch.channels_last)


# ---- ConvNeXt


def test_convnexts_output_norms_are_over_the_channels_of_each_map() -> None:
    torch.manual_seed(0)
    normed, bare = small_convnext(output_norms=True).eval(), small_convnext().eval()
    for name in ("norm0", "norm3"):
        nn.init.uniform_(normed.get_submodule(name).weight)
        nn.init.uniform_(normed.get_submodule(name).bias)
    assert not bare.load_state_dict(normed.state_dict(), strict=False).missing_keys
    assert (normed.channels, normed.strides) == (bare.channels, bare.strides)
    with torch.no_grad():
        features, plain = normed(image(65, 97)), bare(image(65, 97))
    for i, (feature, x) in enumerate(zip(features, plain, strict=True)):
        norm = normed.get_submodule(f"norm{i}")
        x = x - x.mean(1, keepdim=True)
        x = x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt()
        expected = x * norm.weight[:, None, None] + norm.bias[:, None, None]
        torch.testing.assert_close(feature, expected, rtol=1e-4, atol=1e-4)


def test_a_global_response_norm_by_hand() -> None:
    """Channels of norms 5 and 3 over the map: relative to their mean 4 they are 1.25 and 0.75."""
    norm = GlobalResponseNorm(2).double()
    nn.init.constant_(norm.weight, 2.0)
    nn.init.constant_(norm.bias, 0.5)
    x = torch.tensor([[3.0, 0.0], [4.0, 3.0]], dtype=torch.float64).reshape(1, 1, 2, 2)
    expected = [[3 + 2 * 3 * 1.25 + 0.5, 0.5], [4 + 2 * 4 * 1.25 + 0.5, 3 + 2 * 3 * 0.75 + 0.5]]
    torch.testing.assert_close(
        norm(x)[0, 0], torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0
    )


def test_a_newly_initialized_block_of_convnext_v2_has_no_layer_scale() -> None:
    block = ResponseNormBlock(4, 1e-6, 0.0)
    assert not any("layer_scale" in name for name, _ in block.named_parameters())
    x = image(5, 7)[:, :1].expand(1, 4, 5, 7)
    torch.testing.assert_close(block(x), x + block.block(x))


def test_norms_of_maps_that_a_decoder_does_not_read_do_not_learn() -> None:
    with torch.device("meta"):
        backbone = {"name": "convnext_tiny", "output_norms": True}
        model = build_model(backbone, {"name": "fcn", "aux": False}, num_classes=2)
    norms = [model.get_submodule(f"backbone.norm{i}") for i in range(4)]
    assert [norm.weight.requires_grad for norm in norms] == [False, False, False, True]


def test_efficientnets_epsilon_is_timms_where_asked() -> None:
    for name, torchvisions in (("efficientnet_b4", 1e-5), ("efficientnet_b5", 1e-3)):
        with torch.device("meta"):
            for like, eps in (("timm", 1e-5), ("torchvision", torchvisions), ("smp", 1e-3)):
                backbone = BACKBONES[name](like=like)
                norms = {m.eps for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)}
                assert norms == {eps}, (name, like)


# ---- Vision Transformers


def test_rotary_positions_by_hand() -> None:
    cosine, sine = rotary_positions(8, 2, 1, torch.zeros(1))
    # rows at -1/2 and 1/2, the column at 0; periods 1 and 10; angles of the row, then the column
    angles = torch.tensor([torch.pi * sign / period for sign in (-1, 1) for period in (1, 10)])
    expected = torch.cat([angles.view(2, 2), torch.zeros(2, 2)], 1).repeat(1, 2)
    torch.testing.assert_close(cosine, expected.cos())
    torch.testing.assert_close(sine, expected.sin())


def test_rotary_attention_depends_on_distances_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, 8, generator=generator, dtype=torch.float64)

    def scores(cosine: Tensor, sine: Tensor) -> Tensor:
        tokens = [x.expand(-1, -1, 4, -1) for x in (query, key)]
        rotated = [rotate(x, (cosine.double(), sine.double())) for x in tokens]
        return (rotated[0] @ rotated[1].transpose(2, 3))[0, 0]

    by_pair = scores(*rotary_positions(8, 4, 1, torch.zeros(1)))
    for apart in (1, 2):
        first = by_pair.diagonal(apart)
        torch.testing.assert_close(first, first[:1].expand_as(first), rtol=1e-5, atol=1e-5)


def test_positions_of_the_pretrained_grid_are_not_resized() -> None:
    model = small_vit().eval()
    positions = model.pos_embed[:, 1:]
    assert resized(positions, 5, 5) is positions
    assert resized(positions, 3, 7).shape == (1, 21, 16)


@pytest.mark.parametrize("size", [(5, 3), (13, 5), (1, 4)])
def test_positions_are_resized_bicubically(size: tuple[int, int]) -> None:
    positions = torch.randn(1, 25, 3, generator=torch.Generator().manual_seed(0))
    grid = positions.mT.unflatten(2, (5, 5))
    expected = F.interpolate(grid, size, mode="bicubic").flatten(2).mT
    torch.testing.assert_close(resized(positions, *size), expected, rtol=0, atol=1e-5)


def test_a_pyramid_reads_four_blocks_and_a_map_the_last() -> None:
    assert small_vit().outputs == [1, 2, 3, 4]
    assert small_vit(depth=24).outputs == [6, 12, 18, 24]
    with torch.no_grad():
        (feature,) = small_vit(output="map").eval()(image(28, 43))
    assert feature.shape == (1, 16, 2, 4)
