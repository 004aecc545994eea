"""How many cores this process may use: its affinity, and the CPU quota of its container."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def usable_cores(system: Path = Path("/")) -> int:
    """Cores that can work at the same time, at least 1.

    A container limited by quota sees every core of its machine; threads beyond the quota only take
    turns and wait for each other at every barrier of a matrix product.

    Args:
        system: where `proc` and `sys` are mounted.

    Source: cgroup-v2.rst (`cpu.max`) and sched-bwc.rst (`cpu.cfs_quota_us`) of the Linux documentation.
    """
    cores = len(os.sched_getaffinity(0))
    return max(1, min([cores, *(int(quota) for quota in _quotas(system))]))


def _quotas(system: Path) -> Iterator[float]:
    """CPU quotas in cores, of the process's control group and all above it."""
    mounted = system / "sys/fs/cgroup"
    for line in _words(system / "proc/self/cgroup", separator="\n"):
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = mounted / controllers if controllers else mounted
        # Inside a container the path may be the host's; the root then is the container's own group.
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            yield from _quota(folder)
            if folder == root:
                break


def _quota(folder: Path) -> Iterator[float]:
    limits = _words(folder / "cpu.max")  # "max 100000" or "150000 100000", microseconds
    if not limits:
        limits = _words(folder / "cpu.cfs_quota_us") + _words(folder / "cpu.cfs_period_us")
    if len(limits) == 2 and all(limit.isdecimal() for limit in limits) and int(limits[1]):
        yield int(limits[0]) / int(limits[1])


def _words(file: Path, separator: str | None = None) -> list[str]:
    """Parts of a file; none when it is not there."""
    try:
        return file.read_text().strip().split(separator)
    except OSError:
        return []
