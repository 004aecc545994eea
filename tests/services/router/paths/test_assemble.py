"""`assemble` against a list of every possible path, and what must hold of each path."""

from dataclasses import replace
from itertools import pairwise, product
from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockserve.common.api.cluster import (
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
from blockserve.router.paths.assemble import Path, assemble
from blockserve.router.paths.costs import CostModel, RequestSize
from blockserve.router.paths.index import Parent, PathIndex
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


def positions(one):
    return len({place for segment in one.segments for place in range(segment.run.first, segment.run.end)})


def crowding_of(load, usable, model):
    """What a further request adds: measured here, or what is usual, or the model's."""
    known = [one.load.step_crowding for one in usable if one.load.step_crowding]
    return load.step_crowding or (median(known) if known else model.crowding)


def step_alone(one, usable, model):
    """Seconds of a link in a pass of one request, None where nothing was measured."""
    load = one.load
    if not load.step_seconds:
        return None
    shared = max(load.step_requests or load.running_requests, 1)
    return load.step_seconds / max(positions(one), 1) / (1 + crowding_of(load, usable, model) * (shared - 1))


def prefill_of(one):
    """Seconds of a link for one token, None where nothing was measured."""
    rate = one.load.prefill_tokens_per_second
    return 1 / (rate * max(positions(one), 1)) if rate else None


def usual(values, usable, otherwise):
    """The median of what was measured, at speed 1."""
    known = [value * one.record.speed for one, value in zip(usable, values, strict=True) if value is not None]
    return median(known) if known else otherwise


def seconds(model, workers, spans, size):
    """The formulas of docs/placement.md, one path at a time; without the preference for a replica."""
    usable = [one for one in workers.values() if is_usable(one)]
    usual_step = usual([step_alone(one, usable, model) for one in usable], usable, model.link_seconds)
    usual_prefill = usual([prefill_of(one) for one in usable], usable, model.prefill_link_seconds)
    cached = min(min(size.cached_tokens.get(name, 0), max(size.prompt_tokens - 1, 0)) for name, _ in spans)
    prompt, output, total = size.prompt_tokens - cached, size.output_tokens, 0.0
    for name, run in spans:
        one = workers[name]
        load = one.load
        prefill, step = prefill_of(one), step_alone(one, usable, model)
        prefill = usual_prefill / one.record.speed if prefill is None else prefill
        step = usual_step / one.record.speed if step is None else step
        crowd = load.waiting_requests + load.running_requests
        total += load.queued_tokens * positions(one) * prefill
        if load.kv_pages_total and not load.kv_pages_free:
            total += model.full_kv_seconds
        step *= 1 + crowding_of(load, usable, model) * crowd
        total += len(run) * (output * step + prompt * prefill)
    for (here, _), (there, _) in pairwise(spans):
        same = workers[here].record.host == workers[there].record.host != ""
        latency = model.same_host_hop_seconds if same else model.hop_seconds
        latency = workers[here].load.hop_seconds.get(there, latency)
        rate = model.same_host_bytes_per_second if same else model.bytes_per_second
        total += (output + 1) * latency + (output + prompt) * model.row_bytes / rate
    return total + (output * model.hop_seconds if len(spans) > 1 else 0.0)


def is_usable(one):
    return one.record.state is WorkerState.READY and one.record.wire_version == WIRE_VERSION


def every_path(workers, length, exclude):
    usable = [name for name, one in workers.items() if name not in exclude and is_usable(one)]
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
            step_requests=draw(st.sampled_from([0.0, 1.0, 7.5])),
            step_crowding=draw(st.sampled_from([0.0, 0.0, 0.01, 0.3])),
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


def spliced_index(own, other, first, end, *workers, shift=0):
    """Links first to end - 1 of a chain are another's; what workers hold is of these two."""
    chain = (*own[:first], *other[first + shift : end + shift], *own[end:])
    index = PathIndex(view(*workers), EXACT)
    name = ChainId("s" * 64)
    index.splice(name, (Parent(ChainId("o" * 64), own), Parent(ChainId("t" * 64), other, shift)))
    return index, name, chain


def spans(path):
    return [(span.worker, span.run) for span in path.spans]


def test_parts_of_other_chains_serve_a_spliced_one():
    own, other = links(8, "own"), links(8, "other")
    whole = [worker("a", own, Run(0, 8)), worker("b", other, Run(0, 8))]
    index, name, chain = spliced_index(own, other, 5, 8, *whole)
    assert spans(assemble(index, name, chain, SIZE)) == [("a", Run(0, 5)), ("b", Run(5, 8))]
    index.update(view(whole[0]))
    with pytest.raises(NoPathError, match="positions 5 to 7"):
        assemble(index, name, chain, SIZE)
    segments = whole[0].segments | whole[1].segments
    index.update(view(replace(whole[0], segments=segments)))
    assert spans(assemble(index, name, chain, SIZE)) == [("a", Run(0, 8))]
    assert spans(assemble(index, ChainId("o" * 64), own, SIZE)) == [("a", Run(0, 8))]


def test_what_two_chains_share_is_held_by_whoever_has_either():
    own = links(8)
    other = tuple(Link(BlockId(f"other{n}")) if n in (1, 5) else link for n, link in enumerate(own))
    index, name, chain = spliced_index(
        own, other, 5, 6, worker("a", own, Run(0, 4)), worker("b", other, Run(2, 8))
    )
    ((first, head), (second, tail)) = spans(assemble(index, name, chain, SIZE))
    assert (first, second) == ("a", "b")
    assert 2 <= head.end == tail.first <= 4


def test_a_run_may_stand_in_at_another_depth():
    own = links(8)
    index, name, chain = spliced_index(own, own, 2, 3, worker("a", own, Run(0, 8)), shift=3)
    assert chain[2] == own[5] != own[2]
    assert spans(assemble(index, name, chain, SIZE)) == [("a", Run(0, 8))]


def test_a_neighbour_that_has_not_measured_is_no_slower_than_one_that_has():
    chain = links(6)
    measured = LoadReport(step_seconds=0.06, step_requests=12, step_crowding=0.1, running_requests=12)
    cluster = view(worker("a", chain, Run(0, 6), load=measured), worker("b", chain, Run(0, 6)))
    index = PathIndex(cluster, EXACT)
    crowded = assemble(index, CHAIN, chain, SIZE, {WorkerId("b")}).seconds
    idle = assemble(index, CHAIN, chain, SIZE)
    assert idle.spans[0].worker == "b"
    assert crowded > 2 * idle.seconds
    assert idle.seconds == pytest.approx(50 * 0.06 / 2.1 + 100 * 6 * EXACT.prefill_link_seconds)


def test_a_worker_that_was_crowded_and_is_idle_counts_as_idle():
    chain = links(6)
    load = LoadReport(step_seconds=0.06, step_requests=12, step_crowding=0.1, running_requests=12)
    index = PathIndex(view(worker("a", chain, Run(0, 6), load=load)), EXACT)
    crowded = assemble(index, CHAIN, chain, SIZE).seconds
    empty = assemble(index, CHAIN, chain, SIZE, idle=True).seconds
    index.update(view(worker("a", chain, Run(0, 6), load=replace(load, running_requests=0))))
    assert assemble(index, CHAIN, chain, SIZE).seconds == pytest.approx(empty)
    assert empty < crowded / 2


def test_what_is_in_flight_counts_though_no_report_has_seen_it():
    chain = links(2)
    index = PathIndex(view(worker("a", chain, Run(0, 2))), EXACT)
    alone = assemble(index, CHAIN, chain, SIZE).seconds
    for _ in range(10):
        index.assigned.add(WorkerId("a"), Run(0, 2), SIZE)
    index.update(view(worker("a", chain, Run(0, 2), load=LoadReport(running_requests=1))))
    index.update(view(worker("a", chain, Run(0, 2), load=LoadReport(running_requests=2))))
    late = assemble(index, CHAIN, chain, SIZE).seconds
    assert late == pytest.approx(alone + 10 * EXACT.crowding * 50 * 2 * EXACT.link_seconds)
    for _ in range(10):
        index.assigned.remove(WorkerId("a"), Run(0, 2), SIZE)
    index.update(view(worker("a", chain, Run(0, 2))))
    assert assemble(index, CHAIN, chain, SIZE).seconds == pytest.approx(alone)
    for number in range(3):
        index.update(view(worker("a", chain, Run(0, 2), load=LoadReport(queued_tokens=number))))
    assert not index.assigned.workers()


def test_a_new_report_replaces_what_was_assigned_before_it():
    chain = links(2)
    index = PathIndex(view(worker("a", chain, Run(0, 2)), worker("b", chain, Run(0, 2))))
    for name in "ab":
        index.assigned.add(WorkerId(name), Run(0, 2), SIZE)
    reported = worker("a", chain, Run(0, 2), load=LoadReport(running_requests=1))
    assert [index.assigned.crowd(WorkerId(name), 0) for name in "ab"] == [1, 1]
    index.update(view(reported, worker("b", chain, Run(0, 2))))
    assert index.assigned.link_tokens.keys() == {"b"}
    assert index.assigned.crowd(WorkerId("a"), 1) == 1
    index.assigned.remove(WorkerId("a"), Run(0, 2), SIZE)
    index.assigned.remove(WorkerId("b"), Run(0, 2), SIZE)
    assert [index.assigned.crowd(WorkerId(name), 0) for name in "ab"] == [0, 0]


def test_requests_of_other_routers_count_beside_ours():
    chain, run, a = links(2), Run(0, 2), WorkerId("a")

    def reported(count):
        return view(worker("a", chain, run, load=LoadReport(running_requests=count)))

    index = PathIndex(reported(0))
    for _ in range(3):
        index.assigned.add(a, run, SIZE)
    index.update(reported(5))
    assert index.assigned.crowd(a, 5) == 5
    for _ in range(3):
        index.assigned.remove(a, run, SIZE)
    assert index.assigned.crowd(a, 5) == 2
    index.update(reported(2))  # of a moment when ours had ended already, or had not: 2 to 5 are others'
    index.update(reported(3))
    assert index.assigned.crowd(a, 3) == 3


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
    with pytest.raises(NoPathError, match="returns to a worker"):
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
    busy = LoadReport(step_seconds=1.0, running_requests=30, queued_tokens=1000)
    many = [worker(f"b{number:03}", chain, Run(0, 6), load=busy) for number in range(100)]
    halves = [worker("x", chain, Run(0, 3)), worker("y", chain, Run(3, 6))]
    path = assemble(PathIndex(view(*many, *halves)), CHAIN, chain, SIZE)
    assert [span.worker for span in path.spans] == ["x", "y"]
    idle = worker("z", chain, Run(0, 6))
    path = assemble(PathIndex(view(*many, *halves, idle)), CHAIN, chain, SIZE)
    assert [span.worker for span in path.spans] == ["z"]
