"""quantised: whole steps and prompts of a quantised copy, over the variant that it was made from."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from statistics import median

from harness import ROOT, RUNS, Benchmark, Row, check, interleave
from served import MODEL, fresh_folder

from blockserve.common.api.engine import EngineRequest, SamplingParams
from blockserve.worker.engine.engine import BlockEngine
from blockserve.worker.limits import EngineConfig
from blockzoo.manifest import ChainId
from blockzoo.quantising.quantise import FORMATS, quantise
from blockzoo.zoo import Zoo

CASES = ((1, 32, 64), (8, 64, 64), (32, 128, 64))
"""Requests sent at once, prompt tokens, output tokens: those of single-1, single-8 and single-32."""
PROMPT = 512
"""Tokens of the first prompt that is timed."""
_HELDOUT = ROOT / "demo" / "heldout"
_MAX_TOKENS = 4437
_COMMAND = "python benchmarks/run.py --only quantised"

Prompt = tuple[int, ...]


def run(say: Callable[[str], None]) -> list[Row]:
    """One engine over the original and its copies, asked in turns."""
    folder = fresh_folder("quantised-zoo")
    zoo = Zoo.open(folder, create=True)
    zoo.register(MODEL, name="base")
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(_HELDOUT.glob("*.txt")))
    rows = []
    chains = {}
    for fmt in FORMATS:
        made = quantise(zoo, "base", name=fmt, fmt=fmt, text=text, max_tokens=_MAX_TOKENS)
        assert made.quality is not None
        chains[fmt] = made.record.chain
        before, after = made.quality.perplexities
        say(f"{fmt}: perplexity {before:.3f} -> {after:.3f}, {made.num_bytes} -> {made.new_bytes} bytes")
        rows.append(_quality(fmt, after, before, made.quality.num_tokens))
    # Nothing is cached, so that every run computes its prompts.
    engine = BlockEngine(zoo, EngineConfig(dtype="bfloat16", prefix_sharing="off"))
    engine.start()
    try:
        with asyncio.Runner() as runner:
            base = zoo.resolve("base").chain
            for chain in (base, *chains.values()):
                runner.run(engine.load(chain))
            for fmt, chain in chains.items():
                ask = _Asker(runner, engine, chain, base, fmt, say)
                rows += [*(ask.steps(*case) for case in CASES), ask.prefill()]
    finally:
        engine.stop()
    fresh_folder("quantised-zoo")
    return rows


def _quality(fmt: str, after: float, before: float, tokens: int) -> Row:
    return Row(
        id=f"quant-quality-{fmt}",
        case=f"perplexity of the first {tokens} tokens of demo/heldout, SmolLM2",
        unit="perplexity (lower is better)",
        command=_COMMAND,
        ours=[after],
        peer=[before],
        peer_name="ours in bfloat16",
    )


class _Asker:
    """Measures one copy beside its original."""

    def __init__(
        self,
        runner: asyncio.Runner,
        engine: BlockEngine,
        copy: ChainId,
        base: ChainId,
        fmt: str,
        say: Callable[[str], None],
    ) -> None:
        self._runner, self._engine, self._copy, self._base = runner, engine, copy, base
        self._fmt, self._say = fmt, say

    def steps(self, count: int, prompt_tokens: int, output_tokens: int) -> Row:
        """Tokens/s between the first and the last token of all requests."""
        prompts = _prompts(count, prompt_tokens)

        def speed(chain: ChainId) -> float:
            firsts, ends = zip(*self._answers(chain, prompts, output_tokens), strict=True)
            return count * (output_tokens - 1) / (median(ends) - median(firsts))

        return self._row(
            f"{self._fmt}-{count}",
            f"{count} requests of {prompt_tokens} + {output_tokens} tokens: tokens after the first, in the "
            "median request's time from its first to its last token",
            "tokens/s",
            speed,
        )

    def prefill(self) -> Row:
        """Prompt tokens/s of one request that is alone."""
        prompts = _prompts(1, PROMPT)

        def speed(chain: ChainId) -> float:
            ((first, _),) = self._answers(chain, prompts, 1)
            return PROMPT / first

        return self._row(
            f"{self._fmt}-prefill",
            f"one request with {PROMPT} new tokens: prompt tokens in the time to its first token",
            "tokens/s",
            speed,
        )

    def _row(self, name: str, case: str, unit: str, speed: Callable[[ChainId], float]) -> Row:
        for chain in (self._copy, self._base):
            speed(chain)
        ours, peer = interleave(
            lambda: speed(self._copy), lambda: speed(self._base), runs=2 * RUNS, say=self._say
        )
        return Row(
            id=name,
            case=f"{case}; SmolLM2, greedy, engine in process",
            unit=unit,
            command=_COMMAND,
            ours=ours,
            peer=peer,
            peer_name="ours in bfloat16",
        )

    def _answers(
        self, chain: ChainId, prompts: Sequence[Prompt], output_tokens: int
    ) -> list[tuple[float, float]]:
        """Seconds to the first and to the last token of each request."""

        async def one(number: int, prompt: Prompt, started: float) -> tuple[float, float]:
            request = EngineRequest(
                request_id=f"r{number}",
                chain=chain,
                prompt=prompt,
                sampling=SamplingParams(temperature=0.0),
                max_tokens=output_tokens,
            )
            times = [
                time.perf_counter() - started
                async for events in self._engine.generate(request)
                for _ in events
            ]
            check(len(times) == output_tokens, "an answer has too few tokens")
            return times[0], times[-1]

        async def everyone() -> list[tuple[float, float]]:
            started = time.perf_counter()
            calls: list[Awaitable[tuple[float, float]]] = [
                one(number, prompt, started) for number, prompt in enumerate(prompts)
            ]
            return await asyncio.gather(*calls)

        return self._runner.run(everyone())


def _prompts(count: int, tokens: int) -> list[Prompt]:
    source = random.Random(count * tokens)
    return [tuple(source.randrange(1000, 40000) for _ in range(tokens)) for _ in range(count)]


BENCHMARK = Benchmark(
    "quantised",
    "tokens/s of quantised copies over the bfloat16 variant, and perplexity over its perplexity",
    "int8 with AMX: 1.6 / 1.35 / 1.3 at 1 / 8 / 32 requests, prompts 1.5; perplexity at most 1.005",
    run,
)
