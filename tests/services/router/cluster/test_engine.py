"""The engine over workers drives failover: what it asks of the chooser, the workers and the clock."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Sequence

import pytest

from blockserve.common.api.cluster import ClusterView, PathStep, Run, WorkerId
from blockserve.common.api.engine import EngineRequest, SamplingParams, TokenEvent
from blockserve.common.api.tokens import FinishReason
from blockserve.common.errors import (
    BreakCause,
    EngineFailedError,
    NonFiniteLogitsError,
    NoPathError,
    PathBrokenError,
)
from blockserve.common.rpc.channel import Credentials
from blockserve.router.cluster.engine import ClusterEngine
from blockserve.router.cluster.failover import FailoverConfig
from blockserve.router.cluster.stream import WorkerStream
from blockzoo.errors import BlockzooError
from blockzoo.manifest import ChainId
from support.edge import async_test

CHAIN = ChainId("c")
REQUEST = EngineRequest("r", CHAIN, (1, 2), SamplingParams(), max_tokens=3)
Script = Sequence[Sequence[TokenEvent] | BlockzooError]


class Chooser:
    """Chooses the first worker that is not excluded, and records what it hears."""

    def __init__(self, *workers: str) -> None:
        self.workers = [WorkerId(worker) for worker in workers]
        self.excluded: list[set[WorkerId]] = []
        self.released: list[WorkerId] = []
        self.parted: list[tuple[WorkerId, WorkerId]] = []
        self.faulty: list[WorkerId] = []

    def update(self, view: ClusterView) -> None:
        pass

    async def prepare(self, chain: ChainId) -> None:
        pass

    def has_path(self, chain: ChainId) -> bool:
        return True

    def choose(self, request: EngineRequest, excluded: Collection[WorkerId]) -> tuple[PathStep, ...]:
        self.excluded.append(set(excluded))
        for worker in self.workers:
            if worker not in excluded:
                return (PathStep(worker, f"unix:/{worker}", Run(0, 4)),)
        raise NoPathError("none")

    def release(self, path: Sequence[PathStep], request: EngineRequest) -> None:
        self.released.append(path[0].worker)

    def note_parted(self, one: WorkerId, other: WorkerId) -> None:
        self.parted.append((one, other))

    def note_faulty(self, worker: WorkerId) -> None:
        self.faulty.append(worker)


class Loader:
    async def load(self, chain: ChainId, *, pinned: bool | None) -> None:
        pass

    async def unload(self, chain: ChainId) -> None:
        pass


class Stream(WorkerStream):
    """A worker that follows a script for each request it is given."""

    def __init__(self, worker: str, *scripts: Script) -> None:
        super().__init__(WorkerId(worker), f"unix:/{worker}", Credentials())
        self.scripts = list(scripts)
        self.given: list[EngineRequest] = []

    async def run(self, request: EngineRequest) -> AsyncGenerator[Sequence[TokenEvent], None]:
        self.given.append(request)
        for one in self.scripts.pop(0):
            if isinstance(one, BlockzooError):
                raise one
            yield one


def tokens(*indices: int) -> list[TokenEvent]:
    return [TokenEvent(i, 100 + i, finish=FinishReason.LENGTH if i == 2 else None) for i in indices]


def rig(*streams: Stream, **failover: float) -> tuple[ClusterEngine, Chooser, list[ChainId]]:
    chooser, asked = Chooser(*(stream.worker for stream in streams)), list[ChainId]()
    config = FailoverConfig.model_validate(failover)
    engine = ClusterEngine(chooser, Loader(), Credentials(), config, on_request=asked.append)
    engine._streams = {stream.worker: stream for stream in streams}
    return engine, chooser, asked


async def run(engine: ClusterEngine) -> list[int]:
    return [event.token_id async for batch in engine.generate(REQUEST) for event in batch]


@async_test
async def test_one_path_is_enough_where_none_breaks() -> None:
    engine, chooser, asked = rig(Stream("a", [tokens(0), tokens(1, 2)]))
    assert await run(engine) == [100, 101, 102]
    assert (engine.num_failovers, chooser.released, asked) == (0, ["a"], [CHAIN])
    assert engine.path_lengths == {1: 1}


@async_test
async def test_a_broken_path_is_released_and_another_one_goes_on() -> None:
    broken = PathBrokenError("gone", cause=BreakCause.LOST, worker="a", seen_by="z")
    first, second = Stream("a", [tokens(0), broken]), Stream("b", [tokens(0, 1), tokens(2)])
    engine, chooser, asked = rig(first, second)
    assert await run(engine) == [100, 101, 102]
    [attempt] = second.given
    assert (attempt.output, attempt.epoch, attempt.path[0].worker) == ((100,), 1, "b")
    assert (chooser.excluded, chooser.released) == ([set(), {"a"}], ["a", "b"])
    assert chooser.parted == [("z", "a")]
    assert (engine.num_failovers, asked) == (1, [CHAIN])


@async_test
async def test_the_error_of_the_last_path_reaches_the_caller() -> None:
    errors = [PathBrokenError(f"break {i}") for i in range(3)]
    stream = Stream("a", *([error] for error in errors))
    engine, chooser, _ = rig(stream, max_failures=2, backoff_seconds=0)
    with pytest.raises(PathBrokenError, match="break 2"):
        await run(engine)
    assert [attempt.epoch for attempt in stream.given] == [0, 1, 2]
    assert (engine.num_failovers, chooser.released) == (2, ["a"] * 3)


@async_test
async def test_what_no_other_path_cures_is_not_tried_again() -> None:
    stream = Stream("a", [BlockzooError("a fault")])
    engine, chooser, _ = rig(stream)
    with pytest.raises(BlockzooError, match="a fault"):
        await run(engine)
    assert (engine.num_failovers, chooser.released, len(stream.given)) == (0, ["a"], 1)


@async_test
async def test_logits_that_are_not_finite_are_no_workers_fault() -> None:
    first, second = Stream("a", [tokens(0), NonFiniteLogitsError("nan")]), Stream("b", [tokens(1, 2)])
    engine, chooser, _ = rig(first, second)
    with pytest.raises(NonFiniteLogitsError):
        await run(engine)
    assert (chooser.faulty, engine.num_failovers, second.given) == ([], 0, [])


@async_test
async def test_a_failed_pass_is_tried_once_more_elsewhere() -> None:
    first, second = Stream("a", [tokens(0), EngineFailedError("no memory")]), Stream("b", [tokens(1, 2)])
    engine, chooser, _ = rig(first, second)
    assert await run(engine) == [100, 101, 102]
    assert (chooser.excluded, chooser.faulty) == ([set(), {"a"}], ["a"])
    assert second.given[0].output == (100,)


@async_test
async def test_a_request_that_fails_at_two_workers_is_given_up() -> None:
    errors = [EngineFailedError("a bug"), EngineFailedError("a bug", worker="tail")]
    engine, chooser, _ = rig(*(Stream(name, [error]) for name, error in zip("ab", errors, strict=True)))
    with pytest.raises(EngineFailedError):
        await run(engine)
    assert (chooser.faulty, engine.num_failovers) == ([], 1)


@async_test
async def test_the_first_tokens_elsewhere_say_who_was_at_fault() -> None:
    fault = EngineFailedError("no memory", worker="b")
    gone = PathBrokenError("gone", cause=BreakCause.LOST, worker="a")
    first, second = Stream("a", [fault], [gone]), Stream("b", [tokens(0), gone], [tokens(1, 2)])
    engine, chooser, _ = rig(first, second, backoff_seconds=0)
    assert await run(engine) == [100, 101, 102]
    # The head was not to blame, and that the tail then computed the request is no word against it either.
    assert ([len(one.given) for one in (first, second)], chooser.faulty) == ([2, 2], [])


@async_test
async def test_a_tail_is_blamed_by_name_and_once() -> None:
    fault = EngineFailedError("no memory", worker="tail")
    gone = PathBrokenError("gone", cause=BreakCause.LOST, worker="a")
    first, second = Stream("a", [fault], [tokens(0), gone]), Stream("b", [tokens(1, 2)])
    engine, chooser, _ = rig(first, second, backoff_seconds=0)
    assert await run(engine) == [100, 101, 102]
    assert chooser.faulty == ["tail"]
