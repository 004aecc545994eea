"""failover-gap: how long a caller waits for the next token when a worker is killed or stopped.

Two workers hold each half of the model. What the gap is measured against: 1.5 plain prefills of the tokens
that the request had, on the same cluster in the same run, and 0.25 s; where it hangs, also its lease.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from contextlib import aclosing
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves the script's folder out

import grpc
from cluster import LocalCluster, base_model, halves, local_cluster, make_zoo, prompts, row, two_cores
from harness import Row, check
from program import Bar, Program, Say, Scale

from blockproto.v1 import worker_pb2, worker_pb2_grpc
from blockserve.client.aio import AsyncClient
from blockserve.client.generation import AsyncGeneration
from blockserve.common.api.cluster import Run
from blockserve.common.rpc.channel import Credentials, open_channel
from blockserve.common.state.settings import StateConfig

ALLOWED_PREFILLS, ALLOWED_SECONDS = 1.5, 0.25
CONTEXT_TOKENS, SENT_TOKENS = 500, 60
"""Tokens of the request when its worker is hurt, and how many of them were its answer."""
MORE_TOKENS = 20
"""Of the answer, after that."""


async def measure(scale: Scale, say: Say) -> list[Row]:
    """Hurt a worker of a path again and again, first and second half in turns."""
    context = 60 if scale.quick else CONTEXT_TOKENS
    near, far = two_cores()
    both = {near, far}
    zoo = make_zoo("failover-zoo", {"base": base_model(quick=scale.quick)})
    lease = StateConfig(url="memory://").lease_seconds
    settings = {"engine_prefix_sharing": "off", "engine_num_threads": "1"}
    rows = []
    async with local_cluster(zoo, **settings) as cluster:
        runs = halves(cluster.zoo.chain(cluster.zoo.resolve("base").chain))
        names = {f"{half}{copy}": run for half, run in zip("ab", runs, strict=True) for copy in "12"}
        await asyncio.gather(
            *(cluster.start_worker(name, both) for name in names), cluster.start_router(both)
        )
        for name, run in names.items():
            await cluster.load(name, "base", run)
        async with cluster.client() as client:
            for number in range(2):
                await _prefill(client, context, number, scale)  # every copy has its first pass behind it
            for how, extra in ((signal.SIGKILL, 0.0), (signal.SIGSTOP, lease)):
                gaps, bounds = [], []
                for number in range(scale.runs):
                    seed = 100 * how + 10 * number
                    plain = median(
                        [await _prefill(client, context, seed + again, scale) for again in range(3)]
                    )
                    half = runs[number % 2]
                    gap, hurt = await _gap(cluster, client, names, half, how, context, seed, scale)
                    gaps.append(gap)
                    bounds.append(ALLOWED_PREFILLS * plain + ALLOWED_SECONDS + extra)
                    say(
                        f"{how.name} {hurt}: gap {gap:.3f} s, prefill {plain:.3f} s, allowed {bounds[-1]:.3f}"
                    )
                    await _replace(cluster, hurt, names[hurt], both)
                name = "failover-gap" if how is signal.SIGKILL else "failover-gap-stop"
                lease_too = f" + the lease of {lease:g} s" if extra else ""
                case = (
                    f"{how.name} of a worker at {context} tokens of context, two copies of each half, bf16; "
                    "the answer goes on without a token lost or repeated"
                )
                bound = f"{ALLOWED_PREFILLS:g} x a prefill of these tokens + {ALLOWED_SECONDS:g} s{lease_too}"
                rows.append(row("failover_gap", name, case, "s", gaps, peer=bounds, peer_name=bound))
    return rows


async def _prefill(client: AsyncClient, num_tokens: int, seed: int, scale: Scale) -> float:
    """Seconds to the first token of a fresh prompt."""
    (prompt,) = prompts(seed, 1, num_tokens, 500 if scale.quick else 40_000)
    started = time.perf_counter()
    async with aclosing(_stream(client, prompt, 2)) as chunks:
        await anext(aiter(chunks))
        return time.perf_counter() - started


def _stream(client: AsyncClient, prompt: tuple[int, ...], tokens: int) -> AsyncGeneration:
    return client.generate("base", prompt, max_tokens=tokens, temperature=0.0, ignore_eos=True)


async def _gap(
    cluster: LocalCluster,
    client: AsyncClient,
    names: dict[str, Run],
    half: Run,
    how: signal.Signals,
    context: int,
    seed: int,
    scale: Scale,
) -> tuple[float, str]:
    """The longest wait between two tokens from the moment a worker is hurt, and which worker that was."""
    sent = min(SENT_TOKENS, context // 2)
    (prompt,) = prompts(seed + 9, 1, context - sent, 500 if scale.quick else 40_000)
    tokens, busy, last, gap = 0, "", 0.0, 0.0
    async with aclosing(_stream(client, prompt, sent + MORE_TOKENS)) as chunks:
        async for chunk in chunks:
            now = time.perf_counter()
            check(not chunk.token_ids or chunk.first_token_index == tokens, "a token was lost or repeated")
            tokens += len(chunk.token_ids)
            if not busy:
                busy = await busy_worker(cluster, [name for name, run in names.items() if run == half])
            if last:
                gap = max(gap, now - last)
                last = now
            elif tokens >= sent:
                cluster.workers[busy].send(how)
                last = time.perf_counter()
    check(tokens == sent + MORE_TOKENS, f"{tokens} tokens instead of {sent + MORE_TOKENS}")
    return gap, busy


async def busy_worker(cluster: LocalCluster, names: list[str]) -> str:
    """The worker among these that executes a request."""
    for name in names:
        try:
            async with open_channel(cluster.workers[name].address, Credentials()) as channel:
                stub = worker_pb2_grpc.WorkerServiceStub(channel)
                if (await stub.Describe(worker_pb2.DescribeRequest())).running_requests:
                    return name
        except grpc.aio.AioRpcError as error:
            check(False, f"worker {name} does not answer: {error.code().name}")
    check(False, f"none of {names} has the request")
    return ""


async def _replace(cluster: LocalCluster, name: str, run: Run, cores: set[int]) -> None:
    """End a worker that was hurt, start it again, and wait until its old life is forgotten."""
    before = {one.record.id for one in (await cluster.view()).workers.values() if one.record.name == name}
    cluster.workers[name].kill()
    await cluster.until(lambda view: not before & view.workers.keys())
    await cluster.start_worker(name, cores)
    await cluster.load(name, "base", run)


PROGRAM = Program(
    "failover-gap",
    "gap at the client when a worker is lost, over a prefill and a moment",
    measure,
    (Bar("failover-gap", 1.0, at_most=True), Bar("failover-gap-stop", 1.0, at_most=True)),
)
BENCHMARK = PROGRAM.benchmark

if __name__ == "__main__":
    sys.exit(PROGRAM.main())
