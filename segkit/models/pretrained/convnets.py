"""Convolutional backbones by the names of torchvision, timm, mmsegmentation and their authors."""

import re
from functools import partial

from torch import Tensor

from segkit.models.pretrained.names import HUGGING_FACE_NORM, Project, State, Substitutions

_HEADS = "(fc|head|classifier|last_linear|projection_head|projector|prototypes)"
"""Names of what follows a backbone in classifiers and in self-supervised training."""


def _efficientnet(match: re.Match[str]) -> str:
    """Return segkit's name of a part of a block; blocks of the first stage do not expand."""
    stage, block, part = match.groups()
    first = {"conv_pw": "2.0", "bn2": "2.1", "conv_dw": "0.0", "bn1": "0.1", "se": "1"}
    others = {"conv_pw": "0.0", "bn1": "0.1", "conv_dw": "1.0", "bn2": "1.1", "se": "2"}
    others |= {"conv_pwl": "3.0", "bn3": "3.1"}
    place = (first if stage == "0" else others).get(part, part)
    return f"features.{int(stage) + 1}.{block}.block.{place}."


_TIMM: Substitutions = (
    (r"^conv_stem\.", "features.0.0."),
    (r"^bn1\.", "features.0.1."),
    (r"\.se\.conv_reduce\.", ".se.fc1."),
    (r"\.se\.conv_expand\.", ".se.fc2."),
    (r"^blocks\.([0-6])\.(\d+)\.(\w+)\.", _efficientnet),
)


def _lukemelas(state: State) -> Substitutions:
    """Return substitutions to timm's names; blocks are numbered through all stages here.

    A stage begins where the number of channels changes.
    """
    places: dict[str, str] = {}
    stage, block, width = 0, -1, None
    while (weight := state.get(f"_blocks.{len(places)}._project_conv.weight")) is not None:
        stage, block = (stage, block + 1) if width in (None, weight.shape[:1]) else (stage + 1, 0)
        width = weight.shape[:1]
        places[str(len(places))] = f"{stage}.{block}"
    return (
        (r"^_conv_stem\.", "features.0.0."),
        (r"^_bn0\.", "features.0.1."),
        (r"^_blocks\.(\d+)\.", lambda match: f"blocks.{places.get(match[1], '?')}."),
        (r"\._se_(reduce|expand)\.", r".se.conv_\1."),
        (r"^(blocks\.0\.\d+)\._project_conv\.", r"\1.conv_pw."),
        (r"^(blocks\.0\.\d+)\._bn([12])\.", r"\1.bn\2."),
        (r"\._bn([012])\.", lambda match: f".bn{int(match[1]) + 1}."),
        (r"\._expand_conv\.", ".conv_pw."),
        (r"\._depthwise_conv\.", ".conv_dw."),
        (r"\._project_conv\.", ".conv_pwl."),
        *_TIMM,
    )


EFFICIENTNETS = (
    Project(
        "EfficientNet by timm's names",
        ("efficientnet_b", "efficientnet_lite"),
        marks=(r"conv_stem\.", r"blocks\.0\.0\.conv_dw\.", r"blocks\.1\.0\.conv_pwl\."),
        names=_TIMM,
        ours=r"features\.[0-7]\.",
        ignored=r"(conv_head|bn2|classifier)\.",
        unrecorded={
            "backbone.like": (
                "timm's tf_ models need 'tensorflow' (which is right for sides that 32 divides), "
                "its others and segmentation_models.pytorch's 'timm'"
            )
        },
        caveats=(
            "some of timm's tf_ models expect images normalized by a mean and a deviation of 0.5",
        ),
    ),
    Project(
        "EfficientNet by lukemelas's names",
        ("efficientnet_b", "efficientnet_lite"),
        marks=(r"_conv_stem\.", r"_blocks\.0\._depthwise_conv\."),
        names=_lukemelas,
        ours=r"features\.[0-7]\.",
        ignored=r"(_conv_head|_bn1|_fc)\.",
        settings={"backbone.like": "smp"},
        caveats=("its AdvProp weights expect images normalized by a mean and a deviation of 0.5",),
    ),
)


def _convnext_shape(name: str, tensor: Tensor) -> Tensor:
    """Return an entry in segkit's shape: layer scales, response norms and linear layers differ."""
    if name.endswith("layer_scale"):
        return tensor.view(-1, 1, 1)
    if ".block.4.1." in name:
        return tensor.flatten()
    linear = re.search(r"\.block\.[35]\.weight$", name)
    return tensor.flatten(1) if linear and tensor.shape[2:] == (1, 1) else tensor


