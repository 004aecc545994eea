"""What a controller shows: who leads, what was placed, and what was refused."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

import pytest

from blockserve.common.api.cluster import (
    Assignment,
    LoadReport,
    Placement,
    Run,
    WorkerId,
    WorkerRecord,
)
from blockserve.common.metrics.cluster_catalogue import CONTROLLER
from blockserve.common.state.memory import InProcessStore
from blockserve.common.state.store import Announcement, FencingToken
from blockserve.controller.metrics import ControllerMetrics
from blockserve.controller.planning.counts import PlanningCounts
from blockserve.controller.planning.planner import Planner
from blockserve.controller.settings import ControllerSettings
from blockzoo.manifest import ChainId
from blockzoo.zoo import Zoo
from support.edge import async_test
from support.folders import config, tensors, write_checkpoint
from support.scrape import Scraped, scrape


def _held(**workers: tuple[int, ...]) -> Placement:
    """Runs of one link each, by where they begin."""
    wanted: Mapping[WorkerId, tuple[Assignment, ...]] = {
        WorkerId(name): tuple(Assignment(ChainId("c"), Run(first, first + 1)) for first in firsts)
        for name, firsts in workers.items()
    }
    return Placement(1, wanted)


def test_loads_and_unloads_are_those_of_workers_that_live() -> None:
    counts = PlanningCounts()
    counts.note_placed(_held(a=(0, 1), dead=(2,)), _held(a=(1, 2), b=(0,)), 100)
    assert (counts.placements, counts.loads, counts.unloads, counts.moved_bytes) == (1, 2, 1, 100)


class Overtaken(InProcessStore):
    """Another controller takes the lead just before a placement is written."""

    async def place(self, placement: Placement, token: FencingToken) -> Placement:
        await self.resign("one")
        assert await self.lead("other", lease_seconds=1000) is not None
        return await super().place(placement, token)


@pytest.fixture
def zoo(tmp_path: Path) -> Zoo:
    values = config()
    write_checkpoint(tmp_path / "base", values, tensors(values))
    zoo = Zoo.open(tmp_path / "zoo", create=True)
    zoo.register(tmp_path / "base", name="base")
    return zoo


async def lead(zoo: Zoo, store: InProcessStore, *names: str) -> list[Scraped]:
    """Scrapes of planners of one cluster, once the first has decided or was refused."""
    record = WorkerRecord(WorkerId("w.1"), "w", "unix:/w")
    await store.announce(Announcement(record, LoadReport(), frozenset()), lease_seconds=1000)
    await store.tell_demand("router", {zoo.resolve("base").chain: 1.0}, ttl_seconds=1000)
    planners = [
        Planner(
            zoo, store if name == names[0] else store.another(), name, lease_seconds=60, look_seconds=0.01
        )
        for name in names
    ]
    metrics = [ControllerMetrics(ControllerSettings.load(metrics_listen="127.0.0.1:0")) for _ in names]
    for one, planner in zip(metrics, planners, strict=True):
        one.watch(planner)
        one.listen()
    found: list[Scraped] = []
    async with asyncio.timeout(60):
        for planner in planners:
            planner.start()
            counts = planners[0].counts
            while not (planner.seen and counts.placements + counts.refused_writes):
                await asyncio.sleep(0.001)
        found = [await scrape(one.address) for one in metrics]
        for planner in planners:
            await planner.stop()
    for one in metrics:
        one.close()
    return found


@async_test
async def test_one_controller_leads_and_tells_what_it_placed(zoo: Zoo) -> None:
    first, second = await lead(zoo, InProcessStore(), "one", "two")
    assert {metric.name.removesuffix("_total") for metric in CONTROLLER} <= first.families
    assert [one.one("blockzoo_controller_leading") for one in (first, second)] == [1, 0]
    assert first.one("blockzoo_placements_total") == first.one("blockzoo_placement_loads_total") == 1
    assert first.one("blockzoo_placement_moved_bytes_total") > 0
    assert first.one("blockzoo_placement_planning_seconds") > 0
    assert second.one("blockzoo_placements_total") == 0
    assert second.one("blockzoo_placement_version") == 1
    assert second.by("blockzoo_workers", "state")["ready"] == 1


@async_test
async def test_a_write_that_came_too_late_is_counted(zoo: Zoo) -> None:
    (found,) = await lead(zoo, Overtaken(), "one")
    assert found.one("blockzoo_placement_refused_writes_total") == 1
    assert found.one("blockzoo_placements_total") == 0
    assert found.one("blockzoo_controller_leading") == 0
