"""Recall of objects by their size, from masks alone."""

import torch
from torch import Tensor

from segkit.core.labels import IGNORE
from segkit.data.areas import connected_regions

SIZES = {"small": 0, "medium": 32**2, "large": 96**2}
"""Least number of pixels of an object of each size, as in COCO."""


def object_counts(predicted: Tensor, truth: Tensor, num_classes: int) -> Tensor:
    """Count the objects of each class and size, and those that were recognized.

    An object is a connected region of a class in the truth (4 neighbors). It is recognized if more
    than half of its pixels are predicted as its class.

    Shape:
        predicted, truth: (H, W) integer, 255 for ignored pixels of the truth
        counts: (C, sizes, 2) int64; recognized and all objects
    """
    numbers, values = connected_regions(truth.cpu().numpy())
    regions = torch.from_numpy(numbers).to(predicted.device).flatten()
    right = (predicted == truth.to(predicted.device)).flatten()
    pixels = torch.bincount(regions).cpu()
    correct = torch.bincount(regions[right], minlength=len(pixels)).cpu()
    classes = torch.from_numpy(values).long()
    bounds = torch.tensor([*SIZES.values()])
    sizes = torch.bucketize(pixels, bounds, right=True) - 1
    counted = classes != IGNORE
    code = (classes * len(SIZES) + sizes) * 2
    recognized = counted & (2 * correct > pixels)
    bins = num_classes * len(SIZES) * 2
    both = torch.cat([code[recognized], code[counted] + 1])
    return torch.bincount(both, minlength=bins).view(num_classes, len(SIZES), 2)
