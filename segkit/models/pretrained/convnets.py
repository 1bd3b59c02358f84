"""Convolutional backbones by the names of torchvision, timm, mmsegmentation and their authors."""

import re
from functools import partial

from torch import Tensor

from segkit.models.pretrained.names import HUGGING_FACE_NORM, Project, State, has

_HEADS = "(fc|head|classifier|last_linear|projection_head|projector|prototypes)"
"""Names of what follows a backbone in classifiers and in self-supervised training."""


def find_efficientnet(state: State) -> Project | None:
    """Return the project whose names of an EfficientNet these are: timm or lukemelas."""
    if has(state, r"conv_stem\.", r"blocks\.0\.0\.conv_dw\.", r"blocks\.1\.0\.conv_pwl\."):
        first = "conv_dw bn1 se.conv_reduce se.conv_expand conv_pw bn2"
        others = "conv_pw bn1 conv_dw bn2 se.conv_reduce se.conv_expand conv_pwl bn3"
        return Project(
            "EfficientNet by timm's names",
            ("efficientnet_b", "efficientnet_lite"),
            (
                (r"^conv_stem\.", "features.0.0."),
                (r"^bn1\.", "features.0.1."),
                (_EFFICIENTNET_BLOCK, lambda match: _efficientnet_block(match, first, others)),
            ),
            ours=r"features\.[0-7]\.",
            ignored=r"(conv_head|bn2|classifier)\.",
            unrecorded={
                "backbone.like": (
                    "timm's tf_ models need 'tensorflow' (which is right for sides that 32 "
                    "divides), its others and segmentation_models.pytorch's 'timm'"
                )
            },
            caveats=(
                "some of timm's tf_ models expect images normalized by a mean and a deviation of "
                "0.5",
            ),
        )
    if has(state, r"_conv_stem\.", r"_blocks\.0\._depthwise_conv\."):
        first = "_depthwise_conv _bn1 _se_reduce _se_expand _project_conv _bn2"
        others = f"_expand_conv _bn0 {first}"
        places = _blocks_by_stage(state)
        return Project(
            "EfficientNet by lukemelas's names",
            ("efficientnet_b", "efficientnet_lite"),
            (
                (r"^_conv_stem\.", "features.0.0."),
                (r"^_bn0\.", "features.0.1."),
                (r"^_blocks\.(\d+)\.", lambda match: f"blocks.{places.get(match[1], '?')}."),
                (_EFFICIENTNET_BLOCK, lambda match: _efficientnet_block(match, first, others)),
            ),
            ours=r"features\.[0-7]\.",
            ignored=r"(_conv_head|_bn1|_fc)\.",
            settings={"backbone.like": "smp"},
            caveats=(
                "its AdvProp weights expect images normalized by a mean and a deviation of 0.5",
            ),
        )
    return None


_EFFICIENTNET_BLOCK = r"^blocks\.([0-6])\.(\d+)\.(.+)\.(?=\w+$)"


def _efficientnet_block(match: re.Match[str], first: str, others: str) -> str:
    """Return segkit's name of a part of a block; blocks of the first stage do not expand.

    ``first`` and ``others`` are the project's names of the parts of a block of the first and of
    other stages.
    """
    parts, places = others.split(), ["0.0", "0.1", "1.0", "1.1", "2.fc1", "2.fc2", "3.0", "3.1"]
    if match[1] == "0":
        parts, places = first.split(), ["0.0", "0.1", "1.fc1", "1.fc2", "2.0", "2.1"]
    place = dict(zip(parts, places, strict=True)).get(match[3], match[3])
    return f"features.{int(match[1]) + 1}.{match[2]}.block.{place}."


def _blocks_by_stage(state: State) -> dict[str, str]:
    """Return stage and block of the blocks that lukemelas numbers through all stages."""
    places: dict[str, str] = {}
    stage, block, width = 0, -1, None
    while (weight := state.get(f"_blocks.{len(places)}._project_conv.weight")) is not None:
        stage, block = (stage, block + 1) if width in (None, weight.shape[:1]) else (stage + 1, 0)
        width = weight.shape[:1]
        places[str(len(places))] = f"{stage}.{block}"
    return places


def find_convnext(state: State) -> Project | None:
    """Return the project whose names of a ConvNeXt or ConvNeXt V2 these are.

    In torchvision and here ``features.0`` is the stem; then stages and downsampling alternate.
    """
    stages = r"^(?:convnext(?:v2)?\.)?(?:encoder\.)?stages\.(\d)\."
    embeddings = r"^(?:convnext(?:v2)?\.)?embeddings\."
    substitutions = (
        (rf"{stages}(?:blocks\.|layers\.)?(?=\d)", lambda m: f"features.{2 * int(m[1]) + 1}."),
        (rf"{stages}downsampl(?:e|ing_layer)\.", lambda m: f"features.{2 * int(m[1])}."),
        (r"^downsample_layers\.(\d)\.", lambda m: f"features.{2 * int(m[1])}."),
        (r"^stem\.", "features.0."),
        (rf"{embeddings}patch_embeddings\.", "features.0.0."),
        (rf"{embeddings}layernorm\.", "features.0.1."),
        (r"\.(?:conv_dw|dwconv|depthwise_conv)\.", ".block.0."),
        (r"^(features\.\d\.\d+)\.(?:norm|layernorm)\.", r"\1.block.2."),
        (r"\.(?:mlp\.fc1|pwconv1|pointwise_conv1)\.", ".block.3."),
        (r"\.(?:mlp\.fc2|pwconv2|pointwise_conv2)\.", ".block.5."),
        (r"\.(?:mlp\.)?grn\.(?:gamma|weight)$", ".block.4.1.weight"),
        (r"\.(?:mlp\.)?grn\.(?:beta|bias)$", ".block.4.1.bias"),
        (r"\.(?:gamma|layer_scale_parameter)$", ".layer_scale"),
        HUGGING_FACE_NORM,
    )
    project = partial(
        Project,
        fits=("convnext_",),
        substitutions=substitutions,
        ours=r"(features\.[0-7]|norm[0-3])\.",
        convert=_convnext_shape,
    )
    if has(state, r"stages\.0\.(blocks\.0\.conv_dw|0\.dwconv|0\.depthwise_conv)\."):
        return project(
            "ConvNeXt by timm's, mmsegmentation's or its authors' names",
            ignored=r"(head|head\.norm|head\.fc|norm)\.\w+$",
            caveats=(
                "timm's ConvNeXts of CLIP expect images normalized by CLIP's mean and deviation",
            ),
        )
    if has(state, r"(?:convnext(?:v2)?\.)?encoder\.stages\.0\.layers\.0\.dwconv\."):
        return project(
            "ConvNeXt by Hugging Face's names",
            ignored=r"((convnext(v2)?\.)?layernorm|classifier)\.\w+$",
        )
    return None


