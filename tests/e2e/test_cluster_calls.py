"""Calls to a cluster of real processes that end early, or that nobody has room for."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import pytest

from blockserve.client.aio import AsyncClient
from blockserve.common.errors import DeadlineExceededError, NoPathError, QueueFullError
from blockzoo.zoo import Zoo
from support.cluster import PATIENCE, Cluster, cluster

SETTINGS = {
    "BLOCKZOO_ENGINE_DTYPE": "float32",
    "BLOCKZOO_ENGINE_NUM_THREADS": "1",
    "BLOCKZOO_ENGINE_KV_CACHE_BYTES": str(16 << 20),
}
LONG = {"max_tokens": 150, "ignore_eos": True}
PATHS = [{"a": (0, 3), "b": (3, 0)}, {"a": (0, 2), "b": (2, 4), "c": (4, 0)}]


@pytest.fixture
def zoo(base_zoo: Zoo) -> Zoo:
    return base_zoo


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 2 * PATIENCE))


async def until_idle(rig: Cluster, *names: str) -> None:
    """Wait until workers have no request and no page in use."""
    async with asyncio.timeout(PATIENCE):
        for name in names:
            while (said := await rig.describe(name)).kv_pages_used or said.running_requests:
                await asyncio.sleep(0.01)


@pytest.mark.parametrize("cuts", PATHS, ids=["two workers", "three workers"])
def test_an_answer_that_ends_early_frees_every_worker_on_the_path(
    zoo: Zoo, tmp_path: Path, cuts: dict[str, tuple[int, int]]
) -> None:
    """Its caller leaves, or its time is up. The tail worker is stopped meanwhile: nothing ends by itself."""
    *others, tail = cuts
    patient = {"BLOCKZOO_STATE_LEASE_SECONDS": "60"}  # the stopped worker is slow, not lost

    async def work() -> None:
        async with cluster(zoo, tmp_path, list(cuts), **SETTINGS, **patient) as rig:
            for name, (first, end) in cuts.items():
                await rig.load(name, "base", first, end)
            async with AsyncClient(rig.routers[0].address, resume_attempts=0) as client:
                await client.generate("base", "Every tenant", max_tokens=2).result()  # paths are known
                for timeout in (None, 3.0):
                    chunks = aiter(client.generate("base", "Every tenant", timeout=timeout, **LONG))
                    await anext(chunks)
                    assert (await rig.describe(tail)).kv_pages_used
                    rig.workers[tail].send(signal.SIGSTOP)
                    if timeout is None:
                        await chunks.aclose()
                    else:
                        with pytest.raises(DeadlineExceededError):
                            await exhaust(chunks)
                    await until_idle(rig, *others)
                    rig.workers[tail].send(signal.SIGCONT)
                    await until_idle(rig, tail)

    run(work())


async def exhaust(chunks: AsyncIterator[object]) -> None:
    async for _ in chunks:
        pass


def test_what_no_worker_has_room_for_is_unavailable_for_now(zoo: Zoo, tmp_path: Path) -> None:
    """Two calls wait for a place that never comes, more are refused at once; all are told when to retry."""
    small = {"BLOCKZOO_ENGINE_BLOCK_BYTES": "2000"}
    limits = {"BLOCKZOO_FAILOVER_PATH_SECONDS": "3", "BLOCKZOO_ROUTER_MAX_REQUESTS": "2"}

    async def work() -> None:
        async with cluster(zoo, tmp_path, ["a"], **SETTINGS, **small, **limits) as rig:
            await rig.start_controller()
            async with AsyncClient(rig.routers[0].address, resume_attempts=0) as client:

                async def ask() -> BaseException:
                    try:
                        await client.generate("base", "Every tenant", max_tokens=2).result()
                    except (NoPathError, QueueFullError) as error:
                        return error
                    raise AssertionError("nobody has room for it")

                errors = await asyncio.gather(*(ask() for _ in range(5)))
            assert sorted(type(error).__name__ for error in errors) == [
                *["NoPathError"] * 2,
                *["QueueFullError"] * 3,
            ]
            assert all(error.retry_after > 0 for error in errors)
            assert "no room" in rig.log("controller0")

    run(work())
