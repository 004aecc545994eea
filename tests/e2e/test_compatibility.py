"""Neighbouring releases in one cluster: what docs/compatibility.md promises of wire and shared state."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from blockproto.v1 import worker_pb2, worker_pb2_grpc
from blockserve.client.aio import AsyncClient
from blockserve.common.api.cluster import WIRE_VERSION, WorkerState
from blockserve.common.errors import NoPathError, WireError
from blockserve.common.state.store import Announcement
from blockserve.common.wire.errors import from_rpc_error
from blockserve.worker.peers.streams import FROM_KEY, TO_KEY, WIRE_KEY
from blockzoo.zoo import Zoo
from support.cluster import PATIENCE, Cluster, cluster
from support.neighbour import UNKNOWN_FIELD, launcher

OLDER = launcher("--wire", str(WIRE_VERSION - 1))
NUM_TOKENS, LONG = 60, 300
SPLIT = {"a": (0, 3), "b": (3, 0), "d": (3, 0)}
"""A head worker and two tail workers, and what they hold."""
PROMPT = "Every tenant sends requests"
SETTINGS = {
    "BLOCKZOO_ENGINE_DTYPE": "float32",
    "BLOCKZOO_ENGINE_NUM_THREADS": "1",
    "BLOCKZOO_ENGINE_KV_PAGE_TOKENS": "8",
    "BLOCKZOO_ENGINE_KV_CACHE_BYTES": str(16 << 20),
    "BLOCKZOO_DRAIN_SECONDS": "0.2",
    "BLOCKZOO_FAILOVER_MAX_FAILURES": "100",
    "BLOCKZOO_FAILOVER_BACKOFF_SECONDS": "0",
}
IMPATIENT = {"BLOCKZOO_FAILOVER_PATH_SECONDS": "0.5"}
Answer = tuple[tuple[int, ...], str]


@pytest.fixture
def zoo(base_zoo: Zoo) -> Zoo:
    return base_zoo


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 250))


async def ask(client: AsyncClient, **options: Any) -> Answer:
    """A sampled answer; its noise is a function of the seed, so it is the same along every path."""
    wanted = {"max_tokens": NUM_TOKENS, "ignore_eos": True, "temperature": 0.8, "seed": 7, **options}
    answer = await client.generate("base", PROMPT, **wanted).result()
    return answer.token_ids, answer.text


async def until_logged(rig: Cluster, name: str, text: str) -> None:
    """Wait until a process has logged it."""
    async with asyncio.timeout(PATIENCE):
        while text not in rig.log(name):
            await asyncio.sleep(0.01)


async def computed(rig: Cluster, name: str) -> int:
    """Tokens that a worker has computed at any of its segments."""
    return sum(segment.tokens for segment in (await rig.describe(name)).segments)


async def alone(rig: Cluster, **options: Any) -> Answer:
    """What one worker answers that holds the whole chain and is nobody's neighbour."""
    await rig.start_worker("whole")
    await rig.load("whole", "base")
    async with rig.client() as client:
        answer = await ask(client, **options)
    assert await rig.workers.pop("whole").terminate() == 0
    return answer


def test_each_wire_version_is_served_by_its_own_workers(zoo: Zoo, tmp_path: Path) -> None:
    async def work() -> None:
        async with cluster(zoo, tmp_path, [], **SETTINGS, **IMPATIENT) as rig:
            expected = await alone(rig)
            rig.launchers |= {"old": OLDER, "router1": OLDER}
            await asyncio.gather(*(rig.start_worker(name) for name in ("a", "b", "old")), rig.start_router())
            assert (await rig.describe("old")).wire_version == WIRE_VERSION - 1
            # The old one alone holds all of the chain, so that a path over it has no hop.
            await asyncio.gather(
                rig.load("a", "base", 0, 3), rig.load("b", "base", 3), rig.load("old", "base")
            )
            async with rig.client(0) as current, rig.client(1) as older:
                assert await asyncio.gather(*(ask(current) for _ in range(6))) == [expected] * 6
                assert await computed(rig, "old") == 0
                before = await computed(rig, "a")
                assert await asyncio.gather(*(ask(older) for _ in range(6))) == [expected] * 6
                assert await computed(rig, "a") == before
                await rig.until_clean()
                # With only old workers left, old routers serve and new ones say that they cannot.
                for name in ("a", "b"):
                    assert await rig.workers[name].terminate() == 0
                assert await ask(older) == expected
                with pytest.raises(NoPathError):
                    await ask(current)
            await rig.until_clean()

    run(work())


