"""What `blockzoo status` shows of a cluster: its workers, who holds what, and where requests run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockserve.cli.views.tables import (
    NAMES,
    Column,
    Table,
    as_many_as_fit,
    counted,
    fit,
    format_bytes,
    format_seconds,
    short,
    some,
)
from blockserve.cli.views.words import describe_cover, describe_run, last_position

if TYPE_CHECKING:
    from blockserve.common.api.status import ClusterStatus, ResidentRun, ServerStatus, WorkerStatus

PATHS = 10
"""Paths that are listed, of those that requests run along."""
HOLDERS = 6
"""Workers that are named behind a segment."""


def draw_cluster(
    report: ServerStatus,
    cluster: ClusterStatus,
    width: int | None,
    height: int | None = None,
    *,
    everything: bool = False,
) -> list[str]:
    """The cluster for people; the arguments are those of `draw_status`.

    Args:
        report: what the router says.
        cluster: its part about the workers.
        width: columns of the terminal; None where lines may be long.
        height: most lines; None where all may be shown.
        everything: list idle workers one by one even where there is no room.
    """
    placed = "" if cluster.placement_version else "; no controller has placed anything yet"
    head = [
        *fit(
            f"blockzoo {report.version}, router up {format_seconds(report.uptime_seconds)}, "
            f"{counted(len(cluster.workers), 'worker')}, zoo {report.zoo_url}",
            width,
        ),
        *fit(
            f"requests  {report.running_requests} running, {report.waiting_requests} waiting; "
            f"{counted(cluster.failovers, 'failover')}{placed}",
            width,
        ),
    ]
    last = last_position(_places(cluster))
    room = None if height is None or everything else max(12, height - len(head) - 3)
    paths = as_many_as_fit(
        lambda rows: _paths(cluster, last, width, rows), min(PATHS, len(cluster.paths)), room and room // 4
    )
    groups = _groups(cluster)
    segments = as_many_as_fit(
        lambda rows: _segments(groups, last, width, rows), len(groups), room and room // 3
    )
    workers = as_many_as_fit(
        lambda rows: _workers(cluster, last, width, rows, is_watched=height is not None),
        len(cluster.workers),
        room and room - len(paths) - len(segments),
    )
    return [*head, "", *workers, "", *segments, "", *paths]


def _places(cluster: ClusterStatus) -> list[tuple[int, int]]:
    held = [(run.first_position, run.num_blocks) for worker in cluster.workers for run in worker.segments]
    return held + [(step.first_position, step.num_blocks) for path in cluster.paths for step in path.steps]


def _workers(
    cluster: ClusterStatus, last: int, width: int | None, rows: int, *, is_watched: bool
) -> list[str]:
    """The workers; on a watched screen more of them rather than what each holds on several lines."""
    table = Table(
        (
            Column("WORKER", cuts=18, tight=16),
            Column("STATE"),
            Column("RUNNING", numeric=True),
            Column("WAITING", numeric=True),
            Column("STEP", numeric=True, rank=2),
            Column("KV PAGES", numeric=True, rank=4),
            Column("MEMORY", numeric=True, rank=3),
            Column("HOLDS", folds=22, tight=0 if is_watched else 14, rank=1),
            Column("ADDRESS", rank=5),
        )
    )
    shown = list(cluster.workers)
    if rows < len(shown):
        shown = sorted(shown, key=lambda one: (one.state == "ready", -_requests(one), one.name))[:rows]
    for worker in shown:
        table.add(
            worker.name,
            worker.state,
            worker.running_requests,
            worker.waiting_requests,
            format_seconds(worker.step_seconds) if worker.step_seconds else "-",
            f"{worker.kv_pages_total - worker.kv_pages_free} of {worker.kv_pages_total}"
            if worker.kv_pages_total
            else "-",
            _memory(worker),
            describe_cover(((run.first_position, run.num_blocks) for run in worker.segments), last),
            worker.address,
        )
    lines = table.lines(width)
    if len(shown) < len(cluster.workers):
        rest = [worker for worker in cluster.workers if worker not in shown]
        running = sum(map(_requests, rest))
        lines.append(f"and {counted(len(rest), 'more worker')}, with {counted(running, 'request')}")
    return lines


Group = tuple[tuple[int, int, tuple[str, ...]], list[str]]
"""Where segments begin, how long they are and who holds them; and their digests."""


def _groups(cluster: ClusterStatus) -> list[Group]:
    """Segments that lie alike on the same workers together, the most held first."""
    holders: dict[ResidentRun, list[str]] = {}
    for worker in cluster.workers:
        for run in worker.segments:
            holders.setdefault(run, []).append(worker.name)
    groups: dict[tuple[int, int, tuple[str, ...]], list[str]] = {}
    for run, names in holders.items():
        groups.setdefault((run.first_position, run.num_blocks, tuple(names)), []).append(run.segment_digest)
    return sorted(groups.items(), key=lambda item: (-len(item[0][2]), item[0]))


def _segments(groups: list[Group], last: int, width: int | None, rows: int) -> list[str]:
    if not groups:
        return ["No worker holds any blocks yet."]
    table = Table(
        (
            Column("SEGMENT", folds=22),
            Column("COUNT", numeric=True, rank=1),
            Column("REPLICAS", numeric=True),
            Column("WORKERS", folds=20, cuts=NAMES, tight=18),
            Column("ID", rank=2),
        )
    )
    for (first, count, names), digests in groups[:rows]:
        table.add(
            describe_run(first, count, last),
            len(digests),
            len(names),
            some(names, HOLDERS),
            short(digests[0]) if len(digests) == 1 else "",
        )
    lines = table.lines(width)
    if rows < len(groups):
        lines.append(f"and {counted(len(groups) - rows, 'more kind')}")
    return lines


def _paths(cluster: ClusterStatus, last: int, width: int | None, rows: int) -> list[str]:
    """How many of this router's requests run along each path."""
    if not cluster.paths:
        return ["No requests of this router run now."]
    table = Table((Column("PATH", folds=30, cuts=NAMES), Column("REQUESTS", numeric=True)))
    for path in cluster.paths[:rows]:
        steps = (
            f"{step.name} ({describe_run(step.first_position, step.num_blocks, last)})" for step in path.steps
        )
        table.add(" -> ".join(steps), path.requests)
    lines = table.lines(width)
    if rows < len(cluster.paths):
        lines.append(f"and {counted(len(cluster.paths) - rows, 'more path')}")
    return lines


def _requests(worker: WorkerStatus) -> int:
    return worker.running_requests + worker.waiting_requests


def _memory(worker: WorkerStatus) -> str:
    limit = f" of {format_bytes(worker.block_bytes_limit)}" if worker.block_bytes_limit else ""
    return f"{format_bytes(worker.block_bytes)}{limit}"
