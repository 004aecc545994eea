"""`blockzoo up` and `down` with real processes: it answers, heals, and never stays behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest

from blockserve.client.blocking import Client
from blockserve.common.api.status import ClusterStatus
from blockserve.local import record
from blockserve.local.identity import is_alive
from blockserve.local.record import ClusterRecord
from blockzoo.zoo import Zoo
from support.forked import run_blockzoo
from support.variants import VariantFactory

PATIENCE = 120.0
PROMPT = "Every tenant sends requests"


@pytest.fixture(scope="module")
def zoo(factory: VariantFactory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = factory.checkpoint("llama-gqa-tied")
    place = tmp_path_factory.mktemp("zoo")
    zoo = Zoo.open(place, create=True)
    zoo.register(base.path, name="base")
    zoo.register(factory.top_quarter(base).path, name="tuned")
    return place


@pytest.fixture
def folder(tmp_path: Path, zoo: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cluster's folder; whatever a failed test leaves there is ended by `down`."""
    monkeypatch.setenv("BLOCKZOO_ZOO", str(zoo))
    monkeypatch.setenv("BLOCKZOO_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("BLOCKZOO_ENGINE_DTYPE", "float32")
    monkeypatch.setenv("BLOCKZOO_DRAIN_SECONDS", "5")
    yield tmp_path / "run"
    run_blockzoo("down")


def blockzoo(*words: str) -> subprocess.CompletedProcess[str]:
    """Run a command; `up` and `down` as users do, the others forked."""
    if words[0] not in ("up", "down"):
        return run_blockzoo(*words, timeout=PATIENCE)
    command = [sys.executable, "-m", "blockserve.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)


UP = ("up", "--workers", "2", "--listen", "127.0.0.1:0")


def until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def known(folder: Path) -> ClusterRecord:
    found = record.read(folder / "cluster.json")
    assert found is not None
    return found


def answer(address: str, model: str) -> tuple[int, ...]:
    with Client(address, timeout=PATIENCE) as client:
        return client.generate(model, PROMPT, temperature=0, max_tokens=12).result().token_ids


def workers(address: str) -> ClusterStatus:
    with Client(address, timeout=PATIENCE) as client:
        cluster = client.status().cluster
    assert cluster is not None
    return cluster


def metrics(folder: Path, name: str) -> str:
    (address,) = re.findall(r"metrics address=(\S+)", (folder / f"{name}.log").read_text())
    with urlopen(address, timeout=PATIENCE) as response:
        return response.read().decode()


def nothing_is_left(cluster: ClusterRecord) -> bool:
    return not any(is_alive(one.identity) for one in cluster.processes)


def test_a_detached_cluster_answers_heals_and_is_ended_by_down(folder: Path) -> None:
    started = blockzoo(*UP, "--detach", "--metrics-listen", "127.0.0.1:0")
    assert started.returncode == 0, started.stderr
    cluster = known(folder)
    assert cluster.address in started.stderr
    assert "blockzoo status" in started.stderr
    assert "except backup, restore, verify --repair and equivalence evaluate, which need the zoo" in (
        " ".join(started.stderr.split())
    )
    assert len(cluster.processes) == 5
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.glob("*.sock")}
    assert set(modes) == {"state.sock", "controller.sock", "worker-1.sock", "worker-2.sock"}
    assert set(modes.values()) == {0o600}

    listed = blockzoo("ls", "--server", cluster.address, "--json")
    assert [row["name"] for row in json.loads(listed.stdout)["variants"]] == ["base", "tuned"], listed.stderr
    assert blockzoo("rollback", "base", "--server", cluster.address).returncode == 1
    assert blockzoo("rm", "base@7", "--server", cluster.address, "--yes").returncode == 3

    first = {model: answer(cluster.address, model) for model in ("base", "tuned")}
    shown = {name: metrics(folder, name) for name in ("router", "controller", "worker-1", "worker-2")}
    assert "blockzoo_path_workers_count 2.0" in shown["router"]
    assert "blockzoo_controller_leading 1.0" in shown["controller"]
    assert all("blockzoo_lease_known 1.0" in shown[name] for name in ("worker-1", "worker-2"))
    assert first["base"] != first["tuned"]
    status = blockzoo("status", "--server", cluster.address, "--json")
    shown = json.loads(status.stdout)["cluster"]
    assert [worker["name"] for worker in shown["workers"]] == ["worker-1", "worker-2"]
    assert any(worker["segments"] for worker in shown["workers"])
    assert "worker-2" in blockzoo("status", "--server", cluster.address).stdout

    second = blockzoo(*UP)
    assert second.returncode == 1
    assert cluster.address in second.stderr
    assert f"pid {cluster.owner.pid}" in second.stderr

    # A worker that is killed is another life of the same name a moment later.
    before = {worker.name: worker.worker_id for worker in workers(cluster.address).workers}
    (killed,) = [one for one in cluster.processes if one.name == "worker-1"]
    os.kill(killed.identity.pid, signal.SIGKILL)

    def is_back() -> bool:
        now = {worker.name: worker.worker_id for worker in workers(cluster.address).workers}
        return now.keys() == before.keys() and now["worker-1"] != before["worker-1"]

    until(is_back)
    assert {model: answer(cluster.address, model) for model in first} == first
    assert "worker-1 ended with status 137" in (folder / "up.log").read_text()

    cluster = known(folder)
    ended = blockzoo("down", "--json")
    assert ended.returncode == 0, ended.stderr
    assert sorted(json.loads(ended.stdout)["ended"]) == sorted(one.name for one in cluster.processes)
    assert json.loads(ended.stdout)["killed"] == []
    assert not is_alive(cluster.owner)
    assert nothing_is_left(cluster)
    assert not list(folder.glob("*.sock"))
    assert "No cluster runs" in blockzoo("down").stdout


def foreground(folder: Path) -> tuple[subprocess.Popen[str], ClusterRecord]:
    process = subprocess.Popen(
        [sys.executable, "-m", "blockserve.cli", *UP], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    lines: list[str] = []
    while not (lines and lines[-1].startswith("Try: ")):
        lines.append(process.stderr.readline())
        assert lines[-1], "".join(lines)
    return process, known(folder)


def test_nothing_outlives_a_killed_up_and_down_clears_up(folder: Path) -> None:
    process, cluster = foreground(folder)
    with process:
        assert all(is_alive(one.identity) for one in cluster.processes)
        process.kill()
        process.wait()
        until(lambda: nothing_is_left(cluster))
    ended = blockzoo("down")
    assert ended.returncode == 0, ended.stderr
    assert "had crashed" in ended.stdout
    assert not list(folder.glob("*.sock"))
    assert not (folder / "cluster.json").exists()


def test_ctrl_c_lets_answers_end_and_then_ends_everything(folder: Path) -> None:
    process, cluster = foreground(folder)
    with process, Client(cluster.address, timeout=PATIENCE) as client:
        whole = client.generate("base", PROMPT, temperature=0, max_tokens=40, ignore_eos=True).result()
        chunks = iter(client.generate("base", PROMPT, temperature=0, max_tokens=40, ignore_eos=True))
        first = next(chunks)
        process.send_signal(signal.SIGINT)
        told = [*first.token_ids, *(token for chunk in chunks for token in chunk.token_ids)]
        assert tuple(told) == whole.token_ids
        assert process.stderr is not None
        rest = process.stderr.read()
        assert process.wait(PATIENCE) == 0, rest
        assert "Traceback" not in rest
    assert nothing_is_left(cluster)
    assert not (folder / "cluster.json").exists()


def test_a_cluster_that_cannot_start_says_why_and_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLOCKZOO_ENGINE_DTYPE", "int1")
    for words in ((), ("--detach",)):
        failed = blockzoo("up", "--listen", "127.0.0.1:0", "--workers", "1", *words)
        assert failed.returncode == 1
        assert "did not start" in failed.stderr
        assert "dtype" in failed.stderr
    assert not list(folder.glob("*.sock"))
    assert not (folder / "cluster.json").exists()


def test_up_without_a_zoo(folder: Path, tmp_path: Path) -> None:
    outcome = blockzoo(*UP, "--zoo", str(tmp_path / "none"))
    assert outcome.returncode == 3
    assert "there is no zoo" in outcome.stderr
