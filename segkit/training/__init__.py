"""Losses, metrics, optimizers, and the training step."""
