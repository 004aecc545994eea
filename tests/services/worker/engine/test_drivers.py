"""Who runs passes: the same answers from a thread and from the event loop, and nobody waits for an end."""

import asyncio
import itertools
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from blockserve.common.api.cluster import WorkerId
from blockserve.common.api.engine import EngineRequest, SamplingParams, TokenEvent
from blockserve.common.errors import DeadlineExceededError, EngineFailedError, ServerStoppingError
from blockserve.worker.engine.drivers import LoopDriver, ThreadDriver
from blockserve.worker.engine.engine import BlockEngine
from blockserve.worker.engine.pace import Pace
from blockserve.worker.peers.messages import ChunkMsg
from blockserve.worker.requests.running import Chunk
from support.spans import SpanCluster
from support.tiny import SMALL, TinyZoo

GREEDY = SamplingParams(temperature=0.0)
NEVER, ALWAYS = 1e-9, 1e9
"""Seconds up to which passes run in the event loop; the first ones, of which nothing is known, never do."""
PROMPTS = [tuple(range(3, 3 + length)) for length in (1, 9, 70, 100)]
_ids = itertools.count()


def ask(chain: Any, prompt: tuple[int, ...] = (5, 6, 7), max_tokens: int = 12, **more: Any) -> EngineRequest:
    return EngineRequest(f"r{next(_ids)}", chain, prompt, GREEDY, max_tokens, **more)


async def events(engine: BlockEngine, request: EngineRequest) -> list[TokenEvent]:
    return [event async for batch in engine.generate(request) for event in batch]


async def tokens(engine: BlockEngine, request: EngineRequest) -> list[int]:
    return [event.token_id for event in await events(engine, request)]


@asynccontextmanager
async def in_loop(
    tiny: TinyZoo, inline_seconds: float = ALWAYS, **changes: Any
) -> AsyncIterator[BlockEngine]:
    engine = BlockEngine(tiny.zoo, replace(SMALL, inline_seconds=inline_seconds, **changes))
    engine.start(in_loop=True)
    try:
        yield engine
    finally:
        await asyncio.to_thread(engine.stop)


def run(work: Callable[[], Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work(), 60))


def threads_of_passes(engine: BlockEngine) -> list[int]:
    """Where each pass from now on is computed."""
    seen: list[int] = []
    compute = engine._executor.run

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(threading.get_ident())
        return compute(*args, **kwargs)

    engine._executor.run = watched  # type: ignore[method-assign]
    return seen


@pytest.mark.parametrize("inline_seconds", [NEVER, ALWAYS])
def test_answers_are_those_of_an_engine_with_a_thread(
    tiny: TinyZoo, engine: BlockEngine, inline_seconds: float
) -> None:
    async def work() -> None:
        requests = [
            ask(chain, prompt)
            for (name, chain), prompt in itertools.product(tiny.chains.items(), PROMPTS)
            if name != "qwen"
        ]
        async with in_loop(tiny, inline_seconds) as other:
            for request in requests:
                await engine.load(request.chain)
                await other.load(request.chain)
            expected = [await tokens(engine, request) for request in requests]
            assert list(await asyncio.gather(*(tokens(other, one) for one in requests))) == expected
            assert (other.report().kv_pages_used, other.report().running_requests) == (0, 0)
        assert isinstance(engine._driver, ThreadDriver)
        assert isinstance(other._driver, LoopDriver)

    run(work)


def test_short_passes_run_where_the_news_are_and_others_in_a_thread(tiny: TinyZoo) -> None:
    async def work() -> None:
        here = threading.get_ident()
        async with in_loop(tiny) as engine:
            await engine.load(tiny.chains["base"])
            seen = threads_of_passes(engine)
            await tokens(engine, ask(tiny.chains["base"]))
            await tokens(engine, ask(tiny.chains["base"]))
            # The first prompt and the first step tell how long such passes take.
            assert [ident == here for ident in seen] == [False, False, *[True] * (len(seen) - 2)]
        async with in_loop(tiny, NEVER) as engine:
            await engine.load(tiny.chains["base"])
            seen = threads_of_passes(engine)
            await tokens(engine, ask(tiny.chains["base"]))
            assert here not in seen

    run(work)


def test_an_engine_with_teams_of_threads_keeps_to_its_own(tiny: TinyZoo) -> None:
    async def work() -> None:
        for changes in ({"num_threads": 2}, {"inline_seconds": 0.0}):
            async with in_loop(tiny, **{"inline_seconds": ALWAYS, **changes}) as engine:
                assert isinstance(engine._driver, ThreadDriver)

    run(work)


def test_the_event_loop_goes_on_while_a_thread_computes_and_commands_wait(tiny: TinyZoo) -> None:
    async def work() -> None:
        computing, gate, ran = threading.Event(), threading.Event(), threading.Event()
        async with in_loop(tiny) as engine:
            await engine.load(tiny.chains["base"])
            compute = engine._executor.run

            def slow(*args: Any, **kwargs: Any) -> Any:
                computing.set()
                gate.wait(60)
                return compute(*args, **kwargs)

            engine._executor.run = slow  # type: ignore[method-assign]
            answer = asyncio.create_task(tokens(engine, ask(tiny.chains["base"])))
            await asyncio.to_thread(computing.wait, 60)
            engine._post(ran.set, at_once=True)
            await asyncio.sleep(0)
            assert not ran.is_set()
            gate.set()
            assert len(await answer) == 12
            assert ran.is_set()

    run(work)


