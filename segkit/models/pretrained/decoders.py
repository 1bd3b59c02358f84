"""Whole models: their decoders by the names of the projects, and where the backbone is."""

from typing import Any

from torch import Tensor

from segkit.models.pretrained.mask2former import find_mask2former
from segkit.models.pretrained.mit import find_segformer
from segkit.models.pretrained.names import Project, State, Substitutions, has
from segkit.models.pretrained.vit import find_eomt

NO_DECODER = "the file has no decoder"
_OTHER_STRUCTURE = "segkit has no decoder of its structure"
_NOTHING = "(?!)"

OWN = Project(
    "segkit's checkpoint",
    ("",),
    differences=("the file does not tell the settings of the model that it was trained with",),
)
"""A checkpoint of segkit."""


def find_decoder(state: State) -> Project:
    """Return the project whose names of a whole model these are, or of a backbone alone."""
    if has(state, r"backbone\.", r"decoder\."):
        return OWN
    for find in (
        find_segformer,
        find_mmsegmentation,
        find_mask2former,
        find_eomt,
        find_hrnet_ocr,
        find_torchvision,
        find_smp,
    ):
        if (project := find(state)) is not None:
            return project
    if has(state, r"backbone\."):
        return Project("", (), ours=_NOTHING, ignored=".*", reason=NO_DECODER)
    return Project("", (), ours=_NOTHING, prefix="", reason=NO_DECODER)


# A convolution and its BatchNorm are items 0 and 1 of segkit's layers. transformers spells out
# batch_norm and classifier where mmsegmentation has bn and conv_seg.
_CONV_NORM = ((r"\.conv\.(?=\w+$)", ".0."), (r"\.(?:bn|batch_norm)\.(?=\w+$)", ".1."))
_SEPARABLE = (
    (r"\.depthwise_conv\.", ".0."),
    (r"\.pointwise_conv\.conv\.", ".0.3."),
    (r"\.pointwise_conv\.bn\.", ".1."),
)
_CLASSIFIERS = (
    (r"^decode_head\.(?:conv_seg|classifier)\.", "decoder.classifier."),
    (r"^auxiliary_head\.(?:conv_seg|classifier)\.", "decoder.aux.4."),
    (r"^auxiliary_head\.convs\.0\.", "decoder.aux."),
)
_PYRAMID = (
    *_CLASSIFIERS,
    (r"^decode_head\.psp_modules\.(\d)\.1\.", r"decoder.pool.branches.\1."),
    (r"^decode_head\.bottleneck\.", "decoder.pool.fuse."),
    (r"^decode_head\.lateral_convs\.", "decoder.laterals."),
    (r"^decode_head\.fpn_convs\.", "decoder.smooth."),
    (r"^decode_head\.fpn_bottleneck\.", "decoder.fuse."),
    *_CONV_NORM,
)
_BEIT = (  # names of transformers 5 in memory; those on disk are mmsegmentation's
    (r"^decode_head\.psp_modules\.blocks\.(\d)\.conv\.", r"decode_head.psp_modules.\1.1."),
    (r"^decode_head\.psp_bottleneck\.", "decode_head.bottleneck."),
    (r"^(\w+_head\..*)\.convolution\.", r"\1.conv."),
    (r"^(\w+_head\..*)\.normalization\.", r"\1.bn."),
    *_PYRAMID,
)
_CONTEXT = r"^decode_head\.1\.object_context_block"
_OCR = (
    (r"^decode_head\.0\.convs\.0\.", "decoder.regions.0."),
    (r"^decode_head\.0\.conv_seg\.", "decoder.regions.1."),
    (r"^decode_head\.1\.bottleneck\.", "decoder.pixels."),
    (rf"{_CONTEXT}\.(query|key)_project\.", r"decoder.\1."),
    (rf"{_CONTEXT}\.value_project\.", "decoder.value."),
    (rf"{_CONTEXT}\.out_project\.", "decoder.context."),
    (rf"{_CONTEXT}\.bottleneck\.", "decoder.fuse."),
    (r"^decode_head\.1\.conv_seg\.", "decoder.classifier."),
    *_CONV_NORM,
)
_DEEPLABV3PLUS = (
    *_CLASSIFIERS,
    (r"^decode_head\.image_pool\.1\.", "decoder.aspp.average."),
    (r"^decode_head\.aspp_modules\.", "decoder.aspp.branches."),
    (r"^decode_head\.bottleneck\.", "decoder.aspp.project."),
    (r"^decode_head\.c1_bottleneck\.", "decoder.low."),
    (r"^decode_head\.sep_bottleneck\.", "decoder.fuse."),
    *_SEPARABLE,
    *_CONV_NORM,
)
_FCN = (
    (r"^decode_head\.convs\.", "decoder.convs."),
    (r"^decode_head\.conv_cat\.", "decoder.classifier."),
    (r"^decode_head\.conv_seg\.", "decoder.classifier.4."),
    (r"^auxiliary_head\.convs\.0\.", "decoder.aux_classifier."),
    (r"^auxiliary_head\.conv_seg\.", "decoder.aux_classifier.4."),
    *_CONV_NORM,
)


