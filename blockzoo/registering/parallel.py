"""Registering many adapters with several processes.

Most of the work is Python, of which a process runs one thread at a time. Each process opens the zoo for
itself and has a lease of its own, as commands on several machines would. They end with the process that
started them: the connection breaks, and what is being registered then is finished first.
"""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
from collections.abc import Generator, Sequence
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection, Pipe, wait
from typing import cast

from blockzoo.errors import BlockzooError, StorageError
from blockzoo.folders.checkpoint import FolderKind, folder_kind
from blockzoo.registering.batch import BatchEntry
from blockzoo.registering.folder import RegisterResult, register_folder
from blockzoo.storage import open_storage
from blockzoo.store.zoo_store import ZooStore

log = logging.getLogger(__name__)

MAX_JOBS = 8
"""Processes unless more are asked for: more were not measured, and each takes some 100 MB."""

_WORTHWHILE = 16
"""Adapters for each process, below which it is not worth its start, which takes as long as some five."""

_REPORT = "The error output has the details. If it is no fault of the folder or the disk, please report it."

_COLLECT_EVERY = 100_000
"""Objects that are new since the last collection of cycles, before the next; Python's default is 700."""

Outcome = RegisterResult | BlockzooError


def is_adapter(entry: BatchEntry) -> bool:
    """Tell whether an entry is an adapter's folder: nothing else in a list can depend on it."""
    with suppress(BlockzooError, OSError):
        return folder_kind(entry.folder) is FolderKind.ADAPTER
    return False


def useful_jobs(count: int, url: str, jobs: int | None) -> int:
    """Return how many processes are to register `count` adapters, 1 for this one alone.

    Args:
        count: adapters.
        url: of the zoo; one in memory cannot be shared.
        jobs: what the user asked for, None for what suits this machine.
    """
    if url.startswith("memory:"):
        return 1
    if jobs is None:
        # One more than cores, because each waits for the disk a sixth of its time.
        jobs = min(MAX_JOBS, len(os.sched_getaffinity(0)) + 1, count // _WORTHWHILE)
    return max(1, min(jobs, count))


def register_in_parallel(
    url: str, entries: Sequence[BatchEntry], jobs: int
) -> Generator[tuple[BatchEntry, Outcome], None, None]:
    """Register adapters of bases that the zoo holds; yields each with what became of it, in no fixed order.

    Whoever leaves the iteration early waits until what is being registered is finished.

    Args:
        url: of the zoo.
        entries: what `is_adapter` allows.
        jobs: processes.
    """
    left = list(reversed(entries))
    workers: list[_Process] = []
    try:
        _start(url, jobs, workers)
        for worker in workers:
            worker.begin(left.pop())
        while busy := {worker.connection: worker for worker in workers if worker.entry is not None}:
            for connection in wait(list(busy)):
                worker = busy[cast(Connection, connection)]
                entry, outcome = worker.end()
                if left and not worker.is_lost:
                    worker.begin(left.pop())
                yield entry, outcome
        for entry in reversed(left):
            yield entry, _lost("no process was left to register it")
    finally:
        for worker in workers:
            worker.connection.close()
        for worker in workers:
            worker.wait()


def _start(url: str, jobs: int, workers: list[_Process]) -> None:
    """Start processes, fewer where the machine has no room for as many; raises StorageError for none."""
    for _ in range(jobs):
        try:
            workers.append(_Process(url))
        except OSError as error:
            if not workers:
                raise StorageError(
                    f"no process could be started: {error.strerror}", hint="Run the command with --jobs 1."
                ) from error
            return


class _Process:
    """One process, which registers one adapter at a time."""

    def __init__(self, url: str) -> None:
        self.connection, theirs = Pipe()
        self.entry: BatchEntry | None = None
        self.is_lost = False
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", __name__, str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    # Ctrl-C is for the command; a registration is finished or was never begun.
                    process_group=0,
                )
            except OSError:
                self.connection.close()
                raise
        self.connection.send(url)

    def begin(self, entry: BatchEntry) -> None:
        self.entry = entry
        with suppress(OSError):  # told by `end`
            self.connection.send(entry)

    def end(self) -> tuple[BatchEntry, Outcome]:
        entry, self.entry = self.entry, None
        assert entry is not None
        try:
            return entry, cast(Outcome, self.connection.recv())
        except (EOFError, OSError):
            self.is_lost = True
            status = self._process.wait()
            return entry, _lost(f"the process that registered it ended with status {status}", status)

    def wait(self) -> None:
        try:
            self._process.wait()
        except BaseException:
            # A second Ctrl-C: what a killed process leaves behind goes with the next gc.
            self._process.kill()
            self._process.wait()
            raise


def _lost(why: str, status: int = 0) -> StorageError:
    # A system without memory kills.
    more = "; with --jobs 1, one process needs less memory" if status < 0 else ""
    return StorageError(why, hint=f"Run the command again{more}.")


def _serve(connection: Connection) -> None:
    """Register what comes over a connection until it is closed."""
    # To look at each registration's thousands of objects for cycles, which they have not, took a twentieth.
    gc.freeze()
    gc.set_threshold(_COLLECT_EVERY)
    url = connection.recv()
    with ExitStack() as stack, suppress(EOFError, BrokenPipeError, ConnectionResetError):
        store: ZooStore | None = None
        while True:
            entry = cast(BatchEntry, connection.recv())
            try:
                if store is None:
                    store = ZooStore.open(open_storage(url))
                    stack.enter_context(store.batch("register several"))
                outcome: Outcome = register_folder(
                    store, entry.source, name=entry.name, base=entry.base, revision=entry.revision
                )
            except BlockzooError as error:
                outcome = error
            except Exception as error:
                # Of one folder only; the others go on.
                log.exception("registering %s", entry.source)
                outcome = StorageError(f"{type(error).__name__}: {error}", hint=_REPORT)
            connection.send(outcome)


if __name__ == "__main__":
    with suppress(EOFError):
        _serve(Connection(int(sys.argv[1])))
