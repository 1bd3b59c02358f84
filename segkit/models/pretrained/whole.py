"""Whole models: a decoder by its project's names, and where its backbone stands beside it."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from segkit.models.pretrained.naming import Naming, Rule


@dataclass(frozen=True)
class Whole:
    """A project's names for a whole model.

    Args:
        decoder: The names of its decoder, with ``decoder.`` before ours; ``builds`` is the one
            decoder it is, or empty where segkit has none of the same structure.
        backbone: What stands before the backbone's names.
        instead: Why there is no such decoder here.
    """

    decoder: Naming
    backbone: str
    instead: str = ""


def _part(prefix: str) -> Callable[[re.Match[str]], str]:
    """A convolution or its BatchNorm, in the pattern's last two groups, as places 0 and 1."""

    def becomes(match: re.Match[str]) -> str:
        *_, part, value = match.groups()
        return f"decoder.{match.expand(prefix)}.{0 if part == 'conv' else 1}.{value}"

    return becomes


# ---- mmsegmentation, and transformers, which spells out batch_norm and classifier

_CONV = r"(conv|bn|batch_norm)\.(\w+)"
_PYRAMID: tuple[Rule, ...] = (
    (rf"decode_head\.psp_modules\.(\d)\.1\.{_CONV}", _part(r"pool.branches.\1")),
    (rf"decode_head\.bottleneck\.{_CONV}", _part("pool.fuse")),
    (rf"decode_head\.lateral_convs\.(\d)\.{_CONV}", _part(r"laterals.\1")),
    (rf"decode_head\.fpn_convs\.(\d)\.{_CONV}", _part(r"smooth.\1")),
    (rf"decode_head\.fpn_bottleneck\.{_CONV}", _part("fuse")),
    (r"decode_head\.(?:conv_seg|classifier)\.(\w+)", r"decoder.classifier.\1"),
    (rf"auxiliary_head\.convs\.0\.{_CONV}", _part("aux")),
    (r"auxiliary_head\.(?:conv_seg|classifier)\.(\w+)", r"decoder.aux.4.\1"),
)
_FCN: tuple[Rule, ...] = (
    (rf"decode_head\.convs\.([01])\.{_CONV}", _part(r"convs.\1")),
    (rf"decode_head\.conv_cat\.{_CONV}", _part("classifier")),
    (r"decode_head\.conv_seg\.(\w+)", r"decoder.classifier.4.\1"),
    (rf"auxiliary_head\.convs\.0\.{_CONV}", _part("aux_classifier")),
    (r"auxiliary_head\.conv_seg\.(\w+)", r"decoder.aux_classifier.4.\1"),
)


def _separable(pattern: str, prefix: str) -> tuple[Rule, ...]:
    """A depthwise and a pointwise convolution, each with its BatchNorm."""
    return (
        (rf"{pattern}\.depthwise_conv\.{_CONV}", _part(rf"{prefix}.0")),
        (rf"{pattern}\.pointwise_conv\.conv\.(\w+)", rf"decoder.{prefix}.0.3.\2"),
        (rf"{pattern}\.pointwise_conv\.bn\.(\w+)", rf"decoder.{prefix}.1.\2"),
    )


_DEEPLAB: tuple[Rule, ...] = (
    (rf"decode_head\.image_pool\.1\.{_CONV}", _part("aspp.average")),
    (rf"decode_head\.aspp_modules\.(\d)\.{_CONV}", _part(r"aspp.branches.\1")),
    *_separable(r"decode_head\.aspp_modules\.(\d)", r"aspp.branches.\1"),
    (rf"decode_head\.bottleneck\.{_CONV}", _part("aspp.project")),
    (rf"decode_head\.c1_bottleneck\.{_CONV}", _part("low")),
    *_separable(r"decode_head\.sep_bottleneck\.([01])", r"fuse.\1"),
    (r"decode_head\.conv_seg\.(\w+)", r"decoder.classifier.\1"),
    (rf"auxiliary_head\.convs\.0\.{_CONV}", _part("aux")),
    (r"auxiliary_head\.conv_seg\.(\w+)", r"decoder.aux.4.\1"),
)


