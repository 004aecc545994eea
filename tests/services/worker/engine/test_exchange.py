"""Chains over several workers: the same answers as on one, whatever is lost, late or short of memory."""

import asyncio
import itertools
import math
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from blockserve.common.api.cluster import ChainSpan, PathStep, Run, WorkerId
from blockserve.common.api.engine import EngineRequest, SamplingParams, TokenEvent
from blockserve.common.api.tokens import FinishReason
from blockserve.common.errors import (
    BreakCause,
    ChainNotLoadedError,
    DeadlineExceededError,
    EmptyPromptError,
    KvCapacityError,
    PathBrokenError,
    PromptError,
    SpanError,
    WireError,
)
from blockserve.worker.engine.engine import BlockEngine
from blockserve.worker.engine.exchange import TAKEN_BYTES
from blockserve.worker.peers.kv_transfer import PrefixRef, to_bytes
from blockserve.worker.peers.messages import (
    AttemptId,
    BusyMsg,
    ChunkMsg,
    CloseMsg,
    FailMsg,
    OpenMsg,
    RestartMsg,
    SpanMsg,
    TokenMsg,
)
from blockzoo.manifest import ChainId
from support.spans import SpanCluster, span_cluster
from support.tiny import SMALL, TinyZoo

GREEDY = SamplingParams(temperature=0.0)
SAMPLED = SamplingParams(temperature=0.9, top_p=0.95, seed=7, repetition_penalty=1.2)
NONSENSE: list[dict[str, Any]] = [
    {"prompt": ()},
    {"prompt": (1 << 20,)},
    {"logprobs": 1 << 20},
    {"max_tokens": 1 << 20},
    {"sampling": SamplingParams(temperature=math.nan)},
]
_ids = itertools.count()


def ask(chain: ChainId, path: Sequence[PathStep] = (), **more: Any) -> EngineRequest:
    fields: dict[str, Any] = {"prompt": (5, 6, 7), "sampling": GREEDY, "max_tokens": 12, **more}
    return EngineRequest(f"r{next(_ids)}", chain, path=tuple(path), **fields)


async def events(engine: BlockEngine, request: EngineRequest) -> list[TokenEvent]:
    return [event async for batch in engine.generate(request) for event in batch]


async def tokens(engine: BlockEngine, request: EngineRequest) -> list[int]:
    return [event.token_id for event in await events(engine, request)]


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


async def clean(cluster: SpanCluster) -> None:
    """Wait until nobody holds anything, a pass at a time."""
    async with asyncio.timeout(30):
        while not cluster.is_clean():
            for engine in cluster.engines.values():
                await asyncio.wrap_future(engine._call(lambda: None))


async def one_process(engine: BlockEngine, requests: Sequence[EngineRequest]) -> list[list[int]]:
    """What a single process answers to the same requests, together; tests/oracle has what each is alone."""
    for request in requests:
        await engine.load(request.chain)
    return [*await asyncio.gather(*(tokens(engine, replace(request, path=())) for request in requests))]


PROMPTS = [tuple(range(3, 3 + length)) for length in (1, 7, 33, 100)]


@pytest.mark.parametrize("cuts", [{"a": 2, "b": 0}, {"a": 1, "b": 0}, {"a": 1, "b": 2, "c": 3, "d": 0}])
def test_tokens_are_those_of_one_process(tiny: TinyZoo, engine: BlockEngine, cuts: dict[str, int]) -> None:
    if 1 in cuts.values():  # an embedding alone is no run
        cuts = {name: end + 1 if end else 0 for name, end in cuts.items()}

    async def work() -> None:
        requests = []
        for name, chain in tiny.chains.items():
            if name == "qwen":
                continue
            path = cluster.path(chain, **cuts)
            await cluster.load(chain, path)
            for prompt, sampling in itertools.product(PROMPTS, (GREEDY, SAMPLED)):
                requests.append(ask(chain, path, prompt=prompt, sampling=sampling, max_tokens=7))
        expected = await one_process(engine, requests)
        alone = [await tokens(cluster.engine("a"), request) for request in requests[::3]]  # of every chain
        together = await asyncio.gather(*(tokens(cluster.engine("a"), request) for request in requests))
        assert alone == expected[::3]
        assert list(together) == expected
        assert len({tuple(answer) for answer in expected}) > len(expected) // 2
        await clean(cluster)

    with span_cluster(tiny, " ".join(cuts)) as cluster:
        run(work())


