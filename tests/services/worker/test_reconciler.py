"""A worker's memory follows the placement, by content."""

import asyncio
from collections.abc import Sequence

import pytest

from blockserve.common.api.cluster import Assignment, ChainSpan, Placement, Run, WorkerId, WorkerRecord
from blockserve.common.rpc.channel import Credentials
from blockserve.common.state.memory import InProcessStore
from blockserve.worker.engine.engine import BlockEngine
from blockserve.worker.peers.streams import PeerStreams
from blockserve.worker.reconciler import Reconciler
from blockserve.worker.service import WorkerService
from blockzoo.errors import StorageError
from blockzoo.manifest import ChainId, ChainManifest
from support.tiny import SMALL, TinyZoo

ME = WorkerId("me")


def follow(tiny: TinyZoo, placements: Sequence[Placement]) -> list[set[tuple[str, Run, bool]]]:
    """What is in memory after each placement: variant, run, whether it is pinned."""
    names = {chain: name for name, chain in tiny.chains.items()}

    async def work() -> list[set[tuple[str, Run, bool]]]:
        streams = PeerStreams(ME, Credentials(), 1 << 20)
        engine = BlockEngine(tiny.zoo, SMALL, outlet=streams)
        engine.start()
        service = WorkerService(WorkerRecord(ME, "me", "unix:/me"), tiny.zoo, engine, streams, Credentials())
        streams.attach(service)
        reconciler = Reconciler(service, InProcessStore(), tiny.zoo.chain)
        seen = []
        try:
            for placement in placements:
                await reconciler.reconcile(placement)
                chains = engine.report().chains
                seen.append({(names[one.chain], one.run or Run(0, 1), one.pinned) for one in chains})
            # A run of a variant that nobody assigned stays while all its links are assigned for another.
            await engine.load_span(ChainSpan(tiny.chains["top"], Run(0, 2)))
            await reconciler.reconcile(placements[-1])
            seen.append(
                {(names[one.chain], one.run or Run(0, 1), one.pinned) for one in engine.report().chains}
            )
        finally:
            await service.close()
            await asyncio.to_thread(engine.stop)
        return seen

    return asyncio.run(work())


def test_runs_come_go_and_are_pinned_as_the_placement_says(tiny: TinyZoo) -> None:
    base, adapter = tiny.chains["base"], tiny.chains["all"]
    whole = Run(0, len(tiny.zoo.chain(base).links))
    first = Placement(1, {ME: (Assignment(base, Run(0, 3)),)})
    second = Placement(
        2, {ME: (Assignment(base, whole, pinned=True), Assignment(adapter, Run(2, whole.end)))}
    )
    nothing_said = Placement(3, {WorkerId("other"): ()})
    last = Placement(4, {ME: (Assignment(base, whole),)})
    seen = follow(tiny, [first, second, nothing_said, last])
    assert seen[0] == {("base", Run(0, 3), False)}
    # The shorter run stays: everything in it is assigned.
    assert seen[1] == {("base", Run(0, 3), False), ("base", whole, True), ("all", Run(2, whole.end), False)}
    assert seen[2] == seen[1]
    assert seen[3] == {("base", Run(0, 3), False), ("base", whole, False)}
    assert seen[4] == seen[3] | {("top", Run(0, 2), False)}


def test_one_chain_that_cannot_be_read_holds_up_no_other(
    tiny: TinyZoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is reported for a while, nothing is let go meanwhile, and the error names this worker."""
    base, adapter, top = (tiny.chains[name] for name in ("base", "all", "top"))
    whole = Run(0, len(tiny.zoo.chain(base).links))

    async def work() -> None:
        streams = PeerStreams(ME, Credentials(), 1 << 20)
        engine = BlockEngine(tiny.zoo, SMALL, outlet=streams)
        engine.start()
        service = WorkerService(WorkerRecord(ME, "me", "unix:/me"), tiny.zoo, engine, streams, Credentials())
        streams.attach(service)

        def read(chain: ChainId) -> ChainManifest:
            if chain == adapter:
                raise StorageError("Input/output error")
            return tiny.zoo.chain(chain)

        async def load_span(span: ChainSpan, *, pinned: bool | None = None) -> None:
            read(span.chain)
            await original(span, pinned=pinned)

        original = engine.load_span
        reconciler = Reconciler(service, InProcessStore(), read)
        try:
            await service.load(ChainSpan(top, whole))
            with monkeypatch.context() as patch:
                patch.setattr(engine, "load_span", load_span)
                await reconciler.reconcile(
                    Placement(1, {ME: (Assignment(adapter, whole), Assignment(base, whole))})
                )
                assert {one.chain for one in engine.report().chains} == {base, top}
                assert service.unreadable() == (adapter,)
                with pytest.raises(StorageError) as caught:
                    await service.load(ChainSpan(adapter, whole))
                assert caught.value.metadata["worker"] == ME
            await service.load(ChainSpan(adapter, whole))
            assert service.unreadable() == ()
        finally:
            await service.close()
            await asyncio.to_thread(engine.stop)

    asyncio.run(work())
