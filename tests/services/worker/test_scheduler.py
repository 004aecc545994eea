"""The scheduler's promises: decode first, bounded passes, order of priority and arrival, nobody forgotten."""

from collections.abc import Callable
from typing import cast

from hypothesis import given, settings
from hypothesis import strategies as st

from blockserve.common.engine_api import EngineRequest, SamplingParams
from blockserve.worker.blocks import LoadedChain
from blockserve.worker.request import Chunk, RunningRequest
from blockserve.worker.scheduler import Scheduler
from blockzoo.manifest import ChainId

_ALWAYS: Callable[[RunningRequest], bool] = lambda running: True  # noqa: E731


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
    scheduler = Scheduler(max_running=8, max_tokens=10)
    scheduler.add(_request(0, prompt=4))
    _compute(scheduler.next_chunks(_ALWAYS))
    scheduler.add(_request(1, prompt=30))
    chunks = scheduler.next_chunks(_ALWAYS)
    assert [(chunk.running.order, chunk.start, chunk.end) for chunk in chunks] == [(0, 4, 5), (1, 0, 9)]


def test_prompts_are_cut_to_the_budget() -> None:
    scheduler = Scheduler(max_running=8, max_tokens=10)
    scheduler.add(_request(0, prompt=25))
    seen = []
    for _ in range(3):
        chunks = scheduler.next_chunks(_ALWAYS)
        seen += [(chunk.start, chunk.end, chunk.samples) for chunk in chunks]
        _compute(chunks)
    assert seen == [(0, 10, False), (10, 20, False), (20, 25, True)]


def test_priority_then_arrival() -> None:
    scheduler = Scheduler(max_running=1, max_tokens=64)
    for order, priority in enumerate([5, 0, 5, 0]):
        scheduler.add(_request(order, prompt=1, priority=priority))
    order = []
    while scheduler.has_work:
        (chunk,) = scheduler.next_chunks(_ALWAYS)
        order.append(chunk.running.order)
        scheduler.remove(chunk.running)
    assert order == [1, 3, 0, 2]


def test_nobody_overtakes_a_request_that_waits_for_pages() -> None:
    scheduler = Scheduler(max_running=8, max_tokens=64)
    big, small = _request(0, prompt=50), _request(1, prompt=1)
    scheduler.add(big)
    scheduler.add(small)
    assert scheduler.next_chunks(lambda running: running is not big) == []
    assert scheduler.waiting == [big, small]


def test_removing_a_waiting_request_lets_the_next_one_in() -> None:
    scheduler = Scheduler(max_running=8, max_tokens=64)
    big, small = _request(0, prompt=50), _request(1, prompt=1)
    scheduler.add(big)
    scheduler.add(small)
    scheduler.remove(big)
    assert [chunk.running for chunk in scheduler.next_chunks(lambda running: running is not big)] == [small]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 6), st.integers(-2, 2)), min_size=1, max_size=12),
    st.integers(1, 5),
    st.integers(5, 24),
)
def test_every_request_is_computed_exactly_once(
    wanted: list[tuple[int, int, int]], max_running: int, max_tokens: int
) -> None:
    scheduler = Scheduler(max_running=max_running, max_tokens=max_tokens)
    requests = [_request(order, *one) for order, one in enumerate(wanted)]
    for running in requests:
        scheduler.add(running)
    computed: dict[int, list[int]] = {running.order: [] for running in requests}
    for _ in range(2000):
        if not scheduler.has_work:
            break
        chunks = scheduler.next_chunks(_ALWAYS)
        assert 1 <= len(chunks) <= max_running
        assert sum(chunk.num_tokens for chunk in chunks) <= max_tokens
        for chunk in chunks:
            computed[chunk.running.order].extend(range(chunk.start, chunk.end))
        _compute(chunks)
        for chunk in chunks:
            if len(chunk.running.output) == chunk.running.request.max_tokens:
                scheduler.remove(chunk.running)
    assert not scheduler.has_work
    for running in requests:
        assert computed[running.order] == list(range(running.max_kv_tokens))
