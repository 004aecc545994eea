"""Ending what a `blockzoo up` has started, alive or crashed: exactly that and nothing else."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass

from blockserve.local import record
from blockserve.local.identity import is_alive, send, wait_for_end
from blockserve.local.layout import Layout

GUARD_SECONDS = 8.0
"""For guards to end the processes of an owner that is gone."""


@dataclass(frozen=True, slots=True)
class Ended:
    """What was ended.

    Attributes:
        was_running: whether the owner lived.
        names: processes that ran, the owner left out.
        killed: those of them that had to be killed.
    """

    was_running: bool
    names: tuple[str, ...] = ()
    killed: tuple[str, ...] = ()


def end_cluster(layout: Layout) -> Ended | None:
    """Tell the owner to end its cluster, and end what it leaves. An owner that takes too long is killed.

    Returns:
        None when nothing is written down there.

    Raises:
        LocalClusterError: what is written there cannot be understood.
    """
    known = record.read(layout.record)
    if known is None:
        return None
    names = tuple(one.name for one in known.processes if is_alive(one.identity))
    was_running = send(known.owner, signal.SIGTERM)
    if was_running and not wait_for_end(known.owner, known.stop_seconds + GUARD_SECONDS):
        send(known.owner, signal.SIGKILL)
        wait_for_end(known.owner, GUARD_SECONDS)
    return Ended(was_running, names, end_leftovers(layout))


def end_leftovers(layout: Layout, *, wait: Callable[..., bool] = wait_for_end) -> tuple[str, ...]:
    """End the processes of an owner that is gone, and remove its files but the logs.

    Args:
        layout: where the cluster was.
        wait: `identity.wait_for_end`.

    Returns:
        Names of those that their guards did not end and that were killed.
    """
    known = record.read(layout.record)
    killed = []
    for process in known.processes if known else ():
        if not wait(process.identity, GUARD_SECONDS) and send(process.identity, signal.SIGKILL):
            killed.append(process.name)
            wait(process.identity, GUARD_SECONDS)
    for socket in layout.folder.glob("*.sock"):
        if socket.is_socket():
            socket.unlink(missing_ok=True)
    layout.record.unlink(missing_ok=True)
    return tuple(killed)
