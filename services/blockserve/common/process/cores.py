"""How many cores this process may use (affinity, quota of its container), and what others take of them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_STEPS = 100
"""Parts of a second that the kernel counts a core's time in (USER_HZ)."""


@dataclass(frozen=True, slots=True)
class CoreTimes:
    """What has been used of the cores that this process may run on.

    Attributes:
        cores: how many there are.
        busy: seconds that they have worked, for whomever.
        own: seconds of processor time that this process has used.
        running: threads of others that run or want to run just now; 0 where that cannot be told.
    """

    cores: int
    busy: float
    own: float
    running: int


def read_core_times(system: Path = Path("/")) -> CoreTimes | None:
    """Read the kernel's counters; None where there are none, as in some sandboxes.

    Args:
        system: where `proc` is mounted.

    Source: proc.rst of the Linux documentation (`/proc/stat`).
    """
    mine = os.sched_getaffinity(0)
    busy, running, cores, online = 0.0, 0, 0, 0
    for line in _words(system / "proc/stat", separator="\n"):
        name, _, rest = line.partition(" ")
        if name.startswith("cpu") and name[3:].isdecimal():
            online += 1
            if int(name[3:]) in mine:
                cores += 1
                user, nice, kernel, _, _, *others = map(int, rest.split()[:8])
                busy += (user + nice + kernel + sum(others)) / _STEPS
        elif name == "procs_running":
            running = int(rest)
    if not cores or not busy:
        return None
    # Where others have cores that this process may not use, it is not known where they run.
    running = max(0, running - _own_running(system)) if cores == online else 0
    return CoreTimes(cores, busy, time.process_time(), running)


def _own_running(system: Path) -> int:
    """Threads of this process that run or want to run."""
    states = (_words(file, separator=")")[-1:] for file in (system / "proc/self/task").glob("*/stat"))
    return sum(1 for state in states if state and state[0].split()[0] == "R")


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
