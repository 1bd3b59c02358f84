"""Decoders, which map feature maps to logits, by name.

Each is built from ``channels`` and ``strides``, those of the backbone's feature maps, shallow to
deep, and ``num_classes``, the number of logit planes. Other arguments are its own.
"""

from collections.abc import Callable

from torch import nn

from segkit.models.decoders.deeplabv3 import DeepLabV3
from segkit.models.decoders.deeplabv3plus import DeepLabV3Plus
from segkit.models.decoders.eomt import EoMT
from segkit.models.decoders.fcn import FCN
from segkit.models.decoders.mask2former import Mask2Former
from segkit.models.decoders.ocrnet import OCRNet
from segkit.models.decoders.pspnet import PSPNet
from segkit.models.decoders.segformer import SegFormer
from segkit.models.decoders.stlnet import STLNet
from segkit.models.decoders.unet import UNet
from segkit.models.decoders.unet3plus import UNet3Plus
from segkit.models.decoders.unetplusplus import UNetPlusPlus
from segkit.models.decoders.upernet import UPerNet

DECODERS: dict[str, Callable[..., nn.Module]] = {
    "deeplabv3": DeepLabV3,
    "deeplabv3plus": DeepLabV3Plus,
    "eomt": EoMT,
    "fcn": FCN,
    "mask2former": Mask2Former,
    "ocrnet": OCRNet,
    "pspnet": PSPNet,
    "segformer": SegFormer,
    "stlnet": STLNet,
    "unet": UNet,
    "unet3plus": UNet3Plus,
    "unetplusplus": UNetPlusPlus,
    "upernet": UPerNet,
}
