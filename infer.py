#!/usr/bin/env python
"""Predict with trained runs: the same as ``segkit infer``."""

from segkit.commands import console
from segkit.infer import main

if __name__ == "__main__":
    console.run(main)
