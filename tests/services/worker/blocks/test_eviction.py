"""Idle chains make room, the least recently used first; pinned and busy ones never."""

import asyncio
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockserve.common.api.engine import EngineRequest, SamplingParams
from blockserve.common.errors import MemoryBudgetError
from blockserve.worker.blocks.eviction import choose_victims
from blockserve.worker.engine.engine import BlockEngine
from blockzoo.errors import ManifestNotFoundError
from blockzoo.manifest import ChainId
from support.tiny import SMALL, TinyZoo

A, B, C = ChainId("a"), ChainId("b"), ChainId("c")
_SIZES = st.dictionaries(st.integers(0, 7), st.just(1), max_size=5)


def test_the_least_recently_used_goes_first() -> None:
    idle = [(A, {1: 10}), (B, {2: 10}), (C, {3: 10})]
    assert choose_victims([{9: 10}], idle, 40) == []
    assert choose_victims([{9: 10}], idle, 39) == [A]
    assert choose_victims([{9: 10}], idle, 20) == [A, B]
    assert choose_victims([{9: 10}], idle, 9) is None


def test_shared_blocks_count_once_and_going_must_free_something() -> None:
    trunk = {0: 100}
    idle = [(A, {**trunk, 1: 0}), (B, {**trunk, 2: 5}), (C, {3: 50})]
    assert choose_victims([{**trunk, 9: 5}], idle, 160) == []
    # What comes needs the trunk, so the first frees nothing by going.
    assert choose_victims([{**trunk, 9: 5}], idle, 155) == [B]
    # Together they free what neither frees alone.
    assert choose_victims([{9: 5}], [(A, trunk), (B, trunk)], 50) == [A, B]


@settings(max_examples=300, deadline=None)
@given(st.lists(_SIZES, max_size=3), st.lists(_SIZES, max_size=6), st.integers(0, 10))
def test_what_stays_fits_and_nobody_goes_in_vain(
    staying: list[dict[int, int]], idle: list[dict[int, int]], budget: int
) -> None:
    named = [(ChainId(str(place)), sizes) for place, sizes in enumerate(idle)]
    victims = choose_victims(staying, named, budget)

    def total(gone: list[ChainId]) -> int:
        kept = [sizes for name, sizes in named if name not in gone]
        return len({key for sizes in (*staying, *kept) for key in sizes})

    assert (victims is None) == (total([name for name, _ in named]) > budget)
    if victims is not None:
        assert total(victims) <= budget
        for victim in victims:
            assert total([name for name in victims if name != victim]) > budget


_ids = itertools.count()


def ask(chain: ChainId, max_tokens: int = 4) -> EngineRequest:
    return EngineRequest(f"r{next(_ids)}", chain, (5, 6, 7), SamplingParams(temperature=0.0), max_tokens)


async def use(engine: BlockEngine, chain: ChainId) -> list[int]:
    await engine.load(chain)
    return [event.token_id async for batch in engine.generate(ask(chain)) for event in batch]


def sizes(tiny: TinyZoo) -> dict[str, int]:
    """Bytes of the base and of what each other variant adds to it."""

    async def work(engine: BlockEngine) -> dict[str, int]:
        found = {}
        for name in ("base", "all", "other", "top", "qwen"):
            before = engine.report().block_bytes
            await engine.load(tiny.chains[name])
            found[name] = engine.report().block_bytes - before
        return found

    with serving(tiny, 0) as engine:
        return asyncio.run(work(engine))


@contextmanager
def serving(tiny: TinyZoo, block_bytes: int, room_seconds: float = 0.0) -> Iterator[BlockEngine]:
    engine = BlockEngine(tiny.zoo, replace(SMALL, block_bytes=block_bytes, room_seconds=room_seconds))
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


def loaded(engine: BlockEngine, tiny: TinyZoo) -> set[str]:
    return {name for name, chain in tiny.chains.items() if engine.is_loaded(chain)}


