"""What operators ask of a server: which parts it reaches, with and without a cluster behind it."""

from __future__ import annotations

from typing import Any

import pytest

from blockserve.common.errors import RequestNotFoundError, WorkerNotFoundError
from blockserve.common.placement.wishes import WishKeeper
from blockserve.router.intake.catalog import VariantCatalog
from blockserve.router.intake.loading import ChainLoader
from blockserve.router.operations import Operations
from blockserve.router.traces.book import TraceBook
from blockzoo.errors import VariantNotFoundError
from support.edge import FakeZoo, ScriptedEngine, async_test

CHAIN = "chain-of-tale-1"


class Wishes(WishKeeper):
    """Records what is wished."""

    def __init__(self) -> None:
        self.wished: list[tuple[str, bool | None]] = []

    async def wish(self, variant: str, *, pinned: bool | None = None, **_: Any) -> Any:
        self.wished.append((variant, pinned))


class Operator:
    """Records which workers are drained; each gives two requests back."""

    def __init__(self) -> None:
        self.drained: list[tuple[str, float, bool]] = []

    async def drain_worker(self, worker: str, seconds: float, *, resume: bool) -> int:
        self.drained.append((worker, seconds, resume))
        return 2


def make(**parts: Any) -> tuple[Operations, ScriptedEngine]:
    zoo, engine = FakeZoo(), ScriptedEngine()
    zoo.add("tale")
    return Operations(VariantCatalog(zoo), engine, ChainLoader(engine), TraceBook(4), **parts), engine


@async_test
async def test_a_variant_is_loaded_once_and_unloaded() -> None:
    operations, engine = make()
    for _ in range(2):
        chain, seconds = await operations.load("tale")
        assert chain == CHAIN
        assert seconds >= 0
    assert (engine.num_loads, engine.loaded, engine.pinned) == (1, {CHAIN}, set())
    assert await operations.unload("tale@1") == CHAIN
    assert engine.loaded == set()
    with pytest.raises(VariantNotFoundError):
        await operations.load("tail")


@async_test
async def test_pinning_reaches_the_engine_and_stays_as_it_is_where_nothing_is_said() -> None:
    operations, engine = make()
    for pinned, expected in ((True, {CHAIN}), (None, {CHAIN}), (False, set())):
        await operations.load("tale", pinned=pinned)
        assert engine.pinned == expected


@async_test
async def test_in_a_cluster_pins_are_wishes() -> None:
    wishes = Wishes()
    operations, _ = make(wishes=wishes)
    await operations.load("tale")
    await operations.load("tale", pinned=True)
    await operations.unload("tale@1")  # an old version has no wish of its own
    await operations.unload("tale")
    assert wishes.wished == [("tale", True), ("tale", False)]


@async_test
async def test_workers_are_drained_where_there_are_any() -> None:
    operator = Operator()
    operations, _ = make(operator=operator)
    assert await operations.drain_worker("w", 3.0, resume=True) == 2
    assert operator.drained == [("w", 3.0, True)]
    operations, _ = make()
    with pytest.raises(WorkerNotFoundError, match="one process"):
        await operations.drain_worker("w", 3.0)


@async_test
async def test_status_names_the_variants_of_each_chain() -> None:
    operations, _ = make(version="1.2")
    await operations.load("tale", pinned=True)
    status = await operations.status()
    [chain] = status.chains
    assert (chain.chain_digest, chain.models, chain.pinned) == (CHAIN, ("tale@1",), True)
    assert (status.version, status.zoo_url, status.device, status.passes) == (
        "1.2",
        "memory://fake",
        "cpu",
        7,
    )
    assert status.uptime_seconds >= 0
    assert status.cluster is None


@async_test
async def test_a_request_that_was_never_here_has_no_trace() -> None:
    operations, _ = make()
    with pytest.raises(RequestNotFoundError):
        await operations.trace("x")
