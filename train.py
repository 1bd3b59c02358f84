#!/usr/bin/env python
"""Train a run: the same as ``segkit train``."""

from segkit.commands import console
from segkit.train import main

if __name__ == "__main__":
    console.run(main)
