"""Decoders that take the feature maps of any backbone."""

from segkit.models.decoders import DECODERS

PYRAMID_DECODERS = [name for name in DECODERS if name != "eomt"]
"""All but ``eomt``, which needs the tokens of a Vision Transformer (``models/test_eomt.py``)."""
