"""The shared state on servers that are killed, flushed, paused, guarded, moved: all comes back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from blockserve.common.cluster import (
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
from blockserve.common.redis_child import RedisChild
from blockserve.common.state_store import Announcement, StateStore
from blockzoo.manifest import ChainId
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
    assert kept == {"bz:1:placement", "bz:1:assignments", "bz:1:token"}


@with_backend
async def test_a_placement_that_changes_in_part_is_read_whole(backend: ServerBackend) -> None:
    store, reader = backend.open(), backend.open()
    token = await store.lead("a", lease_seconds=LONG)
    assert token is not None
    one, two = WANTED.workers[WORKER], (Assignment(ChainId("d" * 64), Run(4, 6)),)
    for workers in ({"w1": one, "w2": two}, {"w1": one, "w2": one, "w3": ()}, {"w2": one}, {}, {"w1": two}):
        placed = await store.place(
            Placement(0, {WorkerId(name): held for name, held in workers.items()}), token
        )
        assert (await reader.view()).placement == placed
        assert (await backend.open().view()).placement == placed


@with_backend
async def test_a_view_is_one_call_and_brings_only_news(backend: ServerBackend) -> None:
    store = backend.open()
    held = [ResidentSegment(SegmentDigest(f"{number:032}"), Run(number, number + 1)) for number in range(500)]
    await store.announce(Announcement(SAID.record, SAID.load, held), lease_seconds=LONG)
    token = await store.lead("a", lease_seconds=LONG)
    await store.place(Placement(0, {WORKER: WANTED.workers[WORKER] * 200}), token)

    async def sent() -> tuple[int, int]:
        def figures() -> tuple[int, int]:
            network, calls = backend.command("INFO", "stats"), backend.command("INFO", "commandstats")
            return network["total_net_output_bytes"], calls["cmdstat_evalsha"]["calls"]

        before = figures()
        own = figures()[0] - before[0]
        await store.view()
        after = figures()
        return after[0] - before[0] - 2 * own, after[1] - before[1]

    full, _ = await sent()
    again, calls = await sent()
    assert calls == 1
    assert full > 20_000
    assert again < 2_000


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
    backend = ServerBackend(program, settings=lines if own_tls else ())
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
