"""Signals: the first one drains, the second one does not wait. Real processes over fakes."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from blockserve.client.blocking import Client
from blockserve.common.errors import ServerStoppingError
from support.paths import SUPPORT

PROGRAM = f"""
import sys, types
support = types.ModuleType("support"); support.__path__ = [{str(SUPPORT)!r}]; sys.modules["support"] = support
from support.edge import FakeZoo, ScriptedEngine, fake_parts
from blockserve.embedded.settings import EmbeddedSettings
from blockserve.embedded.run import run

import asyncio
zoo = FakeZoo(); zoo.add("tale")
def make_engine(zoo, config):
    async def make():
        engine = ScriptedEngine(); engine.hold_at = 1
        return engine
    return asyncio.run(make())
parts = fake_parts(zoo, None)
parts = type(parts)(open_zoo=parts.open_zoo, make_engine=make_engine, import_engine=STARTING)
settings = EmbeddedSettings.load(listen=sys.argv[1], drain_seconds=float(sys.argv[2]), metrics_listen="off")
run(settings, parts=parts, on_ready=lambda server: print("ready", flush=True))
print("ended", flush=True)
"""


@contextmanager
def process(
    tmp_path: Path, *, drain: float, starting: str = "lambda: None"
) -> Iterator[subprocess.Popen[str]]:
    """A server process; killed at the end if it is still there."""
    address = f"unix:{tmp_path}/s.sock"
    command = [sys.executable, "-c", PROGRAM.replace("STARTING", starting), address, str(drain)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            yield server
        finally:
            server.kill()


def line(server: subprocess.Popen[str]) -> str:
    assert server.stdout is not None
    return server.stdout.readline().strip()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_idle_server_ends_in_order(tmp_path: Path, number: signal.Signals) -> None:
    with process(tmp_path, drain=30) as server:
        assert line(server) == "ready"
        assert (tmp_path / "s.sock").exists()
        server.send_signal(number)
        assert line(server) == "ended"
        assert server.wait(30) == 0
        assert not (tmp_path / "s.sock").exists()


def test_answers_still_running_at_the_bound_are_cut_off(tmp_path: Path) -> None:
    with process(tmp_path, drain=0.2) as server:
        assert line(server) == "ready"
        with Client(f"unix:{tmp_path}/s.sock", resume_attempts=0) as zoo:
            chunks = iter(zoo.generate("tale", "x", max_tokens=3))
            next(chunks)
            server.send_signal(signal.SIGINT)
            with pytest.raises(ServerStoppingError):
                next(chunks)
        assert line(server) == "ended"
        assert server.wait(30) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_at_once(tmp_path: Path, number: signal.Signals) -> None:
    with process(tmp_path, drain=3600) as server:
        assert line(server) == "ready"
        with Client(f"unix:{tmp_path}/s.sock", resume_attempts=0) as zoo:
            next(iter(zoo.generate("tale", "x", max_tokens=3)))
            chunks = iter(zoo.generate("tale", "x", max_tokens=3))
            next(chunks)
            server.send_signal(number)
            assert server.stderr is not None
            while "stopping requests=" not in server.stderr.readline():
                pass
            server.send_signal(number)
            assert server.wait(30) == 130
        assert not (tmp_path / "s.sock").exists()


def test_ctrl_c_while_starting_ends_without_a_traceback(tmp_path: Path) -> None:
    slow = "lambda: print('importing', flush=True) or __import__('time').sleep(1)"
    with process(tmp_path, drain=30, starting=slow) as server:
        assert line(server) == "importing"
        server.send_signal(signal.SIGINT)
        output, errors = server.communicate(timeout=30)
        assert server.returncode == 0
        assert "ended" in output
        assert "ready" not in output
        assert "Traceback" not in errors


def test_a_server_that_cannot_start_says_why_in_two_lines(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "blockserve.embedded"]
    environment = {"BLOCKZOO_ZOO": str(tmp_path / "none"), "BLOCKZOO_LISTEN": f"unix:{tmp_path}/s.sock"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "error: " in done.stderr
    assert not (tmp_path / "s.sock").exists()


def test_a_server_whose_engine_ends_ends_too(tmp_path: Path) -> None:
    failing = "lambda: None"
    program = PROGRAM.replace("STARTING", failing).replace(
        "engine.hold_at = 1",
        "engine.failed = lambda: asyncio.sleep(0.2, EngineFailedError('the engine ended: a bug'))",
    )
    program = "from blockserve.common.errors import EngineFailedError\n" + program
    command = [sys.executable, "-c", program, f"unix:{tmp_path}/s.sock", "30"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "the process ends: the engine ended: a bug" in done.stderr
    assert not (tmp_path / "s.sock").exists()
