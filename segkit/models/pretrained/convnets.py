"""Convolutional backbones by the names of torchvision, timm, mmsegmentation and their authors."""

import re
from typing import Any

from torch import Tensor

from segkit.models.pretrained.naming import HUGGING_FACE_NORMS, Naming, Rule, State

# ---- EfficientNet: features.0 is the stem, features.1 to features.7 the stages

_BATCH_NORM = r"weight|bias|running_mean|running_var|num_batches_tracked"
_PARTS_TIMM = (
    # the first stage has no expansion, so its parts stand one place earlier
    {
        "conv_dw": "0.0",
        "bn1": "0.1",
        "se.conv_reduce": "1.fc1",
        "se.conv_expand": "1.fc2",
        "conv_pw": "2.0",
        "bn2": "2.1",
    },
    {
        "conv_pw": "0.0",
        "bn1": "0.1",
        "conv_dw": "1.0",
        "bn2": "1.1",
        "se.conv_reduce": "2.fc1",
        "se.conv_expand": "2.fc2",
        "conv_pwl": "3.0",
        "bn3": "3.1",
    },
)
_PARTS_LUKEMELAS = (
    {
        "_depthwise_conv": "0.0",
        "_bn1": "0.1",
        "_se_reduce": "1.fc1",
        "_se_expand": "1.fc2",
        "_project_conv": "2.0",
        "_bn2": "2.1",
    },
    {
        "_expand_conv": "0.0",
        "_bn0": "0.1",
        "_depthwise_conv": "1.0",
        "_bn1": "1.1",
        "_se_reduce": "2.fc1",
        "_se_expand": "2.fc2",
        "_project_conv": "3.0",
        "_bn2": "3.1",
    },
)


def _efficientnet(parts: tuple[dict[str, str], dict[str, str]]) -> tuple[Rule, ...]:
    def rules(stage: str, names: dict[str, str]) -> list[Rule]:
        def becomes(match: re.Match[str]) -> str:
            return f"features.{int(match[1]) + 1}.{match[2]}.block.{names[match[3]]}.{match[4]}"

        these = "|".join(map(re.escape, names))
        return [(rf"_?blocks\.({stage})\.(\d+)\.({these})\.({_BATCH_NORM})", becomes)]

    return (
        (r"_?conv_stem\.(\w+)", r"features.0.0.\1"),
        (r"(?:bn1|_bn0)\.(\w+)", r"features.0.1.\1"),
        *rules("0", parts[0]),
        *rules("[1-6]", parts[1]),
    )


def _by_stage(state: State) -> State:
    """Blocks counted by stage and then block, where the file counts through all of them."""
    widths = _widths(state)
    place, stage, block = {0: "0.0"}, 0, 0
    for index in range(1, len(widths)):
        stage, block = (stage, block + 1) if widths[index] == widths[index - 1] else (stage + 1, 0)
        place[index] = f"{stage}.{block}"

    def name(theirs: str) -> str:
        return re.sub(
            r"^_blocks\.(\d+)\.",
            lambda match: f"_blocks.{place.get(int(match[1]), match[1])}.",
            theirs,
        )

    return {name(theirs): tensor for theirs, tensor in state.items()}


def _widths(state: State) -> list[int]:
    """Output channels of each block, as far as they are there without a gap."""
    widths: list[int] = []
    while (name := f"_blocks.{len(widths)}._project_conv.weight") in state:
        widths.append(state[name].shape[0])
    return widths


# ---- ConvNeXt: features.0 is the stem, then stages and their downsampling alternate

_PARTS_CONVNEXT = {
    "conv_dw": "block.0",
    "dwconv": "block.0",
    "depthwise_conv": "block.0",
    "norm": "block.2",
    "layernorm": "block.2",
    "mlp.fc1": "block.3",
    "pwconv1": "block.3",
    "pointwise_conv1": "block.3",
    "mlp.fc2": "block.5",
    "pwconv2": "block.5",
    "pointwise_conv2": "block.5",
}


