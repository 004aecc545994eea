"""one-pass: how often a segment's base blocks run per step with 8 LoRA variants in flight."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from harness import RUNS, Benchmark, Row, check
from served import MODEL, fresh_folder, random_adapters, run_client, serve

from blockserve.client.blocking import AsyncClient
from blockserve.common.api.results import Completion
from blockserve.common.api.status import ServerStatus
from blockzoo.zoo import Zoo

VARIANTS = 8
TOKENS = 64
PROMPT = "The capital of France is"


def run(say: Callable[[str], None]) -> list[Row]:
    """Send one request to each variant at once, and count from the server's status."""
    folder = fresh_folder("one-pass-zoo")
    zoo = Zoo.open(folder, create=True)
    zoo.register(MODEL, name="base")
    names = []
    for adapter in random_adapters(VARIANTS):
        zoo.register(adapter, name=adapter.name, base="base")
        names.append(adapter.name)
    preload = [option for name in names for option in ("--preload", name)]
    # fp32, so that the tokens do not depend on what else is in the batch and can be compared.
    with serve(folder, "--dtype", "float32", *preload) as server:
        samples = run_client(server.address, lambda client: _measure(client, names, say))
    fresh_folder("one-pass-zoo")
    return [
        Row(
            id="one-pass-8-lora",
            case=f"{VARIANTS} LoRA r16 variants, one request each, {TOKENS} tokens: forward calls of the "
            "base blocks per pass of the engine, in the segment with the most",
            unit="calls/pass",
            command="python benchmarks/run.py --only one-pass",
            ours=samples,
            peer=None,
            peer_name=None,
        )
    ]


async def _measure(client: AsyncClient, names: list[str], say: Callable[[str], None]) -> list[float]:
    for name in names:
        await client.load(name)
    alone = [(await _ask(client, name)).token_ids for name in names]
    check(len(set(alone)) > 1, "all adapters answer alike: they have no effect")
    samples = []
    for number in range(RUNS):
        before = await client.status()
        together = await asyncio.gather(*(_ask(client, name) for name in names))
        after = await client.status()
        check([a.token_ids for a in together] == alone, "a variant answers otherwise in a batch than alone")
        samples.append(_calls_per_pass(before, after))
        widest = max(segment.largest_batch_chains for segment in after.segments)
        check(widest == VARIANTS, f"at most {widest} of {VARIANTS} variants met in one call")
        say(f"run {number + 1}/{RUNS}: {samples[-1]:.3f} calls per pass in {after.passes - before.passes}")
    return samples


async def _ask(client: AsyncClient, name: str) -> Completion:
    return await client.generate(name, PROMPT, temperature=0, max_tokens=TOKENS, ignore_eos=True).result()


def _calls_per_pass(before: ServerStatus, after: ServerStatus) -> float:
    calls = {segment.segment_id: segment.forward_calls for segment in before.segments}
    passes = after.passes - before.passes
    check(passes >= TOKENS, f"{passes} passes cannot have made {TOKENS} tokens")
    return max((s.forward_calls - calls.get(s.segment_id, 0)) / passes for s in after.segments)


BENCHMARK = Benchmark(
    "one-pass", "base forward calls per step and segment with 8 LoRA variants in flight", "1.0", run
)
