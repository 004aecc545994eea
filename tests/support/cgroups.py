"""A memory cgroup for one process, where this machine lets tests make some."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_LIMITS = {"memory.limit_in_bytes": _ROOT / "memory", "memory.max": _ROOT}
"""The file with the limit, in versions 1 and 2, and where their hierarchies are."""


@contextmanager
def memory_limit(limit_bytes: int) -> Iterator[Path | None]:
    """A group whose processes are killed when they take more; None where none can be made.

    What a process has already does not count: charges stay with the group in which memory was taken.
    """
    made = _make(limit_bytes)
    try:
        yield made
    finally:
        if made is not None:
            _remove(made)


def has_memory_limits() -> bool:
    """Whether `memory_limit` gives a group here."""
    with memory_limit(1 << 20) as group:
        return group is not None


def put(pid: int, group: Path) -> None:
    """Put a process into a group."""
    (group / "cgroup.procs").write_text(str(pid))


def _make(limit_bytes: int) -> Path | None:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, own = line.split(":", 2)
        for name, root in _LIMITS.items():
            if controllers.split(",") != (["memory"] if root != _ROOT else [""]):
                continue
            group = root / own.lstrip("/") / f"blockzoo-test-{os.getpid()}"
            with suppress(OSError):
                group.mkdir()
                try:
                    (group / name).write_text(str(limit_bytes))
                except OSError:
                    group.rmdir()
                    raise
                return group
    return None


def _remove(group: Path) -> None:
    """Its last process may still be on its way out."""
    deadline = time.monotonic() + 10.0
    while True:
        try:
            group.rmdir()
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        else:
            return
