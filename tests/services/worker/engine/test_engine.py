"""The engine as its callers see it: batching, life cycle, errors, and that nothing leaks."""

import asyncio
import itertools
import math
import threading
import time
from collections.abc import AsyncIterator, Coroutine
from dataclasses import replace
from typing import Any

import pytest
import torch

from blockserve.common.api.engine import EngineRequest, SamplingParams, TokenEvent
from blockserve.common.api.tokens import FinishReason
from blockserve.common.errors import (
    ChainNotLoadedError,
    ConfigurationError,
    DeadlineExceededError,
    EngineFailedError,
    KvCapacityError,
    NonFiniteLogitsError,
    QueueFullError,
    ServerStoppingError,
)
from blockserve.worker.compute.executor import Executor
from blockserve.worker.compute.sampler import Sampler
from blockserve.worker.engine.debug import prompt_logits
from blockserve.worker.engine.engine import BlockEngine
from blockzoo.errors import CorruptBlobError
from blockzoo.layout import blob_key
from blockzoo.manifest import ChainId
from support.tiny import SMALL, TinyZoo
from support.zoo_faults import flip

GREEDY = SamplingParams(temperature=0.0)
_ids = itertools.count()


def ask(
    chain: ChainId, prompt: tuple[int, ...] = (5, 6, 7), max_tokens: int = 8, **more: Any
) -> EngineRequest:
    more.setdefault("sampling", GREEDY)
    return EngineRequest(f"r{next(_ids)}", chain, prompt, max_tokens=max_tokens, **more)


async def tokens(engine: BlockEngine, request: EngineRequest) -> list[int]:
    return [event.token_id async for batch in engine.generate(request) for event in batch]


async def first(stream: AsyncIterator[Any]) -> list[TokenEvent]:
    return list(await anext(stream))


async def until(condition: Any, engine: BlockEngine) -> None:
    """Wait for something the engine does between passes, a pass at a time."""
    async with asyncio.timeout(30):
        while not condition():
            # A command that has run proves that the engine went round once more.
            await asyncio.wrap_future(engine._call(lambda: None))


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


@pytest.mark.parametrize("device", ["cuda:99", "quantum"])
def test_a_device_that_is_not_there_is_refused_at_once(tiny: TinyZoo, device: str) -> None:
    with pytest.raises(ConfigurationError, match=f"the device '{device}' cannot be used: ") as caught:
        BlockEngine(tiny.zoo, replace(SMALL, device=device))
    assert "--device cpu" in caught.value.hint


