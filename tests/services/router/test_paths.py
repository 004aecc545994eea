"""`assemble` against a list of every possible path, and what must hold of each path."""

from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockserve.common.cluster import (
    WIRE_VERSION,
    ClusterView,
    LoadReport,
    ResidentSegment,
    Run,
    WorkerId,
    WorkerRecord,
    WorkerState,
    WorkerView,
    segment_digest,
)
from blockserve.common.errors import NoPathError
from blockserve.router.path_costs import CostModel, RequestSize
from blockserve.router.path_index import PathIndex
from blockserve.router.paths import Path, assemble
from blockzoo.manifest import BlockId, ChainId, Link

CHAIN = ChainId("c" * 64)
IDLE = LoadReport()
EXACT = CostModel(meeting_share=0.0)
SIZE = RequestSize(prompt_tokens=100, output_tokens=50)


def links(count, name="base"):
    return tuple(Link(BlockId(f"{name}{number}")) for number in range(count))


def worker(name, chain, *runs, load=IDLE, **record):
    segments = frozenset(ResidentSegment(segment_digest(chain, run.first, run.end), run) for run in runs)
    return WorkerView(WorkerRecord(WorkerId(name), name, f"{name}:1", **record), load, segments)


def view(*workers):
    return ClusterView({one.record.id: one for one in workers})


def holds(one, run):
    return all(
        any(segment.run.first <= place < segment.run.end for segment in one.segments)
        for place in range(run.first, run.end)
    )


def seconds(model, workers, spans, size):
    """The formulas of docs/placement.md, one path at a time; without the preference for a replica."""
    cached = min(min(size.cached_tokens.get(name, 0), max(size.prompt_tokens - 1, 0)) for name, _ in spans)
    prompt, output, total = size.prompt_tokens - cached, size.output_tokens, 0.0
    for name, run in spans:
        one = workers[name]
        load, held = one.load, len({p for s in one.segments for p in range(s.run.first, s.run.end)})
        rate = load.prefill_tokens_per_second
        prefill = 1 / (rate * held) if rate else model.prefill_link_seconds / one.record.speed
        step = load.step_seconds / held if load.step_seconds else model.link_seconds / one.record.speed
        crowd = load.waiting_requests + (0 if load.step_seconds else load.running_requests)
        total += load.queued_tokens * held * prefill
        if load.kv_pages_total and not load.kv_pages_free:
            total += model.full_kv_seconds
        total += len(run) * (output * step * (1 + model.crowding * crowd) + prompt * prefill)
    for (here, _), (there, _) in pairwise(spans):
        same = workers[here].record.host == workers[there].record.host != ""
        latency = model.same_host_hop_seconds if same else model.hop_seconds
        latency = workers[here].load.hop_seconds.get(there, latency)
        rate = model.same_host_bytes_per_second if same else model.bytes_per_second
        total += (output + 1) * latency + (output + prompt) * model.row_bytes / rate
    return total + (output * model.hop_seconds if len(spans) > 1 else 0.0)


def every_path(workers, length, exclude):
    usable = [
        name
        for name, one in workers.items()
        if name not in exclude
        and one.record.state is WorkerState.READY
        and one.record.wire_version == WIRE_VERSION
    ]
    for chosen in product(usable, repeat=length):
        spans, first = [], 0
        for place in range(length):
            if place + 1 == length or chosen[place + 1] != chosen[place]:
                spans.append((chosen[place], Run(first, place + 1)))
                first = place + 1
        if any(run.first in (1, length - 1) for _, run in spans[1:]):
            continue  # the embedding alone, and the head alone, is no run
        names = [name for name, _ in spans]
        if len(set(names)) == len(names) and all(holds(workers[name], run) for name, run in spans):
            yield spans


