"""Decoders: their contract on maps of awkward sizes, and what each does with them, by hand."""

import math
from collections.abc import Sequence

import pytest
import torch
from pyramids import PYRAMID_DECODERS
from torch import Tensor, nn

from segkit.core.errors import ConfigError
from segkit.models import kernels, layers
from segkit.models.decoders import DECODERS, stlnet
from segkit.models.decoders.ocrnet import OCRNet, gather
from segkit.models.decoders.stlnet import Texture, co_occurrence, maxima, quantize, spread, sums
from segkit.models.decoders.unet import UNet
from segkit.models.decoders.unet3plus import UNet3Plus
from segkit.models.decoders.unetplusplus import UNetPlusPlus
from segkit.models.decoders.upernet import UPerNet
from segkit.models.kernels import doubled
from segkit.models.kernels.doubled import conv_doubled, doubles
from segkit.models.kernels.resized import conv_resized, resizing_last_pays
from segkit.models.layers import (
    ASPP,
    BatchNorm2d,
    ConvNormAct,
    PyramidConv2d,
    PyramidPooling,
    level_at,
    resize,
    sample_points,
)
from segkit.models.queries import QUERY_OUTPUTS

CLASSES = 5
# name: (arguments that make it small, outputs in training besides "out")
SMALL: dict[str, tuple[dict, Sequence[str]]] = {
    "deeplabv3": ({"width": 16}, ["aux"]),
    "deeplabv3plus": ({"width": 16, "low_width": 4}, []),
    "fcn": ({"width": 8}, ["aux"]),
    "mask2former": (
        {
            "width": 16,
            "queries": 6,
            "layers": 4,
            "heads": 2,
            "feedforward": 24,
            "pixel_layers": 2,
            "pixel_feedforward": 24,
        },
        list(QUERY_OUTPUTS),
    ),
    "ocrnet": ({"width": 16, "key_width": 8}, ["aux"]),
    "pspnet": ({"width": 16, "aux_width": 8}, ["aux"]),
    "segformer": ({"width": 16}, []),
    "stlnet": ({"width": 16, "levels": 12, "aux_width": 8}, ["aux"]),
    "unet": ({"widths": (16, 12, 8, 4)}, []),
    "unet3plus": (
        {"width": 4, "deep_supervision": True, "presence": True},
        ["aux1", "aux2", "aux3", "aux4", "aux_presence"],
    ),
    "unetplusplus": (
        {"widths": (16, 12, 8, 8, 4), "deep_supervision": True},
        ["aux1", "aux2", "aux3", "aux4"],
    ),
    "upernet": ({"width": 16, "aux_width": 8}, ["aux"]),
}
# what the backbone families make of a 65 x 97 image
LAYOUTS = {
    "chain": ((2, 4, 8, 16, 32), [(33, 49), (17, 25), (9, 13), (5, 7), (3, 4)]),
    "dilated": ((2, 4, 8, 8, 8), [(33, 49), (17, 25), (9, 13), (9, 13), (9, 13)]),
    "patches": ((4, 8, 16, 32), [(17, 25), (9, 13), (5, 7), (3, 4)]),
    "floored": ((4, 8, 16, 32), [(16, 24), (8, 12), (4, 6), (2, 3)]),
    "whole": ((1, 2, 4, 8, 16), [(65, 97), (33, 49), (17, 25), (9, 13), (5, 7)]),
}
CHANNELS = (4, 8, 8, 12, 16)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def make(name: str, layout: str = "chain", /, **options: object) -> nn.Module:
    strides = LAYOUTS[layout][0]
    torch.manual_seed(0)
    return DECODERS[name](
        channels=CHANNELS[-len(strides) :],
        strides=strides,
        num_classes=CLASSES,
        **(SMALL[name][0] | options),
    )


