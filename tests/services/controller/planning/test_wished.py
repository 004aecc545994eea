"""The planner does what operators wish, from what the zoo says alone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from blockserve.common.api.cluster import (
    WIRE_VERSION,
    ClusterView,
    Placement,
    WorkerId,
    WorkerRecord,
    WorkerView,
)
from blockserve.common.errors import WorkerNotFoundError
from blockserve.common.placement.wishes import EVICT_SECONDS, EvictionFeed, WishKeeper
from blockserve.common.state.memory import InProcessStore
from blockserve.controller.planning.planner import Planner
from blockzoo.errors import InvalidInputError, InvalidNameError, VariantNotFoundError
from blockzoo.manifest import ChainId
from blockzoo.store.wishes import WishBook
from blockzoo.zoo import Zoo
from support.folders import config, tensors, write_adapter, write_checkpoint
from support.zoo_faults import FakeClock


class Rig:
    """A zoo with `base`, `tuned` and `bot`, workers by name, and a planner started anew for every plan."""

    def __init__(self, folder: Path) -> None:
        values = config()
        items = tensors(values)
        write_checkpoint(folder / "base", values, items)
        other = tensors(values, seed=1)
        write_checkpoint(folder / "tuned", values, other)
        write_adapter(folder / "adapter")
        self.zoo = Zoo.open(folder / "zoo", create=True)
        self.zoo.register(folder / "base", name="base")
        self.zoo.register(folder / "tuned", name="tuned")
        self.zoo.register(folder / "adapter", name="bot", base="base")
        self.clock = FakeClock(float(int(time.time())))  # the storage has the true time
        self.zoo.store.clock = self.clock
        self.view = ClusterView()
        self.keeper = WishKeeper(self.zoo, lambda: self.view)
        self.planner: Planner

    def chain(self, name: str) -> ChainId:
        return self.zoo.resolve(name).chain

    def size(self, name: str) -> int:
        manifest = self.zoo.chain(self.chain(name))
        blocks = {block for link in manifest.links for block in (link.base, *link.applied)}
        return sum(ref.num_bytes for block in blocks for ref in self.zoo.block(block).tensors.values())

    def workers(self, *names: str, room: int = 0) -> None:
        views = {
            WorkerId(f"{name}.1"): WorkerView(
                WorkerRecord(WorkerId(f"{name}.1"), name, f"unix:/{name}", block_bytes=room)
            )
            for name in names
        }
        self.view = ClusterView(views, self.view.placement)

    async def plan(self, demand: Mapping[str, float] | None = None) -> dict[str, set[str]]:
        """What each worker holds by name; a planner that was just started says it, as after a restart."""
        asked = {self.chain(name): rate for name, rate in (demand or {}).items()}
        placement = self.view.placement
        self.planner = Planner(self.zoo, InProcessStore(), "me", lease_seconds=1, look_seconds=1)
        for _ in range(3):
            placement = await self.planner.plan(self.view, asked)
            self.view = ClusterView(self.view.workers, Placement(placement.version + 1, placement.workers))
        names = {self.chain(name): name for name in ("base", "tuned", "bot")}
        return {
            worker.partition(".")[0]: {names[one.chain] for one in assigned}
            for worker, assigned in placement.workers.items()
        }


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await work()

    asyncio.run(bounded())


def test_workers_of_each_wire_version_hold_all_of_what_is_asked_for(rig: Rig) -> None:
    """No path joins two versions, so a variant that lay on both would be served by nobody."""

    async def work() -> None:
        room = 3 * max(rig.size("base"), rig.size("tuned"))
        rig.workers("a", "b", "old", room=room)
        old = rig.view.workers[WorkerId("old.1")]
        older = replace(old, record=replace(old.record, wire_version=WIRE_VERSION - 1))
        rig.view = ClusterView({**rig.view.workers, WorkerId("old.1"): older}, rig.view.placement)
        await rig.keeper.wish("tuned", workers=("a",))
        held = await rig.plan({"base": 1.0})
        assert held["old"] == {"base", "tuned"}
        assert held["a"] | held["b"] == {"base", "tuned"}
        assert "tuned" in held["a"]

    run(work)


def test_a_pinned_variant_is_held_without_demand_and_stays_where_it_is(rig: Rig) -> None:
    async def work() -> None:
        rig.workers("a", "b")
        assert await rig.plan() == {"a": set(), "b": set()}
        await rig.keeper.wish("tuned", pinned=True)
        first = await rig.plan()
        assert sorted(map(len, first.values())) == [0, 1]
        (home,) = [name for name, held in first.items() if held]
        assigned = rig.view.placement.workers[WorkerId(f"{home}.1")]
        assert [one.pinned for one in assigned] == [True]
        assert await rig.plan({"base": 5.0}) != first
        rig.workers("a", "b", "0", "c")
        assert "tuned" in (await rig.plan({"base": 5.0}))[home]
        await rig.keeper.wish("tuned", pinned=False)
        assert not any("tuned" in held for held in (await rig.plan({"base": 5.0})).values())

    run(work)


def test_a_pin_makes_room_for_itself_in_full_workers(rig: Rig) -> None:
    async def work() -> None:
        rig.workers("a", room=int(rig.size("base") * 1.5))
        assert await rig.plan({"base": 100.0}) == {"a": {"base"}}
        await rig.keeper.wish("tuned", pinned=True)
        assert await rig.plan({"base": 100.0}) == {"a": {"tuned"}}
        assert rig.chain("base") in rig.planner.left_out

    run(work)


def test_place_moves_and_another_worker_stands_in_while_it_is_gone(rig: Rig) -> None:
    async def work() -> None:
        rig.workers("a", "b")
        await rig.plan({"tuned": 1.0})
        for name, other in (("a", "b"), ("b", "a")):
            await rig.keeper.wish("tuned", workers=[name])
            assert await rig.plan({"tuned": 1.0}) == {name: {"tuned"}, other: set()}
        rig.workers("a")
        assert await rig.plan() == {"a": {"tuned"}}
        rig.workers("a", "b")
        assert await rig.plan() == {"a": set(), "b": {"tuned"}}
        await rig.keeper.wish("tuned", workers=["a.1", "b", "a"])
        assert await rig.plan() == {"a": {"tuned"}, "b": {"tuned"}}
        await rig.keeper.wish("tuned", workers=[])
        assert await rig.plan() == {"a": set(), "b": set()}

    run(work)


def test_replicas_come_and_go(rig: Rig) -> None:
    async def work() -> None:
        rig.workers("a", "b", "c")
        await rig.keeper.wish("bot", replicas=2)
        assert sum("bot" in held for held in (await rig.plan()).values()) == 2
        await rig.keeper.wish("bot", replicas=1000)
        assert all("bot" in held for held in (await rig.plan()).values())
        await rig.keeper.wish("bot", replicas=2, workers=["c"])
        held = await rig.plan()
        assert "bot" in held["c"]
        assert sum("bot" in one for one in held.values()) == 2
        await rig.keeper.wish("bot", replicas=0)
        assert await rig.plan() == {"a": set(), "b": set(), "c": {"bot"}}

    run(work)


def test_evict_withdraws_everything_and_is_over_when_routers_have_forgotten(rig: Rig) -> None:
    async def work() -> None:
        rig.workers("a", "b")
        feed = EvictionFeed(WishBook(rig.zoo.store))
        assert feed() == []
        await rig.keeper.wish("tuned", pinned=True, replicas=2, workers=["a"])
        assert (await rig.plan({"tuned": 3.0}))["a"] == {"tuned"}
        status = await rig.keeper.evict("tuned")
        assert (status.pinned, status.replicas, status.workers) == (False, 0, ())
        assert await rig.plan({"tuned": 3.0, "base": 1.0}) != {"a": set(), "b": set()}
        assert await rig.plan({"tuned": 3.0}) == {"a": set(), "b": set()}
        assert await rig.keeper.list() == ()
        assert feed() == [rig.chain("tuned")]
        assert feed() == []
        rig.clock.sleep(EVICT_SECONDS + 1)
        assert await rig.plan({"tuned": 3.0}) == {"a": {"tuned"}, "b": {"tuned"}}  # all traffic there is
        await rig.keeper.evict("tuned")
        assert feed() == [rig.chain("tuned")]
        # Who pins it right after does not have to wait.
        await rig.keeper.wish("tuned", pinned=True)
        assert any("tuned" in held for held in (await rig.plan()).values())

    run(work)


def test_a_change_after_an_eviction_does_not_evict_again(rig: Rig) -> None:
    async def work() -> None:
        rig.workers("a", "b")
        feed = EvictionFeed(WishBook(rig.zoo.store))
        await rig.keeper.evict("tuned")
        assert feed() == [rig.chain("tuned")]
        rig.clock.sleep(EVICT_SECONDS + 1)
        await rig.keeper.evict("tuned", "a")
        assert feed() == []
        assert await rig.plan({"tuned": 3.0}) == {"a": set(), "b": {"tuned"}}
        await rig.keeper.wish("tuned", pinned=False)
        assert feed() == []
        assert await rig.plan({"tuned": 3.0}) == {"a": set(), "b": {"tuned"}}

    run(work)


def test_evict_from_one_worker_keeps_it_away_until_it_is_placed_there(rig: Rig) -> None:
    async def work() -> None:
        rig.workers("a", "b")
        await rig.keeper.wish("tuned", replicas=2)
        assert await rig.plan() == {"a": {"tuned"}, "b": {"tuned"}}
        status = await rig.keeper.evict("tuned", "a")
        assert (status.avoid, status.replicas) == (("a",), 2)
        assert await rig.plan({"tuned": 50.0}) == {"a": set(), "b": {"tuned"}}
        rig.workers("a")
        assert await rig.plan({"tuned": 1.0}) == {"a": {"tuned"}}, (
            "a bar does not take a variant from everybody"
        )
        rig.workers("a", "b")
        assert await rig.plan() == {"a": set(), "b": {"tuned"}}
        await rig.keeper.wish("tuned", workers=["a"], replicas=0)
        assert await rig.plan() == {"a": {"tuned"}, "b": set()}
        status = await rig.keeper.evict("tuned", "a")
        assert (status.workers, status.avoid) == ((), ("a",))

    run(work)


def test_a_wish_follows_the_name_to_its_newest_version(rig: Rig, tmp_path: Path) -> None:
    async def work() -> None:
        rig.workers("a")
        await rig.keeper.wish("base", pinned=True)
        old = rig.chain("base")
        write_checkpoint(tmp_path / "next", config(), tensors(config(), seed=7))
        rig.zoo.register(tmp_path / "next", name="base")
        placement = await Planner(rig.zoo, InProcessStore(), "me", lease_seconds=1, look_seconds=1).plan(
            rig.view, {}
        )
        (assigned,) = placement.workers[WorkerId("a.1")]
        assert assigned.chain == rig.chain("base") != old

    run(work)


def test_wishes_about_what_is_gone_wait_and_can_be_withdrawn(rig: Rig) -> None:
    async def work() -> None:
        rig.workers("a")
        await rig.keeper.wish("bot", pinned=True)
        rig.zoo.rm("bot")
        placement = await Planner(rig.zoo, InProcessStore(), "me", lease_seconds=1, look_seconds=1).plan(
            rig.view, {}
        )
        assert placement.workers == {WorkerId("a.1"): ()}
        (status,) = await rig.keeper.list()
        assert (status.variant, status.chain) == ("bot", "")
        await rig.keeper.evict("bot")
        assert await rig.keeper.list() == ()

    run(work)


def test_the_list_says_what_has_come_of_it(rig: Rig) -> None:
    async def work() -> None:
        rig.workers("a", "b")
        await rig.keeper.wish("tuned", workers=["b"])
        await rig.keeper.wish("base", replicas=2)
        await rig.plan()
        base, tuned = await rig.keeper.list()
        assert (base.variant, base.replicas, base.placed) == ("base", 2, ("a", "b"))
        assert (tuned.workers, tuned.placed, tuned.chain) == (("b",), ("b",), rig.chain("tuned"))
        assert datetime.fromisoformat(tuned.since).timestamp() == rig.clock.time

    run(work)


def test_what_makes_no_sense_is_refused_and_not_written(rig: Rig) -> None:
    async def work() -> None:
        rig.workers("a", "b")
        keeper = rig.keeper
        for error, asked in (
            (VariantNotFoundError, lambda: keeper.wish("tune", pinned=True)),
            (VariantNotFoundError, lambda: keeper.evict("nobody")),
            (InvalidNameError, lambda: keeper.wish("../base", pinned=True)),
            (InvalidInputError, lambda: keeper.wish("base@1", pinned=True)),
            (InvalidInputError, lambda: keeper.wish("base", replicas=1001)),
            (InvalidInputError, lambda: keeper.wish("base", replicas=-1)),
            (InvalidInputError, lambda: keeper.wish("base", workers=["a"] * 1001)),
            (WorkerNotFoundError, lambda: keeper.wish("base", workers=["a", "z"])),
            (WorkerNotFoundError, lambda: keeper.evict("base", "z")),
        ):
            with pytest.raises(error) as caught:
                await asked()
            assert caught.value.hint or error is InvalidInputError
        assert WishBook(rig.zoo.store).current() == ({}, {})

    run(work)
