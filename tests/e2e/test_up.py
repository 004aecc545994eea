"""`blockzoo up`: a whole cluster, restarts, an end that leaves nothing, and `down`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockserve.router.client import Client
from blockzoo.zoo import Zoo
from support.state_servers import free_port
from support.variants import VariantFactory

PATIENCE = 90.0


@pytest.fixture
def zoo(tmp_path: Path) -> Zoo:
    zoo = Zoo.open(tmp_path / "zoo", create=True)
    zoo.register(VariantFactory(tmp_path / "variants").checkpoint("llama-gqa-tied").path, name="base")
    return zoo


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    made = Path("/tmp") / f"bz-{os.getpid()}-{time.monotonic_ns()}"  # Unix sockets have short paths
    yield made
    subprocess.run(["rm", "-rf", str(made)], check=True)


def blockzoo(*words: str) -> list[str]:
    return [sys.executable, "-m", "blockserve.cli", *words]


def wait_for(condition: object, what: str) -> None:
    until = time.monotonic() + PATIENCE
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < until, f"waited in vain for {what}"
        time.sleep(0.1)


def state(folder: Path) -> dict[str, object]:
    try:
        return dict(json.loads((folder / "cluster.json").read_text()))
    except (OSError, ValueError):
        return {}


def members(folder: Path) -> list[int]:
    """Processes whose command line names the folder: every child of the cluster."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(folder).encode() in words:
                found.append(int(entry.name))
    return found


def test_up_serves_restarts_and_leaves_nothing_behind(zoo: Zoo, folder: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    words = ["up", "--workers", "2", "--zoo", zoo.url, "--listen", address, "--dir", str(folder)]
    process = subprocess.Popen(blockzoo(*words), stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: process.poll() is not None or state(folder), "the cluster")
        with Client(address) as client:
            first = client.generate("base", "Every tenant", max_tokens=8, temperature=0).result()
            # A second one in the same folder is refused and changes nothing.
            again = subprocess.run(blockzoo(*words), capture_output=True, text=True)
            assert again.returncode != 0
            assert "runs in" in again.stderr
            worker = state(folder)["processes"]["worker-1"]  # type: ignore[index]
            os.kill(worker, signal.SIGKILL)
            second = client.generate("base", "Every tenant", max_tokens=8, temperature=0).result()
            assert second.token_ids == first.token_ids
        assert oct(folder.stat().st_mode & 0o777) == "0o700"
        assert all(path.stat().st_mode & 0o077 == 0 for path in folder.glob("*.yaml"))
        process.kill()
        wait_for(lambda: not members(folder), "the end of every process")
        assert subprocess.run(blockzoo("down", "--dir", str(folder)), capture_output=True).returncode == 0
    finally:
        process.kill()
        process.communicate()


def test_a_detached_cluster_is_ended_by_down(zoo: Zoo, folder: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    words = ["up", "-n", "1", "--zoo", zoo.url, "--listen", address, "--dir", str(folder), "--detach"]
    started = subprocess.run(blockzoo(*words), capture_output=True, text=True, timeout=PATIENCE)
    assert started.returncode == 0, started.stderr
    with Client(address) as client:
        assert len(client.generate("base", "Every", max_tokens=4, ignore_eos=True).result().token_ids) == 4
    ended = subprocess.run(blockzoo("down", "--dir", str(folder)), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert address in ended.stdout
    wait_for(lambda: not members(folder), "the end of every process")
    assert not state(folder)