def maps(layout: str = "chain", batch: int = 2, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = LAYOUTS[layout][1]
    return [
        torch.randn(batch, channels, *size, generator=generator, dtype=dtype)
        for channels, size in zip(CHANNELS[-len(sizes) :], sizes, strict=True)
    ]


def loss(outputs: dict[str, Tensor]) -> Tensor:
    return torch.stack([logits.float().square().mean() for logits in outputs.values()]).sum()


def test_every_decoder_is_tested() -> None:
    assert [*SMALL] == PYRAMID_DECODERS


# ---- the contract


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", PYRAMID_DECODERS)
def test_outputs_are_logits_and_aux_only_in_training(name: str, layout: str) -> None:
    decoder, features = make(name, layout), maps(layout)
    trained = decoder(features)
    levels = [f"aux{i}" for i in range(len(features), 5)]  # a level less has a head less
    assert list(trained) == ["out", *(aux for aux in SMALL[name][1] if aux not in levels)]
    for key, logits in trained.items():
        if key in QUERY_OUTPUTS:
            assert logits.shape[:3] == (5, 2, 6)
            continue
        assert logits.shape[:2] == (2, CLASSES)
        assert logits.ndim == (2 if key == "aux_presence" else 4)
        assert logits.isfinite().all()
        assert logits.min() < 0 or name == "unet3plus", "an activation ends the network"
    with torch.no_grad():
        assert list(decoder.eval()(features)) == ["out"]


@pytest.mark.parametrize("name", PYRAMID_DECODERS)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    decoder = make(name)
    loss(decoder(maps())).backward()
    for key, parameter in decoder.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("name", PYRAMID_DECODERS)
def test_a_prediction_does_not_depend_on_the_rest_of_the_batch(name: str) -> None:
    decoder, features = make(name).eval(), maps(batch=3)
    with torch.no_grad():
        together = decoder(features)["out"]
        alone = decoder([feature[1:2] for feature in features])["out"]
    torch.testing.assert_close(together[1:2], alone)


@pytest.mark.parametrize("name", PYRAMID_DECODERS)
def test_bfloat16_is_finite(name: str) -> None:
    decoder, features = make(name), maps()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = decoder(features)
    loss(outputs).backward()
    assert all(logits.isfinite().all() for logits in outputs.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in decoder.parameters())
    decoder = decoder.to(torch.bfloat16).eval()
    with torch.no_grad():
        assert decoder([x.bfloat16() for x in features])["out"].isfinite().all()


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("name", PYRAMID_DECODERS)
def test_one_image_without_contrast_trains(name: str, value: float) -> None:
    decoder = make(name)
    features = [torch.full_like(x, value).requires_grad_() for x in maps(batch=1)]
    outputs = decoder(features)
    loss(outputs).backward()
    assert all(logits.isfinite().all() for logits in outputs.values())
    tensors = [*decoder.parameters(), *features]
    assert all(x.grad is None or x.grad.isfinite().all() for x in tensors)


def fill(module: nn.Module) -> nn.Module:
    """Weights that are a function of their names' order and shapes alone, scaled by fan-in."""
    for i, (_, parameter) in enumerate(sorted(module.named_parameters())):
        wave = torch.sin(torch.arange(parameter.numel(), dtype=torch.float64) * 0.7 + i)
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 16
        norm = 1.0 if parameter.ndim == 1 and i % 2 else 0.0
        with torch.no_grad():
            parameter.copy_((wave / math.sqrt(fan_in) + norm).reshape(parameter.shape))
    return module


GOLDEN: dict[str, tuple[float, list[float]]] = {
    "deeplabv3": (
        0.0850044984,
        [0.0596345685, 0.29763777, 0.342126165, 0.0567660804, -0.270352637],
    ),
    "deeplabv3plus": (0.884199418, [0.300844807, 0.633868831, 1.63114082, 1.51069967, 0.324733374]),
    "fcn": (-0.00650931982, [0.162550535, 0.105951652, -0.00176030191, -0.108814954, -0.163674497]),
    "mask2former": (
        -0.259109175,
        [-0.350643309, 0.77557006, 0.260156589, -0.979123788, -1.0015044],
    ),
    "ocrnet": (0.132832822, [0.34452531, 0.681325776, 0.113072353, -0.358586081, -0.0161701706]),
    "pspnet": (1.02674552, [0.362276111, 1.04136694, 1.49982142, 1.19430627, 0.783849816]),
    "segformer": (0.122130188, [-0.391765036, 0.117657454, 0.620507878, 0.411106, -0.211103222]),
    "stlnet": (0.0578257619, [-0.505314885, 0.816266143, 1.11764378, -0.146994596, -1.12859907]),
    "unet": (0.0363407387, [0.33112555, -0.52841042, 0.306696583, 0.175865749, 0.0646354221]),
    "unet3plus": (-0.405686858, [-1.41882162, -1.76614673, -1.49833366, -1.25203539, -1.01903217]),
    "unetplusplus": (
        -0.142263488,
        [0.0178876468, -0.139691408, -0.219282334, -0.18264256, -0.0462538632],
    ),
    "upernet": (1.01994127, [0.115804428, 0.530154954, 1.53873607, 1.72131798, 0.958907055]),
}


@pytest.mark.parametrize("name", PYRAMID_DECODERS)
def test_golden(name: str) -> None:
    decoder = fill(make(name).double()).eval()
    sizes = LAYOUTS["chain"][1]
    features = [
        torch.cos(torch.arange(math.prod((channels, *size)), dtype=torch.float64) * 0.37)
        .reshape(1, channels, *size)
        .contiguous()
        for channels, size in zip(CHANNELS, sizes, strict=True)
    ]
    with torch.no_grad():
        out = decoder(features)["out"].flatten()
    mean, some = GOLDEN[name]
    assert out.mean().item() == pytest.approx(mean, rel=1e-6, abs=1e-9)
    picked = out[:: len(out) // 5][:5].tolist()
    assert picked == pytest.approx(some, rel=1e-6, abs=1e-9)


# ---- layers


def test_batch_norm_with_one_value_uses_what_it_has_seen() -> None:
    norm = BatchNorm2d(3)
    norm.running_mean.fill_(2.0)
    norm.running_var.fill_(4.0)
    x = torch.full((1, 3, 1, 1), 6.0)
    torch.testing.assert_close(norm(x), torch.full_like(x, 2.0))
    assert norm.running_mean.tolist() == [2.0] * 3
    assert norm.num_batches_tracked == 0


def test_batch_norm_with_more_values_is_torchs() -> None:
    x = torch.randn(2, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    own, reference = BatchNorm2d(3), nn.BatchNorm2d(3)
    assert torch.equal(own(x), reference(x))
    assert torch.equal(own.running_mean, reference.running_mean)


def test_resize_leaves_what_fits_and_obeys_the_corners() -> None:
    x = torch.tensor([[[[0.0, 1.0]]]])
    assert resize(x, (1, 2)) is x
    assert resize(x, (1, 4)).flatten().tolist() == [0, 0.25, 0.75, 1]
    aligned = resize(x, (1, 4), align_corners=True).flatten()
    torch.testing.assert_close(aligned, torch.tensor([0, 1 / 3, 2 / 3, 1]))
    assert resize(x, (1, 3), mode="nearest", align_corners=True).flatten().tolist() == [0, 0, 1]


def test_points_of_a_map_by_hand() -> None:
    x = torch.tensor([[[[0.0, 4.0], [8.0, 12.0]]]])
    points = torch.tensor([[[0.25, 0.25], [0.5, 0.25], [0.5, 0.5], [0.0, 0.25], [2.0, 0.5]]])
    # A center, between two and four centers, at the edge half way to the zeros, and outside.
    assert sample_points(x + 1, points).flatten().tolist() == [1, 3, 7, 0.5, 0]


def test_points_are_sampled_alike_with_deterministic_algorithms(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, 7, generator=rng, dtype=torch.float64, requires_grad=True)
    points = 1.4 * torch.rand(2, 40, 2, generator=rng, dtype=torch.float64) - 0.2
    points.requires_grad_()
    plain = sample_points(x, points)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    indexed = sample_points(x, points)
    torch.testing.assert_close(indexed, plain)
    ours, theirs = (torch.autograd.grad((y**2).sum(), (x, points)) for y in (indexed, plain))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", PYRAMID_DECODERS)
def test_every_convolution_is_called_as_a_module(name: str) -> None:
    """Forward hooks see it, and so do counters of operations, pruning and FSDP."""
    decoder, called = make(name).train(), set()
    for module in decoder.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda conv, *_: called.add(conv))
    decoder(maps())
    missing = [
        path
        for path, module in decoder.named_modules()
        if isinstance(module, nn.Conv2d) and module not in called
    ]
    assert missing == []


def test_convolving_a_doubled_map_is_resizing_and_convolving() -> None:
    rng = torch.Generator().manual_seed(0)
    shapes = (2, 3, 5, 7), (4, 3, 3, 3), (4,)
    x, weight, bias = (
        torch.randn(shape, generator=rng, dtype=torch.float64, requires_grad=True)
        for shape in shapes
    )
    plain = nn.functional.conv2d(resize(x, (10, 14), mode="nearest"), weight, bias, padding=1)
    result = conv_doubled(x, weight, bias)
    torch.testing.assert_close(result, plain)
    ours, theirs = (torch.autograd.grad((y**2).sum(), (x, weight, bias)) for y in (result, plain))
    torch.testing.assert_close(ours, theirs)


def test_a_pointwise_convolution_before_resizing_is_the_same_as_after() -> None:
    levels = maps(dtype=torch.float64)[1:3]
    conv = PyramidConv2d(16, 4, 1, bias=False).double()
    together = torch.cat([levels[0], resize(levels[1], levels[0].shape[-2:])], 1)
    torch.testing.assert_close(conv(levels), nn.functional.conv2d(together, conv.weight))


def test_weights_of_a_doubled_map_are_summed_alike_on_every_device() -> None:
    weight = torch.randn(3, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    sums, pooled = doubled._sums(weight), doubled._pooled_sums(weight)
    torch.testing.assert_close(pooled, sums)
    ours, theirs = (torch.autograd.grad((x**2).sum(), weight) for x in (pooled, sums))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("size", [(10, 14), (33, 49), (17, 25), (6, 8), (5, 7)])
def test_convolving_a_resized_map_is_resizing_and_convolving(size: tuple[int, int]) -> None:
    rng = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(shape, generator=rng, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 3, 5, 7), (4, 3, 3, 3))
    )
    plain = nn.functional.conv2d(resize(x, size), weight, padding=1)
    result = conv_resized(x, size, weight)
    torch.testing.assert_close(result, plain)
    ours, theirs = (torch.autograd.grad((y**2).sum(), (x, weight)) for y in (result, plain))
    torch.testing.assert_close(ours, theirs)


def test_only_large_maps_that_are_doubled_exactly_are_convolved_so() -> None:
    large, small = torch.zeros(1, 1, 16, 17), torch.zeros(1, 1, 15, 17)
    assert doubles(large, (32, 34))
    assert not doubles(large, (32, 33))
    assert not doubles(large, (16, 17))
    assert not doubles(small, (30, 34))


def test_kernels_are_used_only_on_devices_where_they_were_measured() -> None:
    meta = torch.zeros(1, 1, 16, 17, device="meta")
    assert not doubles(meta, (32, 34))
    assert not resizing_last_pays(meta, (64, 68))


@pytest.mark.parametrize("size", [(64, 96), (65, 97)])
@torch.no_grad()
def test_upernet_is_the_same_with_plain_convolutions(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = make("upernet").eval()
    rng = torch.Generator().manual_seed(0)
    features = [
        torch.randn(1, channels, *(-(-side // stride) for side in size), generator=rng)
        for channels, stride in zip(CHANNELS, LAYOUTS["chain"][0], strict=True)
    ]
    expected = decoder(features)["out"]
    monkeypatch.setitem(kernels.DEVICES, "conv_resized", ())
    torch.testing.assert_close(decoder(features)["out"], expected)


@pytest.mark.parametrize("size", [(64, 96), (65, 97)])
@torch.no_grad()
def test_unetplusplus_is_the_same_where_no_map_is_doubled(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = make("unetplusplus").eval()
    rng = torch.Generator().manual_seed(0)
    features = [
        torch.randn(1, channels, *(-(-side // stride) for side in size), generator=rng)
        for channels, stride in zip(CHANNELS, LAYOUTS["chain"][0], strict=True)
    ]
    out = decoder(features)["out"]
    monkeypatch.setattr(layers, "doubles", lambda *_: False)
    torch.testing.assert_close(out, decoder(features)["out"])


def test_level_at_finds_the_first_that_is_coarse_enough() -> None:
    assert level_at(4, (2, 4, 8)) == 1
    assert level_at(4, (4, 8)) == 0
    assert level_at(4, (1, 2, 3)) == 2


def test_separable_convolutions_have_no_norm_in_between() -> None:
    block = ConvNormAct(8, 4, dilation=3, separable=True)
    depthwise, pointwise = block[0]
    assert (depthwise.groups, depthwise.dilation, depthwise.padding) == (8, (3, 3), (3, 3))
    assert count(block) == 8 * 9 + 8 * 4 + 2 * 4
    assert pointwise.kernel_size == (1, 1)


def test_pyramid_pooling_averages_over_a_grid() -> None:
    pool = PyramidPooling(1, width=1, outputs=1, bins=(2,)).eval()
    seen = []
    pool.branches[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    pool(torch.arange(16.0).reshape(1, 1, 4, 4))
    assert seen[0].flatten().tolist() == [2.5, 4.5, 10.5, 12.5]


def test_aspp_dilates_by_its_rates() -> None:
    aspp = ASPP(4, width=2, rates=(6, 12))
    convs = [branch[0] for branch in aspp.branches]
    assert [conv.dilation for conv in convs] == [(1, 1), (6, 6), (12, 12)]
    assert [conv.kernel_size for conv in convs] == [(1, 1), (3, 3), (3, 3)]


# ---- UPerNet


def test_parameters_of_upernet_by_part() -> None:
    with torch.device("meta"):
        decoder = UPerNet(channels=(128, 256, 512, 1024), strides=(4, 8, 16, 32), num_classes=11)
    assert count(decoder.pool.branches) == 2_101_248
    assert count(decoder.pool.fuse) == 14_156_800
    assert count(decoder.laterals) == 461_824
    assert count(decoder.smooth) == 7_080_960
    assert count(decoder.fuse) == 9_438_208
    assert count(decoder.classifier) == 5_643
    assert decoder.aux is not None
    assert count(decoder.aux) == 1_180_160 + 2_827


@pytest.mark.parametrize("name", ["upernet", "pspnet"])
def test_auxiliary_heads_are_there_only_if_asked_for(name: str) -> None:
    decoder = make(name, aux_width=None)
    assert not [key for key, _ in decoder.named_parameters() if key.startswith("aux")]
    assert list(decoder(maps())) == ["out"]


# ---- UNet++


def test_unetplusplus_nodes_take_what_the_paper_draws() -> None:
    with torch.device("meta"):
        decoder = UNetPlusPlus(
            channels=(48, 40, 64, 176, 512), strides=(2, 4, 8, 16, 32), num_classes=11
        )
    nodes = {
        name: (node.conv1[0].in_channels, node.conv2[0].out_channels)
        for name, node in decoder.blocks.items()
    }
    assert nodes == {
        "x_0_0": (688, 256),
        "x_0_1": (384, 128),
        "x_1_1": (240, 64),
        "x_0_2": (248, 64),
        "x_1_2": (144, 40),
        "x_2_2": (104, 40),
        "x_0_3": (256, 32),
        "x_1_3": (184, 48),
        "x_2_3": (136, 48),
        "x_3_3": (88, 48),
        "x_0_4": (32, 16),
    }
    assert count(decoder.blocks) == 3_569_152


@pytest.mark.parametrize(
    ("channels", "parameters"),
    [
        ((32, 24, 40, 112, 320), 2_561_888),
        ((48, 32, 56, 160, 448), 3_264_352),
        ((48, 40, 64, 176, 512), 3_569_152),
        ((64, 48, 80, 224, 640), 4_376_448),
    ],
)
def test_parameters_of_unetplusplus(channels: tuple[int, ...], parameters: int) -> None:
    with torch.device("meta"):
        decoder = UNetPlusPlus(channels=channels, strides=(2, 4, 8, 16, 32), num_classes=11)
    assert count(decoder.blocks) == parameters
    assert count(decoder.classifier) == 1_595


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_unetplusplus_pruned_is_a_shallower_head_without_deeper_nodes(depth: int) -> None:
    whole, pruned = make("unetplusplus").eval(), make("unetplusplus", pruned=depth).eval()
    nodes, ran = {}, []
    for name in whole.blocks:
        whole.blocks[name].register_forward_hook(
            lambda _, inputs, out, name=name: nodes.update({name: out})
        )
        pruned.blocks[name].register_forward_hook(lambda *_, name=name: ran.append(name))
    with torch.no_grad():
        whole(maps())
        expected = whole.heads[depth - 1](nodes[f"x_{4 - depth}_3"])
        torch.testing.assert_close(pruned(maps())["out"], expected)
    assert len(ran) == depth * (depth + 1) // 2
    assert list(pruned.train()(maps())) == ["out", "aux1", "aux2", "aux3", "aux4"]


@pytest.mark.parametrize(
    "options", [{"pruned": 5}, {"pruned": 0}, {"pruned": 1, "average": True}], ids=str
)
def test_unetplusplus_cannot_be_pruned_to_what_it_has_not(options: dict) -> None:
    with pytest.raises(ConfigError, match="pruned: expected a head of deep supervision"):
        make("unetplusplus", **options)


def test_unetplusplus_supervises_the_finest_row_from_shallow_to_deep() -> None:
    decoder = make("unetplusplus")
    assert [head.in_channels for head in decoder.heads] == [4, 4, 4, 8]
    seen = {}
    for name in ("x_3_3", "x_2_3", "x_1_3", "x_0_3"):
        decoder.blocks[name].register_forward_hook(
            lambda _, inputs, out, name=name: seen.update({name: out})
        )
    outputs = decoder(maps())
    row = zip(decoder.heads, ("x_3_3", "x_2_3", "x_1_3", "x_0_3"), strict=True)
    for i, (head, name) in enumerate(row, 1):
        torch.testing.assert_close(outputs[f"aux{i}"], head(seen[name]))


def test_unetplusplus_averages_all_heads_in_accurate_mode() -> None:
    decoder = make("unetplusplus", average=True)
    for i, head in enumerate([*decoder.heads, decoder.classifier]):
        nn.init.zeros_(head.weight)
        nn.init.constant_(head.bias, float(i))
    with torch.no_grad():
        out = decoder.eval()(maps())["out"]
    torch.testing.assert_close(out, torch.full_like(out, 2.0))  # (0 + 1 + 2 + 3 + 4) / 5


def test_unetplusplus_is_never_finer_than_the_image() -> None:
    assert make("unetplusplus", "whole")(maps("whole"))["out"].shape[-2:] == (65, 97)
    assert make("unetplusplus", "chain")(maps("chain"))["out"].shape[-2:] == (66, 98)


@pytest.mark.parametrize(("name", "wanted"), [("unetplusplus", 5), ("unet", 4)])
def test_a_wrong_number_of_widths_is_told(name: str, wanted: int) -> None:
    with pytest.raises(ConfigError, match=f"widths: expected {wanted}, .* got 2"):
        make(name, widths=(8, 4))


def test_unet_takes_one_skip_a_level() -> None:
    decoder = UNet(channels=CHANNELS, strides=(2, 4, 8, 16, 32), num_classes=CLASSES)
    inputs = [level[0][0].in_channels for level in decoder.blocks]
    assert inputs == [16 + 12, 256 + 8, 128 + 8, 64 + 4]


# ---- UNet 3+


@pytest.mark.parametrize(
    ("channels", "bias", "parameters"),
    [
        ((64, 128, 256, 512, 1024), True, 8_117_760),
        ((48, 40, 64, 176, 512), False, 6_331_904),
        ((48, 40, 64, 176, 512), True, 6_334_464),
        ((64, 48, 80, 224, 640), False, 6_723_584),
        ((64, 256, 512, 1024, 2048), False, 11_285_504),
    ],
)
def test_parameters_of_unet3plus(channels: tuple[int, ...], bias: bool, parameters: int) -> None:
    with torch.device("meta"):
        decoder = UNet3Plus(channels=channels, strides=(2, 4, 8, 16, 32), num_classes=11, bias=bias)
    assert count(decoder.nodes) == parameters
    assert count(decoder.heads) == 9 * 320 * 11 + 11


def test_parameters_of_presence_at_two_classes_are_the_published_modules() -> None:
    with torch.device("meta"):
        decoder = UNet3Plus(
            channels=(64, 128, 256, 512, 1024),
            strides=(1, 2, 4, 8, 16),
            num_classes=2,
            presence=True,
        )
    assert decoder.presence is not None
    assert count(decoder.presence) == 26_991_687 - 26_989_637


def test_unet3plus_pools_fine_maps_and_keeps_encoder_maps_out_of_deeper_nodes() -> None:
    decoder = UNet3Plus(channels=(1, 1, 1), strides=(1, 2, 4), num_classes=2, width=1)
    node = decoder.nodes[1]
    seen: list[Tensor] = []
    for branch in node.branches:
        branch.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    fine = torch.arange(15.0).reshape(1, 1, 3, 5)
    node([fine, torch.zeros(1, 1, 2, 3), torch.ones(1, 1, 1, 2)], 1)
    assert seen[0].flatten().tolist() == [6, 8, 9, 11, 13, 14]  # pooled up to the odd size
    assert seen[2].shape == (1, 1, 2, 3)
    assert seen[2].unique().tolist() == [1]


@pytest.mark.parametrize(("background", "first"), [(0, 0.0), (None, -50.0)])
def test_presence_multiplies_the_odds_of_classes_but_not_of_the_background(
    background: int | None, first: float
) -> None:
    decoder = make("unet3plus", background=background).eval()
    assert decoder.presence is not None
    head = decoder.presence[1]
    nn.init.zeros_(head.weight)
    with torch.no_grad():
        head.bias.copy_(torch.tensor([-50.0, 50.0, 0.0, -50.0, 1.0]))
        gated = decoder(maps())["out"]
        decoder.presence = None
        plain = decoder(maps())["out"]
    added = (gated - plain).mean((0, 2, 3))
    expected = [first, 0.0, math.log(0.5), -50.0, -math.log1p(math.exp(-1))]
    assert added.tolist() == pytest.approx(expected, abs=1e-4)


# ---- FCN and DeepLabV3+ as mmsegmentation has them


@pytest.mark.parametrize("name", ["fcn", "deeplabv3plus"])
def test_mmsegmentations_layout_keeps_the_contract(name: str) -> None:
    decoder = make(name, layout="mmsegmentation", aux=True)
    outputs = decoder(maps())
    loss(outputs).backward()
    assert list(outputs) == ["out", "aux"]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in decoder.parameters())
    with torch.no_grad():
        assert list(decoder.eval()(maps())) == ["out"]


def test_parameters_of_deeplabv3plus_by_part() -> None:
    options = {"channels": (64, 256, 512, 1024, 2048), "strides": (2, 4, 8, 16, 16)}
    with torch.device("meta"):
        decoder = DECODERS["deeplabv3plus"](**options, num_classes=11)
        plain = DECODERS["deeplabv3plus"](**options, num_classes=11, separable=False)
    aspp = decoder.aspp
    assert [count(branch) for branch in aspp.branches] == [524_800, 543_232, 543_232, 543_232]
    assert count(aspp.average) == 524_800
    assert count(aspp.project) == 328_192
    assert count(decoder.smooth) == 68_352
    assert count(decoder.low) == 12_384
    assert count(decoder.fuse) == 81_072
    assert count(decoder.classifier) == 2_827
    assert [count(branch) for branch in plain.aspp.branches[1:]] == [9 * 2048 * 256 + 512] * 3


def test_deeplabv3plus_takes_both_sets_of_rates() -> None:
    for rates in ((6, 12, 18), (12, 24, 36)):
        decoder = make("deeplabv3plus", rates=rates, separable=False)
        assert [branch[0].dilation[0] for branch in decoder.aspp.branches] == [1, *rates]


# ---- OCRNet


def test_gather_is_the_mean_of_a_region() -> None:
    pixels = torch.tensor([[1.0, 2, 3, 4], [10, 20, 30, 40]]).reshape(1, 2, 2, 2)
    first, all_of_them = torch.tensor([100.0, 0, 0, 0]), torch.zeros(4)
    objects = gather(pixels, torch.stack([first, all_of_them]).reshape(1, 2, 2, 2))
    assert objects.shape == (1, 2, 2, 1)
    assert objects.flatten().tolist() == pytest.approx([1, 2.5, 10, 25])


def test_gather_shares_a_softmax_over_the_image() -> None:
    pixels = torch.tensor([1.0, 5.0]).reshape(1, 1, 1, 2)
    logits = torch.tensor([0.0, math.log(3)]).reshape(1, 1, 1, 2)
    assert gather(pixels, logits).item() == pytest.approx(0.25 * 1 + 0.75 * 5)


def test_gather_shares_out_a_large_image_in_half_precision() -> None:
    side = 256  # a share is 2^-16, and a thousandth of it under fp16's least number
    regions = torch.zeros(1, 1, side, side, dtype=torch.float16)
    regions[..., : side // 2] = -7  # e^-7 of the others' share
    pixels = torch.ones(1, 1, side, side, dtype=torch.float16)
    pixels[..., : side // 2] = 1000
    with torch.autocast("cpu", torch.bfloat16):
        mean = gather(pixels, regions)
    share = math.exp(-7) / (1 + math.exp(-7))
    assert mean.dtype == torch.float16
    assert mean.item() == pytest.approx(1 + 999 * share, rel=1e-3)


def test_parameters_of_ocrnet_by_part() -> None:
    with torch.device("meta"):
        head = OCRNet(channels=(48, 96, 192, 384), strides=(4, 8, 16, 32), num_classes=11)
    assert count(head.regions) == 528_491
    assert count(head.pixels) == 3_319_296
    attention = (head.query, head.key, head.value, head.context, head.fuse)
    assert sum(map(count, attention)) == 1_184_256
    assert count(head.classifier) == 5_643


def test_ocrnet_aligns_corners_if_asked() -> None:
    true, false = (make("ocrnet", align_corners=aligned).eval() for aligned in (True, False))
    with torch.no_grad():
        assert not torch.allclose(true(maps())["out"], false(maps())["out"])


# ---- STLNet


@pytest.mark.parametrize(
    ("inputs", "parameters"), [(768, 1_504_384), (1024, 1_569_920), (2048, 1_832_064)]
)
def test_parameters_of_the_texture_head(inputs: int, parameters: int) -> None:
    with torch.device("meta"):
        head = Texture(inputs, width=256, levels=128, region_levels=8, scales=(1, 2, 3, 6))
    assert count(head) == parameters
    assert count(head.start) == 256 * inputs + 512
    assert count(head.enhance) == 746_880
    attention = (head.enhance.query, head.enhance.key, head.enhance.value)
    assert [count(part) for part in attention] == [16_384] * 3
    assert count(head.enhance.expand) == 33_280
    assert count(head.reduce) == 131_072
    assert [count(scale) for scale in head.pyramid] == [74_432] * 4
    assert count(head.fuse) == 131_584


def test_quantization_of_a_4x4_map() -> None:
    x = torch.linspace(0, 1.5, 16).reshape(1, 1, 4, 4)  # 0, 0.1, ..., 1.5
    steps, encoding = quantize(x, 3, side=1)
    assert steps.flatten().tolist() == pytest.approx([0.25, 0.75, 1.25])
    assert encoding.shape == (1, 3, 4, 4)
    at_first = encoding[0, :, 0, 0].tolist()  # 0.0: only the first step is nearer than 0.5
    assert at_first == pytest.approx([0.75, 0, 0])
    at_fifth = encoding[0, :, 1, 1].tolist()  # 0.5: between the first and the second
    assert at_fifth == pytest.approx([0.75, 0.75, 0])
    assert ((encoding > 0).sum(1) >= 1).all()
    assert ((encoding > 0).sum(1) <= 2).all()


def test_quantization_of_each_region_apart() -> None:
    x = torch.tensor([[0.0, 1, 10, 30], [1, 0, 30, 10]]).reshape(1, 1, 2, 4)
    steps, encoding = quantize(x, 2, side=2)  # regions of one row and two columns
    assert steps[0, :, 0, 0].tolist() == [0.25, 0.75]
    assert steps[0, :, 0, 1].tolist() == [15, 25]
    assert encoding[0, :, 0, 0].tolist() == [0.75, 0]
    assert encoding[0, :, 0, 2].tolist() == [-4, 0]  # 1 - |15 - 10|: made for cosines


def test_a_map_without_contrast_has_no_level() -> None:
    steps, encoding = quantize(torch.full((1, 1, 3, 3), 0.5), 4, side=1)
    assert steps.unique().tolist() == [0.5]
    assert not encoding.any()


@pytest.mark.parametrize("side", [1, 2, 3, 6])
def test_regions_hold_each_pixel_once_at_any_size(side: int) -> None:
    height, width = 7, 11
    x = torch.rand(2, 1, height, width, generator=torch.Generator().manual_seed(0))
    total, high = sums(x, side), maxima(x, side)
    for i in range(side):
        for j in range(side):
            inside = [
                x[:, 0, y, z]
                for y in range(height)
                for z in range(width)
                if y * side // height == i and z * side // width == j
            ]
            torch.testing.assert_close(total[:, 0, i, j], torch.stack(inside).sum(0))
            assert torch.equal(high[:, 0, i, j], torch.stack(inside).amax(0))
    assert torch.equal(maxima(spread(high, x), side), high)


@pytest.mark.parametrize("side", [1, 2, 3])
def test_co_occurrence_counts_diagonal_neighbors_within_a_region(side: int) -> None:
    levels, height, width = 3, 5, 7
    encoding = torch.rand(1, levels, height, width, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(levels, levels, side, side)
    for y in range(height - 1):
        for z in range(width - 1):
            here = y * side // height, z * side // width
            if here == ((y + 1) * side // height, (z + 1) * side // width):
                pair = encoding[0, :, y, z][:, None] * encoding[0, :, y + 1, z + 1]
                expected[:, :, here[0], here[1]] += pair
    expected = expected / (expected.sum((0, 1)) + 1e-6)
    torch.testing.assert_close(co_occurrence(encoding, side)[0], expected)


def test_texture_is_quantized_in_float32_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(x: Tensor, levels: int, side: int) -> tuple[Tensor, Tensor]:
        steps, encoding = quantize(x, levels, side)
        seen.append({x.dtype, steps.dtype, encoding.dtype})
        return steps, encoding

    def spy_sums(x: Tensor, side: int) -> Tensor:
        counted.append({x.dtype, sums(x, side).dtype})
        return sums(x, side)

    counted: list[set[torch.dtype]] = []
    monkeypatch.setattr(stlnet, "quantize", spy)
    monkeypatch.setattr(stlnet, "sums", spy_sums)
    with torch.autocast("cpu", torch.bfloat16):
        make("stlnet")(maps())
    assert seen == [{torch.float32}] * 5  # the whole image and four scales of regions
    assert counted == [{torch.float32}] * 12  # of each scale: averages, pixels, co-occurrences
