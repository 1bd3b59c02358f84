"""A linear probe: does a backbone with weights see more in photographs than with random values?

    python -m benchmarks.probe --data data/trashnet --backbone efficientnet_lite0 [--weights FILE]

``--data`` is a folder with ``annotations/instances_PART.json`` for ``train``, ``val`` and ``test``,
and ``images``. An image's class is the category of most of its objects' area. Averages of the
deepest map over the image, resized to 224 x 224, are standardized by the training part; a logistic
regression with a fixed penalty is fitted to it, and its accuracy on the other two parts is printed,
for the weights (the default is ``imagenet``) and for random values of the same backbone. Nothing is
chosen.
"""

import argparse
import json
from collections import Counter, defaultdict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.views import MEAN, STD
from segkit.data.images import read_image
from segkit.models.segmenter import Segmenter, build_model

PENALTY = 1e-3


def labelled(data: Path, part: str) -> list[tuple[Path, int]]:
    """Return the images of a part that have objects, and their classes."""
    content = json.loads((data / "annotations" / f"instances_{part}.json").read_text())
    areas: dict[int, Counter[int]] = defaultdict(Counter)
    for record in content["annotations"]:
        areas[record["image_id"]][record["category_id"]] += record["area"]
    classes = sorted(category["id"] for category in content["categories"])
    return [
        (data / "images" / image["file_name"], classes.index(top[0][0]))
        for image in content["images"]
        if (top := areas[image["id"]].most_common(1))
    ]


@torch.inference_mode()
def averages(model: Segmenter, paths: list[Path]) -> Tensor:
    """Return the average of the deepest map of each image: (N, C)."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    rows = []
    for path in paths:
        image = F.interpolate(read_image(path)[None].float() / 255, (224, 224), mode="area")
        rows.append(model.backbone((image - mean) / std)[-1].mean((2, 3))[0])
    return torch.stack(rows).double()


def accuracy(model: Segmenter, data: Path) -> tuple[float, int]:
    """Return the probe's accuracy on the parts it was not fitted to, and their number of images."""
    train, rest = labelled(data, "train"), labelled(data, "val") + labelled(data, "test")
    x, other = (averages(model.eval(), [path for path, _ in part]) for part in (train, rest))
    y, truth = (torch.tensor([label for _, label in part]) for part in (train, rest))
    center, spread = x.mean(0), x.std(0).clamp(min=1e-30)  # of random weights it is about 1e-9
    x, other = (x - center) / spread, (other - center) / spread
    layer = nn.Linear(x.shape[1], int(y.max()) + 1).double()
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        total = F.cross_entropy(layer(x), y) + PENALTY * layer.weight.square().sum()
        total.backward()
        return total

    optimizer.step(loss)  # type: ignore[arg-type]
    return (layer(other).argmax(1) == truth).double().mean().item(), len(rest)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("--weights", default="imagenet")
    options = parser.parse_args()
    for weights in (options.weights, None):
        model = build_model(options.backbone, "fcn", num_classes=2, weights=weights)
        score, images = accuracy(model, options.data)
        print(f"{options.backbone}, {weights or 'random'}: {score:.3f} of {images} images")


if __name__ == "__main__":
    main()
