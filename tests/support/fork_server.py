"""A process that has imported our programs and forks a copy of itself for each one that a test starts.

Importing torch, gRPC and a service takes 1 to 4 seconds of a core, and the tests in `tests/e2e` start some
three hundred processes. Forking from one that has the modules takes milliseconds.

What a forked program shares with `python -m blockserve.worker`: it is a process of its own, with its own
environment, settings, event loop, sockets and gRPC core; the same `__main__` runs in it through `runpy`; it
gets signals, prints, logs and exits in the same way, and dies with the test process.

What it does not: modules are imported already, so what importing them does, and in which order, is not
tested; `/proc/PID/cmdline` is the fork server's; and all copies have one hash seed, so they agree on every
`hash(str)`. Real commands run in `test_processes.py`, `test_up.py`, `test_serve.py` and `test_load.py`.

The server is a program, started by `support.forked` and never imported:

    python fork_server.py FD

FD is a Unix socket for messages. Each is a request, a JSON object with the module to run, its arguments and
its environment, together with three descriptors: the child's stdout, its stderr, and a pipe for reports.
Into the pipe the server writes the child's process id and, when it has ended, its exit status as
`subprocess` counts it (negative for a signal), a line each. The end of the socket ends the server, and with
it every child.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

SERVICES = ("worker", "router", "controller", "embedded")
LARGEST_REQUEST = 1 << 17
PR_SET_PDEATHSIG = 1
FOLLOW = "PYTEST_FAULTS"
"""See `support.faults`, which cannot be imported here."""

Children = dict[int, tuple[int, int]]
"""Process id and report pipe of running children, by the descriptors that say when they end."""


def import_programs() -> None:
    """Import what the programs import when they start, and what they import when they first need it."""
    for service in SERVICES:
        importlib.import_module(f"blockserve.{service}.server")
        importlib.import_module(f"blockserve.{service}.settings")
    importlib.import_module("blockserve.cli.app")
    verbs = importlib.import_module("blockserve.cli.verbs")
    for verb in pkgutil.iter_modules(verbs.__path__, "blockserve.cli.verbs."):
        importlib.import_module(verb.name)


def serve(control: socket.socket) -> dict[str, Any] | None:
    """Answer requests; returns the request in a child, and None in the server at its end."""
    children: Children = {}
    poll = select.poll()
    poll.register(control, select.POLLIN)
    while True:
        for descriptor, _ in poll.poll():
            if descriptor in children:
                poll.unregister(descriptor)
                _report_end(descriptor, *children.pop(descriptor))
                continue
            message, passed, _, _ = socket.recv_fds(control, LARGEST_REQUEST, 3)
            if not message:
                return None
            request, (stdout, stderr, report) = json.loads(message), passed
            pid = _fork()
            if pid == 0:
                _forget(control, report, children)
                _become(request["environment"], stdout, stderr)
                return dict(request)
            os.close(stdout)
            os.close(stderr)
            os.write(report, f"{pid}\n".encode())
            ended = os.pidfd_open(pid)
            children[ended] = pid, report
            poll.register(ended, select.POLLIN)


def _fork() -> int:
    """`os.fork`, where it is safe: had a second thread a lock, nobody would release it in the copy."""
    threads = list(Path("/proc/self/task").iterdir())
    assert len(threads) == 1, f"the fork server has {len(threads)} threads"
    server = os.getpid()
    pid = os.fork()
    if pid == 0:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != server:
            os._exit(1)
    return pid


def _forget(control: socket.socket, report: int, children: Children) -> None:
    """Close the server's descriptors in a child: an open copy of a pipe would hide its end from a reader."""
    control.close()
    os.close(report)
    for ended, (_, pipe) in children.items():
        os.close(ended)
        os.close(pipe)


def _become(environment: dict[str, str], stdout: int, stderr: int) -> None:
    """Take a child's own environment and descriptors."""
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, place in ((stdout, 1), (stderr, 2)):
        os.dup2(descriptor, place)
        os.close(descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if FOLLOW in environment:
        assert ctypes.CDLL(None).faults_follow(os.fsencode(environment[FOLLOW])) == 0


def _report_end(ended: int, pid: int, report: int) -> None:
    _, status = os.waitpid(pid, 0)
    with suppress(BrokenPipeError):  # nobody asks any more
        os.write(report, f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os.close(report)
    os.close(ended)


def main() -> dict[str, Any] | None:
    """Import everything, say so, and serve."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import_programs()
    # Looking for garbage writes to every object, and a copy would then have pages of its own for all of them.
    gc.collect()
    gc.freeze()
    control = socket.socket(fileno=int(sys.argv[1]))
    control.send(b"ready")
    return serve(control)


if __name__ == "__main__":
    # A child returns from `main`, so that its program runs and ends as the only one in its interpreter.
    program = main()
    if program is not None:
        sys.argv[1:] = program["arguments"]
        runpy.run_module(program["module"], run_name="__main__", alter_sys=True)
