"""Engines remember where the time of requests went, alone and along a path."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from blockserve.common.api.cluster import PathStep
from blockserve.common.api.engine import EngineRequest, SamplingParams
from blockserve.common.api.spans import SpanTrace
from blockserve.worker.engine.engine import BlockEngine
from blockserve.worker.peers.messages import BusyMsg, SpanMsg
from blockzoo.manifest import ChainId
from support.spans import SpanCluster, span_cluster
from support.tiny import SMALL, TinyZoo

PROMPT = tuple(range(3, 43))
NUM_TOKENS = 9


def ask(name: str, chain: ChainId, path: Sequence[PathStep] = ()) -> EngineRequest:
    greedy = SamplingParams(temperature=0.0)
    return EngineRequest(name, chain, PROMPT, greedy, max_tokens=NUM_TOKENS, path=tuple(path))


async def answer(engine: BlockEngine, request: EngineRequest) -> None:
    assert sum([len(batch) async for batch in engine.generate(request)]) == NUM_TOKENS


def test_a_request_that_one_engine_executes(tiny: TinyZoo, engine: BlockEngine) -> None:
    async def work() -> None:
        chain = tiny.chains["base"]
        await engine.load(chain)
        await answer(engine, ask("one", chain))
        (span,) = await engine.span_traces(["one", "other"])
        length = len(tiny.zoo.chain(chain).links)
        assert (span.request_id, span.epoch, span.place) == ("one", 0, 0)
        assert (span.run.first, span.run.end) == (0, length)
        times = span.times
        assert not times.running
        assert (times.prompt.tokens, times.decode.tokens) == (len(PROMPT), NUM_TOKENS - 1)
        assert times.decode.passes == NUM_TOKENS - 1
        assert times.prompt.away == times.decode.away == times.opening == 0
        assert 0 < times.decode.longest <= times.decode.seconds
        (path,) = (await engine.trace(["one"]))["one"]
        assert path.steps[0].times == times

    asyncio.run(work())


def test_ended_requests_are_remembered_up_to_a_bound(tiny: TinyZoo) -> None:
    async def work(engine: BlockEngine) -> None:
        chain = tiny.chains["base"]
        await engine.load(chain)
        for name in ("one", "two", "three"):
            await answer(engine, ask(name, chain))
        spans = await engine.span_traces(["one", "two", "three"])
        assert [span.request_id for span in spans] == ["two", "three"]

    engine = BlockEngine(tiny.zoo, replace(SMALL, traced_spans=2))
    engine.start()
    try:
        asyncio.run(work(engine))
    finally:
        engine.stop()


async def spans_of(cluster: SpanCluster, name: str) -> dict[str, SpanTrace]:
    found = {}
    for worker, engine in cluster.engines.items():
        (found[worker],) = await engine.span_traces([name])
    return {str(worker): span for worker, span in found.items()}


def test_the_spans_of_a_path(tiny: TinyZoo) -> None:
    async def work() -> None:
        chain = tiny.chains["base"]
        path = cluster.path(chain, a=2, b=3, c=0)
        await cluster.load(chain, path)
        await answer(cluster.engine("a"), ask("one", chain, path))
        spans = await spans_of(cluster, "one")
        assert [(span.place, span.run) for span in spans.values()] == [
            (place, step.run) for place, step in enumerate(path)
        ]
        for span in spans.values():
            assert (span.times.prompt.tokens, span.times.decode.tokens) == (len(PROMPT), NUM_TOKENS - 1)
        head, *others = (span.times for span in spans.values())
        assert head.attempts == 1
        assert head.opening > 0
        assert (head.prompt.round_trips, head.decode.round_trips) == (1, NUM_TOKENS - 1)
        assert sum(times.decode.here for times in others) <= head.decode.away
        assert all(times.opening == times.decode.away == times.decode.round_trips == 0 for times in others)

    with span_cluster(tiny, "a b c") as cluster:
        asyncio.run(work())


def test_a_path_that_is_opened_again_goes_on_with_its_clocks(tiny: TinyZoo) -> None:
    """The tail's first word is lost and said to be that it is busy; the head asks again."""
    refused: list[SpanMsg] = []

    async def work() -> None:
        chain = tiny.chains["base"]
        path = cluster.path(chain, a=2, b=0)
        await cluster.load(chain, path)

        def refuse(to: str, message: SpanMsg) -> bool:
            if type(message).__name__ != "ReadyMsg" or refused:
                return True
            refused.append(message)
            head = cluster.engine(to)
            head.receive(path[1].worker, [BusyMsg(message.id)])  # type: ignore[attr-defined]
            return False

        cluster.wire.deliver = refuse
        await answer(cluster.engine("a"), ask("one", chain, path))
        spans = await spans_of(cluster, "one")
        assert len(refused) == 1
        assert [span.times.attempts for span in spans.values()] == [2, 2]
        assert spans["a"].times.queued > 0

    with span_cluster(tiny, "a b") as cluster:
        asyncio.run(work())
