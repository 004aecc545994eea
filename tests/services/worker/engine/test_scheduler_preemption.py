"""Pages run out under running requests: nobody is stuck or dropped, and no answer changes."""

import asyncio
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from blockserve.common.api.engine import EngineRequest, SamplingParams, TokenEvent
from blockserve.common.errors import DeadlineExceededError
from blockserve.worker.engine.engine import BlockEngine
from blockserve.worker.limits import EngineConfig
from blockzoo.manifest import ChainId
from support.tiny import SMALL, TinyZoo

GREEDY = SamplingParams(temperature=0.0)
TIGHT = replace(SMALL, kv_cache_bytes=20 * 8 * 4 * 2 * 3 * 14 * 4)
"""Twenty pages of eight tokens at each of four layers: 160 tokens of all requests together."""
_ids = itertools.count()


@contextmanager
def serving(tiny: TinyZoo, config: EngineConfig) -> Iterator[BlockEngine]:
    engine = BlockEngine(tiny.zoo, config)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


def ask(chain: ChainId, prompt: tuple[int, ...], max_tokens: int, **more: Any) -> EngineRequest:
    more.setdefault("sampling", GREEDY)
    return EngineRequest(f"r{next(_ids)}", chain, prompt, max_tokens=max_tokens, **more)


async def collect(engine: BlockEngine, request: EngineRequest) -> list[TokenEvent]:
    return [event async for batch in engine.generate(request) for event in batch]


def answers(engine: BlockEngine, requests: list[EngineRequest]) -> list[list[TokenEvent]]:
    """All of them at the same time."""

    async def work() -> list[list[TokenEvent]]:
        for chain in {request.chain for request in requests}:
            await engine.load(chain)
        return await asyncio.gather(*(collect(engine, request) for request in requests))

    return asyncio.run(work())


def _requests(tiny: TinyZoo) -> list[EngineRequest]:
    """Answers that outgrow the pool together: 12 requests of up to 109 tokens each."""
    chains = [tiny.chains[name] for name in ("base", "all", "top")]
    sampled = SamplingParams(temperature=0.9, top_k=40, top_p=0.95)
    return [
        ask(
            chains[number % 3],
            tuple(range(3 + number, 3 + number + length)),
            60 - number,
            sampling=replace(sampled, seed=number) if number % 2 else GREEDY,
            logprobs=2 if number % 4 == 0 else None,
        )
        for number, length in enumerate((1, 7, 8, 20, 33, 50) * 2)
    ]


@pytest.mark.parametrize("sharing", ["off", "variant", "identical_chain"])
def test_answers_are_those_of_an_undisturbed_run(tiny: TinyZoo, sharing: Any) -> None:
    requests = _requests(tiny)
    with serving(tiny, replace(SMALL, prefix_sharing="off")) as engine:
        expected = answers(engine, requests)
        assert engine.report().preemptions == 0
    with serving(tiny, replace(TIGHT, prefix_sharing=sharing)) as engine:
        found = answers(engine, requests)
        report = engine.report()
    assert report.preemptions > 5
    assert (report.kv_pages_used, report.running_requests, report.waiting_requests) == (0, 0, 0)
    for ours, wanted in zip(found, expected, strict=True):
        assert [event.index for event in ours] == list(range(len(wanted)))
        assert [event.token_id for event in ours] == [event.token_id for event in wanted]
        assert [event.finish for event in ours] == [event.finish for event in wanted]
        for one, other in zip(ours, wanted, strict=True):
            if other.logprobs is not None:
                assert one.logprobs is not None
                assert one.logprobs.logprob == pytest.approx(other.logprobs.logprob, abs=1e-4)


def test_penalties_count_the_same_tokens_after_recomputing(tiny: TinyZoo) -> None:
    """What was drawn before pre-emption is still output, the only part whose occurrences count."""
    penalised = SamplingParams(
        temperature=0.9,
        repetition_penalty=1.3,
        presence_penalty=0.6,
        frequency_penalty=0.4,
        logit_bias=((7, 2.0), (11, -3.0)),
    )
    plain = replace(penalised, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0)

    def requests(sampling: SamplingParams) -> list[EngineRequest]:
        return [
            ask(
                tiny.chains["base"], tuple(range(3, 13 + number)), 60, sampling=replace(sampling, seed=number)
            )
            for number in range(8)
        ]

    with serving(tiny, SMALL) as engine:
        expected = answers(engine, requests(penalised))
        unpenalised = answers(engine, requests(plain))
        assert engine.report().preemptions == 0
    with serving(tiny, TIGHT) as engine:
        found = answers(engine, requests(penalised))
        assert engine.report().preemptions > 0
    tokens = [[event.token_id for event in events] for events in found]
    assert tokens == [[event.token_id for event in events] for events in expected]
    assert tokens != [[event.token_id for event in events] for events in unpenalised]


def test_prompt_logprobs_are_told_once(tiny: TinyZoo) -> None:
    prompts = [tuple(range(start, start + 40)) for start in (3, 50, 90)]
    requests = [ask(tiny.chains["base"], prompt, 50, prompt_logprobs=True) for prompt in prompts]
    with serving(tiny, SMALL) as engine:
        expected = answers(engine, requests)
    with serving(tiny, TIGHT) as engine:
        found = answers(engine, requests)
        assert engine.report().preemptions > 0
    for ours, wanted in zip(found, expected, strict=True):
        assert [event.token_id for event in ours] == [event.token_id for event in wanted]
        assert all(event.prompt_logprobs is None for event in ours[1:])
        told, other = ours[0].prompt_logprobs, wanted[0].prompt_logprobs
        assert told is not None
        assert other is not None
        assert [one.token_id for one in told] == [one.token_id for one in other]


def test_the_oldest_runs_through_and_the_urgent_before_it(tiny: TinyZoo) -> None:
    """Three that need most of the pool each end in rank, although all began at once."""
    ended: list[int] = []

    async def one(engine: BlockEngine, number: int, priority: int) -> None:
        events = await collect(engine, ask(tiny.chains["base"], (5, number), 120, priority=priority))
        assert len(events) == 120
        ended.append(number)

    async def work(engine: BlockEngine) -> None:
        await engine.load(tiny.chains["base"])
        await asyncio.gather(*(one(engine, number, rank) for number, rank in enumerate((1, 1, 0))))

    with serving(tiny, TIGHT) as engine:
        asyncio.run(work(engine))
        assert engine.report().preemptions > 0
    assert ended == [2, 0, 1]


def test_a_request_without_pages_can_be_cancelled_and_can_be_late(tiny: TinyZoo) -> None:
    chain = tiny.chains["base"]

    async def work(engine: BlockEngine) -> None:
        await engine.load(chain)
        streams = [engine.generate(ask(chain, (5, number), 150)) for number in range(3)]
        first = [await anext(stream) for stream in streams]
        assert len(first) == 3
        late = asyncio.create_task(collect(engine, ask(chain, (9,), 100, deadline=0.0)))
        while not engine.report().preemptions:
            await anext(streams[0])
        for stream in reversed(streams[1:]):
            await stream.aclose()
        with pytest.raises(DeadlineExceededError):
            await late
        rest = [event async for batch in streams[0] for event in batch]
        assert rest[-1].index == 149

    with serving(tiny, TIGHT) as engine:
        asyncio.run(work(engine))
        assert engine.report().kv_pages_used == 0
