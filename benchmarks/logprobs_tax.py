"""logprobs-tax: tokens/s of eight streams with five log-probabilities for each token, over those without.

One server; the two kinds of request are asked in turns, eight at a time.
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves the script's folder out

from cluster import base_model, make_zoo, row
from harness import Row, check
from program import Bar, Program, Say, Scale
from served import serve

from blockserve.client.aio import AsyncClient

STREAMS, TOKENS, ALTERNATIVES = 8, 48, 5


async def measure(scale: Scale, say: Say) -> list[Row]:
    """With and without, in turns."""
    zoo = make_zoo("logprobs-zoo", {"base": base_model(quick=scale.quick)})
    with_them: list[float] = []
    without: list[float] = []
    with serve(zoo, "--preload", "base") as server:
        async with AsyncClient(server.address) as client:
            await _rate(client, None)
            for number in range(scale.runs):
                without.append(await _rate(client, None))
                with_them.append(await _rate(client, ALTERNATIVES))
                say(f"run {number + 1}: {without[-1]:.1f} tokens/s, {with_them[-1]:.1f} with them")
    case = f"tokens/s of {STREAMS} streams with {ALTERNATIVES} log-probabilities for each token"
    return [
        row(
            "logprobs_tax",
            "logprobs-tax",
            case,
            "tokens/s",
            with_them,
            peer=without,
            peer_name="without them",
        )
    ]


async def _rate(client: AsyncClient, logprobs: int | None) -> float:
    """Tokens a second of all streams together."""
    started = time.perf_counter()
    counts = await asyncio.gather(*(_stream(client, number, logprobs) for number in range(STREAMS)))
    return sum(counts) / (time.perf_counter() - started)


async def _stream(client: AsyncClient, number: int, logprobs: int | None) -> int:
    options = {} if logprobs is None else {"logprobs": logprobs}
    prompt = tuple(range(20 + number, 40 + number))
    tokens = found = 0
    stream = client.generate("base", prompt, max_tokens=TOKENS, temperature=0.0, ignore_eos=True, **options)
    async for chunk in stream:
        tokens += len(chunk.token_ids)
        found += sum(len(one.top) == logprobs for one in chunk.logprobs)
    check(
        tokens == TOKENS and found == (TOKENS if logprobs else 0),
        "an answer lacks tokens or log-probabilities",
    )
    return tokens


PROGRAM = Program(
    "logprobs-tax",
    "what log-probabilities cost in a batch",
    measure,
    (Bar("logprobs-tax", 0.9),),
)
BENCHMARK = PROGRAM.benchmark

if __name__ == "__main__":
    sys.exit(PROGRAM.main())
