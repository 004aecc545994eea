"""quantised: whole steps and prompts of a quantised copy, over the variant that it was made from."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Literal

from harness import ROOT, RUNS, Benchmark, Row, check, has_bf16, interleave
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
    base = zoo.resolve("base").chain
    types = ("bfloat16",) if has_bf16() else ("bfloat16", "float32")
    with ExitStack() as stack, asyncio.Runner() as runner:
        engines = {dtype: stack.enter_context(_engine(zoo, dtype)) for dtype in types}
        for dtype, engine in engines.items():
            runner.run(engine.load(base))
            for fmt, chain in chains.items():
                ours = _Side(runner, engines["bfloat16"], chain)
                runner.run(ours.engine.load(chain))
                pair = _Pair(ours, _Side(runner, engine, base), fmt, dtype, say)
                rows += [*(pair.steps(*case) for case in CASES), pair.prefill()]
    fresh_folder("quantised-zoo")
    return rows


@contextmanager
def _engine(zoo: Zoo, dtype: Literal["bfloat16", "float32"]) -> Iterator[BlockEngine]:
    # Nothing is cached, so that every run computes its prompts.
    engine = BlockEngine(zoo, EngineConfig(dtype=dtype, prefix_sharing="off"))
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


def _quality(fmt: str, after: float, before: float, tokens: int) -> Row:
    return Row(
        id=f"quant-quality-{fmt}",
        case=f"perplexity of the first {tokens} tokens of demo/heldout, SmolLM2",
        unit="perplexity (lower is better)",
        command=_COMMAND,
        ours=[after] * RUNS,  # exact: every run would have the same
        peer=[before] * RUNS,
        peer_name="ours in bfloat16",
    )


@dataclass(frozen=True)
class _Side:
    """A chain, and the engine that computes it."""

    runner: asyncio.Runner
    engine: BlockEngine
    chain: ChainId

    def answers(self, prompts: Sequence[Prompt], output_tokens: int) -> list[tuple[float, float]]:
        """Seconds to the first and to the last token of each request."""

        async def one(number: int, prompt: Prompt, started: float) -> tuple[float, float]:
            request = EngineRequest(
                request_id=f"r{number}",
                chain=self.chain,
                prompt=prompt,
                sampling=SamplingParams(temperature=0.0),
                max_tokens=output_tokens,
            )
            times = [
                time.perf_counter() - started
                async for events in self.engine.generate(request)
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

        return self.runner.run(everyone())


@dataclass(frozen=True)
class _Pair:
    """A copy beside its original in some type."""

    ours: _Side
    peer: _Side
    fmt: str
    dtype: str
    say: Callable[[str], None]

    def steps(self, count: int, prompt_tokens: int, output_tokens: int) -> Row:
        """Tokens/s between the first and the last token of all requests."""
        if not has_bf16() and count > 8:
            output_tokens, prompt_tokens = output_tokens // 4, prompt_tokens // 4
        prompts = _prompts(count, prompt_tokens)

        def speed(side: _Side) -> float:
            firsts, ends = zip(*side.answers(prompts, output_tokens), strict=True)
            return count * (output_tokens - 1) / (median(ends) - median(firsts))

        return self._row(
            f"{self.fmt}-{count}",
            f"{count} requests of {prompt_tokens} + {output_tokens} tokens: tokens after the first, in the "
            "median request's time from its first to its last token",
            speed,
        )

    def prefill(self) -> Row:
        """Prompt tokens/s of one request that is alone."""
        prompts = _prompts(1, PROMPT)

        def speed(side: _Side) -> float:
            ((first, _),) = side.answers(prompts, 1)
            return PROMPT / first

        return self._row(
            f"{self.fmt}-prefill",
            f"one request with {PROMPT} new tokens: prompt tokens in the time to its first token",
            speed,
        )

    def _row(self, name: str, case: str, speed: Callable[[_Side], float]) -> Row:
        for side in (self.ours, self.peer):
            speed(side)
        ours, peer = interleave(lambda: speed(self.ours), lambda: speed(self.peer), runs=RUNS, say=self.say)
        return Row(
            id=name if self.dtype == "bfloat16" else f"{name}-{self.dtype}",
            case=f"{case}; SmolLM2, greedy, engine in process",
            unit="tokens/s",
            command=_COMMAND,
            ours=ours,
            peer=peer,
            peer_name=f"ours in {self.dtype}",
        )


def _prompts(count: int, tokens: int) -> list[Prompt]:
    source = random.Random(count * tokens)
    return [tuple(source.randrange(1000, 40000) for _ in range(tokens)) for _ in range(count)]


BENCHMARK = Benchmark(
    "quantised",
    "tokens/s of quantised copies over the bfloat16 variant, and perplexity over its perplexity",
    "int8 with AMX: 1.6 / 1.35 / 1.3 at 1 / 8 / 32 requests, prompts 1.5; perplexity at most 1.005",
    run,
)
