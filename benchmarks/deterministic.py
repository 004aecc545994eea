"""deterministic: what bit-identical logits cost, in tokens/s of the engine without the wire."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from harness import RUNS, Benchmark, Row, check, interleave
from served import MODEL, fresh_folder

from blockserve.common.api.engine import EngineRequest, SamplingParams
from blockserve.worker.engine.engine import BlockEngine
from blockserve.worker.limits import EngineConfig
from blockzoo.manifest import ChainId
from blockzoo.zoo import Zoo

CASES = ((1, 32, 64), (8, 64, 64), (32, 128, 64))
"""Requests sent at once, prompt tokens, output tokens: those of single-1, single-8 and single-32."""


def run(say: Callable[[str], None]) -> list[Row]:
    """Two engines over one zoo, asked in turns."""
    folder = fresh_folder("deterministic-zoo")
    zoo = Zoo.open(folder, create=True)
    zoo.register(MODEL, name="base")
    chain = zoo.resolve("base").chain
    with (
        _engine(folder, deterministic=True) as exact,
        _engine(folder, deterministic=False) as plain,
        asyncio.Runner() as runner,
    ):
        for engine in (exact, plain):
            runner.run(engine.load(chain))
        rows = [_case(runner, exact, plain, chain, *case, say) for case in CASES]
    fresh_folder("deterministic-zoo")
    return rows


@contextmanager
def _engine(zoo: Path, *, deterministic: bool) -> Iterator[BlockEngine]:
    # Nothing is cached, so that every run computes its prompts.
    engine = BlockEngine(Zoo.open(zoo), EngineConfig(deterministic=deterministic, prefix_sharing="off"))
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


def _case(
    runner: asyncio.Runner,
    exact: BlockEngine,
    plain: BlockEngine,
    chain: ChainId,
    count: int,
    prompt_tokens: int,
    output_tokens: int,
    say: Callable[[str], None],
) -> Row:
    source = random.Random(count)
    prompts = [tuple(source.randrange(1000, 40000) for _ in range(prompt_tokens)) for _ in range(count)]

    def ask(engine: BlockEngine) -> list[list[int]]:
        return runner.run(_answers(engine, chain, prompts, output_tokens))

    def speed(engine: BlockEngine) -> float:
        started = time.perf_counter()
        ask(engine)
        return count * output_tokens / (time.perf_counter() - started)

    together = ask(exact)
    ask(plain)
    check(all(len(answer) == output_tokens for answer in together), "an answer has too few tokens")
    alone = runner.run(_answers(exact, chain, prompts[:1], output_tokens))
    check(alone[0] == together[0], "a deterministic answer differs between alone and together")
    ours, peer = interleave(lambda: speed(exact), lambda: speed(plain), runs=2 * RUNS, say=say)
    return Row(
        id=f"deterministic-{count}",
        case=f"{count} requests of {prompt_tokens} + {output_tokens} tokens, SmolLM2 bf16, greedy, engine in "
        "process; the first answer has the same tokens alone",
        unit="tokens/s",
        command="python benchmarks/run.py --only deterministic",
        ours=ours,
        peer=peer,
        peer_name="ours without deterministic",
    )


async def _answers(
    engine: BlockEngine, chain: ChainId, prompts: list[tuple[int, ...]], output_tokens: int
) -> list[list[int]]:
    async def answer(number: int, prompt: tuple[int, ...]) -> list[int]:
        request = EngineRequest(
            request_id=f"r{number}",
            chain=chain,
            prompt=prompt,
            sampling=SamplingParams(temperature=0.0),
            max_tokens=output_tokens,
        )
        return [event.token_id async for events in engine.generate(request) for event in events]

    return await asyncio.gather(*(answer(number, prompt) for number, prompt in enumerate(prompts)))


BENCHMARK = Benchmark(
    "deterministic", "tokens/s with deterministic over those without", "published, not bounded", run
)