def test_stopping_ends_requests_and_takes_no_more(tiny: TinyZoo) -> None:
    async def work() -> None:
        async with in_loop(tiny) as engine:
            await engine.load(tiny.chains["base"])
            answer = engine.generate(ask(tiny.chains["base"], max_tokens=400))
            await anext(answer)
            await asyncio.to_thread(engine.stop)
            with pytest.raises(ServerStoppingError):
                async for _ in answer:
                    pass
            with pytest.raises(ServerStoppingError):
                await events(engine, ask(tiny.chains["base"]))

    run(work)


def test_an_engine_that_dies_leaves_nobody_waiting(tiny: TinyZoo) -> None:
    async def work() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        async with in_loop(tiny) as engine:
            await engine.load(tiny.chains["base"])
            answer = engine.generate(ask(tiny.chains["base"], max_tokens=400))
            await anext(answer)

            def explode() -> None:
                raise RuntimeError("as no command should")

            engine._post(explode)
            with pytest.raises(EngineFailedError):
                async for _ in answer:
                    pass
            with pytest.raises(ServerStoppingError):
                await events(engine, ask(tiny.chains["base"]))

    run(work)


def test_a_fault_of_a_pass_fails_its_requests_only(tiny: TinyZoo) -> None:
    async def work() -> None:
        async with in_loop(tiny) as engine:
            await engine.load(tiny.chains["base"])
            await tokens(engine, ask(tiny.chains["base"]))
            compute = engine._executor.run

            def broken(*_: Any, **__: Any) -> Any:
                engine._executor.run = compute  # type: ignore[method-assign]
                raise RuntimeError("once")

            engine._executor.run = broken  # type: ignore[method-assign]
            with pytest.raises(EngineFailedError, match="once"):
                await events(engine, ask(tiny.chains["base"]))
            assert len(await tokens(engine, ask(tiny.chains["base"]))) == 12

    run(work)


def test_commands_of_other_threads_run_in_the_loop(tiny: TinyZoo) -> None:
    async def work() -> None:
        async with in_loop(tiny) as engine:
            where: asyncio.Future[int] = asyncio.get_running_loop().create_future()
            await asyncio.to_thread(engine._post, lambda: where.set_result(threading.get_ident()))
            assert await where == threading.get_ident()

    run(work)


def test_a_deadline_passes_while_another_worker_has_the_request(tiny: TinyZoo) -> None:
    """Nothing comes any more, so the engine has to look by itself."""

    async def work() -> None:
        cluster = SpanCluster(tiny, ["a", "b"], [replace(SMALL, inline_seconds=ALWAYS)] * 2)
        for engine in cluster.engines.values():
            engine.start(in_loop=True)
        path = cluster.path(tiny.chains["base"], a=2, b=0)
        await cluster.load(tiny.chains["base"], path)
        cluster.wire.deliver = lambda _to, message: not isinstance(message, ChunkMsg)
        request = ask(tiny.chains["base"], path=path, deadline=time.monotonic() + 0.2)
        with pytest.raises(DeadlineExceededError):
            await events(cluster.engine("a"), request)
        await asyncio.gather(*(asyncio.to_thread(one.stop) for one in cluster.engines.values()))

    run(work)


@pytest.mark.parametrize("inline_seconds", [NEVER, ALWAYS])
def test_chains_over_several_workers(tiny: TinyZoo, engine: BlockEngine, inline_seconds: float) -> None:
    async def work() -> None:
        config = replace(SMALL, inline_seconds=inline_seconds)
        # The second has a thread of its own: both kinds talk to each other.
        cluster = SpanCluster(tiny, ["a", "b", "c"], [config, replace(config, inline_seconds=0.0), config])
        for one in cluster.engines.values():
            one.start(in_loop=True)
        chain = tiny.chains["base"]
        path = cluster.path(chain, a=2, b=3, c=0)
        await cluster.load(chain, path)
        await engine.load(chain)
        requests = [ask(chain, prompt) for prompt in PROMPTS]
        expected = [await tokens(engine, one) for one in requests]
        split = [replace(one, request_id=f"s{one.request_id}", path=path) for one in requests]
        head = cluster.engines[WorkerId("a")]
        assert list(await asyncio.gather(*(tokens(head, one) for one in split))) == expected
        async with asyncio.timeout(30):
            while not cluster.is_clean():
                await asyncio.sleep(0)
        await asyncio.gather(*(asyncio.to_thread(one.stop) for one in cluster.engines.values()))

    run(work)


def test_how_long_a_pass_should_take(tiny: TinyZoo) -> None:
    def chunks(*sizes: int) -> list[Chunk]:
        return [Chunk(running=None, start=0, end=size) for size in sizes]  # type: ignore[arg-type]

    pace = Pace()
    assert pace.expect(chunks(1)) == pace.expect(chunks(5)) == float("inf")
    pace.note(chunks(1, 1), 0.01)
    pace.note(chunks(50), 0.1)
    assert pace.expect(chunks(1)) == pytest.approx(0.01)
    assert pace.expect(chunks(1, 1, 1, 1)) == pytest.approx(0.02)
    assert pace.expect(chunks(100)) == pytest.approx(0.2)
    assert pace.expect(chunks(1, 1, 100)) == pytest.approx(0.21)
