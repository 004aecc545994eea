"""How long the router takes to choose a path, on one core and without model work."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from harness import RUNS, Benchmark, Row, check

from blockserve.common.api.cluster import (
    ClusterView,
    LoadReport,
    ResidentSegment,
    Run,
    WorkerId,
    WorkerRecord,
    WorkerView,
    segment_digest,
)
from blockserve.router.paths.assemble import assemble
from blockserve.router.paths.costs import RequestSize
from blockserve.router.paths.index import PathIndex
from blockzoo.manifest import BlockId, ChainId, Link

WORKERS, LINKS, CALLS = 300, 34, 600
WHOLE, THIRDS = (Run(0, LINKS),), (Run(0, 12), Run(12, 24), Run(24, LINKS))
CASES = (
    ("whole", 2000, 3, WHOLE),
    ("thirds", 2000, 3, THIRDS),
    ("whole", 300, 200, WHOLE),
    ("thirds", 300, 200, THIRDS),
)
SIZE = RequestSize(prompt_tokens=100, output_tokens=16)


def run(say: Callable[[str], None]) -> list[Row]:
    """Milliseconds of a choice, for chains with few and with many replicas, whole and cut in three."""
    rows = []
    for what, count, replicas, runs in CASES:
        view, links = _cluster(count, replicas, runs)
        samples = [_milliseconds(PathIndex(view), links) for _ in range(RUNS)]
        name = f"paths-{what}-{replicas}"
        case = (
            f"a path on {WORKERS} workers, {count} LoRA chains held {what}, {replicas} replicas of each part"
        )
        rows.append(Row(name, case, "ms", "python benchmarks/run.py --only paths", samples, None, None))
        say(f"{name}: {min(samples):.3f} ms")
    return rows


def _cluster(
    count: int, replicas: int, runs: tuple[Run, ...]
) -> tuple[ClusterView, dict[ChainId, tuple[Link, ...]]]:
    chance = random.Random(0)
    held: list[set[ResidentSegment]] = [set() for _ in range(WORKERS)]
    links = {
        ChainId(f"c{chain}"): tuple(
            Link(BlockId(f"b{depth}"), (BlockId(f"a{chain}.{depth}"),)) for depth in range(LINKS)
        )
        for chain in range(count)
    }
    for chain in links.values():
        for run in runs:
            segment = ResidentSegment(segment_digest(chain, run.first, run.end), run)
            for worker in chance.sample(range(WORKERS), replicas):
                held[worker].add(segment)
    views = {}
    for number, segments in enumerate(held):
        name = WorkerId(f"w{number:03}")
        load = LoadReport(
            chance.randint(0, 3), chance.randint(0, 20), chance.randint(0, 500), chance.random() / 50, 1000.0
        )
        record = WorkerRecord(name, name, "", host=f"h{number // 4}")
        views[name] = WorkerView(record, load, frozenset(segments))
    return ClusterView(views), links


def _milliseconds(index: PathIndex, links: dict[ChainId, tuple[Link, ...]]) -> float:
    """Of a call when the chain's candidates are known, with what was assigned before counted."""
    chains = list(links.items())[:300]
    for chain, one in chains:
        index.candidates(chain, one)
    started = time.perf_counter()
    for number in range(CALLS):
        chain, one = chains[number % len(chains)]
        path = assemble(index, chain, one, SIZE)
        for span in path.spans:
            index.assigned.add(span.worker, span.run, SIZE)
    seconds = time.perf_counter() - started
    check(path.spans[-1].run.end == LINKS, "a path does not end at the head")
    return seconds / CALLS * 1000


BENCHMARK = Benchmark(
    "paths", "choosing a request's path on 300 workers", "well below 1 ms, for 300 requests/s a core", run
)
