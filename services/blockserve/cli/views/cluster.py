"""What `blockzoo status` shows of a cluster: its workers, who holds what, and where requests run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockserve.cli.views.tables import add_row, format_bytes, format_seconds, make_table, short

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

    from blockserve.common.api.status import ClusterStatus, ResidentRun, ServerStatus, WorkerStatus


def draw_cluster(report: ServerStatus, cluster: ClusterStatus) -> Group:
    """The cluster for people.

    Args:
        report: what the router says.
        cluster: its part about the workers.
    """
    from rich.console import Group
    from rich.text import Text

    head = "\n".join(
        (
            f"blockzoo {report.version}, router up {format_seconds(report.uptime_seconds)}, "
            f"{len(cluster.workers)} workers, zoo {report.zoo_url}",
            f"placement version {cluster.placement_version}; {cluster.failovers} failovers",
        )
    )
    return Group(Text(head), Text(), _workers(cluster), Text(), _segments(cluster), Text(), _paths(cluster))


def _workers(cluster: ClusterStatus) -> Table:
    numeric = ("WAITING", "RUNNING", "STEP", "KV PAGES", "BLOCKS", "SEGMENTS")
    table = make_table("WORKER", "STATE", *numeric, "POSITIONS", "ADDRESS", numeric=numeric)
    for worker in cluster.workers:
        add_row(
            table,
            worker.name,
            worker.state,
            worker.waiting_requests,
            worker.running_requests,
            format_seconds(worker.step_seconds) if worker.step_seconds else "-",
            f"{worker.kv_pages_total - worker.kv_pages_free} of {worker.kv_pages_total}",
            _blocks(worker),
            len(worker.segments),
            ", ".join(dict.fromkeys(_positions(run) for run in worker.segments)) or "-",
            worker.address,
        )
    return table


def _segments(cluster: ClusterStatus) -> Table:
    """Each segment once, with the workers that hold it."""
    holders: dict[ResidentRun, list[str]] = {}
    for worker in cluster.workers:
        for run in worker.segments:
            holders.setdefault(run, []).append(worker.name)
    table = make_table("SEGMENT", "POSITIONS", "REPLICAS", "WORKERS", numeric=("REPLICAS",))
    for run in sorted(holders, key=lambda run: (run.first_position, run.num_blocks, run.segment_digest)):
        add_row(table, short(run.segment_digest), _positions(run), len(holders[run]), ", ".join(holders[run]))
    return table


def _paths(cluster: ClusterStatus) -> Table:
    """How many of this router's requests run along each path."""
    table = make_table("PATH", "REQUESTS", numeric=("REQUESTS",))
    for path in cluster.paths:
        steps = (
            f"{step.name} ({step.first_position}-{step.first_position + step.num_blocks - 1})"
            for step in path.steps
        )
        add_row(table, " -> ".join(steps), path.requests)
    return table


def _blocks(worker: WorkerStatus) -> str:
    limit = f" of {format_bytes(worker.block_bytes_limit)}" if worker.block_bytes_limit else ""
    return f"{format_bytes(worker.block_bytes)}{limit}"


def _positions(run: ResidentRun) -> str:
    return f"{run.first_position}-{run.first_position + run.num_blocks - 1}"
