"""hop: what a hop between two workers adds to a token, over half the round trip of a bare grpc.aio echo.

One request decodes over a chain of two workers and at one worker that holds all of it. A token of the chain
makes two hops: its hidden state forward, the sampled token back. The echo carries a frame of the same bytes,
in the same run, between processes on the same cores. Nothing else is on the way: the program speaks to the
head worker as a router does.

The row hop-working has the same hops over another echo, both of whose ends read 16 MiB before they send: what
bare gRPC takes between processes that compute, as workers do. The bar is about the idle one.
"""

from __future__ import annotations

import asyncio
import os
import struct
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves the script's folder out

import torch
from cluster import LocalCluster, Transport, local_cluster, make_zoo, prompts, row, tiny_model, two_cores
from echo import METHOD, work
from harness import Row, check
from program import Bar, Program, Say, Scale
from served import MODEL

from blockproto.v1 import worker_pb2
from blockserve.common.api.cluster import PathStep, Run
from blockserve.common.api.engine import EngineRequest, SamplingParams
from blockserve.common.rpc.channel import Credentials, open_channel
from blockserve.router.cluster.stream import WorkerStream
from blockserve.worker.peers.convert import from_frame, to_frame
from blockserve.worker.peers.messages import AttemptId, ChunkMsg

HOPS = 2
PROMPT_TOKENS = 16
WIDTH = 576
"""Of the hidden states of both models."""
Steps = tuple[PathStep, ...]
"""A request's way over workers."""
MICRO_ROUNDS = 300


def frame() -> bytes:
    """What travels forward for one token of one request."""
    message = ChunkMsg(
        AttemptId("0123456789abcdef0123456789abcdef#1", 0, time.time_ns()), 1, 100, (7,), _hidden()
    )
    return to_frame([message]).SerializeToString()


def _hidden() -> torch.Tensor:
    return torch.ones(1, WIDTH, dtype=torch.bfloat16)


async def measure(scale: Scale, say: Say) -> list[Row]:
    """Both transports with the tiny model, TCP with SmolLM2 too."""
    tokens = 40 if scale.quick else 400
    rows = await _case("hop", "tcp", tiny_model(), tokens, scale, say)
    if not scale.quick:
        rows += await _case("hop-unix", "unix", tiny_model(), tokens, scale, say)
        rows += await _case("hop-smollm2", "tcp", MODEL, 100, scale, say)
    return rows + await _parts(scale, say)


async def _case(
    name: str, transport: Transport, model: Path, tokens: int, scale: Scale, say: Say
) -> list[Row]:
    near, far = two_cores()
    zoo = make_zoo(f"{name}-zoo", {"base": model})
    os.sched_setaffinity(0, {far})
    async with local_cluster(zoo, transport=transport, engine_prefix_sharing="off") as cluster:
        echo = cluster.process("echo", "echo", {near}, {})
        working = cluster.process("echo", "working-echo", {near}, {"echo_works": "1"})
        (alone, chain), _, _ = await asyncio.gather(
            start_workers(cluster, near, far), echo.start(), working.start()
        )
        added, halves, working_halves = [], [], []
        async with (
            _echoing(echo.address, frame()) as round_trip,
            _echoing(working.address, frame(), works=True) as working_round_trip,
        ):
            # Each sample is one of all three in turns, so that what drifts drifts for all.
            for number in range(2 * scale.runs):
                one = (await decode(cluster, alone, tokens, number + 1))[0]
                two = (await decode(cluster, chain, tokens, number + 1))[0]
                half = median([await round_trip() for _ in range(tokens)]) / 2
                added.append((two - one) / HOPS)
                halves.append(half)
                working_halves.append(median([await working_round_trip() for _ in range(tokens)]) / 2)
                say(
                    f"{name}: token {one * 1e6:.0f} us at one worker, {two * 1e6:.0f} us over two; "
                    f"hop {added[-1] * 1e6:.0f} us, half an echo {half * 1e6:.0f} us, "
                    f"between processes that compute {working_halves[-1] * 1e6:.0f} us"
                )
    if min(added) <= 0:
        check(name != "hop", "the chain of two is not slower than one worker: the machine was disturbed")
        say(f"{name}: not reported, tokens at one worker vary by more than a hop takes")
        return []
    case = (
        f"{model.name}, batch 1, {tokens} tokens, {transport}, each worker on one core: (median time of a "
        f"token over two workers - at one) / {HOPS} hops; the echo is of a frame of {len(frame())} bytes"
    )
    idle, busy = "half the round trip of a bare grpc.aio echo", "the same between processes that compute"
    return [
        row("hop", name, case, "s", added, peer=halves, peer_name=idle),
        row("hop", f"{name}-working", case, "s", added, peer=working_halves, peer_name=busy),
    ]


