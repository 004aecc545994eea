"""sick-worker: calls that end in an error while one of two workers has no memory for its large passes.

Both workers hold the whole model. The address space of one is limited to little more than it has, so that
the passes of long prompts fail there and those of short ones do not. The router tries a failed request at the
other worker and learns to avoid the sick one.
"""

from __future__ import annotations

import asyncio
import resource
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves the script's folder out

from cluster import base_model, local_cluster, make_zoo, prompts, row, two_cores
from harness import Row, check
from program import Bar, Program, Say, Scale

from blockserve.client.aio import AsyncClient
from blockserve.common.api.cluster import Run
from blockzoo.errors import BlockzooError

CALLS, CALLERS, OUTPUT_TOKENS = 200, 8, 2
LONG, SHORT = 400, 8
"""Prompt tokens of every other call."""
SPARE_BYTES = 8 << 20
"""What the sick worker may still take: less than a long prompt's pass."""


async def measure(scale: Scale, say: Say) -> list[Row]:
    """One row: the errors of each run, whose workers are new."""
    cores = set(two_cores())
    zoo = make_zoo("sick-zoo", {"base": base_model(quick=scale.quick)})
    settings = {
        "engine_prefix_sharing": "off",
        "engine_num_threads": "1",
        # What is counted are errors. On processors without products of bfloat16, they take ten times as long.
        "engine_dtype": "float32",
        "engine_max_tokens_per_pass": "2048",
    }
    errors = []
    for number in range(scale.runs):
        async with local_cluster(zoo, **settings) as cluster:
            links = len(cluster.zoo.chain(cluster.zoo.resolve("base").chain).links)
            for name in ("sick", "well"):
                await cluster.start_worker(name, cores)
                await cluster.load(name, "base", Run(0, links))
            await cluster.start_router(cores)
            await cluster.until(lambda view: len(view.workers) == 2)
            _limit(cluster.workers["sick"].pid)
            async with cluster.client() as client:
                outcomes = await _calls(client, 40 if scale.quick else CALLS, 500 if scale.quick else 40_000)
            log = cluster.workers["sick"].log.read_text()
        failed = sum("pass " in line and line.endswith("failed") for line in log.splitlines())
        check(failed > 0, "no pass failed: the limit did not bite")
        errors.append(float(sum(count for reason, count in outcomes.items() if reason)))
        say(f"run {number + 1}: {dict(outcomes)}, {failed} passes failed")
    case = f"errors of {CALLS} calls, every other with {LONG} tokens, two workers, one short of memory"
    return [row("sick_worker", "sick-worker", case, "errors", errors)]


def _limit(pid: int) -> None:
    """Let a process have little more address space than it has."""
    (line,) = (
        one for one in Path(f"/proc/{pid}/status").read_text().splitlines() if one.startswith("VmSize:")
    )
    most = int(line.split()[1]) * 1024 + SPARE_BYTES
    resource.prlimit(pid, resource.RLIMIT_AS, (most, most))


async def _calls(client: AsyncClient, count: int, vocab: int) -> Counter[str]:
    """How many calls ended with each reason; "" for an answer."""
    outcomes: Counter[str] = Counter()
    left = iter(range(count))

    async def caller() -> None:
        for number in left:
            (prompt,) = prompts(number, 1, LONG if number % 2 else SHORT, vocab)
            try:
                stream = client.generate(
                    "base", prompt, max_tokens=OUTPUT_TOKENS, temperature=0.0, ignore_eos=True
                )
                tokens = [token async for chunk in stream for token in chunk.token_ids]
            except BlockzooError as error:
                outcomes[error.reason] += 1
            else:
                check(len(tokens) == OUTPUT_TOKENS, f"an answer has {len(tokens)} tokens")
                outcomes[""] += 1

    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    return outcomes


PROGRAM = Program(
    "sick-worker",
    "errors of calls while one of two workers fails its large passes",
    measure,
    (Bar("sick-worker", 0.0, at_most=True, per_peer=False),),
)
BENCHMARK = PROGRAM.benchmark

if __name__ == "__main__":
    sys.exit(PROGRAM.main())
