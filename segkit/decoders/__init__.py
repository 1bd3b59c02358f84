"""Networks that turn feature maps into logits, by name."""

from collections.abc import Callable

from torch import nn

from segkit.decoders.deeplabv3 import DeepLabV3
from segkit.decoders.deeplabv3plus import DeepLabV3Plus
from segkit.decoders.fcn import FCN
from segkit.decoders.ocrnet import OCRNet
from segkit.decoders.pspnet import PSPNet
from segkit.decoders.stlnet import STLNet
from segkit.decoders.unet import UNet
from segkit.decoders.unet3plus import UNet3Plus
from segkit.decoders.unetplusplus import UNetPlusPlus
from segkit.decoders.upernet import UPerNet

DECODERS: dict[str, Callable[..., nn.Module]] = {
    "deeplabv3": DeepLabV3,
    "deeplabv3plus": DeepLabV3Plus,
    "fcn": FCN,
    "ocrnet": OCRNet,
    "pspnet": PSPNet,
    "stlnet": STLNet,
    "unet": UNet,
    "unet3plus": UNet3Plus,
    "unetplusplus": UNetPlusPlus,
    "upernet": UPerNet,
}
