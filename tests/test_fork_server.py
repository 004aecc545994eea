"""Processes from the fork server are what the commands are, as far as tests look."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.forked import ForkServer, fork_server, run_blockzoo
from support.paths import TINY_ZOO

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")


@pytest.fixture
def settings():
    """The environment of a worker that is alone."""
    return {
        **os.environ,
        "BLOCKZOO_ZOO": str(TINY_ZOO),
        "BLOCKZOO_LISTEN": "127.0.0.1:0",
        "BLOCKZOO_STATE_URL": "memory:",
        "BLOCKZOO_ENGINE_KV_CACHE_BYTES": str(1 << 20),
    }


@pytest.fixture
def start(settings, tmp_path):
    """Starts forked workers that print when they are ready, and kills them at the end."""
    started = []

    def run(server=None):
        with (tmp_path / "log").open("ab") as log:
            process = (server or fork_server()).start("blockserve.worker", settings, log)
        started.append(process)
        line = process.stdout.readline()
        assert line.startswith(b"ready "), (tmp_path / "log").read_text()
        return process

    yield run
    for process in started:
        process.kill()


@pytest.mark.parametrize("words", [["--help"], ["ls"], ["ls", "--json"], ["show", "nobody"], ["nonsense"]])
def test_command_lines_say_and_return_the_same(words):
    command = [sys.executable, "-m", "blockserve.cli", *words]
    settings = {"BLOCKZOO_ZOO": str(TINY_ZOO)}
    real = subprocess.run(command, capture_output=True, text=True, env=os.environ | settings)
    forked = run_blockzoo(*words, **settings)
    assert (forked.returncode, forked.stdout, forked.stderr) == (real.returncode, real.stdout, real.stderr)


def test_signals_and_exit_statuses_arrive(start):
    first, second = start(), start()
    assert first.pid != second.pid
    assert (first.poll(), second.poll()) == (None, None)
    with pytest.raises(subprocess.TimeoutExpired):
        first.wait(0.01)
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) == 0
    second.kill()
    assert second.wait(60) == -signal.SIGKILL == second.returncode
    second.send_signal(signal.SIGTERM)  # nobody else may have its process id by now


def test_no_child_outlives_its_server(start):
    server = ForkServer()
    process = start(server)
    os.kill(server._popen.pid, signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    deadline = time.monotonic() + 60
    while Path(f"/proc/{process.pid}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    server.close()


def test_what_libraries_may_read_has_to_be_as_it_was(settings):
    server = fork_server()
    assert server.can_start(settings)
    assert not server.can_start({**settings, "OMP_NUM_THREADS": "2"})
    assert not server.can_start({**settings, "GRPC_VERBOSITY": "debug"})