def test_kernels_that_are_not_for_the_device_are_refused(
    tiny: TinyZoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLOCKZOO_KERNELS", "fast")
    with pytest.raises(ConfigurationError, match="BLOCKZOO_KERNELS is 'fast'") as caught:
        BlockEngine(tiny.zoo, SMALL)
    assert "docs/kernels.md" in caught.value.hint


def test_variants_meet_in_one_base_pass(engine: BlockEngine, tiny: TinyZoo) -> None:
    async def work() -> None:
        names = ("base", "all", "other", "top")
        for name in names:
            await engine.load(tiny.chains[name])
        await asyncio.gather(*(tokens(engine, ask(tiny.chains[name], max_tokens=20)) for name in names * 2))

    run(work())
    report = engine.report()
    trunk = report.segments[0]
    assert trunk.num_chains == 4
    assert trunk.largest_batch_chains == 4
    assert trunk.largest_batch_sequences == 8
    assert trunk.forward_calls == report.passes
    assert trunk.mixed_calls > 0
    # The top of the base (3 chains), of the tuned variant, and one head for all of them.
    assert sorted(segment.num_chains for segment in report.segments[1:]) == [1, 3, 4]


def test_answers_do_not_depend_on_company(engine: BlockEngine, tiny: TinyZoo) -> None:
    prompts = [tuple(range(3, 3 + length)) for length in (1, 7, 8, 9, 33, 100)]

    async def work() -> None:
        for chain in tiny.chains.values():
            await engine.load(chain)
        requests = [ask(chain, prompt, 10) for chain in tiny.chains.values() for prompt in prompts]
        alone = [await tokens(engine, request) for request in requests]
        together = await asyncio.gather(*(tokens(engine, request) for request in requests))
        assert list(together) == alone
        assert len({tuple(answer) for answer in alone}) > len(requests) // 2

    run(work())


def test_sampling_is_fixed_by_its_seed(engine: BlockEngine, tiny: TinyZoo) -> None:
    async def work() -> None:
        chain = tiny.chains["base"]
        await engine.load(chain)

        def sampled(seed: int) -> EngineRequest:
            return ask(chain, max_tokens=20, sampling=SamplingParams(temperature=1.0, top_p=0.95, seed=seed))

        alone = await tokens(engine, sampled(1))
        together = await asyncio.gather(*(tokens(engine, sampled(seed)) for seed in (7, 1, 3, 1)))
        assert together[1] == together[3] == alone
        assert together[0] != together[1] != together[2]

    run(work())


def test_closing_a_stream_frees_its_pages_at_once(engine: BlockEngine, tiny: TinyZoo) -> None:
    async def work() -> None:
        chain = tiny.chains["base"]
        await engine.load(chain)
        stream = engine.generate(ask(chain, max_tokens=400))
        await first(stream)
        assert engine.report().kv_pages_used > 0
        await stream.aclose()
        await asyncio.wrap_future(engine._call(lambda: None))  # commands run in order, between two passes
        report = engine.report()
        assert (report.kv_pages_used, report.running_requests, report.waiting_requests) == (0, 0, 0)

    run(work())


def test_a_cancelled_waiting_request_never_runs(engine: BlockEngine, tiny: TinyZoo) -> None:
    async def work() -> None:
        chain = tiny.chains["base"]
        await engine.load(chain)
        task = asyncio.create_task(tokens(engine, ask(chain, max_tokens=100)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: engine.report().running_requests + engine.report().waiting_requests == 0, engine)
        assert engine.report().kv_pages_used == 0

    run(work())


def test_a_deadline_ends_the_request(engine: BlockEngine, tiny: TinyZoo) -> None:
    async def work() -> None:
        chain = tiny.chains["base"]
        await engine.load(chain)
        with pytest.raises(DeadlineExceededError, match="0 of at most 400"):
            await tokens(engine, ask(chain, max_tokens=400, deadline=time.monotonic() - 1))
        assert engine.report().kv_pages_used == 0
        assert len(await tokens(engine, ask(chain, deadline=time.monotonic() + 60))) == 8

    run(work())


def test_a_chain_must_be_loaded(engine: BlockEngine, tiny: TinyZoo) -> None:
    with pytest.raises(ChainNotLoadedError, match="not in memory"):
        run(tokens(engine, ask(tiny.chains["base"])))


def test_a_request_larger_than_the_pool_is_refused(tiny: TinyZoo) -> None:
    engine = BlockEngine(tiny.zoo, replace(SMALL, kv_cache_bytes=64 << 10))
    engine.start()

    async def work() -> None:
        chain = tiny.chains["base"]
        await engine.load(chain)
        with pytest.raises(KvCapacityError, match="more pages than the pool"):
            await tokens(engine, ask(chain, max_tokens=500))
        # Requests that fit one by one wait for each other and all end.
        answers = await asyncio.gather(*(tokens(engine, ask(chain, max_tokens=30)) for _ in range(6)))
        assert [len(answer) for answer in answers] == [30] * 6
        assert len({tuple(answer) for answer in answers}) == 1

    run(work())
    assert engine.report().kv_pages_used == 0
    engine.stop()


def test_a_full_queue_refuses_politely(tiny: TinyZoo) -> None:
    engine = BlockEngine(
        tiny.zoo, replace(SMALL, max_running_requests=1, max_waiting_requests=2, max_tokens_per_pass=8)
    )
    engine.start()

    async def work() -> None:
        chain = tiny.chains["base"]
        await engine.load(chain)
        running = engine.generate(ask(chain, max_tokens=300))
        await first(running)
        tasks = [asyncio.create_task(tokens(engine, ask(chain))) for _ in range(2)]
        await until(lambda: engine.report().waiting_requests == 2, engine)
        with pytest.raises(QueueFullError) as caught:
            await tokens(engine, ask(chain))
        assert caught.value.retry_after > 0
        await running.aclose()
        assert [len(answer) for answer in await asyncio.gather(*tasks)] == [8, 8]

    run(work())
    engine.stop()


def test_unloading_waits_for_running_requests(engine: BlockEngine, tiny: TinyZoo) -> None:
    async def work() -> None:
        chain = tiny.chains["base"]
        await engine.load(chain)
        whole = await tokens(engine, ask(chain, max_tokens=50))
        stream = engine.generate(ask(chain, max_tokens=50))
        seen = [event.token_id for event in await first(stream)]
        await engine.unload(chain)
        assert not engine.is_loaded(chain)
        with pytest.raises(ChainNotLoadedError):
            await tokens(engine, ask(chain))
        seen += [event.token_id async for batch in stream for event in batch]
        assert seen == whole
        await until(lambda: engine.report().block_bytes == 0, engine)
        assert engine.report().segments == ()
        await engine.load(chain)
        assert await tokens(engine, ask(chain, max_tokens=50)) == whole

    run(work())


def test_loading_again_while_draining_keeps_the_chain(engine: BlockEngine, tiny: TinyZoo) -> None:
    async def work() -> None:
        chain = tiny.chains["base"]
        await engine.load(chain)
        stream = engine.generate(ask(chain, max_tokens=60))
        await first(stream)
        await engine.unload(chain)
        await engine.load(chain)
        assert engine.is_loaded(chain)
        assert len([event async for batch in stream for event in batch]) == 59
        assert engine.is_loaded(chain)
        assert len(await tokens(engine, ask(chain))) == 8

    run(work())


def test_variants_come_and_go_under_a_running_stream(engine: BlockEngine, tiny: TinyZoo) -> None:
    """Segments split and fuse, adapter rows move in and out; the stream does not notice."""

    async def work() -> None:
        chains = tiny.chains
        await engine.load(chains["all"])
        alone = await tokens(engine, ask(chains["all"], max_tokens=120))
        stream = engine.generate(ask(chains["all"], max_tokens=120))
        seen = [event.token_id for event in await first(stream)]
        for _ in range(2):
            for name in ("other", "top", "base"):
                await engine.load(chains[name])
                assert len(await tokens(engine, ask(chains[name], max_tokens=3))) == 3
            for name in ("other", "top", "base"):
                await engine.unload(chains[name])
        seen += [event.token_id async for batch in stream for event in batch]
        assert seen == alone

    run(work())


def test_shared_blocks_are_in_memory_once(engine: BlockEngine, tiny: TinyZoo) -> None:
    async def work() -> None:
        await engine.load(tiny.chains["base"])
        base = engine.report().block_bytes
        await engine.load(tiny.chains["top"])
        with_top = engine.report()
        reports = {one.chain: one for one in with_top.chains}
        assert with_top.block_bytes - base == reports[tiny.chains["top"]].private_bytes
        # One of four layers is private; embedding, head and the other layers are shared.
        assert 0 < reports[tiny.chains["top"]].private_bytes < base / 3
        await asyncio.gather(*(engine.load(tiny.chains[name]) for name in ("all", "all", "all")))
        assert len(engine.report().chains) == 3
        for name in ("top", "all"):
            await engine.unload(tiny.chains[name])
        await until(lambda: len(engine.report().chains) == 1, engine)
        assert engine.report().block_bytes == base

    run(work())


def test_a_corrupt_blob_is_refused_and_others_go_on(engine: BlockEngine, tiny: TinyZoo) -> None:
    base = {link.base for link in tiny.zoo.chain(tiny.chains["base"]).links}
    private = [link.base for link in tiny.zoo.chain(tiny.chains["top"]).links if link.base not in base]
    blob = tiny.zoo.block(private[0]).tensors["mlp.down_proj.weight"].blobs[0]
    flip(tiny.zoo.store, blob_key(blob), -1)

    async def work() -> None:
        await engine.load(tiny.chains["base"])
        stream = engine.generate(ask(tiny.chains["base"], max_tokens=60))
        await first(stream)
        with pytest.raises(CorruptBlobError, match=blob[:12]):
            await engine.load(tiny.chains["top"])
        assert not engine.is_loaded(tiny.chains["top"])
        assert len([event async for batch in stream for event in batch]) == 59

    run(work())


def test_a_fault_in_a_pass_fails_its_requests_only(
    engine: BlockEngine, tiny: TinyZoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        await engine.load(tiny.chains["base"])
        whole = Executor.run

        def broken(self: Executor, chunks: Any, before: Any = None) -> Any:
            monkeypatch.setattr(Executor, "run", whole)
            raise RuntimeError("the processor caught fire")

        monkeypatch.setattr(Executor, "run", broken)
        with pytest.raises(EngineFailedError, match="caught fire"):
            await tokens(engine, ask(tiny.chains["base"]))
        assert engine.report().kv_pages_used == 0
        assert len(await tokens(engine, ask(tiny.chains["base"]))) == 8

    run(work())


@pytest.mark.parametrize("part", [(Executor, "run"), (Sampler, "_edited")])
def test_a_request_that_fails_does_not_take_its_batch_with_it(
    engine: BlockEngine, tiny: TinyZoo, monkeypatch: pytest.MonkeyPatch, part: tuple[type, str]
) -> None:
    """It fails with the others and then alone; those get what they get without it."""
    chain, whole, widths = tiny.chains["base"], getattr(*part), set[int]()
    edited = SamplingParams(temperature=0.0, repetition_penalty=1.9)

    def broken(self: Any, *given: Any, **named: Any) -> Any:
        ones = given[-1] if part[0] is Sampler else given[0]
        requests = [getattr(one, "running", one).request for one in ones]
        found = whole(self, *given, **named)
        if any(request.sampling.seed == 666 for request in requests):
            widths.add(len(requests))
            raise RuntimeError("one of them")
        return found

    async def work() -> None:
        await engine.load(chain)
        good = [ask(chain), ask(chain, (8, 9), sampling=edited)]
        expected = [await tokens(engine, one) for one in good]
        monkeypatch.setattr(*part, broken)
        all_there = threading.Event()
        engine._post(lambda: bool(all_there.wait(10)) or None)
        bad = ask(chain, (3, 4), sampling=replace(edited, seed=666))
        again = [replace(one, request_id=f"{one.request_id}-again") for one in good]
        answers = [asyncio.create_task(tokens(engine, one)) for one in [*again, bad]]
        await asyncio.sleep(0)
        all_there.set()
        found = await asyncio.gather(*answers, return_exceptions=True)
        assert found[:2] == expected
        assert isinstance(found[2], EngineFailedError)
        assert widths == {1, 3}
        assert engine.report().kv_pages_used == 0

    run(work())


def test_requests_that_fail_count_until_a_pass_succeeds(
    engine: BlockEngine, tiny: TinyZoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        chain, whole = tiny.chains["base"], Executor.run
        await engine.load(chain)

        def broken(self: Executor, chunks: Any, before: Any = None) -> Any:
            if any(chunk.running.request.sampling.seed == 666 for chunk in chunks):
                raise RuntimeError("a bug")
            return whole(self, chunks, before)

        monkeypatch.setattr(Executor, "run", broken)
        bad = [ask(chain, sampling=replace(GREEDY, seed=666)) for _ in range(3)]
        for one in (*bad, bad[0]):  # as a router sends it again where there is no other worker
            with pytest.raises(EngineFailedError):
                await tokens(engine, one)
        assert engine.failed_requests(60) == 3
        assert engine.failed_requests(0) == 0
        await tokens(engine, ask(chain))
        assert engine.failed_requests(60) == 0

    run(work())


def test_logits_that_are_not_finite_fail_one_request(
    engine: BlockEngine, tiny: TinyZoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        for name in ("base", "top"):
            await engine.load(tiny.chains[name])
        whole = Executor.run

        def poisoned(self: Executor, chunks: Any, before: Any = None) -> Any:
            results = whole(self, chunks, before)
            return [
                replace(one, rows=torch.full_like(one.rows, math.nan))
                if one.chunk.running.chain.id == tiny.chains["top"]
                else one
                for one in results
            ]

        monkeypatch.setattr(Executor, "run", poisoned)
        good, bad = await asyncio.gather(
            tokens(engine, ask(tiny.chains["base"])),
            tokens(engine, ask(tiny.chains["top"])),
            return_exceptions=True,
        )
        assert isinstance(bad, NonFiniteLogitsError)
        assert isinstance(good, list)
        assert len(good) == 8

    run(work())


def test_stopping_ends_every_stream_with_an_error(tiny: TinyZoo) -> None:
    engine = BlockEngine(tiny.zoo, SMALL)
    engine.start()

    async def work() -> None:
        await engine.load(tiny.chains["base"])
        stream = engine.generate(ask(tiny.chains["base"], max_tokens=400))
        await first(stream)
        await asyncio.to_thread(engine.stop)
        with pytest.raises(ServerStoppingError):
            async for _ in stream:
                pass
        with pytest.raises(ServerStoppingError):
            await tokens(engine, ask(tiny.chains["base"]))

    run(work())


def test_stop_tokens_end_the_answer(engine: BlockEngine, tiny: TinyZoo) -> None:
    async def work() -> None:
        chain = tiny.chains["base"]
        await engine.load(chain)
        whole = await tokens(engine, ask(chain, max_tokens=20))
        stop = whole[9]
        request = ask(chain, max_tokens=20, stop_token_ids=frozenset({stop}))
        events = [event async for batch in engine.generate(request) for event in batch]
        assert [event.token_id for event in events] == whole[: whole.index(stop) + 1]
        assert events[-1].finish is FinishReason.STOP
        assert all(event.finish is None for event in events[:-1])

    run(work())


def test_logprobs_are_those_of_the_logits(engine: BlockEngine, tiny: TinyZoo) -> None:
    prompt = tuple(range(4, 104))  # two chunks of the budget

    async def work() -> list[TokenEvent]:
        await engine.load(tiny.chains["all"])
        request = ask(tiny.chains["all"], prompt, 3, logprobs=4, prompt_logprobs=True)
        return [event async for batch in engine.generate(request) for event in batch]

    events = run(work())
    output = tuple(event.token_id for event in events)
    wanted = prompt_logits(engine, tiny.chains["all"], prompt + output).log_softmax(-1)
    found = [*events[0].prompt_logprobs, *(event.logprobs for event in events)]
    assert [one.token_id for one in found] == [*prompt[1:], *output]
    for row, one in enumerate(found):
        assert one.logprob == pytest.approx(wanted[row, one.token_id].item(), abs=1e-4)
        best = wanted[row].topk(4)
        assert [value for _, value in one.top] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert all(event.prompt_logprobs is None for event in events[1:])


def test_models_of_different_shapes_run_side_by_side(engine: BlockEngine, tiny: TinyZoo) -> None:
    async def work() -> None:
        for name in ("base", "qwen"):
            await engine.load(tiny.chains[name])
        requests = [ask(tiny.chains[name], (9, 8, 7, 6), 12) for name in ("base", "qwen")]
        alone = [await tokens(engine, request) for request in requests]
        assert list(await asyncio.gather(*(tokens(engine, request) for request in requests))) == alone

    run(work())


def test_priority_decides_who_waits(tiny: TinyZoo) -> None:
    engine = BlockEngine(tiny.zoo, replace(SMALL, max_running_requests=1, max_tokens_per_pass=8))
    engine.start()
    ended: list[str] = []

    async def one(name: str, priority: int) -> None:
        await tokens(engine, ask(tiny.chains["base"], max_tokens=3, priority=priority))
        ended.append(name)

    async def work() -> None:
        await engine.load(tiny.chains["base"])
        blocker = engine.generate(ask(tiny.chains["base"], max_tokens=300))
        await first(blocker)
        waiting = [
            asyncio.create_task(one(name, rank)) for name, rank in (("late", 5), ("soon", -5), ("mid", 0))
        ]
        await until(lambda: engine.report().waiting_requests == 3, engine)
        await blocker.aclose()
        await asyncio.gather(*waiting)

    run(work())
    engine.stop()
    assert ended == ["soon", "mid", "late"]