def _convnext_part(match: re.Match[str]) -> str:
    part = _PARTS_CONVNEXT[match[3]]
    return f"features.{2 * int(match[1]) + 1}.{match[2]}.{part}.{match[4]}"


def _convnext_scale(match: re.Match[str]) -> str:
    return f"features.{2 * int(match[1]) + 1}.{match[2]}.layer_scale"


def _as_plane(name: str, tensor: Tensor) -> Tensor:
    return tensor.view(-1, 1, 1) if name.endswith("layer_scale") else tensor


def _even(match: re.Match[str]) -> str:
    return f"features.{2 * int(match[1])}.{match[2]}"


_CONVNEXT_PARTS = "|".join(map(re.escape, _PARTS_CONVNEXT))
_TRANSFORMERS = r"(?:convnext\.)?"
_BLOCKS = rf"{_TRANSFORMERS}encoder\.stages\.(\d)\.layers\.(\d+)"


# ---- HRNet


def _nearest(state: State) -> dict[str, Any]:
    """The ImageNet classifier, which has parts of its own, resizes by the nearest value."""
    classifier = any(name.startswith("incre_modules.") for name in state)
    return {"backbone.upsampling": "nearest"} if classifier else {}


_HEADS = "(fc|head|classifier|last_linear|projection_head|projector|prototypes)"
"""What follows a backbone in classifiers, and where networks learned without labels."""

