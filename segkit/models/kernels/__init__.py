"""Faster forms of PyTorch's operations, each with the device it is for."""
