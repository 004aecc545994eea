"""Names of workers, with processes that start, die and wake up at once, over a real state server."""

from __future__ import annotations

import asyncio
import signal
import time
from pathlib import Path

from blockserve.common.api.cluster import WorkerId
from blockzoo.zoo import Zoo
from support.cluster import PATIENCE, Cluster, Process, cluster

SMALL = {"BLOCKZOO_ENGINE_DTYPE": "float32", "BLOCKZOO_ENGINE_KV_CACHE_BYTES": str(1 << 20)}
LONG_LEASE = {"BLOCKZOO_STATE_LEASE_SECONDS": "3600", "BLOCKZOO_STATE_RENEW_SECONDS": "0.1"}


async def start_together(rig: Cluster, name: str, count: int) -> tuple[list[Process], list[str]]:
    """Start workers of one name at the same moment; those that run, and what the others said."""
    made = []
    for number in range(count):
        process = rig._process("worker", name, {"BLOCKZOO_NAME": name})
        process.log = rig.folder / f"{name}-{number}.log"
        rig.workers[f"{name}-{number}"] = process
        made.append(process)
    results = await asyncio.gather(*(process.start() for process in made), return_exceptions=True)
    running = [one for one, result in zip(made, results, strict=True) if result is one]
    failed = [one for one in made if one not in running]
    for one in failed:
        assert one.popen is not None
        assert await asyncio.to_thread(one.popen.wait, PATIENCE) == 1
    return running, [one.log.read_text() for one in failed]


async def ids(rig: Cluster) -> list[WorkerId]:
    return list((await rig.view()).workers)


def test_of_workers_that_start_at_once_under_one_name_one_runs(tmp_path: Path) -> None:
    async def work() -> None:
        zoo = Zoo.open(tmp_path / "zoo", create=True)
        async with cluster(zoo, tmp_path, [], **SMALL, **LONG_LEASE) as rig:
            [winner], said = await start_together(rig, "w", 6)
            sentence = f"error: another worker is called 'w', at {winner.address}\n"
            assert [sentence in text for text in said] == [True] * 5
            assert all("Give this one another name with --name, or stop the other." in text for text in said)
            [first] = await ids(rig)

            winner.kill()  # its lease has an hour to go
            began = time.monotonic()
            [follower], said = await start_together(rig, "w", 3)
            assert time.monotonic() - began < PATIENCE
            assert [f"'w', at {follower.address}" in text for text in said] == [True] * 2
            [second] = await ids(rig)
            assert second != first

    asyncio.run(asyncio.wait_for(work(), 3 * PATIENCE))


def test_a_worker_that_wakes_up_and_was_replaced_ends(tmp_path: Path) -> None:
    """A stopped worker cannot be told from a lost one once its lease has ended."""
    short = {"BLOCKZOO_STATE_LEASE_SECONDS": "0.6", "BLOCKZOO_STATE_RENEW_SECONDS": "0.1"}

    async def work() -> None:
        zoo = Zoo.open(tmp_path / "zoo", create=True)
        async with cluster(zoo, tmp_path, [], **SMALL, **short) as rig:
            stopped = await rig.start_worker("w")
            stopped.send(signal.SIGSTOP)
            rig.workers["former"] = stopped
            await rig.start_worker("w")
            [present] = await ids(rig)
            stopped.send(signal.SIGCONT)
            assert stopped.popen is not None
            assert await asyncio.to_thread(stopped.popen.wait, PATIENCE) == 1
            assert "another worker is called 'w', at" in rig.log("w")
            async with asyncio.timeout(PATIENCE):
                while await ids(rig) != [present]:
                    await asyncio.sleep(0.05)

    asyncio.run(asyncio.wait_for(work(), 3 * PATIENCE))
