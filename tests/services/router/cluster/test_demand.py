"""Demand: what is asked for first is told at once, rates follow the requests, and what nobody wants fades."""

import asyncio
from collections.abc import Mapping

import pytest

from blockserve.common.errors import StateStoreError
from blockserve.common.state.memory import InProcessStore
from blockserve.router.cluster import demand as module
from blockserve.router.cluster.demand import DemandTeller
from blockzoo.manifest import ChainId

CHAIN = ChainId("c")


def run_teller(action: object, store: InProcessStore) -> dict[ChainId, float]:
    async def work() -> dict[ChainId, float]:
        teller = DemandTeller(store, "router")
        teller.start()
        try:
            await action(teller)  # type: ignore[operator]
            async with asyncio.timeout(10):
                while CHAIN not in (told := await store.demand()):
                    await asyncio.sleep(0.01)
            return told
        finally:
            await teller.stop()

    return asyncio.run(work())


def test_a_chain_that_nobody_holds_is_told_at_once() -> None:
    async def action(teller: DemandTeller) -> None:
        await teller.load(CHAIN)

    assert run_teller(action, InProcessStore())[CHAIN] > 0


def test_demand_for_what_was_evicted_is_forgotten_and_new_calls_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "TELL_SECONDS", 0.05)
    store = InProcessStore()

    async def work() -> None:
        pending: list[ChainId] = []

        def take() -> list[ChainId]:
            taken = list(pending)
            pending.clear()
            return taken

        teller = DemandTeller(store, "router", evicted=take)
        teller.start()
        try:
            async with asyncio.timeout(10):
                await teller.load(CHAIN)
                while CHAIN not in await store.demand():
                    await asyncio.sleep(0.01)
                pending.append(CHAIN)
                while CHAIN in await store.demand():
                    await asyncio.sleep(0.01)
                await teller.load(CHAIN)
                while CHAIN not in await store.demand():
                    await asyncio.sleep(0.01)
        finally:
            await teller.stop()

    asyncio.run(work())


def test_rates_are_requests_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TELL_SECONDS", 0.2)

    async def action(teller: DemandTeller) -> None:
        for _ in range(10):
            teller.note(CHAIN)

    assert run_teller(action, InProcessStore())[CHAIN] == pytest.approx(50, rel=0.5)


def test_what_nobody_asks_for_any_more_is_told_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TELL_SECONDS", 0.05)
    store = InProcessStore()

    async def work() -> None:
        teller = DemandTeller(store, "router")
        teller.start()
        teller.note(CHAIN)
        async with asyncio.timeout(10):
            while not await store.demand():
                await asyncio.sleep(0.01)
            await teller.unload(CHAIN)
            while await store.demand():
                await asyncio.sleep(0.01)
        await teller.stop()

    asyncio.run(work())


def test_a_server_that_is_away_is_logged_once_for_each_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "TELL_SECONDS", 0.001)
    store = AwayStore()

    async def calls(count: int) -> None:
        reached = store.calls + count
        while store.calls < reached:
            await asyncio.sleep(0.001)

    async def work() -> None:
        teller = DemandTeller(store, "router")
        teller.start()
        try:
            async with asyncio.timeout(10):
                for store.is_away in (True, False, True):
                    await calls(5)
        finally:
            await teller.stop()

    asyncio.run(work())
    assert caplog.text.count("demand cannot be reported") == 2


class AwayStore(InProcessStore):
    """Can be cut off."""

    is_away, calls = False, 0

    async def tell_demand(self, router: str, demand: Mapping[ChainId, float], *, ttl_seconds: float) -> None:
        self.calls += 1
        if self.is_away:
            raise StateStoreError("it is away")
        await super().tell_demand(router, demand, ttl_seconds=ttl_seconds)