def test_each_worker_holds_and_computes_only_its_own(tiny: TinyZoo, engine: BlockEngine) -> None:
    async def work() -> None:
        chain = tiny.chains["base"]
        path = cluster.path(chain, a=2, b=0)
        await cluster.load(chain, path)
        await engine.load(chain)
        await tokens(cluster.engine("a"), ask(chain, path))

    with span_cluster(tiny, "a b") as cluster:
        run(work())
        reports = [cluster.engine(name).report() for name in "ab"]
    whole = engine.report().block_bytes
    assert sum(report.block_bytes for report in reports) in (whole, whole + reports[0].chains[0].total_bytes)
    assert all(0 < report.block_bytes < whole for report in reports)
    assert [report.segments[0].first_position for report in reports] == [0, 2]
    assert all(report.passes for report in reports)


def test_logprobs_prompt_logprobs_and_stops_come_from_the_tail(tiny: TinyZoo, engine: BlockEngine) -> None:
    async def work() -> None:
        chain = tiny.chains["all"]
        path = cluster.path(chain, a=2, b=0)
        await cluster.load(chain, path)
        await engine.load(chain)
        request = ask(chain, path, prompt=tuple(range(40)), logprobs=3, prompt_logprobs=True)
        expected = await events(engine, replace(request, path=()))
        found = await events(cluster.engine("a"), request)
        assert [replace(one, timing=None) for one in found] == [replace(one, timing=None) for one in expected]
        assert found[0].timing is not None
        stop = expected[4].token_id
        first = next(place for place, one in enumerate(expected) if one.token_id == stop)
        stopped = await events(
            cluster.engine("a"), ask(chain, path, prompt=tuple(range(40)), stop_token_ids=frozenset({stop}))
        )
        assert stopped[-1].finish is FinishReason.STOP
        assert len(stopped) == first + 1
        await clean(cluster)

    with span_cluster(tiny, "a b") as cluster:
        run(work())


def test_a_request_goes_on_after_tokens_it_was_told_elsewhere(tiny: TinyZoo, engine: BlockEngine) -> None:
    async def work() -> None:
        chain = tiny.chains["base"]
        path = cluster.path(chain, a=3, b=0)
        await cluster.load(chain, path)
        request = ask(chain, path, sampling=SAMPLED, prompt=tuple(range(20)))
        [expected] = await one_process(engine, [request])
        for told in (1, 5, 11):
            later = replace(request, output=tuple(expected[:told]), epoch=told)
            found = await events(cluster.engine("a"), later)
            assert [one.token_id for one in found] == expected[told:]
            assert [one.index for one in found] == list(range(told, len(expected)))

    with span_cluster(tiny, "a b") as cluster:
        run(work())


