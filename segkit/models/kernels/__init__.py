"""Faster replacements of PyTorch operations. Each file says on which device it is used."""