def test_chains_come_and_go_with_their_use(tiny: TinyZoo) -> None:
    """Room for the base and two of its three relatives."""
    size = sizes(tiny)
    budget = size["base"] + size["top"] + size["all"]

    async def work(engine: BlockEngine) -> None:
        answers = {}
        for name in ("base", "all", "other"):
            answers[name] = await use(engine, tiny.chains[name])
        assert loaded(engine, tiny) == {"base", "all", "other"}
        await use(engine, tiny.chains["all"])
        # The base was used before `other`, but its going alone frees nothing: its blocks are theirs.
        answers["top"] = await use(engine, tiny.chains["top"])
        assert loaded(engine, tiny) == {"base", "all", "top"}
        assert engine.report().chain_evictions == 1
        assert engine.report().block_bytes <= budget
        for name in ("other", "top", "all", "base"):
            assert await use(engine, tiny.chains[name]) == answers[name]
            assert engine.report().block_bytes <= budget

    with serving(tiny, budget) as engine:
        asyncio.run(work(engine))


def test_pinned_chains_stay(tiny: TinyZoo) -> None:
    size = sizes(tiny)

    async def work(engine: BlockEngine) -> None:
        base, top, other = (tiny.chains[name] for name in ("base", "top", "qwen"))
        await engine.load(base, pinned=True)
        with pytest.raises(MemoryBudgetError, match="budget"):
            await engine.load(other)
        assert loaded(engine, tiny) == {"base"}
        assert [chain.pinned for chain in engine.report().chains] == [True]
        assert len(await use(engine, base)) == 4
        await engine.load(base)  # says nothing about pinning
        with pytest.raises(MemoryBudgetError):
            await engine.load(top)
        await engine.load(base, pinned=False)
        await engine.load(top)
        assert loaded(engine, tiny) == {"top"}
        await engine.load(top, pinned=True)
        await engine.unload(top)  # by name, pinned or not
        assert loaded(engine, tiny) == set()
        await engine.load(top)
        assert [chain.pinned for chain in engine.report().chains] == [False]

    with serving(tiny, max(size["base"], size["qwen"]) + 1000) as engine:
        asyncio.run(work(engine))


def test_busy_chains_stay(tiny: TinyZoo) -> None:
    size = sizes(tiny)

    async def work(engine: BlockEngine) -> None:
        base, other = tiny.chains["base"], tiny.chains["qwen"]
        await engine.load(base)
        stream = engine.generate(ask(base, 400))
        await anext(stream)
        with pytest.raises(MemoryBudgetError) as caught:
            await engine.load(other)
        assert caught.value.retry_after > 0
        assert len([event async for batch in stream for event in batch]) == 399
        assert len(await use(engine, other)) == 4
        assert loaded(engine, tiny) == {"qwen"}

    with serving(tiny, max(size["base"], size["qwen"])) as engine:
        asyncio.run(work(engine))


def test_a_load_waits_for_requests_that_are_in_the_way(tiny: TinyZoo) -> None:
    size = sizes(tiny)

    async def work(engine: BlockEngine) -> None:
        base, other = tiny.chains["base"], tiny.chains["qwen"]
        await engine.load(base)
        stream = engine.generate(ask(base, 400))
        await anext(stream)
        loading = asyncio.create_task(engine.load(other))
        await asyncio.sleep(0)
        assert len([event async for batch in stream for event in batch]) == 399  # undisturbed
        await loading
        assert len(await use(engine, other)) == 4

    with serving(tiny, max(size["base"], size["qwen"]), room_seconds=60.0) as engine:
        asyncio.run(work(engine))
    with (
        serving(tiny, size["base"] // 2, room_seconds=60.0) as engine,
        pytest.raises(MemoryBudgetError) as caught,
    ):
        asyncio.run(engine.load(tiny.chains["base"]))  # no wait makes it fit
    assert caught.value.retry_after == 0


def test_nobody_goes_for_a_chain_that_cannot_be_loaded(tiny: TinyZoo) -> None:
    size = sizes(tiny)

    async def work(engine: BlockEngine) -> None:
        await engine.load(tiny.chains["base"])
        with pytest.raises(ManifestNotFoundError):
            await engine.load(ChainId("0" * 64))
        assert loaded(engine, tiny) == {"base"}

    with serving(tiny, size["base"]) as engine:
        asyncio.run(work(engine))
    with serving(tiny, size["base"] // 2) as engine, pytest.raises(MemoryBudgetError):
        asyncio.run(engine.load(tiny.chains["base"]))
