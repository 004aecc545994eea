"""The shared state on servers that are killed, flushed, paused, guarded, moved: all comes back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from blockserve.common.api.cluster import (
    Assignment,
    LoadReport,
    Placement,
    ResidentSegment,
    Run,
    SegmentDigest,
    WorkerId,
    WorkerRecord,
)
from blockserve.common.errors import ConfigurationError, StaleLeaderError, StateStoreError
from blockserve.common.process.redis_child import RedisChild
from blockserve.common.state.store import Announcement, FencingToken, StateStore
from blockzoo.manifest import ChainId
from support.earlier_state import before_changes
from support.edge import async_test
from support.state_servers import (
    REDIS,
    VALKEY,
    ServerBackend,
    eventually,
    free_port,
    make_certificates,
    sentinel,
    server_program,
    tls_in_front,
    with_backend,
)

LONG = 60.0
PATIENCE = 10.0
"""For a call of a test that is not about time, on a busy machine."""
WORKER = WorkerId("w1")
SEGMENT = ResidentSegment(SegmentDigest("5" * 32), Run(0, 4))
SAID = Announcement(WorkerRecord(WORKER, "w", "unix:/run/w"), LoadReport(running_requests=1), [SEGMENT])
WANTED = Placement(0, {WORKER: (Assignment(ChainId("c" * 64), Run(0, 4)),)})


@pytest.fixture(scope="module", params=[REDIS, VALKEY])
def program(request: pytest.FixtureRequest) -> Path:
    return server_program(request.param)


@pytest.fixture
def backend(program: Path) -> Iterator[ServerBackend]:
    """A server of its own for each test: here servers come to harm."""
    backend = ServerBackend(program)
    yield backend
    backend.stop()


async def answers(store: StateStore) -> bool:
    try:
        await store.view()
    except StateStoreError:
        return False
    return True


@contextmanager
def within(seconds: float) -> Iterator[None]:
    start = time.monotonic()
    yield
    assert time.monotonic() - start < seconds


@with_backend
async def test_a_flush_is_noticed_and_announcing_restores(backend: ServerBackend) -> None:
    worker, reader = backend.open(), backend.open()
    await worker.announce(SAID, lease_seconds=LONG)
    before = await reader.view()
    backend.flush()
    # Losing everything is a change: who waits looks, and sees that nothing is known.
    await asyncio.wait_for(reader.wait_change(LONG), 10)
    assert (await reader.view()).workers == {}
    assert await worker.renew(WORKER, LoadReport(), lease_seconds=LONG) is False
    waiting = asyncio.create_task(reader.wait_change(LONG))
    await worker.announce(SAID, lease_seconds=LONG)
    await asyncio.wait_for(waiting, 10)
    assert await reader.view() == before


@with_backend
async def test_a_flush_between_two_views_hides_nothing(backend: ServerBackend) -> None:
    """A reader knows the state up to some change; the changes of a new life are counted from elsewhere."""
    worker, reader = backend.open(), backend.open()
    for number in range(20):
        more = ResidentSegment(SegmentDigest(f"{number:032}"), Run(0, 1))
        await worker.announce(Announcement(SAID.record, SAID.load, [more]), lease_seconds=LONG)
    await reader.view()
    backend.flush()
    await worker.announce(SAID, lease_seconds=LONG)
    assert (await reader.view()).workers[WORKER].segments == {SEGMENT}


@with_backend
async def test_after_a_flush_tokens_and_versions_go_on(backend: ServerBackend) -> None:
    old, new, fresh = backend.open(), backend.open(), backend.open()
    token = await old.lead("a", lease_seconds=LONG)
    assert token is not None
    placed = await old.place(WANTED, token)
    backend.flush()
    assert (await fresh.view()).placement == Placement()
    with pytest.raises(StaleLeaderError):
        await old.place(WANTED, token)
    # A leader that has never seen the old state.
    newer = await new.lead("b", lease_seconds=LONG)
    assert newer is not None
    assert newer > token
    with pytest.raises(StaleLeaderError):
        await old.place(WANTED, token)
    again = await new.place(WANTED, newer)
    assert again.version > placed.version
    assert (await old.view()).placement == again


@with_backend
async def test_killed_and_started_again_in_the_middle(backend: ServerBackend) -> None:
    worker, reader = backend.open(), backend.open()
    await worker.announce(SAID, lease_seconds=LONG)
    await reader.view()
    waiting = asyncio.create_task(reader.wait_change(LONG))
    backend.kill()
    with within(3), pytest.raises(StateStoreError, match=r"127\.0\.0\.1"):
        await worker.renew(WORKER, LoadReport(), lease_seconds=LONG)
    with within(3):
        await reader.wait_change(0.2)  # paces a loop instead of failing
    backend.restart()
    # The first call already: nobody has to connect again by hand.
    assert await worker.renew(WORKER, LoadReport(), lease_seconds=LONG) is False
    await worker.announce(SAID, lease_seconds=LONG)
    await asyncio.wait_for(waiting, 10)
    assert (await reader.view()).workers.keys() == {WORKER}


@with_backend
async def test_paused_in_the_middle(backend: ServerBackend) -> None:
    backend.timeout = 0.4
    worker, reader = backend.open(), backend.open()
    await worker.announce(SAID, lease_seconds=LONG)
    await reader.view()
    with backend.paused():
        calls = [
            worker.announce(SAID, lease_seconds=LONG),
            worker.renew(WORKER, LoadReport(), lease_seconds=LONG),
            worker.view(),
            worker.lead("a", lease_seconds=LONG),
            reader.view(),
            backend.open().view(),
        ]
        with within(3):
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [StateStoreError] * len(calls)
        with within(3):
            await reader.wait_change(0.5)
    await eventually(lambda: answers(worker), "the woken server answers")
    assert await worker.renew(WORKER, LoadReport(queued_tokens=3), lease_seconds=LONG) is True
    assert (await reader.view()).workers[WORKER].load == LoadReport(queued_tokens=3)


@with_backend
async def test_calls_side_by_side_do_not_mix_their_answers(backend: ServerBackend) -> None:
    store = backend.open()

    async def live(number: int) -> None:
        me = WorkerId(f"w{number}")
        for step in range(20):
            held = [ResidentSegment(SegmentDigest(f"{number:016}{step:016}"), Run(0, 1))]
            said = Announcement(WorkerRecord(me, "w", f"unix:{me}"), LoadReport(queued_tokens=step), held)
            await store.announce(said, lease_seconds=LONG)
            seen = (await store.view()).workers[me]
            assert (seen.segments, seen.load.queued_tokens) == (set(held), step)

    await asyncio.gather(*(live(number) for number in range(10)))
    assert len((await store.view()).workers) == 10


@with_backend
async def test_a_replica_that_lacks_the_last_changes_hides_nothing(backend: ServerBackend) -> None:
    """Replication lags: what takes over may be a moment behind what readers have seen."""
    worker, reader = backend.open(), backend.open()
    await worker.announce(SAID, lease_seconds=LONG)
    token = await worker.lead("a", lease_seconds=LONG)
    assert token is not None
    await worker.place(WANTED, token)
    for key in backend.command("KEYS", "*"):
        backend.command("COPY", key, key, "DB", "1")
    later = Announcement(SAID.record, SAID.load, [ResidentSegment(SegmentDigest("1" * 32), Run(0, 4))])
    await worker.announce(later, lease_seconds=LONG)
    lost = await worker.place(Placement(0, {}), token)
    assert (await reader.view()).placement == lost
    backend.command("SWAPDB", "0", "1")
    # The worker learns that what it said last is lost.
    assert await worker.renew(WORKER, SAID.load, lease_seconds=LONG) is False
    last = Announcement(SAID.record, SAID.load, [ResidentSegment(SegmentDigest("2" * 32), Run(0, 4))])
    await worker.announce(last, lease_seconds=LONG)
    placed = await backend.open().place(WANTED, token)
    view = await reader.view()
    assert view.workers[WORKER].segments == set(last.segments)
    assert view.placement == placed
    assert placed.version > lost.version


@with_backend
async def test_a_lost_part_is_restored_by_announcing(backend: ServerBackend) -> None:
    """A server that runs out of memory may drop any key."""
    worker, reader = backend.open(), backend.open()
    for key in ("leases", "records", "residency", "revisions", "stamps", "meta", "loads", "changes"):
        await worker.announce(SAID, lease_seconds=LONG)
        backend.command("DEL", f"bz:1:{key}")
        if not await worker.renew(WORKER, SAID.load, lease_seconds=LONG):
            await worker.announce(SAID, lease_seconds=LONG)
        assert (await reader.view()).workers[WORKER].segments == {SEGMENT}, key
        assert (await backend.open().view()).workers[WORKER].record == SAID.record, key


@with_backend
async def test_one_that_cannot_be_read_does_not_hide_the_others(backend: ServerBackend) -> None:
    store = backend.open()
    await store.announce(SAID, lease_seconds=LONG)
    broken = Announcement(WorkerRecord(WorkerId("w2"), "w", "unix:"), LoadReport(), ())
    await store.announce(broken, lease_seconds=LONG)
    backend.command("HSET", "bz:1:records", "w2", "{not json")
    backend.command("HSET", "bz:1:loads", WORKER, '{"queued_tokens": "many"}')
    view = await backend.open().view()
    assert view.workers.keys() == {WORKER}
    assert view.workers[WORKER].load == LoadReport()


@with_backend
async def test_an_abandoned_cluster_leaves_nothing_for_long(backend: ServerBackend) -> None:
    store = backend.open()
    await store.announce(SAID, lease_seconds=LONG)
    await store.place(WANTED, await store.lead("a", lease_seconds=LONG))
    kept = {key for key in backend.command("KEYS", "*") if backend.command("TTL", key) == -1}
    assert kept == {"bz:1:placement", "bz:1:assignments", "bz:1:placed", "bz:1:token"}


def runs(number: int) -> tuple[Assignment, ...]:
    return (Assignment(ChainId("d" * 64), Run(number, number + 1)),)


def cluster(changed: int = 0) -> Placement:
    """A placement of many workers; `changed` is what it says of one of them."""
    workers = {WorkerId(f"many-{number}"): runs(1) * 100 for number in range(50)}
    return Placement(0, {**workers, WORKER: runs(changed)})


async def leads(store: StateStore, holder: str = "a") -> FencingToken:
    token = await store.lead(holder, lease_seconds=LONG)
    assert token is not None
    return token


@with_backend
async def test_only_what_changed_of_a_placement_travels(backend: ServerBackend) -> None:
    backend.timeout = PATIENCE
    leader, reader, one, other = (backend.open() for _ in range(4))
    token = await leads(leader)
    whole = await traffic(backend, leader.place(cluster(1), token))
    assert whole.received > 100_000
    assert (await traffic(backend, reader.view())).sent > 100_000
    for store, worker in ((one, WORKER), (other, WorkerId("many-1"))):
        await store.wanted(worker)
    part = await traffic(backend, leader.place(cluster(2), token))
    assert (part.received < 2_000, part.calls) == (True, 1)
    for reading in (reader.view(), leader.view(), one.wanted(WORKER), other.wanted(WorkerId("many-1"))):
        read = await traffic(backend, reading)
        assert (read.sent < 1_000, read.received < 1_000, read.calls) == (True, True, 1)
    assert (await reader.view()).placement.workers == cluster(2).workers
    assert (await one.wanted(WORKER)).workers == {WORKER: runs(2)}
    assert (await other.wanted(WorkerId("many-1"))).workers == {"many-1": runs(1) * 100}
    # A new leader has seen the placement, and writes the difference to it.
    await leader.resign("a")
    newer = await leads(reader, "b")
    assert (await traffic(backend, reader.place(cluster(3), newer))).received < 2_000
    with pytest.raises(StaleLeaderError):
        await leader.place(cluster(4), token)
    assert (await backend.open().view()).placement.workers == cluster(3).workers


@with_backend
async def test_a_release_that_knows_nothing_of_changes_shares_a_store(backend: ServerBackend) -> None:
    """It writes and reads placements whole, and leaves what it does not know as it is."""
    new, old, reader, old_reader = backend.open(), backend.open(), backend.open(), backend.open()
    old, old_reader = before_changes(old), before_changes(old_reader)
    names = ("new", "new", "old", "old", "new", "old", "new", "new")
    for number, name in enumerate(names):
        writer = new if name == "new" else old
        await writer.resign("new" if name == "old" else "old")
        token = await leads(writer, name)
        wanted = {WorkerId(f"one-{number}"): runs(1), WorkerId("kept"): runs(9), WORKER: runs(number)}
        placed = await writer.place(Placement(0, wanted), token)
        for one in (reader, old_reader, backend.open(), *((new, old) if number % 3 else ())):
            assert (await one.view()).placement == placed, number
        assert await reader.wanted(WORKER) == placed.of(WORKER)
        assert await reader.wanted(WorkerId(f"one-{number - 1}")) == Placement(placed.version)


@with_backend
async def test_changes_that_a_replica_lacks_are_not_taken_for_known(backend: ServerBackend) -> None:
    """What takes over may be behind what leader and readers have seen; it must not add to that."""
    leader, reader, worker = backend.open(), backend.open(), backend.open()
    token = await leads(leader)
    await leader.place(cluster(1), token)
    for key in backend.command("KEYS", "*"):
        backend.command("COPY", key, key, "DB", "1")
    lost = await leader.place(Placement(0, {WORKER: runs(7), WorkerId("many-1"): runs(7)}), token)
    assert (await reader.view()).placement == lost
    assert await worker.wanted(WorkerId("many-1")) == lost.of(WorkerId("many-1"))
    backend.command("SWAPDB", "0", "1")
    # One that has not seen the lost one places the difference to what is there; then the one that has.
    other = backend.open()
    assert (await other.view()).placement.workers == cluster(1).workers
    placed = await other.place(cluster(2), token)
    assert (await reader.view()).placement == placed
    assert await worker.wanted(WorkerId("many-1")) == placed.of(WorkerId("many-1"))
    placed = await leader.place(cluster(3), token)
    for one in (reader, other, leader, backend.open()):
        assert (await one.view()).placement == placed


@with_backend
async def test_a_lost_part_of_the_placement_comes_back_with_the_next(backend: ServerBackend) -> None:
    """A server that runs out of memory may drop any key."""
    leader, reader = backend.open(), backend.open()
    token = await leads(leader)
    for key in ("placed", "assignments", "placement"):
        await leader.place(cluster(1), token)
        assert (await reader.view()).placement.workers == cluster(1).workers
        backend.command("DEL", f"bz:1:{key}")
        placed = await leader.place(cluster(2), token)
        for one in (reader, leader, backend.open()):
            assert (await one.view()).placement == placed, key
            assert await one.wanted(WorkerId("many-1")) == placed.of(WorkerId("many-1")), key


@dataclass(frozen=True)
class Traffic:
    """What a call cost: bytes from and to the server, and scripts run."""

    sent: int
    received: int
    calls: int


async def traffic(backend: ServerBackend, call: Awaitable[object]) -> Traffic:
    def figures() -> tuple[int, int, int]:
        network, calls = backend.command("INFO", "stats"), backend.command("INFO", "commandstats")
        sent, received = network["total_net_output_bytes"], network["total_net_input_bytes"]
        return sent, received, calls.get("cmdstat_evalsha", {"calls": 0})["calls"]

    start = figures()
    before = figures()  # what asking costs
    await call
    after = figures()
    takes = zip(start, before, after, strict=True)
    return Traffic(*(now - then - (then - first) for first, then, now in takes))


@with_backend
async def test_a_view_is_one_call_and_brings_only_news(backend: ServerBackend) -> None:
    store = backend.open()
    held = [ResidentSegment(SegmentDigest(f"{number:032}"), Run(number, number + 1)) for number in range(500)]
    await store.announce(Announcement(SAID.record, SAID.load, held), lease_seconds=LONG)
    token = await store.lead("a", lease_seconds=LONG)
    await store.place(Placement(0, {WORKER: WANTED.workers[WORKER] * 200}), token)

    first = await traffic(backend, store.view())
    again = await traffic(backend, store.view())
    assert again.calls == 1
    assert first.sent > 20_000
    assert again.sent < 2_000


@async_test
async def test_a_wrong_password_is_said_without_repeating_it(program: Path) -> None:
    backend = ServerBackend(program)
    secret = "s3cret-of-the-operator"
    try:
        store = backend.open(url=f"redis://:{secret}@127.0.0.1:{backend.server.port}")
        with pytest.raises(StateStoreError) as caught:
            await store.view()
        assert secret not in str(caught.value) + repr(caught.value) + caught.value.hint
        assert f"redis://127.0.0.1:{backend.server.port}/0" in str(caught.value)
    finally:
        await backend.close_stores()
        backend.stop()


@async_test
async def test_password_from_a_file_and_with_odd_characters(program: Path, tmp_path: Path) -> None:
    password = 'a b"@/:\\%20?#é'
    backend = ServerBackend(program, password=password)
    file = tmp_path / "password"
    file.write_text(f"{password}\n")
    try:
        plain = f"redis://127.0.0.1:{backend.server.port}/0"
        assert (await backend.open(url=plain, password_file=file).view()).workers == {}
        assert (await backend.open().view()).workers == {}
        with pytest.raises(StateStoreError):
            await backend.open(url=plain).view()
    finally:
        await backend.close_stores()
        backend.stop()


@async_test
async def test_over_a_unix_socket(program: Path, tmp_path: Path) -> None:
    backend = ServerBackend(program, socket_path=tmp_path / "state.sock")
    try:
        store = backend.open()
        await store.announce(SAID, lease_seconds=LONG)
        backend.kill()
        with pytest.raises(StateStoreError, match=r"state\.sock"):
            await store.view()
        backend.restart()
        assert (tmp_path / "state.sock").stat().st_mode & 0o777 == 0o600
        assert (await store.view()).workers == {}
    finally:
        await backend.close_stores()
        backend.stop()


@async_test
async def test_over_tls(program: Path, tmp_path: Path) -> None:
    make_certificates(tmp_path)
    own_tls = program.name == "redis-server"
    port = free_port()
    files = {"tls-cert-file": "server.pem", "tls-key-file": "server.key", "tls-ca-cert-file": "ca.pem"}
    lines = [f"tls-port {port}", *(f"{name} {tmp_path / file}" for name, file in files.items())]
    backend = ServerBackend(program, PATIENCE, settings=lines if own_tls else ())
    try:
        async with tls_in_front(backend.server.port, tmp_path) as front:
            url = f"rediss://:{backend.server.password}@127.0.0.1:{port if own_tls else front}"
            ours = {"cert_file": tmp_path / "client.pem", "key_file": tmp_path / "client.key"}
            store = backend.open(url=url, ca_file=tmp_path / "ca.pem", **ours)
            await store.announce(SAID, lease_seconds=LONG)
            assert (await store.view()).workers.keys() == {WORKER}
            with pytest.raises(StateStoreError):  # nobody vouches for the server
                await backend.open(url=url, **ours).view()
            with pytest.raises(StateStoreError):  # nobody vouches for us
                await backend.open(url=url, ca_file=tmp_path / "ca.pem").view()
            await backend.close_stores()
    finally:
        backend.stop()


@async_test
async def test_sentinel_finds_the_server_and_its_successor(program: Path, tmp_path: Path) -> None:
    backend = ServerBackend(program)
    password = backend.server.password
    settings = [
        f"replicaof 127.0.0.1 {backend.server.port}",
        f'masterauth "{password}"',
        "repl-diskless-load swapdb",
    ]
    with (
        RedisChild(program=program, password=password, settings=settings) as second,
        sentinel(program, tmp_path, backend.server) as port,
    ):
        # The first sentinel does not exist, as it happens.
        url = f"redis+sentinel://:{password}@127.0.0.1:{free_port()},127.0.0.1:{port}/zoo"
        store = backend.open(url=url)
        await store.announce(SAID, lease_seconds=LONG)
        token = await store.lead("a", lease_seconds=LONG)
        assert token is not None
        with pytest.raises(StateStoreError, match="other"):
            await backend.open(url=url.replace("/zoo", "/other")).view()

        async def knows_the_replica() -> bool:
            return _replicas(port) == 1

        await eventually(knows_the_replica, "the sentinel knows the replica")
        backend.kill()
        await eventually(lambda: answers(store), "the sentinel has made the replica the server")
        assert _role(second) == "master"
        if not await store.renew(WORKER, SAID.load, lease_seconds=LONG):
            await store.announce(SAID, lease_seconds=LONG)
        assert (await store.view()).workers[WORKER].segments == {SEGMENT}
        assert (await store.lead("a", lease_seconds=LONG) or 0) >= token
        await backend.close_stores()


def _replicas(port: int) -> int:
    import redis

    with redis.Redis(port=port, decode_responses=True) as client:
        return int(client.sentinel_master("zoo")["num-slaves"])


def _role(server: RedisChild) -> str:
    import redis

    with redis.Redis.from_url(server.url, decode_responses=True) as client:
        return client.info("replication")["role"]


@async_test
async def test_cluster_is_refused_with_what_to_use_instead(program: Path, tmp_path: Path) -> None:
    settings = ["cluster-enabled yes", f'dir "{tmp_path}"', f"cluster-port {free_port()}"]
    backend = ServerBackend(program, settings=settings)
    try:
        with pytest.raises(ConfigurationError, match="Redis Cluster") as caught:
            await backend.open().view()
        assert "redis+sentinel://" in caught.value.hint
    finally:
        await backend.close_stores()
        backend.stop()
