"""The engine under load: bounds of the queue, time in it, and what it says about its progress."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from blockserve.common.api.engine import EngineRequest, SamplingParams, TokenEvent
from blockserve.common.errors import (
    DeadlineExceededError,
    EngineFailedError,
    QueueFullError,
    ServerStoppingError,
)
from blockserve.worker.compute.counters import BOUNDS, BatchSizes
from blockserve.worker.engine.engine import BlockEngine
from support.tiny import SMALL, TinyZoo

GREEDY = SamplingParams(temperature=0.0)
_ids = itertools.count()


def ask(chain: Any, prompt: tuple[int, ...] = (5, 6, 7), max_tokens: int = 8, **more: Any) -> EngineRequest:
    return EngineRequest(f"r{next(_ids)}", chain, prompt, GREEDY, max_tokens, **more)


async def events(engine: BlockEngine, request: EngineRequest) -> list[TokenEvent]:
    return [event async for batch in engine.generate(request) for event in batch]


@contextmanager
def running(tiny: TinyZoo, **changes: Any) -> Iterator[BlockEngine]:
    engine = BlockEngine(tiny.zoo, replace(SMALL, **changes))
    engine.start()
    yield engine
    engine.stop()


@contextmanager
def held(engine: BlockEngine) -> Iterator[None]:
    """Block the engine's thread for real."""
    gate, reached = threading.Event(), threading.Event()

    def block() -> None:
        reached.set()
        gate.wait(60)

    engine._post(block)
    assert reached.wait(60)
    try:
        yield
    finally:
        gate.set()


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 60))


def start(engine: BlockEngine, request: EngineRequest) -> asyncio.Task[list[TokenEvent]]:
    return asyncio.create_task(events(engine, request))


def test_the_first_token_says_how_long_the_request_waited(tiny: TinyZoo) -> None:
    async def work(engine: BlockEngine) -> None:
        chain = tiny.chains["base"]
        await engine.load(chain)
        before = time.monotonic()
        with held(engine):
            task = start(engine, ask(chain))
            while engine.report().waiting_requests == 0:
                await asyncio.sleep(0)
            released = time.monotonic()
        first, *rest = await task
        assert first.timing is not None
        assert before <= first.timing.queued <= released <= first.timing.scheduled <= time.monotonic()
        assert [event.timing for event in rest] == [None] * 7

    with running(tiny) as engine:
        run(work(engine))


def test_long_prompts_fill_the_queue_before_their_number_does(tiny: TinyZoo) -> None:
    async def work(engine: BlockEngine) -> None:
        chain = tiny.chains["base"]
        await engine.load(chain)
        with held(engine):
            # One prompt beyond the bound is taken when nobody waits.
            waiting = [start(engine, ask(chain, tuple(range(3, 33))))]
            await asyncio.sleep(0)
            with pytest.raises(QueueFullError, match="30 prompt tokens are in the queue already") as caught:
                await events(engine, ask(chain, (3,)))
            assert caught.value.metadata["limit"] == "20"
        await waiting[0]
        with held(engine):
            waiting = [start(engine, ask(chain, tuple(range(3, 13)))) for _ in range(2)]
            await asyncio.sleep(0)
            with pytest.raises(QueueFullError):
                await events(engine, ask(chain, (3,)))
        assert [len(answer) for answer in await asyncio.gather(*waiting)] == [8, 8]

    with running(tiny, max_waiting_prompt_tokens=20) as engine:
        run(work(engine))


def test_a_deadline_runs_in_the_queue_too(tiny: TinyZoo) -> None:
    async def work(engine: BlockEngine) -> None:
        chain = tiny.chains["base"]
        await engine.load(chain)
        blocker = engine.generate(ask(chain, max_tokens=480))
        await anext(blocker)
        with pytest.raises(DeadlineExceededError, match="after 0 of at most 8"):
            await events(engine, ask(chain, deadline=time.monotonic() + 0.01))
        report = engine.report()
        assert (report.running_requests, report.waiting_requests) == (1, 0)
        await blocker.aclose()

    with running(tiny, max_running_requests=1) as engine:
        run(work(engine))


def test_requests_the_thread_has_not_seen_yet_are_waiting(tiny: TinyZoo) -> None:
    async def work(engine: BlockEngine) -> None:
        chain = tiny.chains["base"]
        await engine.load(chain)
        with held(engine):
            tasks = [start(engine, ask(chain)) for _ in range(3)]
            await asyncio.sleep(0)
            assert engine.report().waiting_requests == 3
            stuck = engine.report().seconds_since_progress
            while engine.report().seconds_since_progress <= stuck:
                await asyncio.sleep(0)
        await asyncio.gather(*tasks)
        assert engine.report().waiting_requests == 0

    with running(tiny) as engine:
        run(work(engine))