# In torchvision and here ``features.0`` is the stem; then stages and downsampling alternate.
_WHOLE = r"(?:convnext(?:v2)?\.)?"
_STAGES = rf"^{_WHOLE}(?:encoder\.)?stages\.(\d)\."
_convnext = partial(
    Project,
    fits=("convnext_",),
    names=(
        (rf"{_STAGES}(?:blocks\.|layers\.)?(?=\d)", lambda m: f"features.{2 * int(m[1]) + 1}."),
        (rf"{_STAGES}downsampl(?:e|ing_layer)\.", lambda m: f"features.{2 * int(m[1])}."),
        (r"^downsample_layers\.(\d)\.", lambda m: f"features.{2 * int(m[1])}."),
        (r"^stem\.", "features.0."),
        (rf"^{_WHOLE}embeddings\.patch_embeddings\.", "features.0.0."),
        (rf"^{_WHOLE}embeddings\.layernorm\.", "features.0.1."),
        (r"\.(?:conv_dw|dwconv|depthwise_conv)\.", ".block.0."),
        (r"^(features\.\d\.\d+)\.(?:norm|layernorm)\.", r"\1.block.2."),
        (r"\.(?:mlp\.fc1|pwconv1|pointwise_conv1)\.", ".block.3."),
        (r"\.(?:mlp\.fc2|pwconv2|pointwise_conv2)\.", ".block.5."),
        (r"\.(?:mlp\.)?grn\.(?:gamma|weight)$", ".block.4.1.weight"),
        (r"\.(?:mlp\.)?grn\.(?:beta|bias)$", ".block.4.1.bias"),
        (r"\.(?:gamma|layer_scale_parameter)$", ".layer_scale"),
        HUGGING_FACE_NORM,
    ),
    ours=r"(features\.[0-7]|norm[0-3])\.",
    convert=_convnext_shape,
)
CONVNEXTS = (
    _convnext(
        "ConvNeXt by timm's, mmsegmentation's or its authors' names",
        marks=(r"stages\.0\.(blocks\.0\.conv_dw|0\.dwconv|0\.depthwise_conv)\.",),
        ignored=r"(head|head\.norm|head\.fc|norm)\.\w+$",
        caveats=("timm's ConvNeXts of CLIP expect images normalized by CLIP's mean and deviation",),
    ),
    _convnext(
        "ConvNeXt by Hugging Face's names",
        marks=(rf"{_WHOLE}encoder\.stages\.0\.layers\.0\.dwconv\.",),
        ignored=rf"({_WHOLE}layernorm|classifier)\.\w+$",
    ),
)

_hrnet = partial(
    Project,
    "HRNet",
    ("hrnet_",),
    ours=r"((conv|bn)[12]|layer1|transition[1-3]|stage[2-4])\.",
    ignored=rf"({_HEADS}|(incre|downsamp)_modules|final_layer|last_layer|aux_head)\.",
    unrecorded={
        "backbone.upsampling": (
            "the authors' OCRNet has 'bilinear' with align_corners, their earlier segmentation "
            "models without, mmsegmentation 'bilinear_by_factor' without, classifiers and "
            "mmdetection 'nearest'"
        )
    },
)
_IN_HRNET = r"transition1\.", r"stage4\.0\.branches\."
_NEAREST = {"backbone.upsampling": "nearest"}
HRNETS = (  # timm and mmsegmentation share its own names
    _hrnet(marks=(*_IN_HRNET, r"incre_modules\."), settings=_NEAREST),  # a classifier
    _hrnet(marks=_IN_HRNET),
)

_resnet = partial(Project, ours=r"(conv1|bn1|layer[1-4])\.", ignored=rf"{_HEADS}\.")
RESNETS = (
    Project(
        "SE-ResNet by Cadene's names",
        ("se_resnet",),
        marks=(r"layer0\.conv1\.", r"layer1\.0\.se_module\."),
        ours=r"layer[0-4]\.",
        ignored=rf"{_HEADS}\.",
    ),
    _resnet(
        "ResNet with a deep stem by mmsegmentation's names",
        ("resnet",),
        marks=(r"stem\.0\.", r"layer1\.0\.conv1\."),
        names=((r"^stem\.([01346])\.", r"conv1.\1."), (r"^stem\.7\.", "bn1.")),
    ),
    _resnet(
        "ResNet by detectron2's names",
        ("resnet", "resnext", "wide_resnet"),
        marks=(r"stem\.conv1\.", r"res2\.0\.conv1\."),
        names=(
            (r"^stem\.", ""),
            (r"^res([2-5])\.", lambda m: f"layer{int(m[1]) - 1}."),
            (r"\.shortcut\.norm\.", ".downsample.1."),
            (r"\.shortcut\.", ".downsample.0."),
            (r"(^|\.)conv([123])\.norm\.", r"\1bn\2."),
        ),
        ignored="(?!)",
        caveats=("detectron2's own ResNets have a stride in the 1x1 convolution, BGR images",),
    ),
    _resnet(
        "ResNet",
        ("resnet", "resnext", "wide_resnet"),
        marks=(r"conv1\.", r"layer1\.0\.conv1\."),
        caveats=(
            "Caffe's ResNets (a stride in the 1x1 convolution, BGR images) and timm's resnetaa "
            "and resnetblur have the same names, but compute otherwise",
        ),
    ),
)

TORCHVISION = (
    Project(
        "RegNet by torchvision's names",
        ("regnet_",),
        marks=(r"trunk_output",),
        ours=r"(stem|trunk_output)\.",
        ignored=rf"{_HEADS}\.",
    ),
    Project(
        "classifier by torchvision's names",
        ("efficientnet_", "mobilenet_", "convnext_", "swin_"),
        marks=(r"features\.0\.0\.",),
        ours=r"(features|norm[0-3])\.",
        ignored=rf"({_HEADS}|norm)\.",
        settings={"backbone.like": "torchvision"},
    ),
    Project(
        "classifier by the names of torchvision's segmentation models",
        ("mobilenet_",),
        marks=(r"0\.0\.weight", r"1\.block\.0\.0\.weight"),
        names=((r"^(?=\d)", "features."),),
        ours=r"features\.",
        settings={"backbone.contract_dilation": False, "backbone.output_stride": 16},
    ),
)
PROJECTS = (*EFFICIENTNETS, *CONVNEXTS, *HRNETS, *RESNETS, *TORCHVISION)
