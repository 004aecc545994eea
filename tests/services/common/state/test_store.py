"""What every store of the shared state promises: in process, Redis and Valkey, one suite."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockserve.common.api.cluster import (
    Assignment,
    LoadReport,
    Placement,
    ResidentSegment,
    Run,
    SegmentDigest,
    WorkerId,
    WorkerRecord,
    WorkerState,
)
from blockserve.common.errors import StaleLeaderError
from blockserve.common.state.scripts import HISTORY
from blockserve.common.state.store import Announcement, FencingToken, StateStore
from blockzoo.manifest import ChainId
from support.state_servers import (
    REDIS,
    VALKEY,
    MemoryBackend,
    ServerBackend,
    eventually,
    server_program,
    with_backend,
)

Backend = MemoryBackend | ServerBackend
LONG = 60.0
"""A lease that outlasts every test."""
SHORT = 0.3
"""A lease that a test waits out."""
SEGMENT = ResidentSegment(SegmentDigest("5" * 32), Run(0, 4))
OTHER = ResidentSegment(SegmentDigest("a" * 32), Run(4, 6))


@pytest.fixture(scope="module", params=["memory", REDIS, VALKEY])
def running(request: pytest.FixtureRequest) -> Iterator[Backend]:
    if request.param == "memory":
        yield MemoryBackend()
        return
    backend = ServerBackend(server_program(request.param))
    yield backend
    backend.stop()


@pytest.fixture
def backend(running: Backend) -> Backend:
    """An empty one for each test."""
    if isinstance(running, MemoryBackend):
        return MemoryBackend()
    running.flush()
    return running


def about(worker: str, *segments: ResidentSegment, **record: object) -> Announcement:
    """An announcement."""
    said = WorkerRecord(WorkerId(worker), worker.rstrip("0123456789"), f"unix:/run/{worker}", **record)
    return Announcement(said, LoadReport(running_requests=1), segments)


def placement(version: int = 0) -> Placement:
    chain = ChainId("c" * 64)
    held = (Assignment(chain, Run(0, 4), pinned=True), Assignment(chain, Run(4, 6)))
    return Placement(version, {WorkerId("w1"): held, WorkerId("w2"): ()})


async def leader(store: StateStore, holder: str = "controller-1") -> FencingToken:
    token = await store.lead(holder, lease_seconds=LONG)
    assert token is not None
    return token


@with_backend
async def test_an_empty_store(backend: Backend) -> None:
    store = backend.open()
    view = await store.view()
    assert (view.workers, view.placement) == ({}, Placement())


@with_backend
async def test_what_is_announced_is_what_others_see(backend: Backend) -> None:
    store, reader = backend.open(), backend.open()
    said = about(
        "w1",
        *(SEGMENT, OTHER),
        state=WorkerState.STARTING,
        kv_fingerprint="kv",
        block_bytes=7 << 30,
        speed=1.5,
        host="h",
    )
    load = LoadReport(1, 2, 3, 0.25, 1e6, 4, 5, 1 << 40, {WorkerId("w2"): 0.001})
    await store.announce(replace(said, load=load), lease_seconds=LONG)
    seen = (await reader.view()).workers[WorkerId("w1")]
    assert (seen.record, seen.load, seen.segments) == (said.record, load, {SEGMENT, OTHER})


@with_backend
async def test_an_announcement_replaces_the_one_before(backend: Backend) -> None:
    store = backend.open()
    await store.announce(about("w1", SEGMENT, state=WorkerState.STARTING), lease_seconds=LONG)
    assert (await store.view()).holders() == {SEGMENT.digest: {"w1"}}
    await store.announce(about("w1", OTHER), lease_seconds=LONG)
    view = await store.view()
    assert view.holders() == {OTHER.digest: {"w1"}}
    assert view.workers[WorkerId("w1")].record.state is WorkerState.READY


@with_backend
async def test_residency_names_every_holder(backend: Backend) -> None:
    store = backend.open()
    await store.announce(about("w1", SEGMENT), lease_seconds=LONG)
    await store.announce(about("w2", SEGMENT, OTHER), lease_seconds=LONG)
    assert (await store.view()).holders() == {SEGMENT.digest: {"w1", "w2"}, OTHER.digest: {"w2"}}
    await store.withdraw(WorkerId("w2"))
    assert (await store.view()).holders() == {SEGMENT.digest: {"w1"}}


@with_backend
async def test_a_lease_runs_out_and_takes_everything_along(backend: Backend) -> None:
    store, reader = backend.open(), backend.open()
    await store.announce(about("w1", SEGMENT), lease_seconds=SHORT)
    await store.announce(about("w2"), lease_seconds=LONG)
    assert (await reader.view()).workers.keys() == {"w1", "w2"}
    backend.pass_time(SHORT)

    async def is_gone() -> bool:
        return (await reader.view()).workers.keys() == {"w2"}

    await eventually(is_gone, "the silent worker is gone")
    assert (await backend.open().view()).holders() == {}
    assert await store.renew(WorkerId("w1"), LoadReport(), lease_seconds=LONG) is False
    assert (await reader.view()).workers.keys() == {"w2"}


@with_backend
async def test_renewing_keeps_a_lease_and_brings_the_load(backend: Backend) -> None:
    store, reader = backend.open(), backend.open()
    await store.announce(about("w1", SEGMENT), lease_seconds=LONG)
    before = await reader.view()
    assert await store.renew(WorkerId("w1"), LoadReport(queued_tokens=9), lease_seconds=LONG) is True
    after = await reader.view()
    assert after.workers[WorkerId("w1")].load == LoadReport(queued_tokens=9)
    assert after.workers[WorkerId("w1")].segments == {SEGMENT}
    assert before.workers[WorkerId("w1")].load == LoadReport(running_requests=1)
    # A renewal sets the end anew, also to an earlier time.
    assert await store.renew(WorkerId("w1"), LoadReport(), lease_seconds=SHORT) is True
    backend.pass_time(SHORT)

    async def is_gone() -> bool:
        return not (await reader.view()).workers

    await eventually(is_gone, "the renewed lease has ended")


@with_backend
async def test_only_a_known_worker_renews_and_only_once_is_withdrawn(backend: Backend) -> None:
    store = backend.open()
    assert await store.renew(WorkerId("w1"), LoadReport(), lease_seconds=LONG) is False
    await store.announce(about("w1"), lease_seconds=LONG)
    await store.withdraw(WorkerId("w1"))
    await store.withdraw(WorkerId("w1"))
    assert await store.renew(WorkerId("w1"), LoadReport(), lease_seconds=LONG) is False
    assert (await store.view()).workers == {}


async def claim(store: StateStore, worker: str, name: str, *aside: str) -> str | None:
    """Announce a worker under a name; who has it instead."""
    said = Announcement(WorkerRecord(WorkerId(worker), name, f"unix:/run/{worker}"), LoadReport(), ())
    return await store.announce(said, lease_seconds=LONG, instead_of=[WorkerId(one) for one in aside])


@with_backend
async def test_of_many_workers_that_take_a_name_at_once_one_has_it(backend: Backend) -> None:
    stores = [backend.open() for _ in range(16)]
    answers = await asyncio.gather(*(claim(store, f"w{i}", "w") for i, store in enumerate(stores)))
    winners = [f"w{i}" for i, other in enumerate(answers) if other is None]
    assert list((await stores[0].view()).workers) == winners
    assert set(answers) == {None, *winners}
    assert len(winners) == 1


@with_backend
async def test_a_name_is_free_where_its_holders_are_set_aside_or_gone(backend: Backend) -> None:
    store, other = backend.open(), backend.open()
    for name in ("w", 'a "b" \\ c', "größer/😀", "", "%w-1."):
        assert await claim(store, "one", name) is None
        assert await claim(other, "two", name) == "one"
        assert await claim(other, "two", name + "w") is None  # part of another name
        assert await claim(store, "one", name) is None  # who has it keeps it
        assert await claim(other, "three", name, "gone", "one") is None
        assert await claim(other, "four", name, "one") == "three"
        await other.withdraw(WorkerId("three"))
        assert await claim(other, "four", name, "one") is None
        assert set((await store.view()).workers) == {"one", "two", "four"}
        for worker in ("one", "two", "four"):
            await store.withdraw(WorkerId(worker))


@with_backend
async def test_a_name_ends_with_the_lease_and_nothing_else_asks_for_it(backend: Backend) -> None:
    store = backend.open()
    await store.announce(about("w1"), lease_seconds=SHORT)
    assert await claim(store, "w2", "w") == "w1"
    await store.announce(about("w3"), lease_seconds=SHORT)  # names do not matter to it
    backend.pass_time(SHORT)

    async def is_free() -> bool:
        return await claim(store, "w2", "w") is None

    await eventually(is_free, "the name is free")


@with_backend
async def test_a_view_is_a_snapshot(backend: Backend) -> None:
    store = backend.open()
    await store.announce(about("w1"), lease_seconds=LONG)
    view = await store.view()
    await store.announce(about("w2"), lease_seconds=LONG)
    await store.withdraw(WorkerId("w1"))
    await store.view()
    assert view.workers.keys() == {"w1"}


@with_backend
async def test_one_leader_at_a_time_and_it_keeps_its_token(backend: Backend) -> None:
    one, two = backend.open(), backend.open()
    token = await leader(one, "a")
    assert await two.leader() == await one.leader() == "a"
    assert await two.lead("b", lease_seconds=LONG) is None
    assert await one.lead("a", lease_seconds=LONG) == token
    await two.resign("b")
    assert await two.lead("b", lease_seconds=LONG) is None
    await one.resign("a")
    assert await leader(two, "b") > token


@with_backend
async def test_a_silent_leader_is_followed_by_another(backend: Backend) -> None:
    one, two = backend.open(), backend.open()
    token = await one.lead("a", lease_seconds=SHORT)
    backend.pass_time(SHORT)
    tokens: list[FencingToken] = []

    async def leads() -> bool:
        tokens.extend(filter(None, [await two.lead("b", lease_seconds=LONG)]))
        return bool(tokens)

    await eventually(leads, "another one leads")
    assert tokens[0] > token
    assert await one.lead("a", lease_seconds=LONG) is None


@with_backend
async def test_of_many_candidates_one_leads(backend: Backend) -> None:
    stores = [backend.open() for _ in range(8)]
    for _ in range(10):
        answers = await asyncio.gather(
            *(store.lead(f"c{number}", lease_seconds=LONG) for number, store in enumerate(stores))
        )
        [winner] = [number for number, token in enumerate(answers) if token is not None]
        await stores[winner].resign(f"c{winner}")


@with_backend
async def test_the_placement_is_the_leaders(backend: Backend) -> None:
    old, new, reader = backend.open(), backend.open(), backend.open()
    token = await leader(old, "a")
    first = await old.place(placement(), token)
    assert first == placement(first.version)
    assert first.version > 0
    second = await old.place(replace(placement(), workers={}), token)
    assert second.version > first.version
    await old.resign("a")
    newer = await leader(new, "b")
    with pytest.raises(StaleLeaderError, match=str(newer)):
        await old.place(placement(), token)
    assert (await reader.view()).placement == second
    third = await new.place(placement(), newer)
    assert third.version > second.version
    assert (await reader.view()).placement == third
    # Read again without a change, by one who has it and by one who has not.
    assert (await reader.view()).placement == third == (await backend.open().view()).placement


@with_backend
async def test_a_worker_reads_what_it_is_to_hold(backend: Backend) -> None:
    store, worker = backend.open(), backend.open()
    w1, w2 = WorkerId("w1"), WorkerId("w2")
    assert await worker.wanted(w1) == Placement()
    token = await leader(store)
    placed = await store.place(placement(), token)
    assert await worker.wanted(w1) == Placement(placed.version, {w1: placed.workers[w1]})
    assert await worker.wanted(w2) == Placement(placed.version, {w2: ()})
    # Changed for another one, then for it, then it is no longer named.
    second = await store.place(Placement(0, {**placed.workers, w2: placed.workers[w1]}), token)
    assert await worker.wanted(w1) == Placement(second.version, {w1: placed.workers[w1]})
    third = await store.place(Placement(0, {w1: (), w2: ()}), token)
    assert await worker.wanted(w1) == Placement(third.version, {w1: ()})
    last = await store.place(Placement(0, {w2: ()}), token)
    assert await worker.wanted(w1) == Placement(last.version)
    assert await worker.wanted(w2) == Placement(last.version, {w2: ()})


@with_backend
async def test_waiting_goes_on_from_what_a_worker_has_read(backend: Backend) -> None:
    store, worker = backend.open(), backend.open()
    token = await leader(store)
    await worker.wanted(WorkerId("w1"))
    await store.place(placement(), token)
    assert not await lasts(worker.wait_change(LONG), LONG)
    await worker.wanted(WorkerId("w1"))
    assert await lasts(worker.wait_change(0.1), 0.1)


@with_backend
async def test_a_reader_far_behind_reads_all(backend: Backend) -> None:
    store, behind, near = backend.open(), backend.open(), backend.open()
    w1, w2 = WorkerId("w1"), WorkerId("w2")
    token = await leader(store)
    first = await store.place(placement(), token)
    for reader in (behind, near):
        assert (await reader.view()).placement == first
        assert await reader.wanted(w1) == first.of(w1)
    placed = await store.place(Placement(0, {w2: first.workers[w1]}), token)
    for number in range(2 * HISTORY):
        runs = (Assignment(ChainId("e" * 64), Run(number, number + 1)),)
        placed = await store.place(Placement(0, {w2: first.workers[w1], WorkerId("w3"): runs}), token)
        if number % 10 == 0:
            assert (await near.view()).placement == placed
            assert await near.wanted(w1) == Placement(placed.version)
    assert (await behind.view()).placement == placed == (await near.view()).placement
    assert await behind.wanted(w1) == Placement(placed.version)
    assert await behind.wanted(w2) == placed.of(w2)


@with_backend
async def test_a_version_grows_beyond_what_the_writer_has_seen(backend: Backend) -> None:
    store = backend.open()
    far = 1 << 50
    placed = await store.place(placement(far), await leader(store))
    assert placed.version == far + 1
    assert (await store.view()).placement == placed


@with_backend
async def test_nobody_places_without_ever_having_led(backend: Backend) -> None:
    with pytest.raises(StaleLeaderError):
        await backend.open().place(placement(), FencingToken(7))


@with_backend
async def test_demand_is_the_sum_of_what_routers_told_lately(backend: Backend) -> None:
    store, other = backend.open(), backend.open()
    one, two = ChainId("1" * 64), ChainId("2" * 64)
    assert await store.demand() == {}
    await store.tell_demand("router-1", {one: 1.5}, ttl_seconds=LONG)
    await other.tell_demand("router-2", {one: 0.5, two: 3.0}, ttl_seconds=SHORT)
    assert await store.demand() == {one: 2.0, two: 3.0}
    await store.tell_demand("router-1", {two: 1.0}, ttl_seconds=LONG)
    assert await other.demand() == {one: 0.5, two: 4.0}
    backend.pass_time(SHORT)

    async def is_forgotten() -> bool:
        return await store.demand() == {two: 1.0}

    await eventually(is_forgotten, "the demand of a silent router")


@with_backend
async def test_a_chain_asked_for_first_is_a_change(backend: Backend) -> None:
    store, other = backend.open(), backend.open()
    await other.view()
    chain = ChainId("1" * 64)
    waiting = asyncio.create_task(other.wait_change(LONG))
    await store.tell_demand("router-1", {chain: 1.0}, ttl_seconds=LONG)
    async with asyncio.timeout(LONG / 2):
        await waiting


@with_backend
async def test_waiting_ends_with_every_change_but_a_load(backend: Backend) -> None:
    store, waiter = backend.open(), backend.open()
    token = await leader(store)
    await store.announce(about("w1"), lease_seconds=LONG)
    changes = [
        lambda: store.announce(about("w2"), lease_seconds=LONG),
        lambda: store.announce(about("w1", SEGMENT), lease_seconds=LONG),
        lambda: store.announce(about("w1", SEGMENT, state=WorkerState.DRAINING), lease_seconds=LONG),
        lambda: store.withdraw(WorkerId("w2")),
        lambda: store.place(placement(), token),
    ]
    for change in changes:
        await waiter.view()
        waiting = asyncio.create_task(waiter.wait_change(LONG))
        await asyncio.sleep(0)
        await change()
        await waiting
    await waiter.view()
    await store.renew(WorkerId("w1"), LoadReport(queued_tokens=5), lease_seconds=LONG)
    same = about("w1", SEGMENT, state=WorkerState.DRAINING)
    await store.announce(replace(same, load=LoadReport()), lease_seconds=LONG)
    assert await lasts(waiter.wait_change(0.2), 0.2)


@with_backend
async def test_waiting_misses_nothing_between_view_and_wait(backend: Backend) -> None:
    store, waiter = backend.open(), backend.open()
    await waiter.view()
    await store.announce(about("w1"), lease_seconds=LONG)
    assert not await lasts(waiter.wait_change(LONG), LONG)
    assert not await lasts(waiter.wait_change(LONG), LONG)  # until it looks
    await waiter.view()
    assert await lasts(waiter.wait_change(0.1), 0.1)


@with_backend
async def test_waiting_ends_with_a_lease(backend: Backend) -> None:
    store, waiter = backend.open(), backend.open()
    await store.announce(about("w1"), lease_seconds=SHORT)
    await waiter.view()
    waiting = asyncio.create_task(waiter.wait_change(LONG))
    await asyncio.sleep(0)
    backend.pass_time(SHORT)
    await waiting
    assert (await waiter.view()).workers == {}


@with_backend
async def test_waiting_can_be_cancelled(backend: Backend) -> None:
    waiter = backend.open()
    await waiter.view()
    waiting = asyncio.create_task(waiter.wait_change(LONG))
    assert await lasts(asyncio.wait({waiting}, timeout=0.1), 0.1)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert waiting.cancelled()
    assert (await waiter.view()).workers == {}


_WORKERS = st.sampled_from(["w1", "w2", "w3", "w4"]).map(WorkerId)
_RUNS = st.sampled_from(
    [
        (),
        (Assignment(ChainId("c" * 64), Run(0, 4)),),
        (Assignment(ChainId("d" * 64), Run(1, 2), pinned=True),),
    ]
)
_PLACE = st.tuples(st.just("place"), st.integers(0, 1), st.dictionaries(_WORKERS, _RUNS))
_READ = st.tuples(st.just("view"), st.integers(0, 2))
_WANTED = st.tuples(st.just("wanted"), st.integers(0, 2), _WORKERS)
_LOSE = st.just(("lose",))
_STALE = st.tuples(st.just("stale"), st.integers(0, 1))


@settings(max_examples=25, deadline=None)
@given(steps=st.lists(st.one_of(_PLACE, _PLACE, _READ, _READ, _WANTED, _LOSE, _STALE), max_size=30))
def test_what_changed_adds_up_to_the_whole(running: Backend, steps: list[tuple[Any, ...]]) -> None:
    """Writers that take turns, readers at their own pace, a store that loses everything now and then."""

    @with_backend
    async def run(backend: Backend) -> None:
        writers = [backend.open(), backend.open()]
        readers = [backend.open() for _ in range(3)]
        tokens = [FencingToken(0), FencingToken(0)]
        now, newest = Placement(), 0
        for kind, *rest in steps:
            if kind == "lose" and isinstance(backend, ServerBackend):
                backend.flush()
                now = Placement()
            elif kind == "place":
                number, workers = rest
                await writers[1 - number].resign(f"c{1 - number}")
                tokens[number] = await leader(writers[number], f"c{number}")
                now = await writers[number].place(Placement(now.version, workers), tokens[number])
                assert (now.workers, now.version > newest) == (workers, True)
                newest = now.version
            elif kind == "stale" and tokens[rest[0]] < max(tokens):
                with pytest.raises(StaleLeaderError):
                    await writers[rest[0]].place(Placement(), tokens[rest[0]])
            elif kind == "view":
                assert (await readers[rest[0]].view()).placement == now
            elif kind == "wanted":
                assert await readers[rest[0]].wanted(rest[1]) == now.of(rest[1])
        for reader in (*readers, *writers, backend.open()):
            assert (await reader.view()).placement == now

    if isinstance(running, ServerBackend):
        running.flush()
    run(MemoryBackend() if isinstance(running, MemoryBackend) else running)


async def lasts(awaitable: object, seconds: float) -> bool:
    """Whether something takes at least that long; timers may be a hair early."""
    loop = asyncio.get_running_loop()
    start = loop.time()
    await awaitable
    return loop.time() - start >= seconds * 0.95