_SEGFORMER = (
    (r"^decode_head\.convs\.", "decoder.projections."),
    (r"^decode_head\.fusion_conv\.", "decoder.fuse."),
    (r"^decode_head\.conv_seg\.", "decoder.classifier."),
    *_CONV_NORM,
)


def find_mmsegmentation(state: State) -> Project | None:
    """Return the decoder of a model of mmsegmentation or transformers.

    The segmentation code of Swin and ConvNeXt is mmsegmentation's.
    """
    stride = {"backbone.output_stride": "mmsegmentation's d8 models have 8, d16 16, d32 32"}
    corners = "mmsegmentation's models for images of 769 x 769 have True, its others False"
    bins = {"decoder.bins": (1, 2, 3, 6)}
    if not has(state, r"decode_head\."):
        return None
    if has(state, r"decode_head\.lateral_convs\.", r"beit\."):
        return Project("UPerNet of Hugging Face", ("upernet",), _BEIT, settings=bins, prefix="")
    if has(state, r"decode_head\.lateral_convs\.0\.batch_norm\."):
        return Project("UPerNet of Hugging Face", ("upernet",), _PYRAMID, settings=bins)
    if has(state, r"decode_head\.lateral_convs\."):
        return _mmsegmentation(
            "UPerNet",
            "upernet",
            _PYRAMID,
            settings=bins | {"backbone.output_stride": 32},
            unrecorded={"align_corners": corners},
        )
    if has(state, r"decode_head\.fusion_conv\."):
        settings = {"decoder.level_norms": True}
        return _mmsegmentation("SegFormer", "segformer", _SEGFORMER, settings=settings)
    if has(state, r"decode_head\.psp_modules\."):
        return _mmsegmentation(
            "PSPNet",
            "pspnet",
            _PYRAMID,
            settings=bins,
            unrecorded=stride | {"align_corners": corners},
        )
    if has(state, r"decode_head\.0\.convs\.0\.", rf"{_CONTEXT}\."):
        return _mmsegmentation("OCRNet", "ocrnet", _OCR, settings={"decoder.align_corners": False})
    if has(state, r"decode_head\.sep_bottleneck\."):
        return _mmsegmentation(
            "DeepLabV3+",
            "deeplabv3plus",
            _DEEPLABV3PLUS,
            convert=average_last,
            unrecorded={
                **stride,
                "decoder.rates": "mmsegmentation's d8 models have 12, 24, 36, d16 6, 12, 18",
                "decoder.align_corners": corners,
            },
            differences=("mmsegmentation's mg124 models dilate their last stage by 1, 2, 4",),
        )
    if has(state, r"decode_head\.convs\.1\.", r"decode_head\.conv_cat\."):
        return _mmsegmentation(
            "FCN",
            "fcn",
            _FCN,
            unrecorded=stride | {"align_corners": corners},
            differences=("mmsegmentation's d6 models dilate the convolutions of their head by 6",),
        )
    return _mmsegmentation("model", "", unrecorded=stride, reason=_OTHER_STRUCTURE)


def _mmsegmentation(
    architecture: str,
    decoder: str,
    substitutions: Substitutions = (),
    *,
    settings: dict[str, Any] | None = None,
    **more: Any,
) -> Project:
    return Project(
        f"{architecture} of mmsegmentation",
        (decoder,) if decoder else (),
        substitutions,
        ignored=r"auxiliary_head\." if decoder else r"(decode|auxiliary)_head\.",
        settings={
            "backbone.contract_dilation": True,
            "backbone.align_corners": False,
            "backbone.upsampling": "bilinear_by_factor",
            **(settings or {}),
        },
        **more,
    )


