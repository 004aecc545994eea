"""Of several planners one leads; one that was stopped in the middle of its work writes nothing afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

import pytest

from blockserve.common.api.cluster import (
    ClusterView,
    LoadReport,
    Placement,
    WorkerId,
    WorkerRecord,
    WorkerView,
)
from blockserve.common.state.memory import InProcessStore
from blockserve.common.state.store import Announcement, StateStore
from blockserve.controller.planning.planner import Planner
from blockzoo.errors import StorageError
from blockzoo.manifest import ChainId, ChainManifest
from blockzoo.zoo import Zoo
from support.edge import async_test
from support.folders import config, tensors, write_checkpoint

LEASE_SECONDS = 10.0
WORKER = WorkerId("w.1")


class StoppablePlanner(Planner):
    """Can be held while it plans, as a process is that gets no time."""

    def __init__(self, zoo: Zoo, store: StateStore, name: str) -> None:
        super().__init__(zoo, store, name, lease_seconds=LEASE_SECONDS, look_seconds=0.01)
        self.may_go_on = asyncio.Event()
        self.may_go_on.set()
        self.is_held = asyncio.Event()

    async def plan(self, view: ClusterView, demand: Mapping[ChainId, float]) -> Placement:
        if not self.may_go_on.is_set():
            self.is_held.set()
            await self.may_go_on.wait()
        return await super().plan(view, demand)


def make_zoo(folder: Path) -> tuple[Zoo, ChainId, ChainId]:
    zoo = Zoo.open(folder / "zoo", create=True)
    for seed, name in enumerate(("one", "two")):
        write_checkpoint(folder / name, config(), tensors(config(), seed=seed))
        zoo.register(folder / name, name=name)
    return zoo, zoo.resolve("one").chain, zoo.resolve("two").chain


async def placed(store: StateStore, *chains: ChainId) -> Placement:
    """The placement, once a worker is to hold these chains and no others."""
    while True:
        placement = (await store.view()).placement
        if {one.chain for one in placement.workers.get(WORKER, ())} == set(chains):
            return placement
        await asyncio.sleep(0.005)


@async_test
async def test_a_leader_that_was_stopped_is_followed_and_overwrites_nothing(tmp_path: Path) -> None:
    zoo, one, two = make_zoo(tmp_path)
    now = 1000.0
    first_store = InProcessStore(lambda: now)
    second_store, beside = first_store.another(), first_store.another()
    said = Announcement(WorkerRecord(WORKER, "w", "unix:/w"), LoadReport(), ())
    await beside.announce(said, lease_seconds=1e6)
    first, second = StoppablePlanner(zoo, first_store, "1"), StoppablePlanner(zoo, second_store, "2")
    try:
        first.start()
        await beside.tell_demand("r", {one: 1.0}, ttl_seconds=1e6)
        before = await placed(beside, one)
        second.start()
        first.may_go_on.clear()
        await first.is_held.wait()
        assert (first.leads, second.leads) == (True, False)

        now += LEASE_SECONDS + 1
        await beside.tell_demand("r", {two: 1.0}, ttl_seconds=1e6)
        after = await placed(beside, two)
        assert second.leads
        assert after.version > before.version

        first.may_go_on.set()
        while first.leads:
            await asyncio.sleep(0.005)
        assert second.leads
        assert (await beside.view()).placement == after
    finally:
        first.may_go_on.set()
        await first.stop()
        await second.stop()


OTHER_WORKER = WorkerId("v.2")
UNLOADED = LoadReport()


def with_load(worker: WorkerId, load: LoadReport = UNLOADED) -> WorkerView:
    return WorkerView(WorkerRecord(worker, worker[0], f"unix:/{worker}"), load)


@async_test
async def test_no_worker_is_given_what_it_could_not_read_a_moment_ago(tmp_path: Path) -> None:
    zoo, one, two = make_zoo(tmp_path)
    planner = Planner(zoo, InProcessStore(), "1", lease_seconds=LEASE_SECONDS, look_seconds=0.01, replicas=2)
    demand = {one: 1.0, two: 1.0}
    workers = {
        WORKER: with_load(WORKER, LoadReport(unreadable=(one,))),
        OTHER_WORKER: with_load(OTHER_WORKER),
    }
    held = await planner.plan(ClusterView(workers), demand)
    assert {run.chain for run in held.workers[WORKER]} == {two}
    assert {run.chain for run in held.workers[OTHER_WORKER]} == {one, two}
    workers[WORKER] = with_load(WORKER)
    well = await planner.plan(ClusterView(workers, held), demand)
    assert {run.chain for run in well.workers[WORKER]} == {one, two}


@async_test
async def test_a_storage_that_fails_makes_no_placement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left out of a placement, the chain would be let go by those who hold it."""
    zoo, one, _ = make_zoo(tmp_path)
    planner = Planner(zoo, InProcessStore(), "1", lease_seconds=LEASE_SECONDS, look_seconds=0.01)

    def fail(chain: ChainId) -> ChainManifest:
        raise StorageError(f"{chain}: Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(zoo, "chain", fail)
        with pytest.raises(StorageError):
            await planner.plan(ClusterView({WORKER: with_load(WORKER)}), {one: 1.0})
    plan = await planner.plan(ClusterView({WORKER: with_load(WORKER)}), {one: 1.0})
    assert {run.chain for run in plan.workers[WORKER]} == {one}
