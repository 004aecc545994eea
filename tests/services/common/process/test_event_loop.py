"""The event loop of the processes, and how the kernel runs their threads."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys

import pytest

from blockserve.common.process.event_loop import event_loop_factory
from blockserve.common.process.threads import take_turns


def test_the_processes_run_on_uvloop_where_it_is_installed() -> None:
    uvloop = pytest.importorskip("uvloop")
    with asyncio.Runner(loop_factory=event_loop_factory()) as runner:
        assert isinstance(runner.get_loop(), uvloop.Loop)


def test_without_uvloop_they_run_on_asyncio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert event_loop_factory() is None


@pytest.mark.skipif(sys.platform != "linux", reason="SCHED_BATCH is Linux's")
def test_a_sandbox_that_forbids_it_is_no_fault(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    take_turns()
    assert "SCHED_BATCH is refused" in caplog.text


@pytest.mark.skipif(sys.platform != "linux", reason="SCHED_BATCH is Linux's")
def test_threads_that_take_turns_hand_this_on_to_those_they_start() -> None:
    script = """
import os, threading
from blockserve.common.process.threads import take_turns
take_turns()
told = [os.sched_getscheduler(0)]
thread = threading.Thread(target=lambda: told.append(os.sched_getscheduler(0)))
thread.start()
thread.join()
print(*told)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(os.SCHED_BATCH)] * 2