def test_cached_prefixes_count_only_where_everybody_has_them(tiny: TinyZoo, engine: BlockEngine) -> None:
    async def work() -> None:
        chain = tiny.chains["base"]
        path = cluster.path(chain, a=2, b=0)
        await cluster.load(chain, path)
        request = ask(chain, path, prompt=tuple(range(100)))
        [expected] = await one_process(engine, [request])
        first = await events(cluster.engine("a"), request)
        again = await events(cluster.engine("a"), replace(request, request_id="again"))
        page = SMALL.kv_page_tokens
        assert (first[0].cached_prompt_tokens, again[0].cached_prompt_tokens) == (0, 99 // page * page)
        # One worker forgets everything: nobody may build on what the other still has.
        for forgetful in "ab":
            pool = next(iter(cluster.engine(forgetful)._pools.values()))
            forget = lambda pool=pool: pool.prefixes.evict(pool.allocator.num_pages)  # noqa: E731
            await asyncio.wrap_future(cluster.engine(forgetful)._call(forget))
            redone = await events(cluster.engine("a"), replace(request, request_id=f"redone {forgetful}"))
            assert redone[0].cached_prompt_tokens == 0
            assert [one.token_id for one in redone] == expected
        assert [one.token_id for one in first] == [one.token_id for one in again] == expected
        await clean(cluster)

    with span_cluster(tiny, "a b") as cluster:
        run(work())


@pytest.mark.parametrize("short", ["a", "b", "c"])
def test_a_worker_short_of_pages_delays_and_loses_nothing(
    tiny: TinyZoo, engine: BlockEngine, short: str
) -> None:
    async def work() -> None:
        chain = tiny.chains["base"]
        path = cluster.path(chain, a=2, b=3, c=0)
        await cluster.load(chain, path)
        requests = [
            ask(chain, path, prompt=tuple(range(seed, seed + 9)), max_tokens=24, arrival=seed)
            for seed in range(12)
        ]
        expected = await one_process(engine, requests)
        found = await asyncio.gather(*(tokens(cluster.engine("a"), request) for request in requests))
        assert list(found) == expected
        await clean(cluster)
        assert cluster.engine(short).report().preemptions > 0
        if short != "a":
            assert cluster.wire.count(RestartMsg) + cluster.wire.count(BusyMsg) > 0

    # One layer's page of 4 tokens of the tiny model; room for about three of the requests.
    few = replace(SMALL, kv_cache_bytes=SMALL.kv_cache_bytes // SMALL.kv_cache_bytes * _pages_bytes(tiny, 40))
    with span_cluster(tiny, "a b c", **{short: few}) as cluster:
        run(work())


def _pages_bytes(tiny: TinyZoo, pages: int) -> int:
    engine = BlockEngine(tiny.zoo, SMALL)
    engine.start()
    try:
        asyncio.run(engine.load(tiny.chains["base"]))
        shape = next(iter(engine._pools))
        return shape.token_bytes * SMALL.kv_page_tokens * pages
    finally:
        engine.stop()


def test_requests_of_several_heads_cross_without_deadlock(tiny: TinyZoo, engine: BlockEngine) -> None:
    """Each worker begins requests that the other executes the end of, with pages for few."""

    async def work() -> None:
        chain = tiny.chains["base"]
        there, back = cluster.path(chain, a=2, b=0), cluster.path(chain, b=3, a=0)
        await cluster.load(chain, there)
        await cluster.load(chain, back)
        requests = [
            ask(chain, path, prompt=tuple(range(seed, seed + 9)), max_tokens=30, arrival=seed)
            for seed, path in enumerate([there, back] * 6)
        ]
        expected = await one_process(engine, requests)
        found = await asyncio.gather(
            *(tokens(cluster.engine(request.path[0].worker), request) for request in requests)
        )
        assert list(found) == expected
        await clean(cluster)

    few = replace(SMALL, kv_cache_bytes=_pages_bytes(tiny, 60))
    with span_cluster(tiny, "a b", few) as cluster:
        run(work())


def test_micro_batches_keep_every_worker_of_a_path_busy(tiny: TinyZoo) -> None:
    async def work() -> None:
        chain = tiny.chains["base"]
        path = cluster.path(chain, a=2, b=0)
        await cluster.load(chain, path)
        requests = [ask(chain, path, max_tokens=60) for _ in range(8)]
        await asyncio.gather(*(tokens(cluster.engine("a"), request) for request in requests))

    with span_cluster(tiny, "a b") as cluster:
        run(work())
        largest = cluster.engine("a").report().segments[0].largest_batch_sequences
    assert largest == 4


def test_a_full_link_holds_the_sender_back(tiny: TinyZoo) -> None:
    async def work() -> None:
        chain = tiny.chains["base"]
        path = cluster.path(chain, a=2, b=0)
        await cluster.load(chain, path)
        cluster.wire.full.add(WorkerId("b"))
        task = asyncio.create_task(tokens(cluster.engine("a"), ask(chain, path)))
        await opened(cluster)
        for _ in range(5):
            await asyncio.wrap_future(cluster.engine("a")._call(lambda: None))
        assert cluster.wire.count(ChunkMsg) == 0
        cluster.wire.full.clear()
        assert len(await task) == 12

    with span_cluster(tiny, "a b") as cluster:
        run(work())


def test_senders_are_told_of_much_at_a_time_and_never_of_too_little(tiny: TinyZoo) -> None:
    async def work() -> None:
        chain = tiny.chains["base"]
        path = cluster.path(chain, a=2, b=0)
        await cluster.load(chain, path)
        for first in (10, 20, 30):
            prompt = tuple(range(first, first + 100))
            await tokens(cluster.engine("a"), ask(chain, path, prompt=prompt))
        await clean(cluster)

    with span_cluster(tiny, "a b") as cluster:
        run(work())
        sent = sum(one.hidden.nbytes for _, one in cluster.wire.sent if isinstance(one, ChunkMsg))
        assert cluster.wire.reports
        assert min(cluster.wire.reports) >= TAKEN_BYTES
        assert 0 <= sent - sum(cluster.wire.reports) < TAKEN_BYTES


async def opened(cluster: SpanCluster) -> None:
    async with asyncio.timeout(30):
        while not cluster.wire.count(OpenMsg):
            await asyncio.wrap_future(cluster.engine("a")._call(lambda: None))


def test_cancelling_frees_the_pages_of_all_workers(tiny: TinyZoo) -> None:
    async def work() -> None:
        chain = tiny.chains["base"]
        path = cluster.path(chain, a=2, b=3, c=0)
        await cluster.load(chain, path)
        stream = cluster.engine("a").generate(ask(chain, path, max_tokens=400))
        await anext(stream)
        assert all(engine.report().kv_pages_used for engine in cluster.engines.values())
        await stream.aclose()
        await clean(cluster)
        assert cluster.wire.count(CloseMsg) == 2

    with span_cluster(tiny, "a b c") as cluster:
        run(work())


def test_a_lost_worker_ends_its_requests_with_a_typed_error(tiny: TinyZoo) -> None:
    async def work() -> None:
        chain = tiny.chains["base"]
        path = cluster.path(chain, a=2, b=3, c=0)
        await cluster.load(chain, path)
        stream = cluster.engine("a").generate(ask(chain, path, max_tokens=400))
        await anext(stream)
        cluster.engine("a").peer_lost(WorkerId("c"))
        with pytest.raises(PathBrokenError) as caught:
            async for _ in stream:
                pass
        error = caught.value
        assert (error.cause, error.worker, error.seen_by) == (BreakCause.LOST, "c", "a")
        await clean(cluster)

    with span_cluster(tiny, "a b c") as cluster:
        run(work())


def test_a_lost_head_leaves_nothing_at_its_followers(tiny: TinyZoo) -> None:
    async def work() -> None:
        chain = tiny.chains["base"]
        path = cluster.path(chain, a=2, b=3, c=0)
        await cluster.load(chain, path)
        stream = cluster.engine("a").generate(ask(chain, path, max_tokens=400))
        await anext(stream)
        cluster.wire.deliver = lambda to, _: to != "a"
        for name in "bc":
            cluster.engine(name).peer_lost(WorkerId("a"))
        async with asyncio.timeout(30):
            while any(cluster.engine(name).report().kv_pages_used for name in "bc"):
                await asyncio.wrap_future(cluster.engine("b")._call(lambda: None))
        await stream.aclose()

    with span_cluster(tiny, "a b c") as cluster:
        run(work())


def test_what_an_older_path_still_says_is_dropped(tiny: TinyZoo, engine: BlockEngine) -> None:
    """A worker wakes up after the request has gone on without it, and repeats nothing."""
    held: list[SpanMsg] = []

    def hold(to: WorkerId, message: SpanMsg) -> bool:
        if isinstance(message, TokenMsg) and (message.id.epoch, message.event.index) == (0, 3):
            held.append(message)
            return False
        return True

    async def work() -> None:
        chain = tiny.chains["base"]
        old, new = cluster.path(chain, a=2, b=0), cluster.path(chain, a=2, c=0)
        await cluster.load(chain, old)
        await cluster.load(chain, new)
        request = ask(chain, old)
        [expected] = await one_process(engine, [request])
        cluster.wire.deliver = hold
        stream = cluster.engine("a").generate(request)
        told: list[int] = []
        while len(told) < 3:
            told.extend(event.token_id for event in await anext(stream))
        later = cluster.engine("a").generate(replace(request, path=new, epoch=1, output=tuple(told)))
        while len(told) < 6:
            told.extend(event.token_id for event in await anext(later))
            cluster.engine("a").receive(WorkerId("b"), held)
        async for batch in later:
            told.extend(event.token_id for event in batch)
        assert told == expected
        assert held
        await stream.aclose()
        await clean(cluster)

    with span_cluster(tiny, "a b c") as cluster:
        run(work())


def test_an_opening_that_was_overtaken_by_its_end_opens_nothing(tiny: TinyZoo) -> None:
    held: list[SpanMsg] = []

    def hold(to: WorkerId, message: SpanMsg) -> bool:
        if to == "b" and isinstance(message, OpenMsg):
            held.append(message)
            return False
        return True

    async def work() -> None:
        chain = tiny.chains["base"]
        path = cluster.path(chain, a=2, b=0)
        await cluster.load(chain, path)
        cluster.wire.deliver = hold
        task = asyncio.create_task(tokens(cluster.engine("a"), ask(chain, path)))
        await opened(cluster)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        async with asyncio.timeout(30):
            while not cluster.wire.count(CloseMsg):
                await asyncio.wrap_future(cluster.engine("a")._call(lambda: None))
        cluster.engine("b").receive(WorkerId("b"), held)
        await clean(cluster)

    with span_cluster(tiny, "a b") as cluster:
        run(work())


def test_errors_of_followers_reach_the_caller(tiny: TinyZoo) -> None:
    async def work() -> None:
        chain = tiny.chains["base"]
        path = cluster.path(chain, a=2, b=0)
        await cluster.load(chain, path[:1])
        with pytest.raises(ChainNotLoadedError, match="positions 2 to"):
            await tokens(cluster.engine("a"), ask(chain, path))
        await cluster.load(chain, path)
        with pytest.raises(KvCapacityError):
            await tokens(cluster.engine("a"), ask(chain, path, max_tokens=200))
        loop_time = asyncio.get_running_loop().time()
        with pytest.raises(DeadlineExceededError):
            await tokens(cluster.engine("a"), ask(chain, path, deadline=loop_time))
        assert len(await tokens(cluster.engine("a"), ask(chain, path))) == 12
        await clean(cluster)

    with span_cluster(tiny, "a b", b=replace(SMALL, kv_cache_bytes=_pages_bytes(tiny, 20))) as cluster:
        run(work())


@pytest.mark.parametrize("bounds", [(0, 1), (0, 99), (5, 6)])
def test_runs_that_cannot_be_executed_are_refused(
    tiny: TinyZoo, engine: BlockEngine, bounds: tuple[int, int]
) -> None:
    chain = tiny.chains["base"]
    with pytest.raises(SpanError):
        run(engine.load_span(ChainSpan(chain, Run(*bounds))))


def test_keys_and_values_of_another_worker_spare_the_computation(tiny: TinyZoo, engine: BlockEngine) -> None:
    """b's pages go to c: what goes on over a and c finds them there; only the last page is computed."""

    async def work() -> None:
        chain = tiny.chains["all"]
        old, new = cluster.path(chain, a=2, b=0), cluster.path(chain, a=2, c=0)
        await cluster.load(chain, old)
        await cluster.load(chain, new)
        request = ask(chain, old, prompt=tuple(range(100)), max_tokens=30, cache_salt="tenant")
        [expected] = await one_process(engine, [request])
        stream = cluster.engine("a").generate(request)
        told: list[int] = []
        while len(told) < 15:
            told.extend(event.token_id for event in await anext(stream))
        await stream.aclose()
        del told[15:]  # in the middle of a page, however far the engine was ahead
        prefix = PrefixRef(ChainSpan(chain, old[1].run), "tenant", (*request.prompt, *told))
        pages = await cluster.engine("b").export_kv(prefix, 0, 1000)
        assert len(pages) == (len(request.prompt) + len(told)) // SMALL.kv_page_tokens
        sent = [(page.place, to_bytes(page.keys), to_bytes(page.values)) for page in pages]
        target = replace(prefix, span=ChainSpan(chain, new[1].run))
        assert await cluster.engine("c").import_kv(target, sent) == len(pages)
        assert await cluster.engine("c").import_kv(target, sent) == len(pages)  # there already
        # Another tenant, and another variant, never meet them.
        for stranger in (replace(target, salt="other"), replace(target, tokens=(9, *target.tokens[1:]))):
            assert await cluster.engine("c").export_kv(stranger, 0, 1000) == []
        later = replace(request, path=new, epoch=1, output=tuple(told))
        before = cluster.wire.count(ChunkMsg)
        found = await events(cluster.engine("a"), later)
        assert told + [event.token_id for event in found] == expected
        # One chunk for what the last page lacked, then a token at a time.
        assert cluster.wire.count(ChunkMsg) - before <= 1 + len(found)
        first = next(
            m for _, m in cluster.wire.sent[::-1] if isinstance(m, ChunkMsg) and len(m.token_ids) > 1
        )
        assert first.start == len(pages) * SMALL.kv_page_tokens
        await clean(cluster)

    with span_cluster(tiny, "a b c") as cluster:
        run(work())


def test_damaged_or_foreign_pages_are_refused(tiny: TinyZoo) -> None:
    async def work() -> None:
        chain = tiny.chains["base"]
        path = cluster.path(chain, a=2, b=0)
        await cluster.load(chain, path)
        prefix = PrefixRef(ChainSpan(chain, path[1].run), "", tuple(range(40)))
        with pytest.raises(WireError):
            await cluster.engine("b").import_kv(prefix, [(0, b"short", b"short")])
        with pytest.raises(ChainNotLoadedError):
            await cluster.engine("a").import_kv(prefix, [(0, b"", b"")])
        assert await cluster.engine("a").export_kv(prefix, 0, 10) == []
        await clean(cluster)

    with span_cluster(tiny, "a b") as cluster:
        run(work())


def test_an_older_head_is_told_that_its_request_has_gone_on(tiny: TinyZoo, engine: BlockEngine) -> None:
    """A head worker was stopped and its follower serves the next path: when it wakes it must not wait."""

    async def work() -> None:
        chain = tiny.chains["base"]
        old, new = cluster.path(chain, a=2, b=0), cluster.path(chain, c=2, b=0)
        await cluster.load(chain, old)
        await cluster.load(chain, new)
        request = ask(chain, old, max_tokens=60)
        [expected] = await one_process(engine, [request])
        stream = cluster.engine("a").generate(request)
        told: list[int] = []
        while len(told) < 3:
            told.extend(event.token_id for event in await anext(stream))
        later = replace(request, path=new, epoch=1, output=tuple(told))
        found = await tokens(cluster.engine("c"), later)
        assert told + found == expected
        with pytest.raises(PathBrokenError) as caught:
            async for _ in stream:
                pass
        assert (caught.value.cause, caught.value.worker) == (BreakCause.SUPERSEDED, "")
        await clean(cluster)

    with span_cluster(tiny, "a b c") as cluster:
        run(work())


def test_messages_that_make_no_sense_end_their_own_request_only(tiny: TinyZoo, engine: BlockEngine) -> None:
    chain = tiny.chains["base"]

    async def work() -> None:
        with span_cluster(tiny, "a b") as cluster:
            path = cluster.path(chain, a=2, b=0)
            await cluster.load(chain, path)
            good = ask(chain, path, max_tokens=40)
            expected = await one_process(engine, [good])
            running = asyncio.create_task(tokens(cluster.engine("a"), good))
            opened = [ask(chain, path, **more) for more in NONSENSE]
            for number, request in enumerate(opened):
                message = OpenMsg(AttemptId(request.request_id, 0, number + 1), request, 1, 0)
                cluster.engine("b").receive(WorkerId("a"), [message])
            fine = ask(chain, path)
            name = AttemptId(fine.request_id, 0, 1)
            width = cluster.engine("b")._chains.get(ChainSpan(chain, path[1].run)).lane.hidden_size  # type: ignore[union-attr]
            too_many = len(fine.prompt) + fine.max_tokens
            for rows in (
                torch.zeros(1, 3),
                torch.zeros(0, width),
                torch.zeros(1, width, dtype=torch.float64),
                torch.zeros(too_many, width),
            ):
                chunk = ChunkMsg(name, 1, 0, (5,) * len(rows), rows)
                cluster.engine("b").receive(WorkerId("a"), [OpenMsg(name, fine, 1, 0), chunk])
                name = replace(name, attempt=name.attempt + 1)
            assert [await running] == expected
            with pytest.raises(EmptyPromptError):
                await tokens(cluster.engine("a"), ask(chain, path, prompt=()))
            await clean(cluster)
            failed = [message for _, message in cluster.wire.sent if isinstance(message, FailMsg)]
            assert {message.id.request_id for message in failed} == {
                request.request_id for request in (*opened, fine)
            }
            said = [str(message.error) for message in failed if isinstance(message.error, WireError)]
            assert [text.partition(" came ")[0] for text in said] == [
                "1 rows of 3 torch.float32",
                f"0 rows of {width} torch.float32",
                f"1 rows of {width} torch.float64",
                f"tokens 0 to {too_many}",
            ]

    run(work())


def test_a_token_that_the_vocabulary_lacks_ends_its_request(tiny: TinyZoo) -> None:
    chain = tiny.chains["base"]

    async def work() -> None:
        with span_cluster(tiny, "a b") as cluster:
            path = cluster.path(chain, a=2, b=0)
            await cluster.load(chain, path)

            def spoil(to: WorkerId, message: SpanMsg) -> bool:
                if isinstance(message, TokenMsg) and message.event.index == 2:
                    wrong = replace(message, event=replace(message.event, token_id=1 << 20))
                    cluster.engine(to).receive(WorkerId("b"), [wrong])
                    return False
                return True

            cluster.wire.deliver = spoil
            with pytest.raises(PromptError, match="token 1048576"):
                await tokens(cluster.engine("a"), ask(chain, path))
            cluster.wire.deliver = lambda _to, _message: True
            assert len(await tokens(cluster.engine("a"), ask(chain, path))) == 12
            await clean(cluster)

    run(work())
