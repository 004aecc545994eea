"""What to say of a path that holds no model itself: where the model probably is."""

from __future__ import annotations

from pathlib import Path

_MARKS = ("config.json", "adapter_config.json")
_DEPTH = 3
_MOST_FOLDERS = 1000
"""Folders that are looked into; whoever names the root of a disk waits for no more."""
_NAMED = 3


def hint_with_models_below(path: Path) -> str:
    """The hint where models are in folders below (a cache of the hub, an unpacked archive), or ""."""
    found = _models_below(path)
    if not found:
        return ""
    named = ", ".join(map(str, found[:_NAMED])) + (" and others" if len(found) > _NAMED else "")
    if path.name.startswith("models--"):
        return f"This is the cache of the hub; the files of each revision are below: give {named}."
    return f"The model is in a folder below: give {named}."


def _models_below(path: Path) -> list[Path]:
    """Folders below that look like a model, the nearest first."""
    found: list[Path] = []
    level, seen = [path], 0
    for _ in range(_DEPTH):
        following: list[Path] = []
        for folder in level:
            try:
                below = sorted(item for item in folder.iterdir() if item.is_dir() and not item.is_symlink())
            except OSError:
                continue
            for item in below:
                seen += 1
                if seen > _MOST_FOLDERS:
                    return found
                is_model = any((item / mark).is_file() for mark in _MARKS)
                (found if is_model else following).append(item)
        level = following
    return found
