"""kv-choice: does the cost model choose the faster of fetching keys and values and computing them again?

A worker drains under an answer, and a copy of its half goes on. Each case is done both ways, by a router that
always fetches and one that always computes again, and then by one that chooses; what counts is how often the
choice was the way that took less time in that case.
"""

from __future__ import annotations

import asyncio
import sys
import time
from contextlib import aclosing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves the script's folder out

from cluster import (
    LocalCluster,
    Process,
    base_model,
    halves,
    local_cluster,
    make_zoo,
    prompts,
    row,
    two_cores,
)
from failover_gap import busy_worker
from harness import Row, check
from program import Bar, Program, Say, Scale

from blockserve.client.aio import AsyncClient

SIZES = (512, 2048, 4096)
BEFORE, AFTER = 4, 4
"""Tokens of the answer before the worker drains, and after."""
WAYS = ("transfer", "recompute", "auto")


async def measure(scale: Scale, say: Say) -> list[Row]:
    """Drain workers of the second half under answers of several lengths, each way."""
    sizes = (64, 96) if scale.quick else SIZES
    both = set(two_cores())
    zoo = make_zoo("kv-choice-zoo", {"base": base_model(quick=scale.quick)})
    taken: dict[str, dict[int, list[float]]] = {way: {size: [] for size in sizes} for way in WAYS}
    shares: list[float] = []
    async with local_cluster(zoo, engine_num_threads="1", engine_deterministic="false") as cluster:
        first, second = halves(cluster.zoo.chain(cluster.zoo.resolve("base").chain))
        names = {"a": first, "b1": second, "b2": second}
        await asyncio.gather(*(cluster.start_worker(name, both) for name in names))
        routers = {way: await _router(cluster, way, both) for way in WAYS}
        for name, run in names.items():
            await cluster.load(name, "base", run)
        clients = {way: AsyncClient(process.address) for way, process in routers.items()}
        for number in range(2):  # what the routers reckon with is measured first
            for way in WAYS:
                await _move(cluster, clients[way], sizes[0], 7000 + number * 10 + len(way), scale)
        for number in range(scale.runs):
            right: list[float] = []
            for size in sizes:
                for way in WAYS:
                    seed = 1000 * number + size + len(way)
                    taken[way][size].append(await _move(cluster, clients[way], size, seed, scale))
                chosen = _last_choice(routers["auto"].log)
                pair = {way: taken[way][size][-1] for way in ("transfer", "recompute")}
                right.append(float(pair[chosen] <= min(pair.values())))
                times = ", ".join(f"{way} {taken[way][size][-1]:.3f} s" for way in WAYS)
                say(f"{size} tokens: {times}; chose {chosen}")
            shares.append(sum(right) / len(right))
        for client in clients.values():
            await client.close()
    case = (
        "cases in which the faster way was chosen, a worker of the second half drains under an answer, bf16"
    )
    rows = [row("kv_choice", "kv-choice", case, "share", shares)]
    rows.extend(
        row(
            "kv_choice",
            f"kv-move-{size}",
            f"longest wait for a token when a worker drains at {size} tokens: fetched, over computed",
            "s",
            taken["transfer"][size],
            peer=taken["recompute"][size],
            peer_name="computed again",
        )
        for size in sizes
    )
    return rows


async def _router(cluster: LocalCluster, way: str, cores: set[int]) -> Process:
    process = cluster.process("router", f"router-{way}", cores, {"kv_choice": way, "log_level": "info"})
    await process.start()
    return process


async def _move(cluster: LocalCluster, client: AsyncClient, size: int, seed: int, scale: Scale) -> float:
    """The longest wait between two tokens when the worker of the second half drains; seconds."""
    (prompt,) = prompts(seed, 1, size - BEFORE, 500 if scale.quick else 40_000)
    tokens, drained, last, gap = 0, "", 0.0, 0.0
    drain: asyncio.Task[int] | None = None
    chunks = client.generate("base", prompt, max_tokens=BEFORE + AFTER, temperature=0.0, ignore_eos=True)
    async with aclosing(chunks.__aiter__()) as stream:  # type: ignore[type-var]
        async for chunk in stream:
            now = time.perf_counter()
            check(not chunk.token_ids or chunk.first_token_index == tokens, "a token was lost or repeated")
            tokens += len(chunk.token_ids)
            if drained:
                gap, last = max(gap, now - last), now
            elif tokens >= BEFORE:
                drained = await busy_worker(cluster, ["b1", "b2"])
                last = time.perf_counter()
                drain = asyncio.create_task(client.drain_worker(drained, 0.0))
    assert drain is not None
    await drain
    check(tokens == BEFORE + AFTER, f"{tokens} tokens instead of {BEFORE + AFTER}")
    await client.drain_worker(drained, 0.0, resume=True)
    return gap


def _last_choice(log: Path) -> str:
    """What the router decided last."""
    for line in reversed(log.read_text().splitlines()):
        for way in ("transfer", "recompute"):
            if f"kv {way} " in line:
                return way
    check(False, "the router has decided nothing")
    return ""


PROGRAM = Program(
    "kv-choice",
    "whether keys and values are fetched when that is faster, and computed when that is",
    measure,
    (Bar("kv-choice", 0.95, per_peer=False),),
)
BENCHMARK = PROGRAM.benchmark

if __name__ == "__main__":
    sys.exit(PROGRAM.main())
