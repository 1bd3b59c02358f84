"""The same random weights here and in the project they are named after give the same numbers.

Needs the ``parity`` extra; nothing is downloaded. Every model is filled at random, statistics of
BatchNorm too, carried over by :mod:`segkit.models.pretrained`, run on one image: equal means the
largest difference is below 1e-4 of the largest value.
"""

import importlib
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import load_state
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models

from segkit.core.errors import CheckpointError
from segkit.models.backbones import BACKBONES
from segkit.models.backbones.beit import beit, relative_offsets
from segkit.models.backbones.vit import PlainTransformer
from segkit.models.decoders import DECODERS
from segkit.models.pretrained import Report, load_file
from segkit.models.pretrained.reading import read_file
from segkit.models.pretrained.recognition import recognize
from segkit.models.segmenter import Segmenter, build_model

pytestmark = pytest.mark.parity
CLASSES = 5
NO_DECODER = nn.Identity()


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")


def fill(model: nn.Module) -> nn.Module:
    """Replace values that are initialized as zero or one by random ones; set eval mode."""
    generator = torch.Generator().manual_seed(0)
    for name, value in model.state_dict().items():
        if name.endswith("running_var") or (name.endswith("weight") and value.ndim == 1):
            value.uniform_(0.5, 1.5, generator=generator)
        elif name.endswith(("gamma", "layer_scale")):
            value.uniform_(0.1, 0.3, generator=generator)
        elif name.endswith(("running_mean", "bias", "bias_table")):
            value.normal_(0, 0.2, generator=generator)
    return model.eval()


def image(height: int, width: int) -> Tensor:
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(1))


