"""The life of a local cluster, with processes that do as they are told."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from blockserve.common.errors import LocalClusterError
from blockserve.local import keeper, record
from blockserve.local.cluster import LocalCluster
from blockserve.local.identity import ProcessIdentity, identify
from blockserve.local.layout import Layout
from blockserve.local.plan import ProcessSpec, make_plan
from support.edge import async_test

NUMBERS = itertools.count(2**22)


@dataclass
class Scripted:
    """One process."""

    world: World
    name: str
    ends_at_once: bool = False
    exit_status: int | None = None
    identity: ProcessIdentity = field(default_factory=lambda: ProcessIdentity(next(NUMBERS), 1, "none"))

    def address(self) -> str:
        return "" if self.ends_at_once or self.name in self.world.slow else f"unix:/{self.name}"

    def status(self) -> int | None:
        return 3 if self.ends_at_once else self.exit_status

    def last_words(self) -> str:
        return "first line\nerror: no zoo\nlook there"

    def ask_to_end(self) -> None:
        self.world.events.append(f"end {self.name}")
        self.exit_status = 0

    def close(self) -> None:
        self.world.events.append(f"close {self.name}")


@dataclass
class World:
    """Starts scripted processes and keeps what happens."""

    events: list[str] = field(default_factory=list)
    slow: set[str] = field(default_factory=set)
    broken: set[str] = field(default_factory=set)
    lives: dict[str, list[Scripted]] = field(default_factory=dict)

    def launch(self, spec: ProcessSpec) -> Scripted:
        self.events.append(f"start {spec.name}")
        process = Scripted(self, spec.name, spec.name in self.broken)
        self.lives.setdefault(spec.name, []).append(process)
        return process

    def ready(self, name: str, address: str) -> None:
        self.events.append(f"ready {name}")

    def ended(self, name: str, status: int, delay: float) -> None:
        self.events.append(f"ended {name} {status}")

    async def until(self, done: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not done():
                await asyncio.sleep(0.001)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(keeper, "next_delay", lambda previous, ran: 0.0)
    return World()


def cluster(world: World, folder: Path) -> LocalCluster:
    layout = Layout(folder)
    plan = make_plan(layout, zoo="/zoo", listen="127.0.0.1:1", num_workers=2, cores=2, memory_bytes=1 << 30)
    return LocalCluster(plan, layout, world, drain_seconds=1.0, launch=world.launch, look_seconds=0.001)


@async_test
async def test_state_first_router_last_and_everything_written_down(world: World, tmp_path: Path) -> None:
    made = cluster(world, tmp_path)
    await made.start()
    assert world.events[:2] == ["start state", "ready state"]
    assert made.address == "unix:/router"
    known = record.read(tmp_path / "cluster.json")
    assert known is not None
    assert known.owner == identify(os.getpid())
    assert known.address == made.address
    names = {"state", "controller", "router", "worker-1", "worker-2"}
    assert {one.name for one in known.processes} == names
    world.events.clear()
    await made.stop()
    ends = [event.removeprefix("end ") for event in world.events if event.startswith("end ")]
    assert ends[0] == "router"
    assert set(ends[1:3]) == {"worker-1", "worker-2"}
    assert ends[3:] == ["controller", "state"]
    assert world.events.index("close router") < world.events.index("end worker-1")
    assert not (tmp_path / "cluster.json").exists()


@async_test
async def test_what_ends_by_itself_is_started_again(world: World, tmp_path: Path) -> None:
    made = cluster(world, tmp_path)
    await made.start()
    for status in (1, 137):
        world.events.clear()
        world.lives["worker-2"][-1].exit_status = status
        await world.until(lambda: "ready worker-2" in world.events)
        assert world.events == [
            "close worker-2",
            f"ended worker-2 {status}",
            "start worker-2",
            "ready worker-2",
        ]
        known = record.read(tmp_path / "cluster.json")
        assert known is not None
        assert world.lives["worker-2"][-1].identity in {one.identity for one in known.processes}
    await made.stop()
    assert {name: len(lives) for name, lives in world.lives.items() if len(lives) > 1} == {"worker-2": 3}


@async_test
async def test_one_that_does_not_start_ends_the_others_and_says_why(world: World, tmp_path: Path) -> None:
    world.broken = {"worker-1"}
    made = cluster(world, tmp_path)
    with pytest.raises(LocalClusterError, match=r"worker-1 did not start: no zoo$"):
        await made.start()
    assert all(f"close {name}" in world.events for name in world.lives)
    assert not (tmp_path / "cluster.json").exists()
    world.broken.clear()
    again = cluster(world, tmp_path)
    await again.start()
    await again.stop()


@async_test
async def test_a_start_that_is_cancelled_leaves_nothing(world: World, tmp_path: Path) -> None:
    world.slow = {"router"}
    starting = asyncio.create_task(cluster(world, tmp_path).start())
    await world.until(lambda: "ready worker-1" in world.events)
    starting.cancel()
    with suppress(asyncio.CancelledError):
        await starting
    assert all(f"close {name}" in world.events for name in world.lives)
    assert not (tmp_path / "cluster.json").exists()


@async_test
async def test_a_second_one_says_what_runs(world: World, tmp_path: Path) -> None:
    made = cluster(world, tmp_path)
    await made.start()
    before = len(world.events)
    with pytest.raises(LocalClusterError, match=rf"on unix:/router, zoo /zoo, pid {os.getpid()}"):
        await cluster(world, tmp_path).start()
    assert len(world.events) == before
    assert (tmp_path / "cluster.json").exists()
    await made.stop()