def test_controllers_place_on_the_workers_of_each_wire_version(zoo: Zoo, tmp_path: Path) -> None:
    """Nothing is loaded by hand, and no chain is split between workers that cannot be on one path."""

    async def work() -> None:
        async with cluster(zoo, tmp_path, ["a"], **SETTINGS) as rig:
            rig.launchers |= {"old": OLDER, "router1": OLDER}
            await asyncio.gather(rig.start_worker("old"), rig.start_router(), rig.start_controller())
            async with rig.client(0) as current, rig.client(1) as older:
                assert await ask(older) == await ask(current)
            assert await computed(rig, "old") == await computed(rig, "a") > 0
            await rig.until_clean()

    run(work())


async def refusal(rig: Cluster, name: str, wire: int, frame: bytes) -> Exception:
    """What a worker says to another's frame."""
    said = await rig.describe(name)
    metadata = ((FROM_KEY, "stranger.1"), (TO_KEY, said.worker_id), (WIRE_KEY, str(wire)))
    async with grpc.aio.insecure_channel(rig.reach(rig.workers[name])) as channel:
        call = worker_pb2_grpc.WorkerServiceStub(channel).Exchange(metadata=metadata, timeout=PATIENCE)
        if frame:  # to a call that is refused without one, grpc.aio may report the failed write instead
            await call.write(worker_pb2.ExchangeRequest.FromString(frame))
        with pytest.raises(grpc.aio.AioRpcError):
            await call.read()
        code, details, trailing = await call.code(), await call.details(), await call.trailing_metadata()
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        return from_rpc_error(grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, details))


def test_an_exchange_between_versions_is_refused_and_the_request_goes_on_elsewhere(
    zoo: Zoo, tmp_path: Path
) -> None:
    """A router that takes an old tail worker for one of its own, as no record of ours tells it."""
    quiet = {"BLOCKZOO_STATE_LEASE_SECONDS": "240", "BLOCKZOO_STATE_RENEW_SECONDS": "120"}

    async def work() -> None:
        async with cluster(zoo, tmp_path, [], **SETTINGS) as rig:
            expected = await alone(rig)
            rig.launchers["old"] = OLDER
            await asyncio.gather(
                rig.start_worker("a"), rig.start_worker("b"), rig.start_worker("old", **quiet)
            )
            await asyncio.gather(rig.load("a", "base", 0, 3), rig.load("old", "base", 3))
            await lie_about_wire_version(rig, "old")
            async with rig.client() as client:
                asking = asyncio.create_task(ask(client))
                await until_logged(rig, "router0", "goes on elsewhere")
                await rig.load("b", "base", 3)
                assert await asking == expected
            refused = f"FAILED_PRECONDITION wire version {WIRE_VERSION} is not {WIRE_VERSION - 1}"
            assert refused in rig.log("a")
            assert isinstance(await refusal(rig, "old", WIRE_VERSION, b""), WireError)
            assert isinstance(await refusal(rig, "a", WIRE_VERSION + 1, b""), WireError)
            assert await computed(rig, "old") == 0
            await rig.until_clean()

    async def lie_about_wire_version(rig: Cluster, name: str) -> None:
        async with asyncio.timeout(PATIENCE):
            while (view := await rig.worker_view(name)) is None or not view.segments:
                await asyncio.sleep(0.01)
        record = replace(view.record, wire_version=WIRE_VERSION)
        await rig.store.announce(Announcement(record, view.load, view.segments), lease_seconds=240)

    run(work())


def test_a_message_of_an_unknown_kind_is_refused_and_nothing_is_lost(zoo: Zoo, tmp_path: Path) -> None:
    """The head worker is a release that says more; its tail worker ends the conversation, not the request."""

    async def work() -> None:
        async with cluster(zoo, tmp_path, [], **SETTINGS) as rig:
            expected = await alone(rig)
            rig.launchers["a"] = launcher("--unknown-after", "30")
            await asyncio.gather(rig.start_worker("a"), rig.start_worker("b"))
            await asyncio.gather(rig.load("a", "base", 0, 3), rig.load("b", "base", 3))
            async with rig.client() as client:
                assert await asyncio.gather(*(ask(client) for _ in range(4))) == [expected] * 4
                # What the head sees of the refusal depends on whether it was sending just then.
                assert "worker lost worker=b" in rig.log("a")
                assert "Exchange code=FAILED_PRECONDITION reason=WIRE" in rig.log("b")
                assert "goes on elsewhere" in rig.log("router0")
                before = rig.log("router0").count("goes on elsewhere")
                asking = asyncio.create_task(ask(client))
                unknown = b"\x0a" + bytes([len(UNKNOWN_FIELD)]) + UNKNOWN_FIELD
                assert isinstance(await refusal(rig, "b", WIRE_VERSION, unknown), WireError)
                assert await asking == expected
                # Somebody else's nonsense is nothing to the requests of those who make sense.
                assert rig.log("router0").count("goes on elsewhere") == before
            await rig.until_clean()

    run(work())