@st.composite
def clusters(draw, most_workers=4):
    length = draw(st.integers(1, 5))
    chain = links(length)
    workers = {}
    for number in range(draw(st.integers(0, most_workers))):
        name = WorkerId(f"w{number}")
        borders = st.tuples(st.integers(0, length), st.integers(0, length)).filter(lambda p: p[0] != p[1])
        runs = [Run(min(pair), max(pair)) for pair in draw(st.lists(borders, max_size=3))]
        load = LoadReport(
            waiting_requests=draw(st.integers(0, 3)),
            running_requests=draw(st.integers(0, 3)),
            queued_tokens=draw(st.sampled_from([0, 0, 40, 5000])),
            step_seconds=draw(st.sampled_from([0.0, 0.0001, 0.01, 0.2])),
            prefill_tokens_per_second=draw(st.sampled_from([0.0, 50.0, 5000.0])),
            kv_pages_free=draw(st.integers(0, 1)),
            kv_pages_total=draw(st.integers(0, 1)),
            hop_seconds=draw(st.dictionaries(st.sampled_from(["w0", "w1", "w2"]), st.floats(0, 0.01))),
        )
        workers[name] = worker(
            name,
            chain,
            *runs,
            load=load,
            state=draw(st.sampled_from([WorkerState.READY] * 4 + [WorkerState.DRAINING])),
            wire_version=draw(st.sampled_from([WIRE_VERSION] * 5 + [WIRE_VERSION + 1])),
            speed=draw(st.sampled_from([0.5, 1.0, 2.0])),
            host=draw(st.sampled_from(["", "a", "b"])),
        )
    names = [WorkerId(f"w{number}") for number in range(most_workers)]
    exclude = draw(st.frozensets(st.sampled_from(names), max_size=1))
    cached = draw(st.dictionaries(st.sampled_from(names), st.integers(0, 200), max_size=3))
    size = RequestSize(draw(st.integers(0, 150)), draw(st.integers(0, 60)), cached)
    return chain, workers, size, exclude


@settings(max_examples=400, deadline=None)
@given(clusters())
def test_assemble_is_as_good_as_the_best_of_all_paths(case):
    chain, workers, size, exclude = case
    costs = [seconds(EXACT, workers, spans, size) for spans in every_path(workers, len(chain), exclude)]
    index = PathIndex(ClusterView(workers), EXACT)
    if not costs:
        with pytest.raises(NoPathError):
            assemble(index, CHAIN, chain, size, exclude)
        return
    path = assemble(index, CHAIN, chain, size, exclude)
    assert path.seconds == pytest.approx(min(costs))
    assert path.seconds == pytest.approx(
        seconds(EXACT, workers, [(span.worker, span.run) for span in path.spans], size)
    )


@settings(max_examples=200, deadline=None)
@given(clusters())
def test_a_path_covers_the_chain_once_with_workers_that_may_be_used(case):
    chain, workers, size, exclude = case
    try:
        path = assemble(PathIndex(ClusterView(workers)), CHAIN, chain, size, exclude)
    except NoPathError:
        return
    assert [place for span in path.spans for place in range(span.run.first, span.run.end)] == list(
        range(len(chain))
    )
    used = [span.worker for span in path.spans]
    assert len(set(used)) == len(used)
    for span in path.spans:
        one = workers[span.worker]
        assert span.worker not in exclude
        assert one.record.state is WorkerState.READY
        assert one.record.wire_version == WIRE_VERSION
        assert holds(one, span.run)


