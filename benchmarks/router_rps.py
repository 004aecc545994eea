"""router-rps: requests/s that one router carries on one core, 16 tokens each, from a worker without a model.

The worker (fake_worker.py) and the load (this program) share the other core. The bar is about answers whose
tokens come in messages of their own; beside it stand passes, as real workers send them, and whole answers
in one message. The peer of every row is a bare relay (relay.py) on the same core, in turns: what grpc.aio
itself takes to pass on such messages, on the machine as it is in that minute.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves the script's folder out

from cluster import Process, base_model, local_cluster, make_zoo, row, two_cores
from fake_worker import AT_ONCE, IN_PASSES, SEPARATE
from harness import Row, check
from program import Bar, Program, Say, Scale
from served import MODEL

from blockproto.v1 import inference_pb2, inference_pb2_grpc
from blockserve.common.rpc.channel import Credentials, open_channel

TOKENS, PROMPT_TOKENS, IN_FLIGHT = 16, 32, 32
SECONDS, WARM_SECONDS = 4.0, 2.0
KINDS = {
    "router-rps": (SEPARATE, "each token in a message of its own"),
    "router-rps-passes": (IN_PASSES, "one token of every request in flight in a message"),
    "router-rps-at-once": (AT_ONCE, "all tokens of a request in one message"),
}


async def measure(scale: Scale, say: Say) -> list[Row]:
    """All kinds in turns against one router."""
    router_core, other = two_cores()
    zoo = make_zoo("rps-zoo", {"base": base_model(quick=scale.quick)})
    os.sched_setaffinity(0, {other})
    seconds = 0.3 if scale.quick else SECONDS
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in KINDS}
    costs: dict[str, list[tuple[float, float]]] = {name: [] for name in KINDS}
    async with local_cluster(zoo) as cluster:
        worker = cluster.process("fake_worker", "fake", {other}, {})
        await worker.start()
        router = await cluster.start_router({router_core}, own_cores="1")
        relay = cluster.process("relay", "relay", {router_core}, {"worker": worker.address})
        await relay.start()
        await cluster.until(lambda view: len(view.workers) == 1)
        for kind, _ in KINDS.values():
            for process in (router, relay):
                await load(process, kind, min(seconds, WARM_SECONDS))
        for number in range(scale.runs):
            for name, (kind, _) in KINDS.items():
                rate, busy = await load(router, kind, seconds)
                bare_rate, bare_busy = await load(relay, kind, seconds)
                rates[name].append((rate, bare_rate))
                costs[name].append((busy / rate, bare_busy / bare_rate))
                say(
                    f"run {number + 1}: {name} {rate:.0f} requests/s, {1000 * busy / rate:.2f} ms a request; "
                    f"bare relay {bare_rate:.0f}, {1000 * bare_busy / bare_rate:.2f} ms"
                )
    model = "a tiny model without a tokenizer" if scale.quick else MODEL.name
    rows = []
    for name, (_, how) in KINDS.items():
        case = f"{IN_FLIGHT} streams of {TOKENS} tokens in flight, {model}, {how}; router on one core"
        rows.append(_row(name, case, "requests/s", rates[name]))
        rows.append(_row(f"{name}-cpu", f"{case}: the process's time on it a request", "s", costs[name]))
    return rows


def _row(name: str, case: str, unit: str, pairs: list[tuple[float, float]]) -> Row:
    ours, bare = map(list, zip(*pairs, strict=True))
    peer = "a bare grpc.aio relay of the same messages"
    return row("router_rps", name, case, unit, ours, peer=bare, peer_name=peer)


async def load(process: Process, kind: int, seconds: float) -> tuple[float, float]:
    """Requests/s through the process, and the share of a core that it used."""
    async with open_channel(process.address, Credentials()) as channel:
        return await _load_through(inference_pb2_grpc.InferenceServiceStub(channel), kind, seconds, process)


async def _load_through(
    stub: inference_pb2_grpc.InferenceServiceStub, kind: int, seconds: float, process: Process
) -> tuple[float, float]:
    until = time.perf_counter() + seconds
    message = inference_pb2.GenerateRequest(
        model="base",
        token_ids=inference_pb2.TokenIds(ids=[kind, *range(20, 20 + PROMPT_TOKENS - 1)]),
        sampling=inference_pb2.SamplingParams(temperature=0.0),
        stopping=inference_pb2.StoppingCriteria(max_tokens=TOKENS, ignore_eos=True),
    )
    ended = 0

    async def caller() -> None:
        nonlocal ended
        while time.perf_counter() < until:
            count = 0
            async for chunk in stub.Generate(message):
                check(chunk.first_token_index == count, "a token was lost or repeated")
                count += len(chunk.token_ids)
            check(count == TOKENS, f"{count} tokens instead of {TOKENS}")
            ended += 1

    started, before = time.perf_counter(), process.cpu_seconds()
    await asyncio.gather(*(caller() for _ in range(IN_FLIGHT)))
    taken = time.perf_counter() - started
    return ended / taken, (process.cpu_seconds() - before) / taken


PROGRAM = Program(
    "router-rps",
    "requests/s through a router on one core, 16-token streams, no model",
    measure,
    (Bar("router-rps", 300, 450, per_peer=False),),
)
BENCHMARK = PROGRAM.benchmark

if __name__ == "__main__":
    sys.exit(PROGRAM.main())
