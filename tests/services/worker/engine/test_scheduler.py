"""The scheduler's promises: decode first, bounded passes, order of priority and arrival, nobody forgotten."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

from hypothesis import given, settings
from hypothesis import strategies as st

from blockserve.common.api.engine import EngineRequest, SamplingParams
from blockserve.worker.blocks.chain import LoadedChain
from blockserve.worker.engine.scheduler import Scheduler
from blockserve.worker.requests.running import Chunk, RunningRequest
from blockzoo.manifest import ChainId


@dataclass
class Tokens:
    """Memory measured in tokens, one page each, without layers.

    Attributes:
        room: tokens that fit.
        held: tokens of each request that has pages.
    """

    room: int = 10**9
    held: dict[RunningRequest, int] = field(default_factory=dict)

    def compete(self, one: RunningRequest, other: RunningRequest) -> bool:
        return True

    def try_admit(self, running: RunningRequest, rivals: Sequence[RunningRequest]) -> bool:
        assert running not in self.held
        if sum(self.held.values()) + running.num_tokens + len(rivals) > self.room:
            return False
        self.held[running] = running.num_tokens
        return True

    def try_grow(self, running: RunningRequest) -> bool:
        if sum(self.held.values()) - self.held[running] + running.num_tokens > self.room:
            return False
        self.held[running] = running.num_tokens
        return True

    def release(self, running: RunningRequest) -> None:
        self.held.pop(running, None)
        running.forget_computed()


def _scheduler(max_running: int, max_tokens: int, room: int = 10**9) -> tuple[Scheduler, Tokens]:
    memory = Tokens(room)
    return Scheduler(memory, max_running=max_running, max_tokens=max_tokens), memory


def _request(order: int, prompt: int, max_tokens: int = 4, priority: int = 0) -> RunningRequest:
    request = EngineRequest(
        str(order), ChainId("c"), tuple(range(prompt)), SamplingParams(), max_tokens, priority=priority
    )
    return RunningRequest(request, cast(LoadedChain, None), order)


def _compute(chunks: list[Chunk]) -> None:
    """What the engine does after a pass: note progress, sample where the chunk reaches the end."""
    for chunk in chunks:
        samples = chunk.samples
        chunk.running.num_computed = chunk.end
        if samples:
            chunk.running.output.append(7)


def test_decode_comes_before_prompts() -> None:
    scheduler, _ = _scheduler(8, 10)
    scheduler.add(_request(0, prompt=4))
    _compute(scheduler.next_chunks())
    scheduler.add(_request(1, prompt=30))
    chunks = scheduler.next_chunks()
    assert [(chunk.running.order, chunk.start, chunk.end) for chunk in chunks] == [(0, 4, 5), (1, 0, 9)]


def test_prompts_are_cut_to_the_budget() -> None:
    scheduler, _ = _scheduler(8, 10)
    scheduler.add(_request(0, prompt=25))
    seen = []
    for _ in range(3):
        chunks = scheduler.next_chunks()
        seen += [(chunk.start, chunk.end, chunk.samples) for chunk in chunks]
        _compute(chunks)
    assert seen == [(0, 10, False), (10, 20, False), (20, 25, True)]


def test_priority_then_arrival() -> None:
    scheduler, _ = _scheduler(1, 64)
    for order, priority in enumerate([5, 0, 5, 0]):
        scheduler.add(_request(order, prompt=1, priority=priority))
    order = []
    while scheduler.has_work:
        (chunk,) = scheduler.next_chunks()
        order.append(chunk.running.order)
        scheduler.remove(chunk.running)
    assert order == [1, 3, 0, 2]


def test_nobody_overtakes_a_request_that_waits_for_pages() -> None:
    scheduler, _ = _scheduler(8, 64, room=20)
    big, small = _request(0, prompt=50), _request(1, prompt=1)
    scheduler.add(big)
    scheduler.add(small)
    assert scheduler.next_chunks() == []
    assert scheduler.waiting == [big, small]


def test_removing_a_waiting_request_lets_the_next_one_in() -> None:
    scheduler, _ = _scheduler(8, 64, room=20)
    big, small = _request(0, prompt=50), _request(1, prompt=1)
    scheduler.add(big)
    scheduler.add(small)
    scheduler.remove(big)
    assert [chunk.running for chunk in scheduler.next_chunks()] == [small]


def test_the_last_in_rank_yields_and_waits_before_those_behind_it() -> None:
    scheduler, memory = _scheduler(2, 64, room=12)
    first, second, third = (_request(order, prompt=5, max_tokens=9) for order in range(3))
    for running in (first, second, third):
        scheduler.add(running)
    _compute(scheduler.next_chunks())  # 5 + 5 tokens, one page of growth left for the first
    _compute(scheduler.next_chunks())  # 6 + 6
    chunks = scheduler.next_chunks()  # the first needs a seventh
    assert [chunk.running for chunk in chunks] == [first]
    assert scheduler.num_preemptions == 1
    assert scheduler.waiting == [second, third]
    assert second.num_computed == 0
    assert second.output == [7, 7]
    memory.release(first)
    scheduler.remove(first)
    chunks = scheduler.next_chunks()
    assert [(chunk.running, chunk.start, chunk.end, chunk.samples) for chunk in chunks] == [
        (second, 0, 7, True)
    ]
    assert scheduler.waiting == [third]


def test_priority_keeps_its_pages() -> None:
    scheduler, _ = _scheduler(2, 64, room=12)
    early, urgent = _request(0, prompt=5, max_tokens=9), _request(1, prompt=5, max_tokens=9, priority=-1)
    scheduler.add(early)
    scheduler.add(urgent)
    for _ in range(2):
        _compute(scheduler.next_chunks())
    assert [chunk.running for chunk in scheduler.next_chunks()] == [urgent]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 6), st.integers(-2, 2)), min_size=1, max_size=12),
    st.integers(1, 5),
    st.integers(5, 24),
    st.integers(45, 120),
)
def test_every_request_ends_and_the_first_in_rank_never_yields(
    wanted: list[tuple[int, int, int]], max_running: int, max_tokens: int, room: int
) -> None:
    """Whatever the room, as long as each request fits alone."""
    scheduler, memory = _scheduler(max_running, max_tokens, room)
    requests = [_request(order, *one) for order, one in enumerate(wanted)]
    for running in requests:
        scheduler.add(running)
    computed: dict[int, list[int]] = {running.order: [] for running in requests}
    for _ in range(4000):
        if not scheduler.has_work:
            break
        first = scheduler.running[0] if scheduler.running else None
        chunks = scheduler.next_chunks()
        assert 1 <= len(chunks) <= max_running
        assert sum(chunk.num_tokens for chunk in chunks) <= max_tokens
        assert sum(memory.held.values()) <= room
        assert set(memory.held) == set(scheduler.running)
        assert first is None or first in scheduler.running
        for chunk in chunks:
            if chunk.start == 0:
                computed[chunk.running.order].clear()
            computed[chunk.running.order].extend(range(chunk.start, chunk.end))
        _compute(chunks)
        for chunk in chunks:
            if len(chunk.running.output) == chunk.running.request.max_tokens:
                scheduler.remove(chunk.running)
                del memory.held[chunk.running]
    assert not scheduler.has_work
    for running in requests:
        assert computed[running.order] == list(range(running.max_kv_tokens))
        assert len(running.output) == running.request.max_tokens