def test_records_of_other_releases_are_read_as_the_state_page_says(zoo: Zoo, tmp_path: Path) -> None:
    """Unknown fields ignored, missing ones defaulted; an unknown state gets no requests."""

    async def work() -> None:
        async with cluster(zoo, tmp_path, ["a", "b", "d"], **SETTINGS, **IMPATIENT) as rig:
            await asyncio.gather(*(rig.load(name, "base", *run) for name, run in SPLIT.items()))
            async with rig.client() as client:
                expected = await ask(client)
            before = await computed(rig, "d")
            await rewrite(rig, "a", {"colour": "blue", "racks": [1]}, ("speed", "host", "name"))
            await rewrite(rig, "b", {"state": "ready", "moods": {"b": "good"}}, ("block_bytes",))
            await rewrite(rig, "d", {"state": "hibernating"}, ())
            await rig.start_router()
            view = await rig.worker_view("d")
            assert view is not None
            assert view.record.state is WorkerState.DRAINING
            async with rig.client(1) as client:
                assert await asyncio.gather(*(ask(client) for _ in range(6))) == [expected] * 6
                assert await computed(rig, "d") == before
                assert await rig.workers["b"].terminate() == 0
                with pytest.raises(NoPathError):
                    await ask(client)
                await asyncio.to_thread(rig.state.flush)  # it announces itself in words that we know
                await until_ready(rig, "d")
                assert await ask(client) == expected
            await rig.until_clean()

    async def rewrite(rig: Cluster, name: str, more: dict[str, object], less: tuple[str, ...]) -> None:
        """What a worker's record says in Redis, as another release would have written it."""
        worker = (await rig.describe(name)).worker_id
        async with asyncio.timeout(PATIENCE):
            while rig.state.command("HGET", "bz:1:residency", worker) in (None, "[]"):
                await asyncio.sleep(0.01)
        said = json.loads(str(rig.state.command("HGET", "bz:1:records", worker)))
        text = json.dumps({key: value for key, value in (said | more).items() if key not in less})
        rig.state.command("HSET", "bz:1:records", worker, text)
        rows = json.loads(str(rig.state.command("HGET", "bz:1:residency", worker)))
        rig.state.command("HSET", "bz:1:residency", worker, json.dumps([[*row, "gpu-1", {}] for row in rows]))

    async def until_ready(rig: Cluster, name: str) -> None:
        async with asyncio.timeout(PATIENCE):
            while (view := await rig.worker_view(name)) is None or view.record.state is not WorkerState.READY:
                await asyncio.sleep(0.01)

    run(work())


def test_keys_and_values_of_another_layout_are_computed_again(zoo: Zoo, tmp_path: Path) -> None:
    """Two tails whose pages differ in size; what one has cached is of no use to the other."""

    async def work() -> None:
        async with cluster(zoo, tmp_path, [], **SETTINGS, BLOCKZOO_KV_CHOICE="transfer") as rig:
            expected = await alone(rig, max_tokens=LONG)
            await asyncio.gather(
                rig.start_worker("a"),
                rig.start_worker("b"),
                rig.start_worker("d", BLOCKZOO_ENGINE_KV_PAGE_TOKENS="16"),
            )
            await asyncio.gather(*(rig.load(name, "base", *run) for name, run in SPLIT.items()))
            layouts = {(await rig.describe(name)).kv_fingerprint for name in ("b", "d")}
            assert len(layouts) == 2
            async with rig.client() as client:
                asking = asyncio.create_task(ask(client, max_tokens=LONG))
                await client.drain_worker(await busy(rig, "b", "d"), 0.0)
                assert await asking == expected
            assert "kv recompute reason=other_layout" in rig.log("router0")
            assert isinstance(await export_refusal(rig), WireError)
            await rig.until_clean()

    async def busy(rig: Cluster, *names: str) -> str:
        async with asyncio.timeout(PATIENCE):
            while True:
                for name in names:
                    if (await rig.describe(name)).running_requests:
                        return name

    async def export_refusal(rig: Cluster) -> Exception:
        """What the one says when the other asks for its pages all the same."""
        chain, layout = zoo.resolve("base").chain, (await rig.describe("d")).kv_fingerprint
        prefix = worker_pb2.PrefixRef(chain_digest=chain, first=3, end=6, tokens=range(40))
        async with grpc.aio.insecure_channel(rig.reach(rig.workers["b"])) as channel:
            call = worker_pb2_grpc.WorkerServiceStub(channel).ExportKv(
                worker_pb2.ExportKvRequest(prefix=prefix, kv_fingerprint=layout), timeout=PATIENCE
            )
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
        return from_rpc_error(caught.value)

    run(work())