def average_last(name: str, tensor: Tensor) -> Tensor:
    """Return the convolution that joins a pyramid's branches with the image's average as the last.

    In mmsegmentation it is the first; here, as in torchvision and segmentation_models.pytorch, it
    is the last.

    Args:
        name: segkit's name of the entry; others are returned unchanged.
        tensor: (width, 5 width, 3, 3)
    """
    if name != "decoder.aspp.project.0.weight":
        return tensor
    return tensor.roll(-(tensor.shape[1] // 5), 1)


def find_hrnet_ocr(state: State) -> Project | None:
    """Return the decoder of the authors' HRNet-OCR."""
    if not has(state, r"conv3x3_ocr\.", r"ocr_distri_head\."):
        return None
    context = r"^ocr_distri_head\.object_context_block"
    return Project(
        "OCRNet of HRNet-OCR",
        ("ocrnet",),
        (
            (r"^(?:aux_head|last_layer)\.([01])\.", r"decoder.regions.0.\1."),
            (r"^(?:aux_head|last_layer)\.3\.", "decoder.regions.1."),
            (r"^conv3x3_ocr\.", "decoder.pixels."),
            (rf"{context}\.f_pixel\.", "decoder.query."),
            (rf"{context}\.f_object\.", "decoder.key."),
            (rf"{context}\.f_down\.", "decoder.value."),
            (rf"{context}\.f_up\.", "decoder.context."),
            (r"^ocr_distri_head\.conv_bn_dropout\.", "decoder.fuse."),
            (r"^cls_head\.", "decoder.classifier."),
            (r"^(decoder\.(?:query|key))\.([0-3])\.", _two_layers),
            (r"^(decoder\.(?:query\.\d|key\.\d|pixels|value|context|fuse)\.1)\.0\.", r"\1."),
        ),
        ignored=r"loss\.",
        settings={
            "decoder.align_corners": True,
            "backbone.align_corners": True,
            "backbone.upsampling": "bilinear",
        },
        prefix="",
    )


def _two_layers(match: Any) -> str:
    """Return item i of two layers of two modules each as item i % 2 of layer i // 2."""
    return f"{match[1]}.{int(match[2]) // 2}.{int(match[2]) % 2}."


def _aspp(place: str) -> Substitutions:
    """Return the substitutions of a pyramid with torchvision's names, at ``place`` (a pattern)."""
    return (
        (rf"^{place}\.convs\.4\.1\.", "decoder.aspp.average.0."),
        (rf"^{place}\.convs\.4\.2\.", "decoder.aspp.average.1."),
        (rf"^{place}\.convs\.", "decoder.aspp.branches."),
        (rf"^{place}\.project\.", "decoder.aspp.project."),
    )


def find_torchvision(state: State) -> Project | None:
    """Return the decoder of a segmentation model of torchvision."""
    settings = {"backbone.output_stride": 8, "backbone.contract_dilation": True}
    if has(state, r"backbone\.", r"classifier\.0\.convs\."):
        return Project(
            "DeepLabV3 of torchvision",
            ("deeplabv3",),
            (
                *_aspp(r"classifier\.0"),
                (r"^classifier\.([12])\.", lambda m: f"decoder.classifier.{int(m[1]) - 1}."),
                (r"^classifier\.4\.", "decoder.classifier.4."),
                (r"^aux_classifier\.", "decoder.aux."),
            ),
            settings=settings | {"decoder.rates": (12, 24, 36)},
        )
    if has(state, r"backbone\.", r"classifier\.0\.weight", r"classifier\.4\."):
        return Project(
            "FCN of torchvision",
            ("fcn",),
            ((r"^(?=(aux_)?classifier\.)", "decoder."),),
            settings=settings,
        )
    return None


def find_smp(state: State) -> Project | None:
    """Return the decoder of a model of segmentation_models.pytorch."""
    if not has(state, r"encoder\.", r"decoder\.", r"segmentation_head\."):
        return None
    if has(state, r"decoder\.blocks\.x_"):
        return Project(
            "UNet++ of segmentation_models.pytorch",
            ("unetplusplus",),
            ((r"^segmentation_head\.0\.", "decoder.classifier."),),
            settings={"backbone.output_stride": 32},
            differences=(
                "segmentation_models.pytorch's decoder_interpolation is not told by the file, and "
                "is its default here, 'nearest'",
            ),
            prefix="encoder.",
        )
    if has(state, r"decoder\.aspp\.0\.", r"decoder\.block2\."):
        return Project(
            "DeepLabV3+ of segmentation_models.pytorch",
            ("deeplabv3plus",),
            (
                *_aspp(r"decoder\.aspp\.0"),
                (r"^decoder\.aspp\.([12])\.", lambda m: f"decoder.smooth.{int(m[1]) - 1}."),
                (r"^decoder\.block1\.", "decoder.low."),
                (r"^decoder\.block2\.", "decoder.fuse."),
                (r"^segmentation_head\.0\.", "decoder.classifier."),
            ),
            settings={"backbone.contract_dilation": False, "decoder.align_corners": True},
            unrecorded={
                "backbone.output_stride": "segmentation_models.pytorch has 16 unless told 8",
                "decoder.rates": "segmentation_models.pytorch has 12, 24, 36 unless told others",
            },
            prefix="encoder.",
        )
    return Project(
        "model of segmentation_models.pytorch",
        (),
        ours=_NOTHING,
        ignored=r"(decoder|segmentation_head)\.",
        settings={"backbone.contract_dilation": False},
        unrecorded={
            "backbone.output_stride": (
                "segmentation_models.pytorch has 8 or 16 in DeepLabV3, 16 or 32 in PAN, "
                "otherwise 32"
            )
        },
        prefix="encoder.",
        reason=_OTHER_STRUCTURE,
    )
