"""Parameters, multiply-adds and training memory of each shipped model.

    python -m benchmarks.models [--json] [--cfg NAME ...] [--size 512] [--classes 11]

Models are built and run on PyTorch's "meta" device, which computes only shapes, so the largest
takes seconds and no memory. All numbers are fp32.

- multiply-adds: of convolutions and matrix products, one image, evaluation
- state: weights, gradients and AdamW's two moments, 16 bytes per parameter
- activations: tensors that a training step saves for backward, per image, each storage once;
  without the logits at the image's size, the loss, and workspaces of operations
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from segkit.core import config
from segkit.models.segmenter import build_model
from segkit.training.memory import BATCH, kept_for_backward

NAMES = (
    "swin",
    "swin_b",
    "unetplusplus_b5",
    "unetplusplus_b7",
    "unet3plus",
    "unet3plus_b5",
    "fcn_r50",
    "fcn_r101",
    "ocrnet_w48",
    "stlnet_r101",
    "deeplabv3plus_se152",
    "segformer_b5",
    "convnext_xl",
    "beit_l",
    "vit_l_upernet",
    "vit_b_eomt",
    "swin_l_mask",
)
"""Configurations of the table in docs/models.md."""

CHECKPOINTED = (
    "swin",
    "swin_b",
    "ocrnet_w48",
    "segformer_b5",
    "convnext_xl",
    "vit_b_eomt",
    "swin_l_mask",
)
"""Configurations that are also measured with the backbone's ``checkpointing``."""


@dataclass(frozen=True)
class Cost:
    """The cost of a model.

    Args:
        name: Name of the configuration, and changes to it.
        parameters: Number of parameters.
        multiply_adds: In billions.
        state: GiB.
        activations: GiB per image.
    """

    name: str
    parameters: int
    multiply_adds: float
    state: float
    activations: float


def cost(model: nn.Module, name: str, size: int) -> Cost:
    """Measure a model that was built on the meta device."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    image = torch.empty(BATCH, 3, size, size, device="meta")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)  # the counter fails on modules that are called with a parameter
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(image[:1])
    for parameter in trained:
        parameter.requires_grad_()
    return Cost(
        name=name,
        parameters=parameters,
        multiply_adds=counter.get_total_flops() / 2e9,
        state=16 * parameters / 2**30,
        activations=kept_for_backward(model.train(), image) / BATCH / 2**30,
    )


def costs(names: Sequence[str], size: int, num_classes: int) -> Iterator[Cost]:
    """Yield the cost of each configuration, also with checkpointing where it has that."""
    for name in names:
        settings = config.load(name).model
        with torch.device("meta"):
            yield cost(_build(settings, num_classes), name, size)
            if name in CHECKPOINTED:
                model = _build(settings, num_classes, checkpointing=True)
                yield cost(model, f"{name}, checkpointing", size)


def _build(settings: config.ModelConfig, num_classes: int, **options: object) -> nn.Module:
    backbone = {**settings.backbone, **options}
    return build_model(backbone, settings.decoder, num_classes=num_classes)


def main() -> None:
    """Print a table, or one line of JSON per model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON per model")
    parser.add_argument("--cfg", nargs="+", default=NAMES, help="configurations to measure")
    parser.add_argument("--size", type=int, default=512, help="side of the image")
    parser.add_argument("--classes", type=int, default=11, help="number of classes")
    options = parser.parse_args()
    if not options.json:
        print("| configuration | parameters | multiply-adds, G | state, GiB | activations, GiB |")
        print("| --- | ---: | ---: | ---: | ---: |")
    for model in costs(options.cfg, options.size, options.classes):
        if options.json:
            print(json.dumps(asdict(model)), flush=True)
        else:
            print(
                f"| {model.name} | {model.parameters:,} | {model.multiply_adds:,.1f} "
                f"| {model.state:.2f} | {model.activations:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
