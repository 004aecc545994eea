"""The shared state at the size of a large cluster: what a renewal, a view and a placement cost one process.

    python benchmarks/state_scale.py [--workers 1000] [--held 100] [--server PROGRAM]

Prints one JSON object: milliseconds of single takes, and the bytes that the server sent and received.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import redis

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
from blockserve.common.process.redis_child import RedisChild
from blockserve.common.state.opening import open_store
from blockserve.common.state.settings import StateConfig
from blockserve.common.state.store import Announcement
from blockzoo.manifest import ChainId

LEASE_SECONDS = 600.0


async def measure(server: RedisChild, num_workers: int, num_held: int) -> dict[str, Any]:
    """Announce, renew, view and place on an empty server."""
    store = open_store(StateConfig(url=server.url, timeout_seconds=30))
    beside = redis.Redis.from_url(server.url, decode_responses=True)
    ids = [WorkerId(f"worker-{number:04}-0123456789ab") for number in range(num_workers)]
    load = LoadReport(1, 2, 3, 0.01, 1000.0, 5, 6, 7, dict.fromkeys(ids[:8], 0.0001))
    results: dict[str, Any] = {"workers": num_workers, "held": num_held, "server": server.program.name}

    async def take(name: str, call: Awaitable[Any], times: int = 1) -> Any:
        before, start = beside.info("stats"), time.perf_counter()
        value = await call
        results[f"{name}_ms"] = round((time.perf_counter() - start) * 1e3 / times, 2)
        after = beside.info("stats")
        for word, figure in (("sent", "total_net_output_bytes"), ("received", "total_net_input_bytes")):
            results[f"{name}_{word}_bytes"] = (after[figure] - before[figure]) // times
        return value

    async def wanted_by_each() -> None:
        for worker in ids:
            await store.wanted(worker)

    async def announce_all() -> None:
        for number, worker in enumerate(ids):
            held = [
                ResidentSegment(SegmentDigest(f"{number % 50:016x}{at:016x}"), Run(at, at + 1))
                for at in range(num_held)
            ]
            said = Announcement(WorkerRecord(worker, worker[:11], "192.0.2.1:7460"), load, held)
            await store.announce(said, lease_seconds=LEASE_SECONDS)

    async def renew_all() -> None:
        for worker in ids:
            assert await store.renew(worker, load, lease_seconds=LEASE_SECONDS)

    await take("announce", announce_all(), num_workers)
    await take("renew", renew_all(), num_workers)
    await take("first_view", store.view())
    await take("next_view", store.view())
    runs = tuple(Assignment(ChainId(f"{at % 9:064x}"), Run(at, at + 1)) for at in range(num_held))
    token = await store.lead("bench", lease_seconds=LEASE_SECONDS)
    assert token is not None
    wanted = dict.fromkeys(ids, runs)
    reader = open_store(StateConfig(url=server.url, timeout_seconds=30))
    await reader.view()
    await take("place", store.place(Placement(0, wanted), token))
    await take("view_with_placement", reader.view())
    await take("first_wanted", wanted_by_each(), num_workers)
    await take("place_one_changed", store.place(Placement(0, {**wanted, ids[0]: runs[:-1]}), token))
    await take("view_with_one_changed", reader.view())
    await take("wanted_with_one_changed", wanted_by_each(), num_workers)
    await reader.close()
    assert len((await store.view()).workers) == num_workers
    await store.close()
    beside.close()
    return results


def main() -> None:
    """Measure on a server of our own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--held", type=int, default=100, help="segments, and assignments, of each worker")
    parser.add_argument("--server", type=Path, help="program of the server; the first one found otherwise")
    arguments = parser.parse_args()
    with RedisChild(program=arguments.server) as server:
        print(json.dumps(asyncio.run(measure(server, arguments.workers, arguments.held)), indent=2))


if __name__ == "__main__":
    main()
