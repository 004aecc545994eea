"""split-2: one model in halves over two workers of one core each, over one process with both cores.

Both sides are asked through a router of their own that may use both cores; the row `split-2-serve` compares
with `blockzoo serve`, where router and engine are one process.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves the script's folder out

from cluster import answer, base_model, halves, local_cluster, make_zoo, prompts, row, two_cores
from harness import Row, check
from program import Bar, Program, Say, Scale
from served import serve

from blockserve.client.aio import AsyncClient
from blockserve.common.api.cluster import Run

REQUESTS, PROMPT_TOKENS, OUTPUT_TOKENS = 32, 128, 64


async def measure(scale: Scale, say: Say) -> list[Row]:
    """Three servers over one zoo, asked in turns."""
    count, prompt_tokens, output_tokens = (
        (4, 16, 8) if scale.quick else (REQUESTS, PROMPT_TOKENS, OUTPUT_TOKENS)
    )
    near, far = two_cores()
    both = {near, far}
    os.sched_setaffinity(0, both)  # inherited by `serve`
    zoo = make_zoo("split-zoo", {"base": base_model(quick=scale.quick)})
    settings = {"engine_prefix_sharing": "off"}
    async with AsyncExitStack() as stack:
        split = await stack.enter_async_context(local_cluster(zoo, **settings))
        whole = await stack.enter_async_context(local_cluster(zoo, **settings))
        chain = split.zoo.chain(split.zoo.resolve("base").chain)
        await asyncio.gather(
            split.start_worker("first", {near}),
            split.start_worker("second", {far}),
            split.start_router(both),
            whole.start_worker("whole", both),
            whole.start_router(both),
        )
        first, second = halves(chain, sampled=output_tokens / (prompt_tokens + output_tokens))
        await split.load("first", "base", first)
        await split.load("second", "base", second)
        await whole.load("whole", "base", Run(0, len(chain.links)))
        server = stack.enter_context(serve(zoo, "--preload", "all", "--prefix-sharing", "off"))
        clients = [
            await stack.enter_async_context(client)
            for client in (split.client(), whole.client(), AsyncClient(server.address))
        ]
        say(f"positions {first.first} to {first.end - 1} and {second.first} to {second.end - 1}")

        async def ask(client: AsyncClient, asked: Sequence[tuple[int, ...]]) -> list[list[int]]:
            return await asyncio.gather(*(answer(client, "base", prompt, output_tokens) for prompt in asked))

        samples: list[list[float]] = [[] for _ in clients]
        for number in range(-1, scale.runs):
            asked = prompts(100 + number, count, prompt_tokens, 500 if scale.quick else 40_000)
            given = []
            for client, taken in zip(clients, samples, strict=True):
                started = time.perf_counter()
                given.append(await ask(client, asked))
                if number >= 0:  # the first run warms up
                    taken.append(count * output_tokens / (time.perf_counter() - started))
            # bf16 parts near ties otherwise in another batch, so it is the first tokens that are compared.
            same = sum(a[0] == b[0] for a, b in zip(given[0], given[1], strict=True))
            check(same >= 0.75 * count, f"only {same} of {count} first tokens are the same over two workers")
            if number >= 0:
                say("run " + ", ".join(f"{taken[-1]:.1f}" for taken in samples) + " tokens/s")
    case = (
        f"{count} requests at once, {prompt_tokens} in, {output_tokens} out, greedy, bf16; two workers of "
        "one core each over a router on both cores"
    )
    return [
        row(
            "split",
            "split-2",
            case,
            "tokens/s",
            samples[0],
            peer=samples[1],
            peer_name="the same router over one worker with both cores",
        ),
        row(
            "split",
            "split-2-serve",
            case,
            "tokens/s",
            samples[0],
            peer=samples[2],
            peer_name="blockzoo serve with both cores",
        ),
    ]


PROGRAM = Program(
    "split-2",
    "tokens/s of a model split over two workers of one core, over one process with two",
    measure,
    (Bar("split-2", 0.8, 0.9), Bar("split-2-serve", 0.8, 0.9)),
)
BENCHMARK = PROGRAM.benchmark

if __name__ == "__main__":
    sys.exit(PROGRAM.main())