async def start_workers(cluster: LocalCluster, near: int, far: int) -> tuple[Steps, Steps]:
    """Start a worker that holds all of the model, and a chain of two; the paths over them.

    Raises:
        CheckFailedError: they answer otherwise than each other.
    """
    length = len(cluster.zoo.chain(cluster.zoo.resolve("base").chain).links)
    cut = length // 2
    await asyncio.gather(
        cluster.start_worker("alone", {near}),
        cluster.start_worker("head", {near}),
        cluster.start_worker("tail", {far}),
    )
    alone = (await cluster.load("alone", "base", Run(0, length)),)
    chain = (
        await cluster.load("head", "base", Run(0, cut)),
        await cluster.load("tail", "base", Run(cut, length)),
    )
    check(
        (await decode(cluster, alone, 30, 0))[1] == (await decode(cluster, chain, 30, 0))[1],
        "two workers answer otherwise than one",
    )
    return alone, chain


async def decode(cluster: LocalCluster, path: Steps, tokens: int, seed: int) -> tuple[float, list[int]]:
    """The median time between tokens, and the tokens."""
    (prompt,) = prompts(seed, 1, PROMPT_TOKENS, 500)
    request = EngineRequest(
        request_id=f"hop-{time.time_ns()}",
        chain=cluster.zoo.resolve("base").chain,
        prompt=prompt,
        sampling=SamplingParams(temperature=0.0),
        max_tokens=tokens,
        path=path,
        arrival=time.time_ns(),
    )
    stream = WorkerStream(path[0].worker, path[0].address, Credentials())
    times, answer = [], []
    try:
        async with aclosing(stream.run(request)) as batches:
            async for events in batches:
                times.append(time.perf_counter())
                answer += [event.token_id for event in events]
    finally:
        await stream.close()
    check(len(answer) == tokens, "an answer has too few tokens")
    return median(later - earlier for earlier, later in pairwise(times)), answer


@asynccontextmanager
async def _echoing(
    address: str, data: bytes, *, works: bool = False
) -> AsyncIterator[Callable[[], Awaitable[float]]]:
    """Gives a function that makes a round trip; its seconds, without those that both ends compute."""
    async with open_channel(address, Credentials()) as channel:
        call = channel.stream_stream(METHOD)()

        async def round_trip() -> float:
            if works:
                work()
            started = time.perf_counter()
            await call.write(data)
            answer = await call.read()
            seconds = time.perf_counter() - started
            check(answer[-len(data) :] == data, "the echo is not what was sent")
            return seconds - (struct.unpack("<d", answer[:8])[0] if works else 0.0)

        for _ in range(50):
            await round_trip()
        yield round_trip
        await call.done_writing()


async def _parts(scale: Scale, say: Say) -> list[Row]:
    """What our side of a hop is made of, each part alone in this process."""
    rounds = 20 if scale.quick else MICRO_ROUNDS
    data, message = frame(), from_frame(worker_pb2.ExchangeRequest.FromString(frame()))
    loop = asyncio.get_running_loop()

    async def wake_loop() -> float:
        future: asyncio.Future[float] = loop.create_future()

        def come() -> None:
            started = time.perf_counter()
            loop.call_soon_threadsafe(lambda: future.set_result(time.perf_counter() - started))

        threading.Timer(0.001, come).start()
        return await future

    async def wake_thread() -> float:
        wake, ready, woken = threading.Condition(), threading.Event(), []

        def wait() -> None:
            with wake:
                ready.set()
                wake.wait()
            woken.append(time.perf_counter())

        thread = threading.Thread(target=wait)
        thread.start()
        ready.wait()
        await asyncio.sleep(0.001)
        started = time.perf_counter()
        with wake:
            wake.notify()
        thread.join()
        return woken[0] - started

    async def timed(action: Callable[[], object]) -> float:
        started = time.perf_counter()
        action()
        return time.perf_counter() - started

    parts = {
        "encode": lambda: timed(lambda: to_frame(message).SerializeToString()),
        "loop-wake": wake_loop,
        "decode": lambda: timed(lambda: from_frame(worker_pb2.ExchangeRequest.FromString(data))),
        "engine-wake": wake_thread,
    }
    rows = []
    for name, part in parts.items():
        samples = [await part() for _ in range(rounds)]
        say(f"{name}: {median(samples) * 1e6:.0f} us")
        rows.append(row("hop", f"hop-{name}", f"the part {name} of a hop, alone", "s", samples))
    return rows


PROGRAM = Program(
    "hop",
    "added latency per hop and token over half the round trip of a bare echo",
    measure,
    (Bar("hop", 2.0, 1.3, at_most=True),),
)
BENCHMARK = PROGRAM.benchmark

if __name__ == "__main__":
    sys.exit(PROGRAM.main())