def equal(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert theirs.std() > 1e-3 * theirs.abs().max()  # of a constant map everything is equal
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def whole(report: Report) -> None:
    """Nothing keeps its initial values; of the file only what no logits depend on is skipped."""
    assert not report.initialized
    assert "of a decoder" not in report.skipped.values()


def backbone(name: Any, theirs: nn.Module, **options: Any) -> Segmenter:
    """A backbone with the weights of a classifier."""
    model = Segmenter(BACKBONES[name](**options), NO_DECODER)
    load_state(model, theirs.state_dict(), source="theirs")
    return model.eval()


# ---- torchvision


@pytest.mark.parametrize("size", [(64, 96), (65, 97)])
@pytest.mark.parametrize("decoder", ["fcn", "deeplabv3"])
@torch.no_grad()
def test_torchvisions_segmentation_models(decoder: str, size: tuple[int, int]) -> None:
    build = getattr(models.segmentation, f"{decoder}_resnet50")
    theirs = fill(build(weights=None, weights_backbone=None, num_classes=CLASSES, aux_loss=True))
    encoder = {"name": "resnet50", "output_stride": 8}
    ours = build_model(encoder, decoder, num_classes=CLASSES)
    whole(load_state(ours, theirs.state_dict(), source="theirs"))
    equal(ours.eval()(image(*size))["out"], theirs(image(*size))["out"])


@torch.no_grad()
def test_the_backbone_of_torchvisions_mobile_segmentation_model() -> None:
    build = models.segmentation.deeplabv3_mobilenet_v3_large
    theirs = fill(build(weights=None, weights_backbone=None, num_classes=CLASSES))
    ours = backbone("mobilenet_v3_large", theirs, output_stride=16, contract_dilation=False)
    # theirs ends with a 1x1 convolution that is not ours
    features = ours.backbone(image(65, 97))
    equal(theirs.backbone["16"](features[-1]), theirs.backbone(image(65, 97))["out"])


@pytest.mark.parametrize("size", [(224, 224), (226, 262)])
@torch.no_grad()
def test_torchvisions_swin(size: tuple[int, int]) -> None:
    theirs = fill(models.swin_t(weights=None))
    ours = backbone("swin_t", theirs)
    height, width = (side // 4 * 4 for side in size)  # it drops the rest, we pad
    picture = image(height, width)
    deepest = theirs.features(picture).permute(0, 3, 1, 2)
    equal(ours.backbone(picture)[-1], normalized(deepest))


def normalized(feature: Tensor) -> Tensor:
    """Apply a newly initialized LayerNorm over the channels, as our Swin does at each stage."""
    return F.layer_norm(feature.permute(0, 2, 3, 1), feature.shape[1:2]).permute(0, 3, 1, 2)


# ---- segmentation_models.pytorch


@pytest.mark.parametrize(
    ("theirs_name", "encoder"),
    [
        ("efficientnet-b0", {"name": "efficientnet_b0", "like": "smp"}),
        ("efficientnet-b5", {"name": "efficientnet_b5", "like": "smp"}),
        ("resnet34", "resnet34"),
    ],
)
@torch.no_grad()
def test_smps_unetplusplus(theirs_name: str, encoder: Any) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    theirs = fill(smp.UnetPlusPlus(theirs_name, encoder_weights=None, classes=CLASSES))
    ours = build_model(encoder, "unetplusplus", num_classes=CLASSES)
    report = load_state(ours, theirs.state_dict(), source="theirs")
    whole(report)
    [note] = report.notes
    assert "decoder_interpolation is not told by the file" in note
    ours.eval()
    for size in ((64, 96), (160, 64)):
        equal(ours(image(*size))["out"], theirs(image(*size)))


@torch.no_grad()
def test_smps_unetplusplus_without_tensorflows_padding_differs_and_the_report_says_so() -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    theirs = fill(smp.UnetPlusPlus("efficientnet-b0", encoder_weights=None, classes=CLASSES))
    ours = build_model("efficientnet_b0", "unetplusplus", num_classes=CLASSES)
    report = load_state(ours, theirs.state_dict(), source="theirs")
    assert report.notes[0] == "made with backbone.like 'smp', this model has 'torchvision'"
    difference = ours.eval()(image(64, 96))["out"] - theirs(image(64, 96))
    assert difference.abs().max() > 1e-2


@pytest.mark.parametrize(
    ("theirs_name", "encoder"),
    [
        ("mit_b0", "mit_b0"),  # by NVIDIA's names
        ("timm-efficientnet-b0", {"name": "efficientnet_b0", "like": "timm"}),
        ("timm-tf_efficientnet_lite0", {"name": "efficientnet_lite0", "like": "timm"}),
    ],
)
@torch.no_grad()
def test_smps_other_encoders(theirs_name: str, encoder: Any) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    theirs = fill(smp.Unet(theirs_name, encoder_weights=None, classes=CLASSES))
    ours = build_model(encoder, "fcn", num_classes=CLASSES).eval()
    report = load_state(ours, theirs.state_dict(), source="theirs")
    assert all(name.startswith("decoder.") for name in report.initialized)
    features = zip(
        ours.backbone(image(64, 96))[-4:], theirs.encoder(image(64, 96))[-4:], strict=True
    )
    for mine, other in features:
        equal(mine, other)


@pytest.mark.parametrize("output_stride", [16, 8])
@pytest.mark.parametrize("name", ["resnet50", "se_resnet50", "efficientnet-b0"])
@torch.no_grad()
def test_smps_deeplabv3plus(name: str, output_stride: int) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    theirs = fill(
        smp.DeepLabV3Plus(
            name, encoder_weights=None, classes=CLASSES, encoder_output_stride=output_stride
        )
    )
    encoder: Any = {"name": name.replace("-", "_"), "output_stride": output_stride}
    if name != "se_resnet50":  # its stride is in a 1x1 convolution, which has no dilation
        encoder["contract_dilation"] = False
    if name == "efficientnet-b0":
        encoder["like"] = "smp"
    ours = build_model(encoder, "deeplabv3plus", num_classes=CLASSES)
    whole(load_state(ours, theirs.state_dict(), source="theirs"))
    equal(ours.eval()(image(96, 64))["out"], theirs(image(96, 64)))


# ---- Hugging Face transformers


@pytest.mark.parametrize(
    ("name", "width", "depths", "heads", "hidden", "size"),
    [
        ("swin_t", 96, (2, 2, 6, 2), (3, 6, 12, 24), 512, (232, 232)),
        ("swin_t", 96, (2, 2, 6, 2), (3, 6, 12, 24), 32, (229, 262)),
        ("swin_b", 128, (2, 2, 18, 2), (4, 8, 16, 32), 32, (256, 288)),
    ],
)
@torch.no_grad()
def test_transformers_upernet_on_swin(
    name: str,
    width: int,
    depths: tuple[int, ...],
    heads: tuple[int, ...],
    hidden: int,
    size: tuple[int, int],
    tmp_path: Path,
) -> None:
    transformers = pytest.importorskip("transformers")
    swin = transformers.SwinConfig(
        embed_dim=width,
        depths=list(depths),
        num_heads=list(heads),
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    about = transformers.UperNetConfig(
        backbone_config=swin,
        hidden_size=hidden,
        auxiliary_in_channels=4 * width,
        num_labels=CLASSES,
    )
    theirs = fill(transformers.UperNetForSemanticSegmentation(about))
    theirs.save_pretrained(tmp_path)
    decoder = {"name": "upernet", "width": hidden}
    ours = build_model(name, decoder, num_classes=CLASSES).eval()
    for report in (
        load_state(ours, theirs.state_dict(), source="theirs"),
        load_file(ours, tmp_path / "model.safetensors"),
    ):
        whole(report)
    equal(ours(image(*size))["out"], theirs(image(*size)).logits)


MASK2FORMER = {"width": 64, "queries": 7, "layers": 4, "heads": 4, "feedforward": 40}
"""A small Mask2Former; its GroupNorm has 32 groups, as that of the published ones."""


def transformers_mask2former(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    module = pytest.importorskip("transformers.models.mask2former.modeling_mask2former")
    # Its loss is built with each model, needs scipy, and is not called here.
    monkeypatch.setattr(module, "requires_backends", lambda *_: None)
    swin = transformers.SwinConfig(
        embed_dim=96,
        depths=[2, 2, 6, 2],
        num_heads=[3, 6, 12, 24],
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    about = transformers.Mask2FormerConfig(
        backbone_config=swin,
        feature_size=64,
        mask_feature_size=64,
        hidden_dim=64,
        encoder_layers=2,
        encoder_feedforward_dim=48,
        decoder_layers=5,
        dim_feedforward=40,
        num_attention_heads=4,
        num_queries=7,
        num_labels=CLASSES,
    )
    return fill(transformers.Mask2FormerForUniversalSegmentation(about))


def test_a_mask2former_of_other_classes_loads_all_but_its_class_head(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = transformers_mask2former(monkeypatch).state_dict()
    names = {name.removeprefix("model."): value for name, value in state.items()}
    weights = recognize(names, source="theirs")
    assert (weights.decoder, weights.classes) == ("mask2former", CLASSES)
    decoder = {"name": "mask2former", "pixel_layers": 2, "pixel_feedforward": 48, **MASK2FORMER}
    report = load_state(build_model("swin_t", decoder, num_classes=3), state, source="theirs")
    assert set(report.initialized) == {"decoder.class_head.weight", "decoder.class_head.bias"}
    light = {**decoder, "pixel_decoder": "fpn"}
    report = load_state(build_model("swin_t", light, num_classes=3), state, source="theirs")
    assert all(name.startswith("backbone.") for name in report.loaded)


@pytest.mark.parametrize("size", [(232, 232), (229, 262)])
@torch.no_grad()
def test_transformers_mask2former(
    size: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = transformers_mask2former(monkeypatch)
    theirs.save_pretrained(tmp_path)
    decoder = {"name": "mask2former", "pixel_layers": 2, "pixel_feedforward": 48, **MASK2FORMER}
    ours = build_model("swin_t", decoder, num_classes=CLASSES).eval()
    for report in (
        load_state(ours, theirs.state_dict(), source="theirs"),
        load_file(ours, tmp_path / "model.safetensors"),
    ):
        whole(report)
    x = image(*size)
    inner = theirs.model(x, output_hidden_states=True)
    masks = inner.masks_queries_logits
    states = inner.transformer_decoder_intermediate_states
    classes = [theirs.class_predictor(y.transpose(0, 1)) for y in states]
    ours.decoder.train()
    trained = ours(x)
    equal(trained["query_masks"], torch.stack(masks))
    equal(trained["query_classes"], torch.stack(classes))
    ours.eval()
    shares = torch.einsum("bqc,bqhw->bchw", classes[-1].softmax(2)[..., :-1], masks[-1].sigmoid())
    equal(ours.decoder(ours.backbone(x))["out"].exp(), shares)
    equal(ours(x)["out"], F.interpolate(shares.log(), size, mode="bilinear"))


def nvidia_segformer(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a transformers' SegFormer, on disk, by NVIDIA's names."""
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        for theirs, nvidia in (
            (
                r"segformer\.encoder\.patch_embeddings\.(\d)\.proj",
                lambda m: f"backbone.patch_embed{int(m[1]) + 1}.proj",
            ),
            (
                r"segformer\.encoder\.patch_embeddings\.(\d)\.layer_norm",
                lambda m: f"backbone.patch_embed{int(m[1]) + 1}.norm",
            ),
            (r"segformer\.encoder\.block\.(\d)", lambda m: f"backbone.block{int(m[1]) + 1}"),
            (r"segformer\.encoder\.layer_norm\.(\d)", lambda m: f"backbone.norm{int(m[1]) + 1}"),
            (r"layer_norm_([12])", r"norm\1"),
            (r"attention\.self\.query", "attn.q"),
            (r"attention\.self\.key", "attn.kv"),
            (r"attention\.self\.sr", "attn.sr"),
            (r"attention\.self\.layer_norm", "attn.norm"),
            (r"attention\.output\.dense", "attn.proj"),
            (r"mlp\.dense", "mlp.fc"),
            (r"linear_c\.(\d)", lambda m: f"linear_c{int(m[1]) + 1}"),
            (r"linear_fuse\.", "linear_fuse.conv."),
            (r"batch_norm", "linear_fuse.bn"),
            (r"head\.classifier", "head.linear_pred"),
        ):
            name = re.sub(theirs, nvidia, name)
        if "attn.kv" in name:
            value = torch.cat([value, state[name_of_value(name)]])
        if "self.value" not in name:
            renamed[name] = value
    return renamed | {"decode_head.conv_seg.weight": torch.zeros(CLASSES, 32, 1, 1)}


def name_of_value(name: str) -> str:
    """Return the name in transformers of the values whose keys have this name of NVIDIA."""
    stage, rest = name.removeprefix("backbone.block").split(".", 1)
    rest = rest.replace("attn.kv", "attention.self.value")
    return f"segformer.encoder.block.{int(stage) - 1}.{rest}"


@pytest.mark.parametrize("size", [(64, 96), (65, 97)])
@torch.no_grad()
def test_segformer(size: tuple[int, int], tmp_path: Path) -> None:
    """In memory and on disk, by NVIDIA's names, the encoder alone, and a classifier."""
    transformers = pytest.importorskip("transformers")
    about = transformers.SegformerConfig(
        depths=[2, 2, 2, 2],
        hidden_sizes=[32, 64, 160, 256],
        num_attention_heads=[1, 2, 5, 8],
        decoder_hidden_size=32,
        num_labels=CLASSES,
    )
    theirs = fill(transformers.SegformerForSemanticSegmentation(about))
    theirs.save_pretrained(tmp_path)
    expected = F.interpolate(theirs(image(*size)).logits, size, mode="bilinear")
    saved = read_file(tmp_path / "model.safetensors")
    for state in (theirs.state_dict(), saved, nvidia_segformer(saved)):
        ours = build_model("mit_b0", {"name": "segformer", "width": 32}, num_classes=CLASSES)
        whole(load_state(ours, state, source="theirs"))
        equal(ours.eval()(image(*size))["out"], expected)
    deepest = theirs.segformer(image(*size)).last_hidden_state
    nvidia = nvidia_segformer(saved)
    trunks = [{k.removeprefix("backbone."): v for k, v in nvidia.items() if "decode" not in k}]
    for prefix in ("", "segformer."):
        trunk = theirs.segformer.state_dict()
        trunks.append({prefix + key: value for key, value in trunk.items()})
    for state in trunks:
        ours = Segmenter(BACKBONES["mit_b0"](), NO_DECODER).eval()
        whole(load_state(ours, state | {"head.weight": torch.zeros(2, 256)}, source="theirs"))
        equal(ours.backbone(image(*size))[-1], deepest)


def beit_config(**options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.BeitConfig(
        hidden_size=32,
        num_hidden_layers=12,
        num_attention_heads=2,
        intermediate_size=128,
        use_relative_position_bias=True,
        image_size=64,
        num_labels=CLASSES,
        **options,
    )


def small_beit(window: int = 4) -> PlainTransformer:
    return beit(width=32, depth=12, heads=2, window=window)


def fill_scales(model: nn.Module) -> nn.Module:
    for name, value in fill(model).named_parameters():
        if "lambda_" in name or "gamma_" in name:
            value.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(3))
        elif name.endswith(("cls_token", "bias_table")):
            value.normal_(0, 0.5, generator=torch.Generator().manual_seed(4))
    return model


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (160, 64)])
@torch.no_grad()
def test_transformers_beit(size: tuple[int, int], tmp_path: Path) -> None:
    """With UPerNet, by its names in memory and on disk, and as a classifier."""
    transformers = pytest.importorskip("transformers")
    # Its indices count from the patch embedding, 1: these are the outputs of blocks 4, 6, 8 and 12.
    about = beit_config(out_indices=[3, 5, 7, 11])
    theirs = fill_scales(transformers.BeitForSemanticSegmentation(about))
    theirs.save_pretrained(tmp_path)
    theirs.config._out_indices = [5, 7, 9, 13]  # the setter refuses the last block
    expected = F.interpolate(theirs(image(*size)).logits, size, mode="bilinear")
    for state in (theirs.state_dict(), read_file(tmp_path / "model.safetensors")):
        beit = small_beit()
        decoder = DECODERS["upernet"](
            channels=beit.channels, strides=beit.strides, num_classes=CLASSES, width=32
        )
        ours = Segmenter(beit, decoder)
        report = load_state(ours, state, source="theirs")
        whole(report)
        assert "from blocks 2, 4, 6 and 10" in report.notes[0]
        equal(ours.eval()(image(*size))["out"], expected)


@torch.no_grad()
def test_timms_beit() -> None:
    timm = pytest.importorskip("timm")
    small = {"img_size": 64, "embed_dim": 32, "num_heads": 2}
    theirs = fill_scales(timm.create_model("beit_base_patch16_224", pretrained=False, **small))
    ours = Segmenter(small_beit(), NO_DECODER).eval()
    report = load_state(ours, theirs.state_dict(), source="theirs")
    assert all(name.startswith("backbone.neck.") for name in report.initialized)
    x = ours.backbone.patch_embed(image(64, 64)).flatten(2).transpose(1, 2)
    x = torch.cat([ours.backbone.cls_token, x], 1)
    grid = relative_offsets(4, 4, x)
    for block in ours.backbone.blocks:
        x = block(x, grid)
    theirs.norm = nn.Identity()
    equal(x, theirs.forward_features(image(64, 64)))


def authors_convnext(name: str) -> str:
    """The name that an entry of a transformers' ConvNeXt has in its authors' segmentation code."""
    for theirs, authors in (
        (r"^convnextv2\.", "backbone."),
        (r"backbone\.embeddings\.patch_embeddings", "backbone.downsample_layers.0.0"),
        (r"backbone\.embeddings\.layernorm", "backbone.downsample_layers.0.1"),
        (r"encoder\.stages\.(\d)\.downsampling_layer", r"downsample_layers.\1"),
        (r"encoder\.stages\.(\d)\.layers\.(\d+)", r"stages.\1.\2"),
        ("layer_scale_parameter", "gamma"),
        (r"(stages\.\d\.\d+)\.layernorm", r"\1.norm"),
        (r"hidden_states_norms\.stage(\d)", lambda match: f"norm{int(match[1]) - 1}"),
        (r"grn\.weight", "grn.gamma"),
        (r"grn\.bias", "grn.beta"),
        ("batch_norm", "bn"),
        (r"head\.classifier", "head.conv_seg"),
    ):
        name = re.sub(theirs, authors, name)
    return name


def openmmlab_convnext(name: str) -> str:
    """The same in mmsegmentation."""
    name = re.sub(r"\.pwconv([12])\.", r".pointwise_conv\1.", authors_convnext(name))
    return name.replace(".dwconv.", ".depthwise_conv.")


@pytest.mark.parametrize("size", [(64, 96), (96, 160)])
@torch.no_grad()
def test_upernet_on_convnext(size: tuple[int, int]) -> None:
    """By the names of transformers, the authors and mmsegmentation, and as none without norms."""
    transformers = pytest.importorskip("transformers")
    convnext = transformers.ConvNextConfig(
        hidden_sizes=[96, 192, 384, 768],
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    about = transformers.UperNetConfig(
        backbone_config=convnext, hidden_size=32, auxiliary_in_channels=384, num_labels=CLASSES
    )
    theirs = fill(transformers.UperNetForSemanticSegmentation(about))
    expected = theirs(image(*size)).logits
    state = theirs.state_dict()
    decoder = {"name": "upernet", "width": 32}
    encoder = {"name": "convnext_tiny", "output_norms": True}
    for name in (str, authors_convnext, openmmlab_convnext):
        renamed = {name(key): value for key, value in state.items()}
        assert name is str or not renamed.keys() & {k for k in state if "norms" in k}
        ours = build_model(encoder, decoder, num_classes=CLASSES).eval()
        whole(load_state(ours, renamed, source="theirs"))
        equal(ours(image(*size))["out"], expected)
        bare = build_model("convnext_tiny", decoder, num_classes=CLASSES)
        with pytest.raises(CheckpointError, match="give the backbone output_norms: true"):
            load_state(bare, renamed, source="theirs")


@torch.no_grad()
def test_transformers_convnext_v2() -> None:
    """By its names and by those of its authors, with a head of 22k classes."""
    transformers = pytest.importorskip("transformers")
    about = transformers.ConvNextV2Config(
        hidden_sizes=[40, 80, 160, 320], depths=[2, 2, 6, 2], num_labels=21841
    )
    theirs = fill(transformers.ConvNextV2ForImageClassification(about))
    for name, value in theirs.named_parameters():
        if name.endswith("grn.weight"):  # (1, 1, 1, C) zeros
            value.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(2))
    state = theirs.state_dict()
    authors = {authors_convnext(k).removeprefix("backbone."): v for k, v in state.items()}
    head = {"norm": "layernorm", "head": "classifier"}
    for ours, other in head.items():
        for kind in ("weight", "bias"):
            authors[f"{ours}.{kind}"] = authors.pop(f"{other}.{kind}")
    for entries in (state, authors):
        model = Segmenter(BACKBONES["convnext_v2_atto"](), NO_DECODER).eval()
        whole(load_state(model, entries, source="theirs"))
        for size in ((64, 96), (65, 97)):
            expected = theirs.convnextv2(image(*size)).last_hidden_state
            equal(model.backbone(image(*size))[-1], expected)


@pytest.mark.parametrize("width", [224, 288])
@torch.no_grad()
def test_transformers_swin_shifts_even_where_a_window_covers_a_side_of_a_map(width: int) -> None:
    """7 x 7 and 7 x 9 in the deepest stage, window 7: we do not shift a side of 7."""
    transformers = pytest.importorskip("transformers")
    about = transformers.SwinConfig(out_features=["stage1", "stage2", "stage3", "stage4"])
    theirs = fill(transformers.SwinBackbone(about))
    ours = backbone("swin_t", theirs)
    picture = image(224, width)
    *others, deepest = zip(ours.backbone(picture), theirs(picture).feature_maps, strict=True)
    for mine, other in others:
        equal(mine, other)
    mine, other = deepest
    assert (mine - other).abs().max() > 1e-2


# ---- timm


@pytest.mark.parametrize(
    ("theirs_name", "name", "options"),
    [
        ("resnet50", "resnet50", {}),
        ("resnet50c", "resnet50_v1c", {}),
        ("legacy_seresnet50", "se_resnet50", {}),
        ("efficientnet_b0", "efficientnet_b0", {"like": "timm"}),
        ("efficientnet_b5", "efficientnet_b5", {"like": "timm"}),
        ("tf_efficientnet_b5", "efficientnet_b5", {"like": "tensorflow"}),
        ("efficientnet_lite0", "efficientnet_lite0", {"like": "timm"}),
        ("tf_efficientnet_lite2", "efficientnet_lite2", {"like": "tensorflow"}),
        ("convnext_tiny", "convnext_tiny", {}),
        ("convnextv2_atto", "convnext_v2_atto", {}),
        ("hrnet_w18", "hrnet_w18", {"upsampling": "nearest"}),
    ],
)
@torch.no_grad()
def test_timms_convolutional_backbones(theirs_name: str, name: str, options: Any) -> None:
    timm = pytest.importorskip("timm")
    theirs = fill(timm.create_model(theirs_name, pretrained=False))
    ours = backbone(name, theirs, **options)
    odd = name != "hrnet_w18" and options.get("like") != "tensorflow"
    for size in ((64, 96), (65, 97)) if odd else ((64, 96),):
        picture = image(*size)
        deepest = ours.backbone(picture)
        if name == "hrnet_w18":
            x = theirs.act1(theirs.bn1(theirs.conv1(picture)))
            x = theirs.act2(theirs.bn2(theirs.conv2(x)))
            for mine, other in zip(deepest, theirs.stages(x), strict=True):
                equal(mine, other)
            continue
        whole_net = theirs.forward_features(picture)
        if name.startswith("efficientnet"):
            mine = theirs.bn2(theirs.conv_head(deepest[-1]))
            equal(mine, whole_net)
        else:
            equal(deepest[-1], whole_net)


@torch.no_grad()
def test_timms_swin() -> None:
    timm = pytest.importorskip("timm")
    theirs = fill(timm.create_model("swin_tiny_patch4_window7_224", pretrained=False))
    ours = backbone("swin_t", theirs)
    x = theirs.patch_embed(image(224, 224))
    for layer, mine in zip(theirs.layers, ours.backbone(image(224, 224)), strict=True):
        x = layer(x)
        equal(mine, normalized(x.permute(0, 3, 1, 2)))


@torch.no_grad()
def test_timms_swin_fills_maps_up_to_whole_windows_after_it_shifted_them() -> None:
    timm = pytest.importorskip("timm")
    name = "swin_tiny_patch4_window7_224"
    theirs = fill(timm.create_model(name, pretrained=False, img_size=256))
    ours = backbone("swin_t", theirs)
    x = theirs.layers[0](theirs.patch_embed(image(256, 256)))  # 64 x 64, not whole windows of 7
    difference = ours.backbone(image(256, 256))[0] - normalized(x.permute(0, 3, 1, 2))
    assert difference.abs().max() > 1e-2


@pytest.mark.parametrize("output_stride", [32, 16])
@torch.no_grad()
def test_smps_deeplabv3plus_at_another_stride_differs_and_the_report_says_so(
    output_stride: int,
) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    theirs = fill(smp.DeepLabV3Plus("resnet34", encoder_weights=None, classes=CLASSES))
    encoder = {"name": "resnet34", "output_stride": output_stride, "contract_dilation": False}
    ours = build_model(encoder, "deeplabv3plus", num_classes=CLASSES)
    report = load_state(ours, theirs.state_dict(), source="theirs")
    told = f"the file does not tell backbone.output_stride, {output_stride} in this model"
    assert report.notes[0].startswith(told)
    expected = theirs(image(96, 64))
    difference = (ours.eval()(image(96, 64))["out"] - expected).abs().max() / expected.abs().max()
    assert difference < 1e-4 if output_stride == 16 else difference > 0.1


# ---- Vision Transformers


def dino(kind: str, **options: Any) -> nn.Module:
    """A model of transformers as small as ViT-S allows, with random values everywhere."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=384, num_attention_heads=6, num_hidden_layers=12, **options
    )
    model = fill(getattr(transformers, f"{kind}Model")(config))
    generator = torch.Generator().manual_seed(2)
    for name, value in model.state_dict().items():
        if name.endswith(("lambda1", "_tokens", "cls_token", "position_embeddings")):
            value.normal_(0.2, 0.1, generator=generator)
    return model


@pytest.mark.parametrize(
    ("kind", "name", "options", "size"),
    [
        ("Dinov2", "vit_s_dinov2", {"patch_size": 14, "image_size": 518}, (518, 518)),
        ("Dinov2", "vit_s_dinov2", {"patch_size": 14, "image_size": 518}, (70, 98)),
        (
            "Dinov2WithRegisters",
            "vit_s_dinov2_reg",
            {"patch_size": 14, "image_size": 518, "num_register_tokens": 4},
            (518, 518),
        ),
        ("DINOv3ViT", "vit_s_dinov3", {"num_register_tokens": 4}, (64, 96)),
        (
            "DINOv3ViT",
            "vit_s_plus_dinov3",
            {"num_register_tokens": 4, "use_gated_mlp": True, "hidden_act": "silu"},
            (64, 96),
        ),
    ],
)
@torch.no_grad()
def test_transformers_dino(kind: str, name: str, options: Any, size: tuple[int, int]) -> None:
    theirs = dino(kind, **options)
    model = backbone(name, theirs, output="map")
    registers = options.get("num_register_tokens", 0)
    tokens = theirs(image(*size)).last_hidden_state[:, 1 + registers :]
    (feature,) = model.backbone(image(*size))
    equal(feature.flatten(2).transpose(1, 2), tokens)


@pytest.mark.parametrize("registers", [False, True])
@torch.no_grad()
def test_timms_dinov2(registers: bool) -> None:
    timm = pytest.importorskip("timm")
    theirs = fill(timm.create_model(f"vit_small_patch14_{'reg4_' * registers}dinov2"))
    theirs.cls_token.normal_()
    model = backbone(f"vit_s_dinov2{'_reg' * registers}", theirs, output="map")
    tokens = theirs.forward_features(image(518, 518))[:, 5 if registers else 1 :]
    (feature,) = model.backbone(image(518, 518))
    equal(feature.flatten(2).transpose(1, 2), tokens)


@pytest.mark.parametrize(
    ("theirs_name", "name"),
    [
        ("vit_small_patch16_dinov3", "vit_s_dinov3"),
        ("vit_small_patch16_dinov3_qkvb", "vit_s_dinov3"),
        ("vit_small_plus_patch16_dinov3", "vit_s_plus_dinov3"),
    ],
)
@torch.no_grad()
def test_timms_dinov3(theirs_name: str, name: str) -> None:
    timm = pytest.importorskip("timm")
    theirs = fill(timm.create_model(theirs_name))
    for parameter, value in theirs.state_dict().items():
        if parameter.endswith(("token", "gamma_1", "gamma_2")):
            value.normal_(0.2, 0.1, generator=torch.Generator().manual_seed(2))
    model = backbone(name, theirs, output="map")
    tokens = theirs.forward_features(image(64, 96))[:, 5:]
    (feature,) = model.backbone(image(64, 96))
    equal(feature.flatten(2).transpose(1, 2), tokens)


def eomt(annealing: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Segmenter, nn.Module]:
    """A model of transformers, and here with its weights."""
    transformers = pytest.importorskip("transformers")
    modeling = importlib.import_module("transformers.models.eomt.modeling_eomt")
    monkeypatch.setattr(modeling, "requires_backends", lambda *_: None)  # scipy, for its loss
    theirs = fill(
        transformers.EomtForUniversalSegmentation(
            transformers.EomtConfig(
                hidden_size=384, num_attention_heads=6, num_hidden_layers=12, image_size=96,
                patch_size=16, num_register_tokens=4, num_blocks=4, num_queries=7,
                num_labels=CLASSES,
            )
        )
    )  # fmt: skip
    theirs.embeddings.register_tokens.normal_()
    vit = {"name": "vit_s_dinov2_reg", "patch": 16, "positions": 6}
    model = build_model(
        {**vit, "output": "tokens", "omitted_blocks": 4},
        {"name": "eomt", "queries": 7, "annealing": annealing},
        num_classes=CLASSES,
    )
    report = load_state(model, theirs.state_dict(), source="theirs")
    assert set(report.initialized) == {"decoder.forward_passes"}
    return model.eval(), theirs


@pytest.mark.parametrize("masked", [True, False])
@torch.no_grad()
def test_transformers_eomt(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, theirs = eomt(1000 * masked, monkeypatch)
    theirs.attn_mask_probs.fill_(masked)
    result = theirs(image(96, 96))
    shares = result.class_queries_logits.softmax(2)[..., :-1]
    expected = torch.einsum("bqc,bqhw->bchw", shares, result.masks_queries_logits.sigmoid())
    out = model.decoder(model.backbone(image(96, 96)))["out"]
    equal(out.softmax(1), expected / expected.sum(1, keepdim=True))


@torch.no_grad()
def test_a_vit_is_divided_between_backbone_and_eomt() -> None:
    theirs = dino("Dinov2", patch_size=14, image_size=84)
    vit = {"name": "vit_s_dinov2", "positions": 6}
    whole = backbone("vit_s_dinov2", theirs, positions=6, output="map")
    model = build_model(
        {**vit, "output": "tokens", "omitted_blocks": 3}, {"name": "eomt", "blocks": 3},
        num_classes=CLASSES,
    )  # fmt: skip
    report = load_state(model, theirs.state_dict(), source="theirs")
    assert not any(".blocks." in name or "norm" in name for name in report.initialized)
    for i, block in enumerate(model.decoder.blocks):
        for name, value in block.state_dict().items():
            assert torch.equal(value, whole.backbone.blocks[9 + i].state_dict()[name])