@settings(max_examples=200, deadline=None)
@given(clusters())
def test_one_more_idle_worker_never_makes_the_estimate_worse(case):
    chain, workers, size, exclude = case
    more = {**workers, WorkerId("w9"): worker("w9", chain, Run(0, max(len(chain) // 2, 1)))}
    try:
        before = assemble(PathIndex(ClusterView(workers)), CHAIN, chain, size, exclude)
    except NoPathError:
        return
    after = assemble(PathIndex(ClusterView(more)), CHAIN, chain, size, exclude)
    assert after.seconds <= before.seconds * (1 + 1e-9)


@settings(max_examples=100, deadline=None)
@given(clusters(), clusters())
def test_an_updated_index_answers_as_a_new_one(first, second):
    chain, workers, size, exclude = second
    index = PathIndex(ClusterView(first[1]))
    index.candidates(ChainId("d" * 64), first[0])
    index.update(ClusterView(workers))

    def answer(one):
        try:
            return assemble(one, CHAIN, chain, size, exclude)
        except NoPathError as error:
            return str(error)

    assert answer(index) == answer(PathIndex(ClusterView(workers)))


def test_neighbouring_segments_stay_on_one_worker():
    chain = links(6)
    cluster = view(*(worker(name, chain, Run(0, 3), Run(3, 6)) for name in "ab"))
    path = assemble(PathIndex(cluster), CHAIN, chain, SIZE)
    assert [span.run for span in path.spans] == [Run(0, 6)]


def test_a_busy_worker_gives_its_part_to_an_idle_one():
    chain = links(6)
    busy = LoadReport(step_seconds=1.0, running_requests=30)
    cluster = view(worker("a", chain, Run(0, 6), load=busy), worker("b", chain, Run(3, 6)))
    path = assemble(PathIndex(cluster), CHAIN, chain, SIZE)
    assert [(span.worker, span.run) for span in path.spans] == [("a", Run(0, 3)), ("b", Run(3, 6))]


def test_variants_of_one_base_meet_until_there_is_a_crowd():
    base = links(4)
    variants = [
        tuple(Link(link.base, (BlockId(f"lora{number}.{place}"),)) for place, link in enumerate(base))
        for number in range(40)
    ]
    runs = [[ResidentSegment(segment_digest(chain, 0, 4), Run(0, 4)) for chain in variants] for _ in range(4)]
    cluster = view(
        *(
            WorkerView(WorkerRecord(WorkerId(name), name, ""), LoadReport(), frozenset(held))
            for name, held in zip("abcd", runs, strict=True)
        )
    )
    index = PathIndex(cluster)
    first = [
        assemble(index, ChainId(str(n)), chain, SIZE).spans[0].worker for n, chain in enumerate(variants)
    ]
    assert len(set(first)) == 1
    for number, chain in enumerate(variants):
        for span in assemble(index, ChainId(str(number)), chain, SIZE).spans:
            index.assigned.add(span.worker, span.run, SIZE)
    assert sorted(index.assigned.requests) == ["a", "b", "c", "d"]
    assert max(index.assigned.requests.values()) - min(index.assigned.requests.values()) <= 4


def test_a_new_report_replaces_what_was_assigned_before_it():
    chain = links(2)
    index = PathIndex(view(worker("a", chain, Run(0, 2)), worker("b", chain, Run(0, 2))))
    for name in "ab":
        index.assigned.add(WorkerId(name), Run(0, 2), SIZE)
    reported = worker("a", chain, Run(0, 2), load=LoadReport(running_requests=1))
    index.update(view(reported, worker("b", chain, Run(0, 2))))
    assert index.assigned.requests == {"b": 1}
    index.assigned.remove(WorkerId("a"), Run(0, 2), SIZE)
    index.assigned.remove(WorkerId("b"), Run(0, 2), SIZE)
    assert index.assigned.requests == {}


def test_a_missing_part_is_named():
    chain = links(6)
    cluster = view(worker("a", chain, Run(0, 2)), worker("b", chain, Run(4, 6)))
    with pytest.raises(NoPathError, match="positions 2 to 3 of") as raised:
        assemble(PathIndex(cluster), CHAIN, chain, SIZE)
    assert raised.value.metadata["positions"] == "2 to 3"
    with pytest.raises(NoPathError, match="positions 0 to 1, 2 to 3 of"):
        assemble(PathIndex(cluster), CHAIN, chain, SIZE, {WorkerId("a")})
    with pytest.raises(NoPathError, match="positions 0 to 5 of"):
        assemble(PathIndex(ClusterView()), CHAIN, chain, SIZE)


def test_a_worker_that_would_have_to_be_visited_twice_is_no_path():
    chain = links(5)
    cluster = view(worker("a", chain, Run(0, 2), Run(3, 5)), worker("b", chain, Run(2, 3)))
    with pytest.raises(NoPathError, match="coming back"):
        assemble(PathIndex(cluster), CHAIN, chain, SIZE)


def test_many_workers_that_alternate_still_give_a_path():
    chain = links(24)
    fast = LoadReport(step_seconds=1e-5, prefill_tokens_per_second=1e6)
    every_second = [
        worker(f"f{n:02}", chain, Run(n, n + 1), Run(n + 12, n + 13), load=fast) for n in range(12)
    ]
    path = assemble(PathIndex(view(worker("slow", chain, Run(0, 24)), *every_second)), CHAIN, chain, SIZE)
    assert isinstance(path, Path)
    assert len({span.worker for span in path.spans}) == len(path.spans)


def test_of_many_replicas_one_that_is_idle_is_found():
    chain = links(6)
    busy = LoadReport(step_seconds=1.0, queued_tokens=1000)
    many = [worker(f"b{number:03}", chain, Run(0, 6), load=busy) for number in range(100)]
    halves = [worker("x", chain, Run(0, 3)), worker("y", chain, Run(3, 6))]
    path = assemble(PathIndex(view(*many, *halves)), CHAIN, chain, SIZE)
    assert [span.worker for span in path.spans] == ["x", "y"]
    idle = worker("z", chain, Run(0, 6))
    path = assemble(PathIndex(view(*many, *halves, idle)), CHAIN, chain, SIZE)
    assert [span.worker for span in path.spans] == ["z"]
