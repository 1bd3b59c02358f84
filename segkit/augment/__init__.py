"""Augmentation as a pure function of (seed, epoch, sample index) that resamples each image once."""

from segkit.augment.pipeline import OPERATIONS, Pipeline, Plan, generator, list_augmentations

__all__ = ["OPERATIONS", "Pipeline", "Plan", "generator", "list_augmentations"]
