"""The metrics of real routers, workers and controllers while workers are killed and drained."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from blockserve.client.aio import AsyncClient
from blockzoo.zoo import Zoo
from support.cluster import PATIENCE, Cluster, cluster
from support.scrape import Scraped, scrape_logged

NUM_TOKENS = 300
SETTINGS = {
    "BLOCKZOO_METRICS_LISTEN": "127.0.0.1:0",
    "BLOCKZOO_ENGINE_DTYPE": "float32",
    "BLOCKZOO_ENGINE_NUM_THREADS": "1",
    "BLOCKZOO_ENGINE_KV_PAGE_TOKENS": "8",
    "BLOCKZOO_ENGINE_KV_CACHE_BYTES": str(16 << 20),
    "BLOCKZOO_DRAIN_SECONDS": "0.2",
    "BLOCKZOO_KV_CHOICE": "transfer",
}
HALVES = {"a": (0, 3), "b": (3, 0), "c": (0, 3), "d": (3, 0)}
"""Two workers for each half of the chain."""


@pytest.fixture
def zoo(base_zoo: Zoo) -> Zoo:
    return base_zoo


async def read(rig: Cluster, name: str) -> Scraped:
    """The metrics of the process that logs under this name."""
    return await scrape_logged(rig.log(name))


async def until(rig: Cluster, name: str, holds: Callable[[Scraped], bool]) -> Scraped:
    """A scrape of which something holds."""
    async with asyncio.timeout(PATIENCE):
        while not holds(found := await read(rig, name)):
            await asyncio.sleep(0.02)
    return found


async def ask(client: AsyncClient, harm: Callable[[], object] | None = None) -> tuple[int, ...]:
    """One answer; something happens while it runs."""
    tokens: list[int] = []
    async for chunk in client.generate(
        "base", "Every tenant sends requests", temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True
    ):
        tokens.extend(chunk.token_ids)
        if harm is not None and len(tokens) > 40:
            happening, harm = harm(), None
            if asyncio.iscoroutine(happening):
                await happening
    return tuple(tokens)


async def busy(rig: Cluster, one: str, other: str) -> str:
    """Whichever of two workers executes requests now."""
    async with asyncio.timeout(PATIENCE):
        while True:
            for name in (one, other):
                if (await rig.describe(name)).running_requests:
                    return name


def test_what_happens_to_a_cluster_is_what_its_processes_show(zoo: Zoo, tmp_path: Path) -> None:
    async def work() -> None:
        async with cluster(zoo, tmp_path, HALVES, **SETTINGS) as rig:
            for name, (first, end) in HALVES.items():
                await rig.load(name, "base", first, end)
            async with rig.client() as client:
                whole = await ask(client)
                await check_undisturbed(rig)
                lost: list[str] = []

                async def kill_tail() -> None:
                    lost.append(await busy(rig, "b", "d"))
                    peer = await until(
                        rig, lost[0], lambda one: one.one("blockzoo_requests_begun_elsewhere") == 1
                    )
                    assert peer.one("vllm:num_requests_running") == 1
                    rig.workers[lost[0]].kill()

                assert await ask(client, kill_tail) == whole
                await check_failover(rig, lost[0])
                rig.workers.pop(lost[0])

                async def drain_head() -> None:
                    await client.drain_worker(await busy(rig, "a", "c"), 0.0)

                assert await ask(client, drain_head) == whole
                await check_transfer(rig)
                await rig.start_controller()
                await check_controller(rig)
                assert await ask(client) == whole
            rig.state.kill()
            await until(rig, "a", lambda one: one.one("blockzoo_lease_known") == 0)
            await until(rig, "router0", lambda one: one.one("blockzoo_view_age_seconds") > 2)

    asyncio.run(asyncio.wait_for(work(), 250))


async def check_undisturbed(rig: Cluster) -> None:
    router = await read(rig, "router0")
    assert router.one("blockzoo_failovers_total") == 0
    assert router.by("blockzoo_workers", "state") == {"ready": 4, "starting": 0, "draining": 0}
    assert (router.one("blockzoo_path_workers_count"), router.one("blockzoo_path_workers_sum")) == (1, 2)
    assert router.by("vllm:generation_tokens_total", "model_name") == {"base": NUM_TOKENS}
    assert router.by("vllm:time_to_first_token_seconds_count", "model_name") == {"base": 1}
    assert 0 <= router.one("blockzoo_view_age_seconds") < PATIENCE
    workers = [await read(rig, name) for name in HALVES]
    assert all(one.one("blockzoo_lease_known") == 1 for one in workers)
    # One head and one tail have worked: each has a link to the other, and nothing waits there.
    linked = [one for one in workers if one.by("blockzoo_link_in_flight_bytes", "peer")]
    assert len(linked) == 2
    assert all(one.one("blockzoo_engine_passes_total") >= NUM_TOKENS for one in linked)
    for one in linked:
        (peer,) = one.by("blockzoo_hop_seconds", "peer")
        assert peer.rpartition(".")[0] in HALVES
        assert 0 < one.one("blockzoo_hop_seconds") < PATIENCE


async def check_failover(rig: Cluster, lost: str) -> None:
    router = await until(rig, "router0", lambda one: one.by("blockzoo_workers", "state")["ready"] == 3)
    assert router.one("blockzoo_failovers_total") == rig.log("router0").count("goes on elsewhere") > 0
    assert router.by("blockzoo_kv_decisions_total", "what") == {"recompute": 1}
    assert router.by("blockzoo_kv_decisions_total", "reason") == {"owner_lost": 1}
    assert router.one("blockzoo_kv_transfer_bytes_per_second") == 0
    assert router.one("blockzoo_path_workers_count") == 3
    assert router.by("vllm:generation_tokens_total", "model_name") == {"base": 2 * NUM_TOKENS}
    head = await read(rig, "a"), await read(rig, "c")
    peers = {peer for one in head for peer in one.by("blockzoo_hop_seconds", "peer")}
    assert lost not in {peer.rpartition(".")[0] for peer in peers}


async def check_transfer(rig: Cluster) -> None:
    router = await read(rig, "router0")
    assert router.by("blockzoo_kv_decisions_total", "what") == {"recompute": 1, "transfer": 1}
    assert router.by("blockzoo_kv_decisions_total", "reason") == {"owner_lost": 1, "cheaper": 1}
    assert router.one("blockzoo_kv_transfer_bytes_per_second") > 0
    await until(rig, "router0", lambda one: one.by("blockzoo_workers", "state")["draining"] == 1)


async def check_controller(rig: Cluster) -> None:
    """What was asked for a moment ago is placed."""
    controller = await until(rig, "controller0", lambda one: one.one("blockzoo_placements_total") > 0)
    assert controller.one("blockzoo_controller_leading") == 1
    assert controller.one("blockzoo_placement_loads_total") > 0
    assert controller.one("blockzoo_placement_refused_writes_total") == 0
    assert controller.one("blockzoo_placement_planning_seconds") > 0
    version = controller.one("blockzoo_placement_version")
    await until(rig, "router0", lambda one: one.one("blockzoo_placement_version") >= version)
