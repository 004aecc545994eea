"""shared-trunk: variants whose top quarter is their own, on one trunk, over a server for each.

All servers are ours and share the same cores; those of one variant take the number of threads, one or two,
at which all of them together are faster.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves the script's folder out

from cluster import answer, make_zoo, prompts, row, tiny_model, two_cores
from harness import Row, check
from program import Bar, Program, Say, Scale
from served import serve, top_quarter_variants

from blockserve.client.aio import AsyncClient

VARIANTS, REQUESTS, PROMPT_TOKENS, OUTPUT_TOKENS = 8, 4, 16, 128
PROBE_TOKENS = 24
"""Output tokens of the runs that choose the number of threads."""


async def measure(scale: Scale, say: Say) -> list[Row]:
    """One server of all variants and one each, asked in turns."""
    os.sched_setaffinity(0, set(two_cores()))  # inherited by all servers
    variants = 2 if scale.quick else VARIANTS
    output_tokens = 8 if scale.quick else OUTPUT_TOKENS
    model = {"model": tiny_model()} if scale.quick else {}
    folders = top_quarter_variants(variants, **model)
    names = [f"variant-{number}" for number in range(variants)]
    shared_zoo = make_zoo("trunk-zoo", dict(zip(names, folders, strict=True)))
    off = ("--preload", "all", "--prefix-sharing", "off")
    async with AsyncExitStack() as stack:
        shared = await _open(stack, [stack.enter_context(serve(shared_zoo, *off)).address] * variants)
        own_zoos = [
            make_zoo(f"trunk-zoo-{number}", {names[number]: folder}) for number, folder in enumerate(folders)
        ]

        async def tokens_per_second(
            clients: Sequence[AsyncClient], seed: int, tokens: int
        ) -> tuple[float, list[list[int]]]:
            asked = prompts(seed, variants * REQUESTS, PROMPT_TOKENS, 500 if scale.quick else 40_000)
            started = time.perf_counter()
            answers = await asyncio.gather(
                *(
                    answer(clients[number % variants], names[number % variants], prompt, tokens)
                    for number, prompt in enumerate(asked)
                )
            )
            return len(asked) * tokens / (time.perf_counter() - started), answers

        speeds: dict[int, float] = {}
        servers: dict[int, list[AsyncClient]] = {}
        for threads in (1, 2):
            options = (*off, "--num-threads", str(threads))
            with ExitStack() as starting:
                addresses = [starting.enter_context(serve(zoo, *options)).address for zoo in own_zoos]
                stack.callback(starting.pop_all().close)
            servers[threads] = await _open(stack, addresses)
            probe = min(PROBE_TOKENS, output_tokens)
            await tokens_per_second(servers[threads], 1, 4)
            speeds[threads], _ = await tokens_per_second(servers[threads], 2, probe)
            say(f"{variants} servers of {threads} threads: {speeds[threads]:.1f} tokens/s with short answers")
        best = max(speeds, key=speeds.__getitem__)
        await tokens_per_second(shared, 1, 4)
        ours: list[float] = []
        peer: list[float] = []
        for number in range(scale.runs):
            fast, together = await tokens_per_second(shared, 10 + number, output_tokens)
            slow, apart = await tokens_per_second(servers[best], 10 + number, output_tokens)
            # bf16 parts near ties otherwise in another batch, so it is the first tokens that are compared.
            same = sum(a[0] == b[0] for a, b in zip(together, apart, strict=True))
            check(same >= 0.75 * len(apart), f"only {same} of {len(apart)} first tokens are the same")
            ours.append(fast)
            peer.append(slow)
            say(f"run {number + 1}/{scale.runs}: {fast:.1f} on one trunk, {slow:.1f} apart")
    case = (
        f"{variants} variants with the top quarter of layers their own, {REQUESTS} requests each at once, "
        f"{PROMPT_TOKENS} in, {output_tokens} out, greedy, bf16, one server of two threads"
    )
    return [
        row(
            "shared_trunk",
            "shared-trunk",
            case,
            "tokens/s",
            ours,
            peer=peer,
            peer_name=f"{variants} servers of ours of one variant and {best} threads each, on the same cores",
        )
    ]


async def _open(stack: AsyncExitStack, addresses: Sequence[str]) -> list[AsyncClient]:
    return [await stack.enter_async_context(AsyncClient(address)) for address in addresses]


PROGRAM = Program(
    "shared-trunk",
    "tokens/s of variants on one trunk over a server for each",
    measure,
    (Bar("shared-trunk", 1.6, 2.0),),
)
BENCHMARK = PROGRAM.benchmark

if __name__ == "__main__":
    sys.exit(PROGRAM.main())
