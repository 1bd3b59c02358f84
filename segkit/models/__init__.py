"""Backbones, decoders, the models built from both, and pretrained weights."""
