"""Whose fault a failed pass is: real workers and the router's own choice of paths, over real gRPC."""

from __future__ import annotations

import asyncio
import itertools
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from blockserve.common.api.cluster import (
    ClusterView,
    LoadReport,
    ResidentSegment,
    Run,
    WorkerId,
    WorkerView,
    segment_digest,
)
from blockserve.common.api.engine import EngineRequest, SamplingParams
from blockserve.common.errors import EngineFailedError
from blockserve.common.rpc.channel import Credentials
from blockserve.router.cluster.engine import ClusterEngine
from blockserve.router.paths.chooser import ZooPathChooser
from blockserve.worker.compute.executor import Executor
from blockzoo.zoo import Zoo
from support.tiny import TinyZoo
from support.variants import VariantFactory
from support.workers import Workers, running_workers

BAD = 499
"""A token that no pass survives here, wherever it is computed: a fault of ours that a caller has found."""
GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture
def tiny(factory: VariantFactory, tmp_path: Path) -> TinyZoo:
    zoo = Zoo.open(tmp_path / "zoo", create=True)
    zoo.register(factory.checkpoint("llama-gqa").path, name="base")
    return TinyZoo(zoo, tmp_path / "zoo", {"base": zoo.resolve("base").chain})


@pytest.fixture
def socket_folder() -> Iterator[Path]:
    """Short enough for socket names."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Ids of executors whose passes fail whatever they compute; at all of them those that hold `BAD` do."""
    sick: set[int] = set()
    whole = Executor.run

    def failing(self: Executor, chunks: Any, before: Any = None) -> Any:
        if id(self) in sick or any(BAD in chunk.running.request.prompt for chunk in chunks):
            raise RuntimeError("no pass survives this")
        return whole(self, chunks, before)

    monkeypatch.setattr(Executor, "run", failing)
    return sick


class Rig:
    """A router's engine over workers that hold the whole chain."""

    def __init__(self, tiny: TinyZoo, workers: Workers) -> None:
        self.workers = workers
        self.chooser = ZooPathChooser(tiny.zoo)
        self.engine = ClusterEngine(self.chooser, _NoLoader(), Credentials())
        self.chain = tiny.chains["base"]
        self.chosen: Counter[str] = Counter()
        self._ids = itertools.count()
        links = tiny.zoo.chain(self.chain).links
        whole = Run(0, len(links))
        held = frozenset({ResidentSegment(segment_digest(links, 0, whole.end), whole)})
        self.view = ClusterView(
            {
                WorkerId(name): WorkerView(service.record(), LoadReport(), held)
                for name, service in workers.services.items()
            }
        )
        self.engine.update(self.view)

    async def ask(self, *prompt: int) -> list[int]:
        request = EngineRequest(f"r{next(self._ids)}", self.chain, prompt, GREEDY, max_tokens=4)
        return [event.token_id async for batch in self.engine.generate(request) for event in batch]

    def avoided(self) -> set[WorkerId]:
        return set(self.chooser._avoided())


class _NoLoader:
    async def load(self, chain: Any, *, pinned: bool | None) -> None:
        raise AssertionError("everything is loaded")

    async def unload(self, chain: Any) -> None:
        raise AssertionError


@asynccontextmanager
async def running(tiny: TinyZoo, folder: Path, names: str) -> AsyncIterator[Rig]:
    async with asyncio.timeout(120), running_workers(tiny, folder, names) as workers:
        for name in names:
            await workers.engine(name).load(tiny.chains["base"])
        rig = Rig(tiny, workers)
        try:
            yield rig
        finally:
            await rig.engine.close()


@pytest.mark.parametrize("names", ["ab", "abc"])
def test_a_caller_of_bad_requests_makes_nobody_avoid_a_healthy_worker(
    tiny: TinyZoo, socket_folder: Path, poisoned: set[int], names: str
) -> None:
    """Two hundred requests, each of which fails by itself, while another caller is served at the workers."""

    async def work() -> None:
        async with running(tiny, socket_folder, names) as rig:
            expected = await rig.ask(5, 6, 7)
            ended = asyncio.Event()

            async def good() -> int:
                count = 0
                while not ended.is_set():
                    assert await rig.ask(5, 6, 7) == expected
                    assert rig.avoided() == set()
                    count += 1
                return count

            async def bad(count: int) -> None:
                for _ in range(count):
                    with pytest.raises(EngineFailedError):
                        await rig.ask(5, BAD, 7)
                    assert rig.avoided() == set()

            served = asyncio.create_task(good())
            await asyncio.gather(*(bad(50) for _ in range(4)))
            ended.set()
            assert await served > 10
            assert rig.avoided() == set()
            assert rig.engine.num_failovers == 200  # each was tried at a second worker

    asyncio.run(work())


def test_a_worker_whose_passes_fail_is_avoided_where_others_compute_its_requests(
    tiny: TinyZoo, socket_folder: Path, poisoned: set[int]
) -> None:
    async def work() -> None:
        async with running(tiny, socket_folder, "ab") as rig:
            expected = await rig.ask(5, 6, 7)
            poisoned.add(id(rig.workers.engine("a")._passes._executor))
            for _ in range(8):
                assert await rig.ask(5, 6, 7) == expected
            assert rig.avoided() == {"a"}
            before = rig.engine.num_failovers
            assert [await rig.ask(5, 6, 7) for _ in range(8)] == [expected] * 8
            assert rig.engine.num_failovers == before

    asyncio.run(work())
