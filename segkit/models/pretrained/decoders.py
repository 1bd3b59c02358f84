"""Whole models: their decoders by the names of the projects, and where the backbone is."""

from functools import partial

from torch import Tensor

from segkit.models.pretrained import mask2former, mit
from segkit.models.pretrained.names import Project, Substitutions
from segkit.models.pretrained.vit import EOMT

NO_DECODER = "the file has no decoder"
_OTHER_STRUCTURE = "segkit has no decoder of its structure"

OWN = Project(
    "segkit's checkpoint",
    ("",),
    marks=(r"backbone\.", r"decoder\."),
    differences=("the file does not tell the settings of the model that it was trained with",),
)
"""A checkpoint of segkit."""

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


_BINS = {"decoder.bins": (1, 2, 3, 6)}
_OPENMMLAB = {
    "backbone.contract_dilation": True,
    "backbone.align_corners": False,
    "backbone.upsampling": "bilinear_by_factor",
}
_STRIDE = {"backbone.output_stride": "mmsegmentation's d8 models have 8, d16 16, d32 32"}
_CORNERS = "mmsegmentation's models for images of 769 x 769 have True, its others False"
_openmmlab = partial(Project, ignored=r"auxiliary_head\.", settings=_OPENMMLAB)
_LATERALS = r"decode_head\.lateral_convs\."

MMSEGMENTATION = (  # transformers and the segmentation code of Swin and ConvNeXt have its names too
    Project(
        "UPerNet of Hugging Face",
        ("upernet",),
        marks=(_LATERALS, r"beit\."),
        names=_BEIT,
        settings=_BINS,
        prefix="",
    ),
    Project(
        "UPerNet of Hugging Face",
        ("upernet",),
        marks=(rf"{_LATERALS}0\.batch_norm\.",),
        names=_PYRAMID,
        settings=_BINS,
    ),
    _openmmlab(
        "UPerNet of mmsegmentation",
        ("upernet",),
        marks=(_LATERALS,),
        names=_PYRAMID,
        settings=_OPENMMLAB | _BINS | {"backbone.output_stride": 32},
        unrecorded={"align_corners": _CORNERS},
    ),
    _openmmlab(
        "SegFormer of mmsegmentation",
        ("segformer",),
        marks=(r"decode_head\.fusion_conv\.",),
        names=_SEGFORMER,
        settings=_OPENMMLAB | {"decoder.level_norms": True},
    ),
    _openmmlab(
        "PSPNet of mmsegmentation",
        ("pspnet",),
        marks=(r"decode_head\.psp_modules\.",),
        names=_PYRAMID,
        settings=_OPENMMLAB | _BINS,
        unrecorded=_STRIDE | {"align_corners": _CORNERS},
    ),
    _openmmlab(
        "OCRNet of mmsegmentation",
        ("ocrnet",),
        marks=(r"decode_head\.0\.convs\.0\.", rf"{_CONTEXT}\."),
        names=_OCR,
        settings=_OPENMMLAB | {"decoder.align_corners": False},
    ),
    _openmmlab(
        "DeepLabV3+ of mmsegmentation",
        ("deeplabv3plus",),
        marks=(r"decode_head\.sep_bottleneck\.",),
        names=_DEEPLABV3PLUS,
        convert=average_last,
        unrecorded={
            **_STRIDE,
            "decoder.rates": "mmsegmentation's d8 models have 12, 24, 36, d16 6, 12, 18",
            "decoder.align_corners": _CORNERS,
        },
        differences=("mmsegmentation's mg124 models dilate their last stage by 1, 2, 4",),
    ),
    _openmmlab(
        "FCN of mmsegmentation",
        ("fcn",),
        marks=(r"decode_head\.convs\.1\.", r"decode_head\.conv_cat\."),
        names=_FCN,
        unrecorded=_STRIDE | {"align_corners": _CORNERS},
        differences=("mmsegmentation's d6 models dilate the convolutions of their head by 6",),
    ),
    _openmmlab(
        "model of mmsegmentation",
        (),
        marks=(r"decode_head\.",),
        ignored=r"(decode|auxiliary)_head\.",
        unrecorded=_STRIDE,
        reason=_OTHER_STRUCTURE,
    ),
)

