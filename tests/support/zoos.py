"""Zoos that are filled once and copied for each test."""

import shutil
from pathlib import Path

from blockzoo.zoo import Zoo


def copy_zoo(source: Path, folder: Path) -> Zoo:
    """Copy a zoo into a new folder, byte by byte: what a test does to the copy reaches no other test."""
    shutil.copytree(source, folder)
    return Zoo.open(folder)
