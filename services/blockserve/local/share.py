"""What one machine has to share among workers: memory, with the limits of its container."""

from __future__ import annotations

import os
from pathlib import Path


def usable_memory(system: Path = Path("/")) -> int:
    """Bytes of memory that this process's group may use.

    Args:
        system: where `proc` and `sys` are mounted.

    Source: cgroup-v2.rst (`memory.max`) of the Linux documentation.
    """
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    mounted = system / "sys/fs/cgroup"
    for line in _text(system / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers:
            continue
        group = mounted / path.lstrip("/")
        for folder in (group, *group.parents):
            text = _text(folder / "memory.max").strip()
            if text.isdecimal():
                limits.append(int(text))
            if folder == mounted:
                break
    return min(limits)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii")
    except OSError:
        return ""
