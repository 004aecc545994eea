"""Several processes register adapters: the zoo is what one process makes of them, whatever ends early."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import pytest

from blockzoo import Zoo
from blockzoo.errors import BlockzooError, StorageError, VariantNotFoundError, ZooNotFoundError
from blockzoo.registering.batch import BatchEntry, read_batch
from blockzoo.registering.folder import RegisterResult
from blockzoo.registering.parallel import is_adapter, register_in_parallel, useful_jobs
from support.folders import (
    adapter_config,
    adapter_tensors,
    config,
    tensor,
    write_adapter,
    write_checkpoint,
)


@pytest.fixture
def fleet(tmp_path: Path) -> tuple[Zoo, list[BatchEntry]]:
    """A zoo with a base, and different adapters for it."""
    write_checkpoint(tmp_path / "base")
    zoo = Zoo.open(tmp_path / "zoo", create=True)
    zoo.register(tmp_path / "base", name="base")
    for number in range(32):
        items = {
            name: tensor(item.shape, seed=f"{number} {name}", dtype="F32")
            for name, item in adapter_tensors(config()).items()
        }
        write_adapter(tmp_path / "many" / f"bot-{number:02}", items=items)
    return zoo, read_batch(tmp_path / "many", "base")


_MANY = 1000
"""Variants of a command that is stopped on its way, which takes seconds for them even alone on a machine."""


def _long_command(zoo: Zoo, entries: list[BatchEntry]) -> list[str]:
    path = Path(zoo.url).parent / "many.yaml"
    places = [entries[number % len(entries)].source for number in range(_MANY)]
    path.write_text("".join(f"- {{folder: {place}, name: v{at}}}\n" for at, place in enumerate(places)))
    command = [sys.executable, "-m", "blockserve.cli", "register", "--all", str(path)]
    return [*command, "--base", "base", "--jobs", "2", "--zoo", zoo.url]


def test_it_is_as_with_one_process(fleet: tuple[Zoo, list[BatchEntry]], tmp_path: Path) -> None:
    zoo, entries = fleet
    outcomes = dict(register_in_parallel(zoo.url, entries, 2))
    assert outcomes.keys() == set(entries)
    assert all(isinstance(outcome, RegisterResult) for outcome in outcomes.values())
    assert not zoo.verify().problems
    alone = Zoo.open(tmp_path / "alone", create=True)
    alone.register(tmp_path / "base", name="base")
    for entry in entries:
        alone.register(entry.source, name=entry.name, base="base")
    assert _contents(zoo) == _contents(alone)
    assert not list((tmp_path / "zoo" / "leases").glob("*"))


def test_one_that_fails_leaves_the_others(fleet: tuple[Zoo, list[BatchEntry]], tmp_path: Path) -> None:
    zoo, entries = fleet
    write_adapter(tmp_path / "many" / "bot-05", adapter_config(r=99))
    outcomes = {entry.name: outcome for entry, outcome in register_in_parallel(zoo.url, entries, 2)}
    failed = outcomes.pop("bot-05")
    assert isinstance(failed, BlockzooError)
    assert failed.hint
    assert all(isinstance(outcome, RegisterResult) for outcome in outcomes.values())


def test_a_process_that_is_killed_loses_one(fleet: tuple[Zoo, list[BatchEntry]]) -> None:
    zoo, entries = fleet
    outcomes = register_in_parallel(zoo.url, entries, 2)
    got = [next(outcomes)]
    victim = _children(os.getpid())[0]
    os.kill(victim, signal.SIGKILL)
    got += list(outcomes)
    lost = [outcome for _, outcome in got if isinstance(outcome, BlockzooError)]
    assert len(lost) <= 1  # none where it was killed between two
    assert len(got) == len(entries)
    assert all("ended with status -9" in str(error) for error in lost)
    again = dict(register_in_parallel(zoo.url, entries, 2))
    assert all(isinstance(outcome, RegisterResult) for outcome in again.values())
    assert {outcome.record.version for outcome in again.values() if isinstance(outcome, RegisterResult)} == {
        1
    }


def test_when_all_are_killed_the_rest_is_told(fleet: tuple[Zoo, list[BatchEntry]]) -> None:
    zoo, entries = fleet
    outcomes = register_in_parallel(zoo.url, entries, 2)
    got = [next(outcomes)]
    for child in _children(os.getpid()):
        os.kill(child, signal.SIGKILL)
    got += list(outcomes)
    assert {entry.name for entry, _ in got} == {entry.name for entry in entries}
    assert any("no process was left" in str(outcome) for _, outcome in got)


def test_what_is_wrong_is_said_as_by_one_process(fleet: tuple[Zoo, list[BatchEntry]]) -> None:
    zoo, entries = fleet
    stray = [BatchEntry(entry.source, entry.name, "bass") for entry in entries[:4]]
    with pytest.raises(BlockzooError) as alone:
        zoo.register(stray[0].source, name="x", base="bass")
    for _, outcome in register_in_parallel(zoo.url, stray, 2):
        assert isinstance(outcome, VariantNotFoundError)
        assert (str(outcome), outcome.hint, outcome.metadata) == (
            str(alone.value),
            alone.value.hint,
            alone.value.metadata,
        )


def test_an_error_that_is_none_of_ours_costs_one_folder(fleet: tuple[Zoo, list[BatchEntry]]) -> None:
    zoo, entries = fleet
    odd = [BatchEntry(cast(str, number), f"odd-{number}", "base") for number in range(3)]  # no path at all
    outcomes = dict(register_in_parallel(zoo.url, [*odd, *entries], 2))
    for entry in odd:
        assert isinstance(outcomes[entry], StorageError)
        assert "TypeError" in str(outcomes[entry])
    assert all(isinstance(outcomes[entry], RegisterResult) for entry in entries)


def test_a_zoo_that_cannot_be_opened(fleet: tuple[Zoo, list[BatchEntry]], tmp_path: Path) -> None:
    _, entries = fleet
    outcomes = [outcome for _, outcome in register_in_parallel(str(tmp_path / "no-zoo"), entries, 2)]
    assert len(outcomes) == len(entries)
    assert all(isinstance(outcome, ZooNotFoundError) for outcome in outcomes)


def test_fewer_processes_where_the_machine_has_no_room(
    fleet: tuple[Zoo, list[BatchEntry]], monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo, entries = fleet
    begin, left = subprocess.Popen, [1]

    def start(*arguments: Any, **settings: Any) -> Any:
        if not left:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        left.pop()
        return begin(*arguments, **settings)

    monkeypatch.setattr("blockzoo.registering.parallel.subprocess.Popen", start)
    outcomes = dict(register_in_parallel(zoo.url, entries, 3))
    assert all(isinstance(outcome, RegisterResult) for outcome in outcomes.values())
    with pytest.raises(StorageError, match="no process could be started") as caught:
        list(register_in_parallel(zoo.url, entries, 3))
    assert "--jobs 1" in caught.value.hint


def test_whoever_leaves_early_waits_for_what_has_begun(fleet: tuple[Zoo, list[BatchEntry]]) -> None:
    zoo, entries = fleet
    outcomes = register_in_parallel(zoo.url, entries, 2)
    next(outcomes)
    outcomes.close()  # type: ignore[attr-defined]
    assert not _children(os.getpid())
    assert 1 <= len(zoo.variants()) - 1 < len(entries)
    assert not zoo.verify().problems


def test_they_end_with_the_command(fleet: tuple[Zoo, list[BatchEntry]]) -> None:
    zoo, entries = fleet
    with subprocess.Popen(_long_command(zoo, entries), stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        running.stdout.readline()
        children = _children(running.pid)
        running.kill()
    assert len(children) == 2
    deadline = time.monotonic() + 20
    while any(_is_alive(child) for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ctrl_c_says_what_was_done(fleet: tuple[Zoo, list[BatchEntry]]) -> None:
    zoo, entries = fleet
    with subprocess.Popen(_long_command(zoo, entries), stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        running.stdout.readline()
        children = _children(running.pid)
        running.send_signal(signal.SIGINT)
        running.communicate(timeout=30)
    assert not any(map(_is_alive, children))
    done = len(zoo.variants()) - 1
    assert running.returncode == 130
    assert 1 <= done < _MANY


def test_jobs_by_default(tmp_path: Path) -> None:
    assert useful_jobs(1000, "memory:", 4) == 1
    assert useful_jobs(10, "/zoo", None) == 1
    assert useful_jobs(3, "/zoo", 8) == 3
    assert 1 <= useful_jobs(1000, "/zoo", None) <= 8
    write_checkpoint(tmp_path / "base")
    assert not is_adapter(BatchEntry(str(tmp_path / "base"), "base"))
    assert not is_adapter(BatchEntry("org/model", "base"))


def _contents(zoo: Zoo) -> dict[str, object]:
    return {record.name: (record.chain, dict(record.files)) for record in zoo.variants()}


def _children(pid: int) -> list[int]:
    """Processes that register for a process."""
    found = []
    for child in map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
        if b"blockzoo.registering.parallel" in Path(f"/proc/{child}/cmdline").read_bytes():
            found.append(child)
    return found


def _is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