def average_last(name: str, tensor: Tensor) -> Tensor:
    """The convolution that joins a pyramid's branches, whose first is mmsegmentation's average.

    Here, as in torchvision and segmentation_models.pytorch, the average is the last.

    Shape:
        tensor: (width, 5 width, 3, 3)
    """
    if name != "decoder.aspp.project.0.weight":
        return tensor
    return tensor.roll(-(tensor.shape[1] // 5), 1)


_ATTENTION = r"decode_head\.1\.object_context_block"
_OCR_OPENMMLAB: tuple[Rule, ...] = (
    (rf"decode_head\.0\.convs\.0\.{_CONV}", _part("regions.0")),
    (r"decode_head\.0\.conv_seg\.(\w+)", r"decoder.regions.1.\1"),
    (rf"decode_head\.1\.bottleneck\.{_CONV}", _part("pixels")),
    (rf"{_ATTENTION}\.(query|key)_project\.([01])\.{_CONV}", _part(r"\1.\2")),
    (rf"{_ATTENTION}\.value_project\.{_CONV}", _part("value")),
    (rf"{_ATTENTION}\.out_project\.{_CONV}", _part("context")),
    (rf"{_ATTENTION}\.bottleneck\.{_CONV}", _part("fuse")),
    (r"decode_head\.1\.conv_seg\.(\w+)", r"decoder.classifier.\1"),
)


_OPENMMLAB = {
    "backbone.contract_dilation": True,
    "backbone.align_corners": False,
    "backbone.upsampling": "bilinear_by_factor",
}
_BINS = {"decoder.bins": (1, 2, 3, 6)}
_CORNERS = "mmsegmentation's models for images of 769 x 769 have True, its others False"
_STRIDE = "mmsegmentation's d8 models have 8, d16 16, d32 32"
# ---- the authors' HRNet-OCR

_DISTRIBUTION = r"ocr_distri_head\.object_context_block"
_TWICE = {"f_pixel": "query", "f_object": "key"}
_ONCE = {"f_down": "value", "f_up": "context"}
_PLACES = {"0": "0.0", "1.0": "0.1", "2": "1.0", "3.0": "1.1"}
_OCR_AUTHORS: tuple[Rule, ...] = (
    (r"(?:aux_head|last_layer)\.([01])\.(\w+)", r"decoder.regions.0.\1.\2"),
    (r"(?:aux_head|last_layer)\.3\.(\w+)", r"decoder.regions.1.\1"),
    (r"conv3x3_ocr\.([01])(?:\.0)?\.(\w+)", r"decoder.pixels.\1.\2"),
    (
        rf"{_DISTRIBUTION}\.(f_pixel|f_object)\.(0|1\.0|2|3\.0)\.(\w+)",
        lambda match: f"decoder.{_TWICE[match[1]]}.{_PLACES[match[2]]}.{match[3]}",
    ),
    (
        rf"{_DISTRIBUTION}\.(f_down|f_up)\.([01])(?:\.0)?\.(\w+)",
        lambda match: f"decoder.{_ONCE[match[1]]}.{match[2]}.{match[3]}",
    ),
    (r"ocr_distri_head\.conv_bn_dropout\.([01])(?:\.0)?\.(\w+)", r"decoder.fuse.\1.\2"),
    (r"cls_head\.(\w+)", r"decoder.classifier.\1"),
)

# ---- torchvision

_HEADS: tuple[Rule, ...] = (
    (r"classifier\.([014])\.(\w+)", r"decoder.classifier.\1.\2"),
    (r"aux_classifier\.([014])\.(\w+)", r"decoder.aux_classifier.\1.\2"),
)
_ATROUS: tuple[Rule, ...] = (
    (r"classifier\.0\.convs\.([0-3])\.([01])\.(\w+)", r"decoder.aspp.branches.\1.\2.\3"),
    (r"classifier\.0\.convs\.4\.1\.(\w+)", r"decoder.aspp.average.0.\1"),
    (r"classifier\.0\.convs\.4\.2\.(\w+)", r"decoder.aspp.average.1.\1"),
    (r"classifier\.0\.project\.([01])\.(\w+)", r"decoder.aspp.project.\1.\2"),
    (r"classifier\.1\.(\w+)", r"decoder.classifier.0.\1"),
    (r"classifier\.2\.(\w+)", r"decoder.classifier.1.\1"),
    (r"classifier\.4\.(\w+)", r"decoder.classifier.4.\1"),
    (r"aux_classifier\.([014])\.(\w+)", r"decoder.aux.\1.\2"),
)

_TORCHVISION = {"backbone.output_stride": 8, "backbone.contract_dilation": True}

# ---- segmentation_models.pytorch

_NESTED: tuple[Rule, ...] = (
    (r"decoder\.(blocks\.x_\d_\d\.conv[12]\.[01]\.\w+)", r"decoder.\1"),
    (r"segmentation_head\.0\.(\w+)", r"decoder.classifier.\1"),
)
_SEPARABLE: tuple[Rule, ...] = (
    (r"decoder\.aspp\.0\.convs\.([0-3]\.[\w.]+)", r"decoder.aspp.branches.\1"),
    (r"decoder\.aspp\.0\.convs\.4\.1\.(\w+)", r"decoder.aspp.average.0.\1"),
    (r"decoder\.aspp\.0\.convs\.4\.2\.(\w+)", r"decoder.aspp.average.1.\1"),
    (r"decoder\.aspp\.0\.project\.([01])\.(\w+)", r"decoder.aspp.project.\1.\2"),
    (r"decoder\.aspp\.1\.([01])\.(\w+)", r"decoder.smooth.0.\1.\2"),
    (r"decoder\.aspp\.2\.(\w+)", r"decoder.smooth.1.\1"),
    (r"decoder\.block1\.([01])\.(\w+)", r"decoder.low.\1.\2"),
    (r"decoder\.block2\.([\w.]+)", r"decoder.fuse.\1"),
    (r"segmentation_head\.0\.(\w+)", r"decoder.classifier.\1"),
)


_SMP = {"backbone.contract_dilation": False}


def _openmmlab(
    title: str,
    builds: str,
    *signature: str,
    rules: tuple[Rule, ...] = (),
    told: dict[str, Any] | None = None,
    **more: Any,
) -> Naming:
    settings = _OPENMMLAB | (told or {})
    return Naming(
        title=f"{title} of mmsegmentation",
        builds=(builds,) if builds else (),
        signature=signature,
        rules=rules,
        settings=lambda state: settings,
        beyond=r"(decode|auxiliary)_head\." if not builds else r"auxiliary_head\.",
        **more,
    )


OWN = Whole(
    Naming(
        title="segkit's checkpoint",
        builds=("",),
        signature=(r"backbone\.", r"decoder\."),
        rules=((r"decoder\..*", r"\g<0>"),),
        differs=("the file does not tell the settings of the model that it was trained with",),
    ),
    "backbone.",
)

WHOLE = (
    OWN,
    Whole(
        Naming(
            title="UPerNet of Hugging Face",
            builds=("upernet",),
            signature=(r"decode_head\.lateral_convs\.0\.batch_norm\.",),
            rules=_PYRAMID,
            settings=lambda state: _BINS,
        ),
        "backbone.",
    ),
    Whole(
        _openmmlab(
            "UPerNet",
            "upernet",
            r"decode_head\.lateral_convs\.",
            rules=_PYRAMID,
            told=_BINS | {"backbone.output_stride": 32},
            untold={"align_corners": _CORNERS},
        ),
        "backbone.",
    ),
    Whole(
        _openmmlab(
            "PSPNet",
            "pspnet",
            r"decode_head\.psp_modules\.",
            rules=_PYRAMID,
            told=_BINS,
            untold={"backbone.output_stride": _STRIDE, "align_corners": _CORNERS},
        ),
        "backbone.",
    ),
    Whole(
        _openmmlab(
            "OCRNet",
            "ocrnet",
            r"decode_head\.0\.convs\.0\.",
            rf"{_ATTENTION}\.",
            rules=_OCR_OPENMMLAB,
            told={"decoder.align_corners": False},
        ),
        "backbone.",
    ),
    Whole(
        _openmmlab(
            "DeepLabV3+",
            "deeplabv3plus",
            r"decode_head\.sep_bottleneck\.",
            rules=_DEEPLAB,
            after=average_last,
            untold={
                "backbone.output_stride": _STRIDE,
                "decoder.rates": "mmsegmentation's d8 models have 12, 24, 36, d16 6, 12, 18",
                "decoder.align_corners": _CORNERS,
            },
            differs=("mmsegmentation's mg124 models dilate their last stage by 1, 2, 4",),
        ),
        "backbone.",
    ),
    Whole(
        _openmmlab(
            "FCN",
            "fcn",
            r"decode_head\.convs\.1\.",
            r"decode_head\.conv_cat\.",
            rules=_FCN,
            untold={"backbone.output_stride": _STRIDE, "align_corners": _CORNERS},
            differs=("mmsegmentation's d6 models dilate the convolutions of their head by 6",),
        ),
        "backbone.",
    ),
    Whole(
        _openmmlab("model", "", r"decode_head\.", untold={"backbone.output_stride": _STRIDE}),
        "backbone.",
        instead="segkit has no decoder of its structure",
    ),
    Whole(
        Naming(
            title="OCRNet of HRNet-OCR",
            builds=("ocrnet",),
            signature=(r"conv3x3_ocr\.", r"ocr_distri_head\."),
            rules=_OCR_AUTHORS,
            beyond=r"loss\.",
            settings=lambda state: {
                "decoder.align_corners": True,
                "backbone.align_corners": True,
                "backbone.upsampling": "bilinear",
            },
        ),
        "",
    ),
    Whole(
        Naming(
            title="DeepLabV3 of torchvision",
            builds=("deeplabv3",),
            signature=(r"backbone\.", r"classifier\.0\.convs\."),
            rules=_ATROUS,
            settings=lambda state: _TORCHVISION | {"decoder.rates": (12, 24, 36)},
        ),
        "backbone.",
    ),
    Whole(
        Naming(
            title="FCN of torchvision",
            builds=("fcn",),
            signature=(r"backbone\.", r"classifier\.0\.weight", r"classifier\.4\."),
            rules=_HEADS,
            settings=lambda state: _TORCHVISION,
        ),
        "backbone.",
    ),
    Whole(
        Naming(
            title="UNet++ of segmentation_models.pytorch",
            builds=("unetplusplus",),
            signature=(r"encoder\.", r"decoder\.blocks\.x_", r"segmentation_head\."),
            rules=_NESTED,
            settings=lambda state: {"backbone.output_stride": 32},
            differs=(
                "segmentation_models.pytorch's decoder_interpolation is not told by the file, and "
                "is its default here, 'nearest'",
            ),
        ),
        "encoder.",
    ),
    Whole(
        Naming(
            title="DeepLabV3+ of segmentation_models.pytorch",
            builds=("deeplabv3plus",),
            signature=(r"encoder\.", r"decoder\.aspp\.0\.", r"decoder\.block2\."),
            rules=_SEPARABLE,
            settings=lambda state: _SMP | {"decoder.align_corners": True},
            untold={
                "backbone.output_stride": "segmentation_models.pytorch has 16 unless told 8",
                "decoder.rates": "segmentation_models.pytorch has 12, 24, 36 unless told others",
            },
        ),
        "encoder.",
    ),
    Whole(
        Naming(
            title="model of segmentation_models.pytorch",
            builds=(),
            signature=(r"encoder\.", r"decoder\.", r"segmentation_head\."),
            rules=(),
            beyond=r"(decoder|segmentation_head)\.",
            settings=lambda state: _SMP,
            untold={
                "backbone.output_stride": (
                    "segmentation_models.pytorch has 8 or 16 in DeepLabV3, 16 or 32 in PAN, "
                    "otherwise 32"
                )
            },
        ),
        "encoder.",
        instead="segkit has no decoder of its structure",
    ),
    Whole(
        Naming(title="", builds=(), signature=(r"backbone\.",), rules=(), beyond=".*"),
        "backbone.",
        instead="the file has no decoder",
    ),
    Whole(
        Naming(title="", builds=(), signature=(), rules=()), "", instead="the file has no decoder"
    ),
)
"""In the order they are tried; the last two are backbones alone."""
