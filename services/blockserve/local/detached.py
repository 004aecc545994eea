"""A cluster in the background: a process of its own session runs it, and we wait until it is ready."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence

from blockserve.common.errors import LocalClusterError
from blockserve.local import record
from blockserve.local.cluster import already_running
from blockserve.local.keeper import error_in
from blockserve.local.layout import Layout
from blockserve.local.record import ClusterRecord

NAME = "up"
"""Of the log of the process that runs the cluster."""
_LOOK_SECONDS = 0.1


def start_detached(command: Sequence[str], layout: Layout, on_ready: Callable[[], None]) -> ClusterRecord:
    """Run a command that runs a cluster, and wait until all of it has started.

    Args:
        command: runs a `LocalCluster` in `layout` in its foreground.
        layout: where; prepared.
        on_ready: called once for each process that is ready.

    Raises:
        LocalClusterError: a cluster runs there, or this one does not start.
    """
    with layout.locked() as free:
        if not free:
            raise already_running(layout)
    log = layout.log(NAME)
    with log.open("wb") as output:
        owner = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    told: set[str] = set()
    try:
        while owner.poll() is None:
            known = record.read(layout.record)
            if known is not None and known.owner.pid == owner.pid:
                for process in known.processes:
                    if process.address and process.name not in told:
                        told.add(process.name)
                        on_ready()
                if known.address:
                    return known
            time.sleep(_LOOK_SECONDS)
    except BaseException:
        owner.terminate()
        owner.wait()
        raise
    message, hint = error_in(log.read_text(encoding="utf-8", errors="replace"))
    raise LocalClusterError(
        f"the cluster did not start: {message}", hint=f"{hint} The logs are in {layout.folder}.".strip()
    )
