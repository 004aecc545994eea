"""What operators wish, with real processes and a real Redis: it moves blocks, and nothing forgets it."""

from __future__ import annotations

import asyncio
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from blockserve.client.aio import AsyncClient
from blockserve.common.errors import WorkerNotFoundError
from blockzoo.zoo import Zoo
from support.cluster import PATIENCE, Cluster, cluster
from support.forked import run_blockzoo

SETTINGS = {"BLOCKZOO_ENGINE_DTYPE": "float32", "BLOCKZOO_ENGINE_KV_CACHE_BYTES": str(16 << 20)}


@pytest.fixture
def zoo(base_zoo: Zoo) -> Zoo:
    return base_zoo


async def blockzoo(rig: Cluster, *words: str) -> subprocess.CompletedProcess[str]:
    """A command line to the router."""
    return await asyncio.to_thread(run_blockzoo, *words, "--server", rig.routers[0].address)


async def said(rig: Cluster, *words: str) -> Any:
    """What a command line that works prints as JSON."""
    outcome = await blockzoo(rig, *words, "--json")
    assert outcome.returncode == 0, outcome.stderr
    return json.loads(outcome.stdout)


async def held_by(rig: Cluster, *names: str) -> None:
    """Wait until exactly these workers hold blocks: there is one variant only."""
    seen: set[str] = set()
    try:
        async with asyncio.timeout(PATIENCE):
            while (seen := await holders(rig)) != set(names):
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise AssertionError(f"held by {seen}, not {names}:\n{rig.log('controller0')[-2000:]}") from None


async def holders(rig: Cluster) -> set[str]:
    return {one.record.name for one in (await rig.view()).workers.values() if one.segments}


def test_wishes_move_blocks_and_outlive_controllers_and_redis(zoo: Zoo, tmp_path: Path) -> None:
    async def work() -> None:
        async with cluster(zoo, tmp_path, ["a", "b"], **SETTINGS) as rig:
            await asyncio.gather(rig.start_controller(), rig.start_controller())

            # No call was made yet: the pin alone has it loaded.
            assert (await said(rig, "pin", "base"))["pinned"]
            async with asyncio.timeout(PATIENCE):
                while not await holders(rig):
                    await asyncio.sleep(0.05)

            # Controllers take wishes whether or not they lead.
            for controller, name in zip(rig.controllers, ("a", "b"), strict=True):
                async with AsyncClient(controller.address) as client:
                    with pytest.raises(WorkerNotFoundError):
                        await client.wish("base", workers=["nobody"])
                    await client.wish("base", workers=[name])
                await held_by(rig, name)
            await said(rig, "place", "base", "a")
            await held_by(rig, "a")

            await said(rig, "replicas", "base", "2")
            await held_by(rig, "a", "b")

            # Nothing but the zoo is left of it, and it is enough.
            for controller in rig.controllers:
                controller.kill()
            rig.state.flush()
            assert not (await rig.view()).placement.workers
            await rig.start_controller()
            async with asyncio.timeout(PATIENCE):
                while sum(map(bool, (await rig.view()).placement.workers.values())) < 2:
                    await asyncio.sleep(0.05)
            await held_by(rig, "a", "b")
            (listed,) = (await said(rig, "place"))["wishes"]
            assert (listed["pinned"], listed["replicas"], listed["workers"]) == (True, 2, ["a"])
            assert "pinned, 2 replicas, on a" in (await blockzoo(rig, "place")).stdout
            await said(rig, "replicas", "base", "0")
            await held_by(rig, "a")

            # Evicted under demand: it goes, and the next call has it again, wherever that is.
            async with rig.client() as client:
                before = await client.generate("base", "Every tenant", max_tokens=8, temperature=0).result()
                await said(rig, "evict", "base")
                await held_by(rig)
                assert (await said(rig, "place"))["wishes"] == []
                after = await client.generate("base", "Every tenant", max_tokens=8, temperature=0).result()
            assert after.token_ids == before.token_ids
            await said(rig, "evict", "base", "--worker", "a")
            await held_by(rig, "b")

            # `load --pin` is the same pin.
            await said(rig, "load", "base", "--pin")
            assert (await said(rig, "place"))["wishes"][0]["pinned"]
            await said(rig, "pin", "base", "--off")

            for code, reason, words in (
                (3, "VARIANT_NOT_FOUND", ("pin", "nobody")),
                (3, "WORKER_NOT_FOUND", ("place", "base", "nobody")),
                (3, "WORKER_NOT_FOUND", ("evict", "base", "--worker", "nobody")),
                (1, "INVALID_INPUT", ("replicas", "base", "100000")),
                (1, "INVALID_INPUT", ("replicas", "base", "99999999999")),
                (1, "INVALID_INPUT", ("pin", "base@1")),
            ):
                failed = await blockzoo(rig, *words, "--json")
                assert failed.returncode == code, failed.stderr
                assert json.loads(failed.stderr)["error"]["reason"] == reason

    asyncio.run(asyncio.wait_for(work(), 250))
