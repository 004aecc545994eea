"""The process between us and a child that must not outlive us; started by file name, never imported.

Standard input is the rope: one line of JSON says what to run, and when the other end is gone, in whatever way
its owner ended, the child is told to stop and after a while killed. Should this process be killed itself, the
kernel kills the child: it forks from the only thread there is, so that PR_SET_PDEATHSIG means the process.
Needs nothing but the standard library.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import subprocess
import sys

LOOK_SECONDS = 0.2
STOP_SECONDS = 3.0
_PR_SET_PDEATHSIG = 1


def main() -> int:
    """Run the child until it or the rope ends; the child's exit status, or 128 + signal."""
    parent = os.getppid()
    order = json.loads(sys.stdin.buffer.readline())
    guard = os.getpid()
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def die_with_guard() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != guard:
            os._exit(1)

    child = subprocess.Popen(
        order["command"],
        stdin=subprocess.PIPE,
        stdout=sys.stderr,
        stderr=sys.stderr,
        preexec_fn=die_with_guard,
    )
    assert child.stdin is not None
    try:
        child.stdin.write(order["input"].encode())
        child.stdin.close()
    except BrokenPipeError:
        pass  # it ended at once; its status says why
    sys.stdout.write(f"{child.pid}\n")
    sys.stdout.flush()
    # The process id is looked at too: a fork of our owner may hold the rope longer than the owner lives.
    while child.poll() is None and os.getppid() == parent:
        readable, _, _ = select.select([sys.stdin], [], [], LOOK_SECONDS)
        if readable:
            break
    return _stop(child)


def _stop(child: subprocess.Popen[bytes]) -> int:
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
    status = child.wait()
    return 128 - status if status < 0 else status


if __name__ == "__main__":
    sys.exit(main())
