"""What people see of a cluster."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from blockserve.cli.verbs.server import status_to_json
from blockserve.cli.views.server import draw_status, headline
from blockserve.common.api.cluster import (
    ClusterView,
    LoadReport,
    PathStep,
    Placement,
    ResidentSegment,
    Run,
    SegmentDigest,
    WorkerId,
    WorkerRecord,
    WorkerState,
    WorkerView,
)
from blockserve.common.api.status import ServerStatus
from blockserve.router.cluster.report import KnowsCluster, describe
from blockserve.router.traces.journeys import NamedStep

TRUNK = ResidentSegment(SegmentDigest("aa" * 16), Run(0, 4))
HEAD = ResidentSegment(SegmentDigest("bb" * 16), Run(4, 6))


class Seen:
    """A cluster as its router has seen it."""

    def __init__(self, workers: Sequence[WorkerView]) -> None:
        self.view = ClusterView({worker.record.id: worker for worker in workers}, Placement(version=7))
        self.num_failovers = 3

    def running_paths(self) -> Counter[tuple[NamedStep, ...]]:
        first = PathStep(WorkerId("a.1"), "unix:/a", Run(0, 4)), "a"
        second = PathStep(WorkerId("b.1"), "unix:/b", Run(4, 6)), "b"
        return Counter({(second,): 1, (first, second): 5})


def seen() -> Seen:
    busy = LoadReport(1, 2, 50, 0.25, 0.0, 30, 40, 5_000_000)
    first = WorkerRecord(WorkerId("a.1"), "a", "unix:/a", block_bytes=9_000_000, host="here")
    second = WorkerRecord(WorkerId("b.1"), "b", "unix:/b", WorkerState.DRAINING)
    return Seen(
        [
            WorkerView(second, LoadReport(), frozenset({TRUNK})),
            WorkerView(first, busy, frozenset({HEAD, TRUNK})),
        ]
    )


def status() -> ServerStatus:
    counts = (1, 2, 3, 4, 5, 6, 7)
    return ServerStatus("1.0", 5.0, "memory:", "2 workers", *counts, (), (), cluster=describe(seen()))


def test_each_worker_is_described_by_name() -> None:
    assert isinstance(seen(), KnowsCluster)
    assert not isinstance(object(), KnowsCluster)
    cluster = describe(seen())
    assert (cluster.placement_version, cluster.failovers) == (7, 3)
    first, second = cluster.workers
    assert (first.name, first.state, first.host) == ("a", "ready", "here")
    assert (first.waiting_requests, first.running_requests, first.queued_tokens) == (1, 2, 50)
    assert (first.kv_pages_free, first.kv_pages_total, first.step_seconds) == (30, 40, 0.25)
    assert (first.block_bytes, first.block_bytes_limit) == (5_000_000, 9_000_000)
    assert [(run.segment_digest, run.first_position, run.num_blocks) for run in first.segments] == [
        (TRUNK.digest, 0, 4),
        (HEAD.digest, 4, 2),
    ]
    assert (second.name, second.state, len(second.segments)) == ("b", "draining", 1)


def test_tables_show_workers_and_replicas() -> None:
    lines = [" ".join(line.split()) for line in draw_status(status(), None)]
    assert lines == [
        "blockzoo 1.0, router up 5 s, 2 workers, zoo memory:",
        "requests 2 running, 1 waiting; 3 failovers",
        "",
        "WORKER STATE RUNNING WAITING STEP KV PAGES MEMORY HOLDS ADDRESS",
        "a ready 2 1 0.25 s 10 of 40 5 MB of 9 MB embedding, layers 0-3, head unix:/a",
        "b draining 0 0 - - 0 B embedding, layers 0-2 unix:/b",
        "",
        "SEGMENT COUNT REPLICAS WORKERS ID",
        "embedding, layers 0-2 1 2 a, b aaaaaaaaaaaa",
        "layer 3, head 1 1 a bbbbbbbbbbbb",
        "",
        "PATH REQUESTS",
        "a (embedding, layers 0-2) -> b (layer 3, head) 5",
        "b (layer 3, head) 1",
    ]


def test_one_line_of_a_watched_cluster() -> None:
    assert headline(status()).endswith("2 workers, 3 failovers")
    assert status_to_json(status())["cluster"]["workers"][0]["name"] == "a"
