"""Choosing paths: what the router remembers between two requests."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import pytest

from blockserve.common.api.cluster import (
    ClusterView,
    ResidentSegment,
    Run,
    WorkerId,
    WorkerRecord,
    WorkerView,
    segment_digest,
)
from blockserve.common.api.engine import EngineRequest, SamplingParams
from blockserve.router.paths.chooser import AVOID_SECONDS, FAULT_SECONDS, PARTED_SECONDS, ZooPathChooser
from blockzoo.manifest import ChainId
from blockzoo.zoo import Zoo
from support.paths import TINY_ZOO

HEAD, TAIL = Run(0, 2), Run(2, 5)


class Rig:
    """A chooser over the chain `base` of a real zoo, whose clock is set."""

    def __init__(self) -> None:
        zoo = Zoo.open(TINY_ZOO)
        self.chain: ChainId = zoo.resolve("base").chain
        self.links = zoo.chain(self.chain).links
        self.now = 100.0
        self.chooser = ZooPathChooser(zoo, clock=lambda: self.now)
        asyncio.run(self.chooser.prepare(self.chain))

    def view(self, **runs: Run) -> None:
        """Workers by name, each with the run that it holds."""
        views = {}
        for name, run in runs.items():
            segment = ResidentSegment(segment_digest(self.links, run.first, run.end), run)
            record = WorkerRecord(WorkerId(name), name, f"{name}:1")
            views[WorkerId(name)] = WorkerView(record, segments=frozenset([segment]))
        self.chooser.update(ClusterView(views))

    def choose(self, excluded: Iterable[str] = ()) -> tuple[WorkerId, ...]:
        """The workers of the path of one request that ends at once."""
        request = EngineRequest("r", self.chain, (1, 2, 3), SamplingParams(), max_tokens=8)
        path = self.chooser.choose(request, {WorkerId(name) for name in excluded})
        self.chooser.release(path, request)
        return tuple(step.worker for step in path)


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_workers_that_lost_each_other_are_kept_apart_for_a_while(rig: Rig) -> None:
    rig.view(a=HEAD, b=TAIL, d=TAIL)
    head, tail = rig.choose()
    (other,) = {"b", "d"} - {tail}
    rig.chooser.note_parted(head, tail)
    assert rig.choose() == (head, other)
    rig.view(a=HEAD, b=TAIL, d=TAIL)
    assert rig.choose() == (head, other)
    rig.now += PARTED_SECONDS + 0.1
    rig.view(a=HEAD, b=TAIL, d=TAIL)
    assert rig.choose() == (head, tail)


def test_a_head_that_lost_every_tail_is_passed_by_though_it_lives(rig: Rig) -> None:
    """Each tail is well, so that leaving out the one that was lost last would come back to it for ever."""
    rig.view(a=HEAD, b=TAIL, c=HEAD, d=TAIL)
    head, _ = rig.choose()
    for tail in (WorkerId("b"), WorkerId("d")):
        rig.chooser.note_parted(tail, head)
    (other,) = {"a", "c"} - {head}
    assert rig.choose()[0] == other
    assert rig.choose(excluded=["b"]) == (other, "d")


def test_who_has_no_other_way_is_tried_all_the_same(rig: Rig) -> None:
    rig.view(a=HEAD, b=TAIL)
    rig.chooser.note_parted(WorkerId("a"), WorkerId("b"))
    rig.chooser.note_parted(WorkerId("a"), WorkerId("gone"))
    assert rig.choose() == ("a", "b")
    assert rig.chooser.has_path(rig.chain)


def test_a_worker_whose_passes_fail_is_avoided_for_a_while(rig: Rig) -> None:
    rig.view(a=Run(0, 5), b=Run(0, 5))
    (worker,) = rig.choose()
    (other,) = {"a", "b"} - {worker}
    rig.chooser.note_faulty(worker)
    assert rig.choose() == (worker,)
    rig.now += FAULT_SECONDS + 1
    rig.chooser.note_faulty(worker)
    assert rig.choose() == (worker,)
    rig.chooser.note_faulty(worker)
    rig.view(a=Run(0, 5), b=Run(0, 5))
    assert rig.choose() == (other,)
    assert rig.choose(excluded=[other]) == (worker,)
    rig.now += AVOID_SECONDS + 1
    assert rig.choose() == (worker,)


def test_where_all_fail_all_are_used(rig: Rig) -> None:
    rig.view(a=Run(0, 5))
    for _ in range(3):
        rig.chooser.note_faulty(WorkerId("a"))
    assert rig.choose() == ("a",)
    assert rig.chooser.has_path(rig.chain)


def test_whether_there_is_a_path_follows_the_view(rig: Rig) -> None:
    assert not rig.chooser.has_path(rig.chain)
    rig.view(head=HEAD, tail=TAIL)
    assert rig.chooser.has_path(rig.chain)
    assert rig.chooser.has_path(rig.chain)
    rig.view(head=HEAD)
    assert not rig.chooser.has_path(rig.chain)
    rig.view(all=Run(0, 5))
    assert rig.chooser.has_path(rig.chain)
    assert rig.choose() == ("all",)
