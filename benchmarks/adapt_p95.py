"""adapt-p95: latency under overload where an approved equivalent is idle beside it, over exact answers only.

Two workers of one core: one holds a variant, the other the model it was made from. Requests for the variant
arrive as a Poisson process, faster than its worker alone can answer them. The same arrivals are played twice
in every run: by callers who allow nothing, and by callers who allow approved equivalents. What an approximate
answer costs in quality, the measured divergence of the pair, stands in a row of its own.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import time
from itertools import accumulate
from pathlib import Path
from statistics import quantiles

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves the script's folder out

from cluster import LOOK_SECONDS, local_cluster, make_zoo, prompts, row, two_cores
from harness import Row, check
from program import Bar, Program, Say, Scale
from served import MODEL, START_SECONDS, top_quarter_variants

from blockserve.client.aio import AsyncClient
from blockserve.common.api.cluster import Run
from blockzoo.equivalence import EquivalenceRecord, Ledger, approve
from blockzoo.evaluation.evaluate import evaluate
from blockzoo.zoo import Zoo

REQUESTS, PROMPT_TOKENS, OUTPUT_TOKENS = 60, 64, 32
CONCURRENT = 8
"""Requests at a time when it is measured what one worker can do."""
OVERLOAD = 1.5
"""Arrivals, as a multiple of that."""
VOCABULARY = 40_000
HELD_OUT = 2048
"""Tokens on which the pair is compared."""


async def measure(scale: Scale, say: Say) -> list[Row]:
    """The same arrivals, exact only and adaptive, in turns."""
    count, output = (8, 8) if scale.quick else (REQUESTS, OUTPUT_TOKENS)
    own, other = two_cores()
    os.sched_setaffinity(0, {own, other})
    (tuned,) = top_quarter_variants(1)
    path = make_zoo("adapt-zoo", {"base": MODEL, "tuned": tuned})
    record = _approved(Zoo.open(path), 256 if scale.quick else HELD_OUT)
    say(f"tuned as base: mean KL {record.mean_kl:.2g} nats, same first choice {record.top1_agreement:.1%}")
    exact: list[float] = []
    adaptive: list[float] = []
    async with local_cluster(path, engine_num_threads="1", engine_prefix_sharing="off") as cluster:
        await asyncio.gather(
            cluster.start_worker("exact", {own}),
            cluster.start_worker("equivalent", {other}),
            cluster.start_router({own, other}),
        )
        for name, model in (("exact", "tuned"), ("equivalent", "base")):
            links = len(cluster.zoo.chain(cluster.zoo.resolve(model).chain).links)
            await cluster.load(name, model, Run(0, links))
        async with cluster.client() as client:
            load = Load(client, output)
            await load.capacity(4)
            rate = OVERLOAD * await load.capacity(count)
            say(f"{rate:.2f} requests/s arrive, {OVERLOAD} times what the variant's worker can answer")
            for number in range(scale.runs):
                alone, none = await load.play(number, count, rate, allow=False)
                check(none == 0, "a caller who allowed nothing got an equivalent")
                both, substituted = await load.play(number, count, rate, allow=True)
                check(scale.quick or 0 < substituted < count, f"{substituted} of {count} were substituted")
                exact.append(_p95(alone))
                adaptive.append(_p95(both))
                say(
                    f"run {number + 1}/{scale.runs}: p95 {exact[-1]:.2f} s exact only, {adaptive[-1]:.2f} s "
                    f"adaptive with {substituted} of {count} on the equivalent"
                )
            await _exact_again(client)
    case = (
        f"p95 of {count} requests, {PROMPT_TOKENS} in, {output} out, Poisson at {OVERLOAD} times what one "
        "worker of one core answers, an idle worker of one core with an approved equivalent, bf16"
    )
    divergence = f"mean KL of the pair's outputs in nats, {record.num_tokens} held-out tokens, fp32"
    return [
        row("adapt_p95", "adapt-p95", case, "s", adaptive, peer=exact, peer_name="exact only"),
        row("adapt_p95", "adapt-p95-kl", divergence, "nats", [record.mean_kl] * scale.runs),
    ]


class Load:
    """Requests for the variant."""

    def __init__(self, client: AsyncClient, output_tokens: int) -> None:
        """Ask through `client`."""
        self._client = client
        self._output_tokens = output_tokens

    async def capacity(self, count: int) -> float:
        """Requests/s that the variant's worker answers when several are always there."""
        free = asyncio.Semaphore(CONCURRENT)

        async def one(prompt: tuple[int, ...]) -> None:
            async with free:
                await self.ask(prompt, allow=False)

        started = time.perf_counter()
        await asyncio.gather(*map(one, prompts(1, count, PROMPT_TOKENS, VOCABULARY)))
        return count / (time.perf_counter() - started)

    async def play(self, seed: int, count: int, rate: float, *, allow: bool) -> tuple[list[float], int]:
        """Seconds of every request since its arrival, and how many an equivalent answered."""
        source = random.Random(seed)
        arrivals = accumulate(source.expovariate(rate) for _ in range(count))
        began = time.perf_counter()

        async def one(arrival: float, prompt: tuple[int, ...]) -> tuple[float, bool]:
            await asyncio.sleep(began + arrival - time.perf_counter())
            substituted = await self.ask(prompt, allow=allow)
            return time.perf_counter() - began - arrival, substituted

        asked = prompts(100 + seed, count, PROMPT_TOKENS, VOCABULARY)
        answers = await asyncio.gather(*map(one, arrivals, asked))
        return [seconds for seconds, _ in answers], sum(substituted for _, substituted in answers)

    async def ask(self, prompt: tuple[int, ...], *, allow: bool) -> bool:
        """Whether an equivalent answered."""
        answer = await self._client.generate(
            "tuned",
            prompt,
            max_tokens=self._output_tokens,
            temperature=0.0,
            ignore_eos=True,
            allow_equivalents=allow,
        ).result()
        check(len(answer.token_ids) == self._output_tokens, "an answer is too short")
        return bool(answer.info.approximations)


def _approved(zoo: Zoo, tokens: int) -> EquivalenceRecord:
    """The pair, measured on text of this repository and approved."""
    root = Path(__file__).resolve().parent.parent
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(root.glob("docs/*.md")))
    record = evaluate(zoo, "tuned", "base", text, max_tokens=tokens)[-1]
    approve(Ledger(zoo.store), record.id, by="benchmark", reason="adapt-p95", max_kl=max(1.0, record.mean_kl))
    return record


async def _exact_again(client: AsyncClient) -> None:
    """Without overload, who allows an equivalent gets the variant itself."""
    async with asyncio.timeout(START_SECONDS):
        while await _is_busy(client):
            await asyncio.sleep(LOOK_SECONDS)
    (prompt,) = prompts(9, 1, PROMPT_TOKENS, VOCABULARY)
    check(not await Load(client, 4).ask(prompt, allow=True), "the equivalent answers without overload")


async def _is_busy(client: AsyncClient) -> bool:
    """Whether the router believes that a worker has something to do: it chooses by what it has last seen."""
    seen = (await client.status()).cluster
    return seen is None or any(worker.running_requests + worker.waiting_requests for worker in seen.workers)


def _p95(seconds: list[float]) -> float:
    return quantiles(seconds, n=20, method="inclusive")[-1]


PROGRAM = Program(
    "adapt-p95",
    "p95 latency under overload, adaptive over exact only",
    measure,
    (Bar("adapt-p95", 0.6, at_most=True),),
)
BENCHMARK = PROGRAM.benchmark

if __name__ == "__main__":
    sys.exit(PROGRAM.main())
