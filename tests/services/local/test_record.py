"""Processes by identity, the folder of a cluster, and what is written down there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from blockserve.common.errors import LocalClusterError
from blockserve.local import record
from blockserve.local.ending import Ended, end_cluster
from blockserve.local.identity import ProcessIdentity, identify, is_alive, send, wait_for_end
from blockserve.local.layout import Layout, default_folder
from blockserve.local.record import ClusterRecord, RecordedProcess
from blockserve.local.share import usable_memory

GONE = ProcessIdentity(2**22, 1, "another boot")


def sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])


def test_a_process_is_signalled_only_as_itself() -> None:
    with sleeper() as process:
        known = identify(process.pid)
        assert known is not None
        assert is_alive(known)
        for other in (replace(known, started=known.started - 1), replace(known, boot="another")):
            assert not is_alive(other)
            assert not send(other, signal.SIGKILL)
        assert process.poll() is None
        assert not wait_for_end(known, 0.0)
        assert send(known, signal.SIGKILL)
        assert wait_for_end(known, 60.0)
        # Not reaped yet: its number is taken, but it is no process any more.
        assert identify(process.pid) is None
        assert not send(known, signal.SIGKILL)
    assert not send(known, signal.SIGKILL)


def test_the_folder_is_closed_to_others(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "a" / "b")
    layout.prepare()
    layout.prepare()
    assert layout.folder.stat().st_mode & 0o777 == 0o700
    layout.folder.chmod(0o750)
    with pytest.raises(LocalClusterError, match="other users may access") as caught:
        layout.prepare()
    assert "chmod 700" in caught.value.hint


def test_a_folder_too_deep_for_sockets_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LocalClusterError, match="too long"):
        Layout(tmp_path / ("x" * 100)).prepare()


def test_the_default_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/somewhere")
    assert default_folder() == Path("/somewhere/blockzoo")
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert default_folder() == Path("/home/me/.local/state/blockzoo")


def test_one_holds_the_lock(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    with layout.locked() as first, layout.locked() as second:
        assert (first, second) == (True, False)
    with layout.locked() as again:
        assert again


def test_a_record_is_read_as_written(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    assert record.read(layout.record) is None
    us = identify(os.getpid())
    assert us is not None
    processes = (RecordedProcess("router", us, "127.0.0.1:1"), RecordedProcess("worker-1", GONE))
    written = ClusterRecord(us, "/zoo", "127.0.0.1:1", processes, 12.5)
    record.write(layout.record, written)
    assert record.read(layout.record) == written
    assert layout.record.stat().st_mode & 0o777 == 0o600
    assert written.describe() == f"on 127.0.0.1:1, zoo /zoo, pid {us.pid} (router {us.pid})"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 2}', '{"format": 1, "owner": 3}'])
def test_a_record_that_cannot_be_understood_is_an_error(tmp_path: Path, text: str) -> None:
    layout = Layout(tmp_path)
    layout.record.write_text(text)
    with pytest.raises(LocalClusterError, match="not a readable list"):
        end_cluster(layout)


def test_nothing_to_end(tmp_path: Path) -> None:
    assert end_cluster(Layout(tmp_path)) is None


def test_ending_spares_whoever_has_the_numbers_now(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    with sleeper() as process:
        known = identify(process.pid)
        assert known is not None
        former = replace(known, started=known.started - 1)
        record.write(layout.record, ClusterRecord(former, "/zoo", "", (RecordedProcess("router", former),)))
        layout.log("router").write_text("kept")
        assert end_cluster(layout) == Ended(was_running=False)
        assert process.poll() is None
        assert not layout.record.exists()
        assert layout.log("router").exists()
        process.kill()


@pytest.mark.parametrize(("limit", "expected"), [("1000000\n", 1_000_000), ("max\n", None)])
def test_memory_is_bounded_by_the_group(tmp_path: Path, limit: str, expected: int | None) -> None:
    group = tmp_path / "sys/fs/cgroup/a/b"
    group.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/a/b\n")
    (group / "memory.max").write_text("max\n")
    (group.parent / "memory.max").write_text(limit)
    whole = usable_memory(tmp_path / "nothing")
    assert usable_memory(tmp_path) == (expected or whole)
