"""Processes by pid and start time: a pid alone may long belong to somebody else."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_LOOK_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """One life of one process.

    Attributes:
        pid: its number.
        started: when it started, in clock ticks since the machine did.
        boot: which life of the machine.
    """

    pid: int
    started: int
    boot: str


def identify(pid: int) -> ProcessIdentity | None:
    """Who has this pid now; None when nobody has, or when what has it only waits to be reaped.

    Source: proc_pid_stat(5), fields `state` and `starttime`.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()  # the name before it may hold spaces and brackets
    if fields[0] in "ZX":
        return None
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return ProcessIdentity(pid, int(fields[19]), boot)


def is_alive(process: ProcessIdentity) -> bool:
    """Whether that very process runs."""
    return identify(process.pid) == process


def send(process: ProcessIdentity, number: signal.Signals) -> bool:
    """Signal that very process; says whether it was there to be signalled."""
    try:
        handle = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return False
    try:
        # The handle keeps meaning one process from here on, so what is checked is what is signalled.
        if not is_alive(process):
            return False
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, number)
        return True
    finally:
        os.close(handle)


def wait_for_end(process: ProcessIdentity, seconds: float) -> bool:
    """Wait until a process has ended; says whether it has."""
    deadline = time.monotonic() + seconds
    while is_alive(process):
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_SECONDS)
    return True