def test_who_stops_waiting_for_an_unload_leaves_the_engine_alive(tiny: TinyZoo) -> None:
    chain = tiny.chains["base"]

    async def work(engine: BlockEngine) -> None:
        await engine.load(chain)
        with held(engine):
            asked = asyncio.create_task(engine.unload(chain))
            await asyncio.sleep(0.05)
            asked.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asked
        assert engine.is_loaded(chain)
        assert len(await events(engine, ask(chain))) == 8

    with running(tiny) as engine:
        run(work(engine))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_thread_that_ends_leaves_nobody_waiting(tiny: TinyZoo) -> None:
    chain = tiny.chains["base"]

    def explode() -> None:
        raise RuntimeError("a bug")

    async def work(engine: BlockEngine) -> None:
        await engine.load(chain)
        waiting = asyncio.create_task(events(engine, ask(chain, max_tokens=200)))
        await asyncio.sleep(0.05)
        engine._post(explode)
        with pytest.raises(EngineFailedError, match="engine ended"):
            await waiting
        with pytest.raises(ServerStoppingError):
            await events(engine, ask(chain))
        assert "a bug" in str(await engine.failed())

    with running(tiny) as engine:
        run(work(engine))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_an_engine_that_ends_did_not_come_to_is_answered(tiny: TinyZoo) -> None:
    chain = tiny.chains["base"]

    async def work(engine: BlockEngine) -> None:
        await engine.load(chain)
        all_there = threading.Event()

        def explode() -> None:
            all_there.wait(10)
            raise RuntimeError("a bug")

        engine._post(explode)
        answer = asyncio.create_task(events(engine, ask(chain)))
        asked = asyncio.create_task(engine.span_traces(["r"]))
        await asyncio.sleep(0.05)
        all_there.set()
        found = await asyncio.wait_for(asyncio.gather(answer, asked, return_exceptions=True), 10)
        assert [type(one) for one in found] == [EngineFailedError, EngineFailedError]
        assert engine.report().waiting_requests == 0

    with running(tiny) as engine:
        run(work(engine))


def test_an_engine_that_had_nothing_to_do_is_not_behind_with_its_first_request(tiny: TinyZoo) -> None:
    async def work(engine: BlockEngine) -> None:
        chain = tiny.chains["base"]
        await engine.load(chain)
        while not engine._driver._is_idle:
            await asyncio.sleep(0)
        engine._driver.last_progress -= 3600
        assert engine.report().seconds_since_progress > 3000
        with held(engine):
            task = start(engine, ask(chain))
            await asyncio.sleep(0)
            report = engine.report()
            assert (report.waiting_requests, report.seconds_since_progress < 3000) == (1, True)
        await task

    with running(tiny) as engine:
        run(work(engine))


def test_every_forward_call_is_in_the_batch_sizes_once(tiny: TinyZoo) -> None:
    names = ("base", "all", "top", "qwen")

    async def work(engine: BlockEngine) -> None:
        for name in names:
            await engine.load(tiny.chains[name])
        asks = [ask(tiny.chains[name], tuple(range(3, 3 + n)), 12) for name in names for n in (1, 30, 90)]
        await asyncio.gather(*(events(engine, one) for one in asks))

    with running(tiny) as engine:
        run(work(engine))
        report = engine.report()
    assert [one.segment_id for one in report.batches] == [one.segment_id for one in report.segments]
    for segment, batches in zip(report.segments, report.batches, strict=True):
        for sizes in (batches.sequences, batches.tokens, batches.chains):
            assert sum(sizes.counts) == segment.forward_calls > 0
        assert batches.sequences.total == segment.sequences
        assert batches.tokens.total == segment.tokens
        assert sum(batches.chains.counts[1:]) == segment.mixed_calls
    shared = [one for one in report.batches if sum(one.chains.counts[1:])]
    assert shared
    # Prompts of 121 tokens and 11 decoded ones for each of 12 requests; of the head only rows that sample.
    tops = [one for one in report.segments if one.first_position == 0]
    assert sum(one.tokens for one in tops) == 4 * 121 + 12 * 11


def test_chains_that_come_and_go_are_counted(tiny: TinyZoo) -> None:
    async def work(engine: BlockEngine) -> None:
        for name in ("base", "all", "base"):
            await engine.load(tiny.chains[name])
        await engine.unload(tiny.chains["base"])
        await engine.unload(tiny.chains["base"])
        await engine.load(tiny.chains["base"])

    with running(tiny) as engine:
        run(work(engine))
        assert (engine.report().chain_loads, engine.report().chain_unloads) == (3, 1)


@pytest.mark.parametrize(("size", "place"), [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (4096, -2), (4097, -1)])
def test_a_size_falls_into_the_bucket_that_ends_at_or_above_it(size: int, place: int) -> None:
    sizes = BatchSizes()
    sizes.add(sequences=1, tokens=size, chains=1)
    counts = [0] * (len(BOUNDS) + 1)
    counts[place] = 1
    tokens = sizes.report("segment").tokens
    assert (tokens.bounds, list(tokens.counts), tokens.total) == (BOUNDS, counts, size)
