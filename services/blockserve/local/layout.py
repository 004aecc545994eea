"""The folder of a local cluster: sockets, logs, and what runs."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from blockserve.common.errors import LocalClusterError

MAX_SOCKET_PATH = 107
"""Bytes of a Unix socket's path. Source: unix(7), `sun_path`, less its closing zero."""
_LONGEST_NAME = "worker-9999.sock"


def default_folder() -> Path:
    """Where a cluster is unless somebody says otherwise. Source: the XDG base directory specification."""
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "blockzoo"


@dataclass(frozen=True, slots=True)
class Layout:
    """The files of a cluster in its folder."""

    folder: Path

    def socket(self, name: str) -> Path:
        """Where a process listens."""
        return self.folder / f"{name}.sock"

    def log(self, name: str) -> Path:
        """Where a process logs."""
        return self.folder / f"{name}.log"

    @property
    def record(self) -> Path:
        """What runs; see `blockserve.local.record`."""
        return self.folder / "cluster.json"

    def prepare(self) -> None:
        """Make the folder, or check the one that is there.

        Raises:
            LocalClusterError: others may look into it, or its path is too long for sockets.
        """
        if len(os.fsencode(self.folder / _LONGEST_NAME)) > MAX_SOCKET_PATH:
            raise LocalClusterError(
                f"the path {self.folder} is too long for Unix sockets",
                hint="Choose a shorter one with --dir.",
            )
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = self.folder.stat()
        if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
            raise LocalClusterError(
                f"other users may access {self.folder}, where the processes meet",
                hint=f"Choose another folder with --dir, or: chmod 700 {self.folder}",
            )

    @contextmanager
    def locked(self) -> Iterator[bool]:
        """Try to be the one process that runs a cluster here; yields whether we are."""
        handle = os.open(self.folder / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True
        finally:
            os.close(handle)
