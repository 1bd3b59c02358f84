"""Augmentation: a pure function of (seed, epoch, sample index) that touches the pixels once."""

from segkit.augment.pipeline import OPERATIONS, Pipeline, Plan, generator

__all__ = ["OPERATIONS", "Pipeline", "Plan", "generator"]
