"""Models of other libraries with random weights, their losses, and the logits that users make."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import segmentation

CLASSES = 11
SMP = "segmentation-models-pytorch"


def smp(architecture: str, encoder: str) -> nn.Module:
    """Return a model of segmentation_models.pytorch."""
    import segmentation_models_pytorch as peer

    return getattr(peer, architecture)(encoder, encoder_weights=None, classes=CLASSES)


def torchvision(name: str) -> nn.Module:
    """Return a model of torchvision, with its auxiliary head."""
    build = getattr(segmentation, name)
    return build(weights=None, weights_backbone=None, num_classes=CLASSES, aux_loss=True)


def swin(width: int, depths: Sequence[int], heads: Sequence[int], window: int = 7) -> Any:
    """Return transformers' configuration of a Swin."""
    import transformers as peer

    return peer.SwinConfig(
        embed_dim=width,
        depths=list(depths),
        num_heads=list(heads),
        window_size=window,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )


def upernet(*sizes: Any) -> nn.Module:
    """Return UPerNet on a Swin of transformers; the arguments are those of :func:`swin`."""
    import transformers as peer

    about = peer.UperNetConfig(
        backbone_config=swin(*sizes), auxiliary_in_channels=4 * sizes[0], num_labels=CLASSES
    )
    return peer.UperNetForSemanticSegmentation(about)


def segformer_b5() -> nn.Module:
    """Return SegFormer-B5 of transformers."""
    import transformers as peer

    about = peer.SegformerConfig(
        depths=[3, 6, 40, 3],
        hidden_sizes=[64, 128, 320, 512],
        decoder_hidden_size=768,
        num_labels=CLASSES,
    )
    return peer.SegformerForSemanticSegmentation(about)


def beit_l() -> nn.Module:
    """Return UPerNet on BEiT-L of transformers, with position biases of 512 x 512 pixels."""
    import transformers as peer

    about = peer.BeitConfig(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        use_relative_position_bias=True,
        image_size=512,
        out_indices=[7, 11, 15, 23],
        num_labels=CLASSES,
    )
    return peer.BeitForSemanticSegmentation(about)


def mask2former(*sizes: Any) -> nn.Module:
    """Return Mask2Former on a Swin of transformers; the arguments are those of :func:`swin`."""
    import transformers as peer

    about = peer.Mask2FormerConfig(backbone_config=swin(*sizes), num_labels=CLASSES)
    return peer.Mask2FormerForUniversalSegmentation(about)


def eomt_l(*, masked: bool) -> nn.Module:
    """Return EoMT on DINOv3's ViT-L of transformers, with masked attention or after its end."""
    import transformers as peer

    about = peer.EomtDinov3Config(num_queries=100, num_labels=CLASSES)
    model = peer.EomtDinov3ForUniversalSegmentation(about)
    model.attn_mask_probs.fill_(masked)

    def read_size(model: Any, inputs: tuple[Tensor]) -> None:  # it has that of its configuration
        model.grid_size = tuple(side // about.patch_size for side in inputs[0].shape[-2:])

    model.register_forward_pre_hook(read_size)
    return model


def loss_of(model: nn.Module, images: Tensor, masks: Tensor, *, aux_weight: float) -> Tensor:
    """Return the loss that each library's users compute, with that of an auxiliary head."""
    if type(model).__module__.startswith("transformers."):
        if not hasattr(model, "class_predictor"):
            return model(images, labels=masks).loss
        classes = torch.arange(CLASSES, device=masks.device)
        segments = [(mask == classes[:, None, None]).float() for mask in masks]
        labels = [classes] * len(masks)
        return model(images, mask_labels=segments, class_labels=labels).loss
    outputs = model(images)
    if isinstance(outputs, Mapping):
        main, aux = (F.cross_entropy(outputs[name], masks) for name in ("out", "aux"))
        return main + aux_weight * aux
    return F.cross_entropy(outputs, masks)


def logits_of(outputs: Any, size: Sequence[int]) -> Any:
    """Return logits of the image's size of transformers' outputs; of others, these themselves.

    As its image processors do; probabilities of the queries are summed at the size of their masks,
    not of 384 x 384.
    """
    if hasattr(outputs, "class_queries_logits"):
        shares = outputs.class_queries_logits.softmax(2)[..., :-1]
        masks = outputs.masks_queries_logits.sigmoid()
        logits = torch.einsum("bqc,bqhw->bchw", shares, masks)
    elif hasattr(outputs, "logits"):
        logits = outputs.logits
    else:
        return outputs
    if logits.shape[-2:] == torch.Size(size):
        return logits
    return F.interpolate(logits, tuple(size), mode="bilinear")