_AUTHORS = r"^ocr_distri_head\.object_context_block"
HRNET_OCR = Project(
    "OCRNet of HRNet-OCR",
    ("ocrnet",),
    marks=(r"conv3x3_ocr\.", r"ocr_distri_head\."),
    names=(
        (r"^(?:aux_head|last_layer)\.([01])\.", r"decoder.regions.0.\1."),
        (r"^(?:aux_head|last_layer)\.3\.", "decoder.regions.1."),
        (r"^conv3x3_ocr\.", "decoder.pixels."),
        (rf"{_AUTHORS}\.f_pixel\.", "decoder.query."),
        (rf"{_AUTHORS}\.f_object\.", "decoder.key."),
        (rf"{_AUTHORS}\.f_down\.", "decoder.value."),
        (rf"{_AUTHORS}\.f_up\.", "decoder.context."),
        (r"^ocr_distri_head\.conv_bn_dropout\.", "decoder.fuse."),
        (r"^cls_head\.", "decoder.classifier."),
        # Their items 0 to 3 are two layers of two modules each.
        (
            r"^(decoder\.(?:query|key))\.([0-3])\.",
            lambda m: f"{m[1]}.{int(m[2]) // 2}.{int(m[2]) % 2}.",
        ),
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


def _aspp(place: str) -> Substitutions:
    """Return the substitutions of a pyramid with torchvision's names, at ``place`` (a pattern)."""
    return (
        (rf"^{place}\.convs\.4\.1\.", "decoder.aspp.average.0."),
        (rf"^{place}\.convs\.4\.2\.", "decoder.aspp.average.1."),
        (rf"^{place}\.convs\.", "decoder.aspp.branches."),
        (rf"^{place}\.project\.", "decoder.aspp.project."),
    )


_DILATED = {"backbone.output_stride": 8, "backbone.contract_dilation": True}
TORCHVISION = (
    Project(
        "DeepLabV3 of torchvision",
        ("deeplabv3",),
        marks=(r"backbone\.", r"classifier\.0\.convs\."),
        names=(
            *_aspp(r"classifier\.0"),
            (r"^classifier\.([12])\.", lambda m: f"decoder.classifier.{int(m[1]) - 1}."),
            (r"^classifier\.4\.", "decoder.classifier.4."),
            (r"^aux_classifier\.", "decoder.aux."),
        ),
        settings=_DILATED | {"decoder.rates": (12, 24, 36)},
    ),
    Project(
        "FCN of torchvision",
        ("fcn",),
        marks=(r"backbone\.", r"classifier\.0\.weight", r"classifier\.4\."),
        names=((r"^(?=(aux_)?classifier\.)", "decoder."),),
        settings=_DILATED,
    ),
)

_smp = partial(Project, prefix="encoder.")
_IN_SMP = r"encoder\.", r"segmentation_head\."
SMP = (
    _smp(
        "UNet++ of segmentation_models.pytorch",
        ("unetplusplus",),
        marks=(*_IN_SMP, r"decoder\.blocks\.x_"),
        names=((r"^segmentation_head\.0\.", "decoder.classifier."),),
        settings={"backbone.output_stride": 32},
        differences=(
            "segmentation_models.pytorch's decoder_interpolation is not told by the file, and "
            "is its default here, 'nearest'",
        ),
    ),
    _smp(
        "DeepLabV3+ of segmentation_models.pytorch",
        ("deeplabv3plus",),
        marks=(*_IN_SMP, r"decoder\.aspp\.0\.", r"decoder\.block2\."),
        names=(
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
    ),
    _smp(
        "model of segmentation_models.pytorch",
        (),
        marks=(*_IN_SMP, r"decoder\."),
        ours="(?!)",
        ignored=r"(decoder|segmentation_head)\.",
        settings={"backbone.contract_dilation": False},
        unrecorded={
            "backbone.output_stride": (
                "segmentation_models.pytorch has 8 or 16 in DeepLabV3, 16 or 32 in PAN, "
                "otherwise 32"
            )
        },
        reason=_OTHER_STRUCTURE,
    ),
)

WHOLE_MODELS = (
    *(OWN, *mit.SEGFORMERS, *MMSEGMENTATION, *mask2former.PROJECTS),
    *(EOMT, HRNET_OCR, *TORCHVISION, *SMP),
)
PREFIXED = Project("", (), marks=(r"backbone\.",), ours="(?!)", ignored=".*", reason=NO_DECODER)
ALONE = Project("", (), ours="(?!)", prefix="", reason=NO_DECODER)
"""A backbone whose names have a prefix, and one whose names have none."""
