"""Processes from the fork server of this test session, with the part of `subprocess.Popen` that tests use."""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from support.faults import library

PROGRAM = Path(__file__).with_name("fork_server.py")
PATIENCE = 120.0
"""Seconds in which the server imports everything, on a machine that is busy with other work."""


class ForkedProcess:
    """A child of the fork server.

    Attributes:
        pid: its process id.
        returncode: as in `subprocess.Popen`: None until `poll` or `wait` saw its end.
        stdout: what it prints, if that goes into a pipe.
    """

    def __init__(self, report: BinaryIO, stdout: BinaryIO | None = None) -> None:
        """Take the reading ends of its pipes."""
        self.stdout = stdout
        self.returncode: int | None = None
        self._report = report
        self._reading = threading.Lock()
        self.pid = int(report.readline())

    def poll(self) -> int | None:
        """Its exit status, or None while it runs."""
        return self._status(0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; its exit status.

        Raises:
            subprocess.TimeoutExpired: it still runs after `timeout` seconds.
        """
        status = self._status(timeout)
        if status is None:
            raise subprocess.TimeoutExpired(PROGRAM.name, timeout or 0.0)
        return status

    def send_signal(self, number: int) -> None:
        """Signal it, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """kill -9."""
        self.send_signal(signal.SIGKILL)

    def _status(self, timeout: float | None) -> int | None:
        """Any thread may wait while another asks, so nobody waits with the lock."""
        poll = select.poll()
        poll.register(self._report, select.POLLIN)
        if self.returncode is None and poll.poll(None if timeout is None else timeout * 1000):
            with self._reading:
                if self.returncode is None:
                    line = self._report.readline()
                    # Without a status the server was killed, and by the kernel every child with it.
                    self.returncode = int(line) if line else -signal.SIGKILL
        return self.returncode


class ForkServer:
    """`support.fork_server`, running until this process ends or `close`.

    Attributes:
        environment: what it was started with; see `can_start`.
    """

    def __init__(self) -> None:
        """Start it and wait until it has imported everything."""
        self.environment = {**_foreign(os.environ), "OMP_NUM_THREADS": "1"}
        faults = library()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._popen = subprocess.Popen(
                [*ending_with_us(), sys.executable, PROGRAM, str(theirs.fileno())],
                # Not in `environment`: the server's children forget it, so their own children do without.
                env={**self.environment, **({"LD_PRELOAD": str(faults)} if faults else {})},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self._control.settimeout(PATIENCE)
        assert self._control.recv(16) == b"ready", "the fork server did not start"

    def can_start(self, environment: Mapping[str, str]) -> bool:
        """Whether a process with this environment is the same when forked.

        Our own settings are read when a program starts. Other variables may be read when a library is loaded,
        which in the fork server happened before.
        """
        return _foreign(environment) == self.environment

    def start(
        self,
        module: str,
        environment: Mapping[str, str],
        stderr: BinaryIO,
        *,
        arguments: Sequence[str] = (),
        stdout: BinaryIO | None = None,
    ) -> ForkedProcess:
        """Run `python -m MODULE ARGUMENTS` in a copy of the server.

        Args:
            module: one of our packages with a `__main__`.
            environment: all of the child's.
            stderr: where it goes.
            arguments: of the command line.
            stdout: where it goes; None makes a pipe that the process has as `stdout`.
        """
        assert self.can_start(environment)
        request = {"module": module, "arguments": list(arguments), "environment": dict(environment)}
        report, its_report = os.pipe()
        pipe, its_stdout = os.pipe() if stdout is None else (None, stdout.fileno())
        descriptors = [its_stdout, stderr.fileno(), its_report]
        socket.send_fds(self._control, [json.dumps(request).encode()], descriptors)
        os.close(its_report)
        if pipe is None:
            return ForkedProcess(open(report, "rb"))
        os.close(its_stdout)
        return ForkedProcess(open(report, "rb"), open(pipe, "rb"))

    def close(self) -> None:
        """End it and every process that it started."""
        self._control.close()
        self._popen.wait()


@functools.cache
def fork_server() -> ForkServer | None:
    """The one of this test process, started by the first test that needs it; None where there is no Linux."""
    if sys.platform != "linux":
        return None
    server = ForkServer()
    atexit.register(server.close)
    return server


def run_blockzoo(*words: str, timeout: float = PATIENCE, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run the command line `blockzoo WORDS` to its end, forked if that is the same; both outputs as text.

    Args:
        words: of the command line.
        timeout: seconds after which it is killed.
        settings: variables of its environment, beside those of this process.

    Raises:
        subprocess.TimeoutExpired: it was killed.
    """
    environment, server = {**os.environ, **settings}, fork_server()
    module, words = "blockserve.cli", tuple(map(str, words))
    if server is None or not server.can_start(environment):
        return subprocess.run(
            [sys.executable, "-m", module, *words],
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        process = server.start(module, environment, stderr, arguments=words, stdout=stdout)
        try:
            status = process.wait(timeout)
        finally:
            process.kill()
        texts = []
        for output in (stdout, stderr):
            output.seek(0)
            texts.append(output.read().decode())
    return subprocess.CompletedProcess(["blockzoo", *words], status, *texts)


def ending_with_us() -> list[str]:
    """What stands before a command so that the kernel ends it when we are gone, also after `kill -9`.

    Not `preexec_fn`: gRPC has threads and fork handlers here, and Python code before exec would meet both.
    """
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL"] if setpriv else []


def _foreign(environment: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value for name, value in environment.items() if not name.startswith(("BLOCKZOO_", "PYTEST_"))
    }
