"""Faults of the machine below one process, made by `faults.c`: a disk that returns EIO, a wrong clock.

The library is preloaded into the fork server, so every forked process has it, and does nothing until a test
gives the process a file to follow (`Faults.environment`).
"""

from __future__ import annotations

import functools
import mmap
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntFlag
from pathlib import Path

SOURCE = Path(__file__).with_name("faults.c")
FOLLOW = "PYTEST_FAULTS"
"""Variable with the file that a forked process follows; `support.fork_server` reads it, too."""
PATH_BYTES = 4096
_CONTROL = struct.Struct(f"<qII{PATH_BYTES}s")


class Broken(IntFlag):
    """What of a disk fails."""

    NOTHING = 0
    READS = 1
    WRITES = 2


@functools.cache
def library() -> Path | None:
    """The compiled library, made once for this process; None where there is no C compiler."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        return None
    folder = tempfile.TemporaryDirectory(prefix="blockzoo-faults-")
    made = Path(folder.name) / "faults.so"
    command = [compiler, "-O1", "-Wall", "-shared", "-fPIC", "-o", made, SOURCE, "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    _FOLDERS.append(folder)
    return made


_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []
"""Removed when this process ends."""


class Faults:
    """What is wrong with the machine below one process.

    Attributes:
        path: the file that the process follows; it survives the process.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        """Nothing is wrong yet.

        Args:
            path: a file to make.
            folder: the one whose disk can break.
        """
        self.path = path
        name = str(folder.resolve()).encode()
        assert len(name) < PATH_BYTES
        path.write_bytes(_CONTROL.pack(0, 0, 0, name))
        with path.open("r+b") as file:
            self._shared = mmap.mmap(file.fileno(), _CONTROL.size)

    @property
    def environment(self) -> dict[str, str]:
        """What a process has to be started with."""
        return {FOLLOW: str(self.path)}

    @property
    def num_failed(self) -> int:
        """Calls that failed so far."""
        return int(struct.unpack_from("<I", self._shared, 12)[0])

    @contextmanager
    def broken(self, what: Broken) -> Iterator[None]:
        """Have reads or writes in the folder fail with EIO meanwhile."""
        struct.pack_into("<I", self._shared, 8, what)
        try:
            yield
        finally:
            struct.pack_into("<I", self._shared, 8, Broken.NOTHING)

    def set_clock(self, ahead_seconds: float) -> None:
        """Have the wall clock be wrong by so much from now on."""
        struct.pack_into("<q", self._shared, 0, int(ahead_seconds * 1e9))