NAMINGS = (
    Naming(
        title="EfficientNet by timm's names",
        builds=("efficientnet_b",),
        signature=(r"conv_stem\.", r"blocks\.0\.0\.conv_dw\.", r"blocks\.1\.0\.conv_pwl\."),
        rules=_efficientnet(_PARTS_TIMM),
        beyond=r"(conv_head|bn2|classifier)\.",
        untold={
            "backbone.like": (
                "timm's tf_ models need 'tensorflow' (which is right for sides that 32 divides), "
                "its others 'timm'"
            )
        },
        doubts=(
            "some of timm's tf_ models expect images normalized by a mean and a deviation of 0.5",
        ),
    ),
    Naming(
        title="EfficientNet by lukemelas's names",
        builds=("efficientnet_b",),
        signature=(r"_conv_stem\.", r"_blocks\.0\._depthwise_conv\."),
        rules=_efficientnet(_PARTS_LUKEMELAS),
        beyond=r"(_conv_head|_bn1|_fc)\.",
        before=_by_stage,
        settings=lambda state: {"backbone.like": "smp"},
        doubts=("its AdvProp weights expect images normalized by a mean and a deviation of 0.5",),
    ),
    Naming(
        title="ConvNeXt by timm's, mmsegmentation's or its authors' names",
        builds=("convnext_",),
        signature=(r"stages\.0\.(blocks\.0\.conv_dw|0\.dwconv|0\.depthwise_conv)\.",),
        rules=(
            (r"(?:stem|downsample_layers\.0)\.([01])\.(\w+)", r"features.0.\1.\2"),
            (r"stages\.([1-3])\.downsample\.([01]\.\w+)", _even),
            (r"downsample_layers\.([1-3])\.([01]\.\w+)", _even),
            (rf"stages\.(\d)\.(?:blocks\.)?(\d+)\.({_CONVNEXT_PARTS})\.(\w+)", _convnext_part),
            (r"stages\.(\d)\.(?:blocks\.)?(\d+)\.gamma", _convnext_scale),
            (r"norm([0-3])\.(\w+)", r"norm\1.\2"),
        ),
        beyond=r"(head|head\.norm|head\.fc|norm)\.\w+$",
        after=_as_plane,
        doubts=("timm's ConvNeXts of CLIP expect images normalized by CLIP's mean and deviation",),
    ),
    Naming(
        title="ConvNeXt by Hugging Face's names",
        builds=("convnext_",),
        signature=(rf"{_TRANSFORMERS}encoder\.stages\.0\.layers\.0\.dwconv\.",),
        rules=(
            (rf"{_TRANSFORMERS}embeddings\.patch_embeddings\.(\w+)", r"features.0.0.\1"),
            (rf"{_TRANSFORMERS}embeddings\.layernorm\.(\w+)", r"features.0.1.\1"),
            (rf"{_TRANSFORMERS}encoder\.stages\.([1-3])\.downsampling_layer\.([01]\.\w+)", _even),
            (rf"{_BLOCKS}\.({_CONVNEXT_PARTS})\.(\w+)", _convnext_part),
            (rf"{_BLOCKS}\.layer_scale_parameter", _convnext_scale),
            HUGGING_FACE_NORMS,
        ),
        beyond=r"(convnext\.layernorm|layernorm|classifier)\.\w+$",
        after=_as_plane,
    ),
    Naming(
        title="HRNet",
        builds=("hrnet_",),
        signature=(r"transition1\.", r"stage4\.0\.branches\."),
        rules=((r"(?:(?:conv|bn)[12]|layer1|transition[1-3]|stage[2-4])\..*", r"\g<0>"),),
        beyond=rf"({_HEADS}|(incre|downsamp)_modules|final_layer|last_layer|aux_head)\.",
        settings=_nearest,
        untold={
            "backbone.upsampling": (
                "the authors' OCRNet has 'bilinear' with align_corners, their earlier segmentation "
                "models without, mmsegmentation 'bilinear_by_factor' without, classifiers and "
                "mmdetection 'nearest'"
            )
        },
    ),
    Naming(
        title="SE-ResNet by Cadene's names",
        builds=("se_resnet",),
        signature=(r"layer0\.conv1\.", r"layer1\.0\.se_module\."),
        rules=((r"layer[0-4]\..*", r"\g<0>"),),
        beyond=rf"{_HEADS}\.",
    ),
    Naming(
        title="ResNet with a deep stem by mmsegmentation's names",
        builds=("resnet",),
        signature=(r"stem\.0\.", r"layer1\.0\.conv1\."),
        rules=(
            (r"stem\.([01346]\.\w+)", r"conv1.\1"),
            (r"stem\.7\.(\w+)", r"bn1.\1"),
            (r"layer[1-4]\..*", r"\g<0>"),
        ),
        beyond=rf"{_HEADS}\.",
    ),
    Naming(
        title="ResNet",
        builds=("resnet", "resnext", "wide_resnet"),
        signature=(r"conv1\.", r"layer1\.0\.conv1\."),
        rules=((r"(?:conv1|bn1|layer[1-4])\..*", r"\g<0>"),),
        beyond=rf"{_HEADS}\.",
        doubts=(
            "Caffe's ResNets (a stride in the 1x1 convolution, BGR images) and timm's resnetaa and "
            "resnetblur have the same names, but compute otherwise",
        ),
    ),
    Naming(
        title="RegNet by torchvision's names",
        builds=("regnet_",),
        signature=(r"trunk_output",),
        rules=((r"(?:stem|trunk_output)\..*", r"\g<0>"),),
        beyond=rf"{_HEADS}\.",
    ),
    Naming(
        title="classifier by torchvision's names",
        builds=("efficientnet_", "mobilenet_", "convnext_", "swin_"),
        signature=(r"features\.0\.0\.",),
        rules=((r"(?:features|norm[0-3])\..*", r"\g<0>"),),
        beyond=rf"({_HEADS}|norm)\.",
        settings=lambda state: {"backbone.like": "torchvision"},
    ),
    Naming(
        title="classifier by the names of torchvision's segmentation models",
        builds=("mobilenet_",),
        signature=(r"0\.0\.weight", r"1\.block\.0\.0\.weight"),
        rules=((r"\d+\..*", r"features.\g<0>"),),
        settings=lambda state: {
            "backbone.contract_dilation": False,
            "backbone.output_stride": 16,
        },
    ),
)
"""In the order they are tried."""
