"""A child process that ends when we do, also when we are killed: `child_guard` stands between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

STOP_SECONDS = 6.0
"""The guard gives the child half of it before it kills it."""


class GuardedChild:
    """A running program with its input; what it prints is kept for error messages.

    Args:
        command: program and arguments; process lists show them, so secrets go into `text`.
        text: what the child reads from its standard input.
        environment: of the child; None gives it ours.
        log: a file to append what it prints to; None keeps that only as long as it runs.

    Raises:
        OSError: the guard cannot be started.
    """

    def __init__(
        self,
        command: Sequence[str],
        text: str = "",
        *,
        environment: Mapping[str, str] | None = None,
        log: Path | None = None,
    ) -> None:
        # Both live as long as the child.
        self._output: IO[bytes] = tempfile.TemporaryFile() if log is None else log.open("a+b")  # noqa: SIM115
        self._begin = self._output.seek(0, os.SEEK_END)
        guard = Path(__file__).with_name("child_guard.py")
        self._guard = subprocess.Popen(
            [sys.executable, "-I", "-S", str(guard)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._output,
            env=environment,
            # Ctrl-C in the terminal is our business; we stop the child when we are done with it.
            start_new_session=True,
        )
        assert self._guard.stdin is not None
        assert self._guard.stdout is not None
        order = json.dumps({"command": list(command), "input": text})
        with suppress(BrokenPipeError):  # when the guard ended at once; `output` says why
            self._guard.stdin.write(f"{order}\n".encode())
            self._guard.stdin.flush()
        line = self._guard.stdout.readline()
        self._guard.stdout.close()
        self.pid: int | None = int(line) if line else None
        """The child's process id; None when it did not start."""

    @property
    def is_running(self) -> bool:
        """Whether the child has not ended."""
        return self._guard.poll() is None

    @property
    def output(self) -> str:
        """The last of what the child has printed."""
        self._output.seek(self._begin)
        return self._output.read()[-2000:].decode(errors="replace")

    def wait(self, timeout: float) -> int:
        """The child's exit status; 128 + n when signal n ended it.

        Raises:
            subprocess.TimeoutExpired: it runs on.
        """
        return self._guard.wait(timeout)

    def stop(self) -> None:
        """End the child and wait for it; it is asked first and killed when it does not follow."""
        assert self._guard.stdin is not None
        with suppress(BrokenPipeError):
            self._guard.stdin.close()
        try:
            self._guard.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._guard.send_signal(signal.SIGKILL)
            self._guard.wait()
        self._output.close()
