"""Backbones, decoders, the network of both, and the weights to start from."""
