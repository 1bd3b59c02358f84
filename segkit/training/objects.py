"""Recall of objects by their size, from masks alone."""

import numpy as np
import torch
from torch import Tensor

from segkit.core.labels import IGNORE

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


def connected_regions(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of each pixel's region of connected equal values, and each region's value.

    Runs of rows are joined: each takes the smallest number of those that it touches, and then the
    number of its number, until none changes.

    Shape:
        mask: (H, W)
        numbers: (H, W) int64, from 0
        values: (regions,), of the mask's type
    """
    starts = np.ones(mask.shape, dtype=bool)
    starts[:, 1:] = mask[:, 1:] != mask[:, :-1]
    runs = starts.cumsum().reshape(mask.shape) - 1
    # Two runs that touch are the same pair until either ends.
    touching = (mask[1:] == mask[:-1]) & (starts[1:] | starts[:-1])
    pairs = np.stack([runs[:-1][touching], runs[1:][touching]])
    number = np.arange(runs[-1, -1] + 1)
    while len(pairs[0]):
        above, below = number[pairs]
        if (above == below).all():
            break
        least = np.minimum(above, below)
        np.minimum.at(number, above, least)
        np.minimum.at(number, below, least)
        while (number[number] != number).any():
            number = number[number]
    first, number = np.unique(number, return_inverse=True)
    return number.reshape(-1)[runs], mask[starts][first]
