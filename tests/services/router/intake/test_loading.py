"""Chains are loaded once, however many wait."""

from __future__ import annotations

import asyncio

import pytest

from blockserve.router.intake.loading import ChainLoader
from blockzoo.errors import CorruptBlobError
from blockzoo.manifest import ChainId
from support.edge import ScriptedEngine, async_test, until

CHAIN = ChainId("chain")


@async_test
async def test_concurrent_requests_share_one_load() -> None:
    engine = ScriptedEngine()
    engine.load_gate = asyncio.Event()
    loader = ChainLoader(engine)
    waiters = [asyncio.create_task(loader.ensure(CHAIN)) for _ in range(5)]
    other = asyncio.create_task(loader.ensure(ChainId("other")))
    await until(lambda: engine.num_loads == 2)
    engine.load_gate.set()
    await asyncio.gather(*waiters, other)
    await loader.ensure(CHAIN)
    assert engine.num_loads == 2


@async_test
async def test_a_waiter_that_leaves_does_not_take_the_load_along() -> None:
    engine = ScriptedEngine()
    engine.load_gate = asyncio.Event()
    loader = ChainLoader(engine)
    leaver, stayer = (asyncio.create_task(loader.ensure(CHAIN)) for _ in range(2))
    await until(lambda: engine.num_loads == 1)
    leaver.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaver
    engine.load_gate.set()
    await stayer
    assert engine.is_loaded(CHAIN)
    assert engine.num_loads == 1


@async_test
async def test_a_failure_reaches_every_waiter_and_is_not_remembered(caplog: pytest.LogCaptureFixture) -> None:
    engine = ScriptedEngine()
    engine.fail_load = CorruptBlobError("blob c0ffee is damaged")
    loader = ChainLoader(engine)
    outcomes = await asyncio.gather(loader.ensure(CHAIN), loader.ensure(CHAIN), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [CorruptBlobError] * 2
    assert engine.num_loads == 1
    assert "c0ffee" in caplog.text
    engine.fail_load = None
    await loader.ensure(CHAIN)
    assert engine.is_loaded(CHAIN)


@async_test
async def test_closing_gives_up_loads() -> None:
    engine = ScriptedEngine()
    engine.load_gate = asyncio.Event()
    loader = ChainLoader(engine)
    waiter = asyncio.create_task(loader.ensure(CHAIN))
    await until(lambda: engine.num_loads == 1)
    await loader.close()
    with pytest.raises(asyncio.CancelledError):
        await waiter