def _convnext_shape(name: str, tensor: Tensor) -> Tensor:
    """Return an entry in segkit's shape: layer scales, response norms and linear layers differ."""
    if name.endswith("layer_scale"):
        return tensor.view(-1, 1, 1)
    if ".block.4.1." in name:
        return tensor.flatten()
    linear = re.search(r"\.block\.[35]\.weight$", name)
    return tensor.flatten(1) if linear and tensor.shape[2:] == (1, 1) else tensor


def find_hrnet(state: State) -> Project | None:
    """Return HRNet's own names, which timm and mmsegmentation share."""
    if not has(state, r"transition1\.", r"stage4\.0\.branches\."):
        return None
    classifier = has(state, r"incre_modules\.")  # it resizes branches by the nearest value
    return Project(
        "HRNet",
        ("hrnet_",),
        ours=r"((conv|bn)[12]|layer1|transition[1-3]|stage[2-4])\.",
        ignored=rf"({_HEADS}|(incre|downsamp)_modules|final_layer|last_layer|aux_head)\.",
        settings={"backbone.upsampling": "nearest"} if classifier else {},
        unrecorded={
            "backbone.upsampling": (
                "the authors' OCRNet has 'bilinear' with align_corners, their earlier segmentation "
                "models without, mmsegmentation 'bilinear_by_factor' without, classifiers and "
                "mmdetection 'nearest'"
            )
        },
    )


def find_resnet(state: State) -> Project | None:
    """Return the project whose names of a ResNet, with or without squeezing, these are."""
    if has(state, r"layer0\.conv1\.", r"layer1\.0\.se_module\."):
        return Project(
            "SE-ResNet by Cadene's names",
            ("se_resnet",),
            ours=r"layer[0-4]\.",
            ignored=rf"{_HEADS}\.",
        )
    if has(state, r"stem\.0\.", r"layer1\.0\.conv1\."):
        return Project(
            "ResNet with a deep stem by mmsegmentation's names",
            ("resnet",),
            ((r"^stem\.([01346])\.", r"conv1.\1."), (r"^stem\.7\.", "bn1.")),
            ours=r"(conv1|bn1|layer[1-4])\.",
            ignored=rf"{_HEADS}\.",
        )
    if has(state, r"stem\.conv1\.", r"res2\.0\.conv1\."):
        return Project(
            "ResNet by detectron2's names",
            ("resnet", "resnext", "wide_resnet"),
            (
                (r"^stem\.", ""),
                (r"^res([2-5])\.", lambda m: f"layer{int(m[1]) - 1}."),
                (r"\.shortcut\.norm\.", ".downsample.1."),
                (r"\.shortcut\.", ".downsample.0."),
                (r"(^|\.)conv([123])\.norm\.", r"\1bn\2."),
            ),
            ours=r"(conv1|bn1|layer[1-4])\.",
            caveats=("detectron2's own ResNets have a stride in the 1x1 convolution, BGR images",),
        )
    if has(state, r"conv1\.", r"layer1\.0\.conv1\."):
        return Project(
            "ResNet",
            ("resnet", "resnext", "wide_resnet"),
            ours=r"(conv1|bn1|layer[1-4])\.",
            ignored=rf"{_HEADS}\.",
            caveats=(
                "Caffe's ResNets (a stride in the 1x1 convolution, BGR images) and timm's "
                "resnetaa and resnetblur have the same names, but compute otherwise",
            ),
        )
    return None


def find_torchvision(state: State) -> Project | None:
    """Return torchvision's names of a classifier, or of the backbone of a segmentation model."""
    if has(state, r"trunk_output"):
        return Project(
            "RegNet by torchvision's names",
            ("regnet_",),
            ours=r"(stem|trunk_output)\.",
            ignored=rf"{_HEADS}\.",
        )
    if has(state, r"features\.0\.0\."):
        return Project(
            "classifier by torchvision's names",
            ("efficientnet_", "mobilenet_", "convnext_", "swin_"),
            ours=r"(features|norm[0-3])\.",
            ignored=rf"({_HEADS}|norm)\.",
            settings={"backbone.like": "torchvision"},
        )
    if has(state, r"0\.0\.weight", r"1\.block\.0\.0\.weight"):
        return Project(
            "classifier by the names of torchvision's segmentation models",
            ("mobilenet_",),
            ((r"^(?=\d)", "features."),),
            ours=r"features\.",
            settings={"backbone.contract_dilation": False, "backbone.output_stride": 16},
        )
    return None
