"""What `blockzoo status` shows of one server: its queues, and how its variants share blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockserve.cli.views.cluster import draw_cluster
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
from blockserve.cli.views.words import describe_run, last_position

if TYPE_CHECKING:
    from blockserve.common.api.status import LoadedChain, ServerStatus

SHOWN = 12
"""Chains that are listed one by one, whether anybody uses them or not."""
NAMED = 4


def draw_status(
    report: ServerStatus, width: int | None, height: int | None = None, *, everything: bool = False
) -> list[str]:
    """The status of a server or a cluster as lines.

    Args:
        report: what the server says.
        width: columns of the terminal; None where lines may be long.
        height: most lines; None where all may be shown.
        everything: list idle chains one by one too.
    """
    if report.cluster is not None:
        return draw_cluster(report, report.cluster, width, height, everything=everything)
    head = [line for text in _head(report) for line in fit(text, width)]
    room = None if height is None else max(12, height - len(head) - 2)
    shown = SHOWN if not everything else len(report.segments)
    segments = as_many_as_fit(
        lambda rows: _segments(report, width, rows),
        min(shown, len(report.segments)),
        None if room is None else room // 2,
    )
    left = None if room is None else room - len(segments)
    chains = _listed(report, everything)
    return [
        *head,
        "",
        *segments,
        "",
        *as_many_as_fit(lambda rows: _chains(chains, report, width, rows), len(chains), left),
    ]


def headline(report: ServerStatus) -> str:
    """The status in one line."""
    held = (
        f"{counted(len(report.chains), 'chain')} loaded"
        if report.cluster is None
        else f"{len(report.cluster.workers)} workers, {report.cluster.failovers} failovers"
    )
    return (
        f"{report.running_requests} running, {report.waiting_requests} waiting, "
        f"{_pages(report.kv_pages_used, report.kv_pages_total)}, {held}"
    )


def _pages(used: int, total: int) -> str:
    return f"{used} of {total} KV pages" if total else "no KV pages yet"


def _head(report: ServerStatus) -> list[str]:
    used = report.kv_pages_used / report.kv_pages_total if report.kv_pages_total else 0.0
    pages = (
        f"{report.kv_pages_used} of {report.kv_pages_total} used ({used:.0%} of "
        f"{format_bytes(report.kv_bytes_total)}), {report.kv_pages_cached} more cached; "
        f"{counted(report.preemptions, 'pre-emption')}"
        if report.kv_pages_total
        else "none yet; the first variant that is loaded says how large they are"
    )
    return [
        f"blockzoo {report.version}, up {format_seconds(report.uptime_seconds)}, "
        f"on {report.device}, zoo {report.zoo_url}",
        f"requests  {report.running_requests} running, {report.waiting_requests} waiting; "
        f"{report.passes} passes",
        f"KV pages  {pages}",
        f"prefixes  {report.prefix_hit_tokens} of {report.prefix_queried_tokens} prompt tokens "
        "were in the cache",
        f"blocks    {format_bytes(report.block_bytes)} in memory; "
        f"{counted(report.chain_evictions, 'chain')} made room for others",
    ]


def _segments(report: ServerStatus, width: int | None, rows: int) -> list[str]:
    """The segments as they stand in the chain; of many, those that most chains and tokens pass through."""
    if not report.segments:
        return ["No blocks are in memory yet."]
    last = last_position((one.first_position, one.num_blocks) for one in report.segments)
    table = Table(
        (
            Column("SEGMENT", folds=24),
            Column("CHAINS", numeric=True),
            Column("CALLS", numeric=True),
            Column("MIXED", numeric=True, rank=2),
            Column("TOKENS", numeric=True, rank=1),
            Column("MOST SEQUENCES", numeric=True, folds=1, rank=4),
            Column("MOST CHAINS", numeric=True, folds=1, rank=3),
            Column("ID", rank=5),
        )
    )
    busiest = sorted(report.segments, key=lambda one: (-one.num_chains, -one.tokens))[:rows]
    for segment in (one for one in report.segments if one in busiest):
        table.add(
            describe_run(segment.first_position, segment.num_blocks, last),
            segment.num_chains,
            segment.forward_calls,
            segment.mixed_calls,
            segment.tokens,
            segment.largest_batch_sequences,
            segment.largest_batch_chains,
            short(segment.segment_id),
        )
    lines = table.lines(width)
    if rows < len(report.segments):
        rest = [one for one in report.segments if one not in busiest]
        lines.append(
            f"and {len(rest)} more, of {counted(max(one.num_chains for one in rest), 'chain')} at most"
        )
    return lines


def _listed(report: ServerStatus, everything: bool) -> list[LoadedChain]:
    """The chains that are listed one by one, the busiest first."""
    ranked = sorted(report.chains, key=lambda one: (-one.running_requests, not one.pinned, one.models))
    if everything or len(ranked) <= SHOWN:
        return ranked
    return [one for one in ranked if one.running_requests]


def _chains(chains: list[LoadedChain], report: ServerStatus, width: int | None, rows: int) -> list[str]:
    """What is loaded; those that are not listed in one line."""
    table = Table(
        (
            Column("VARIANTS", folds=24, cuts=NAMES),
            Column("RUNNING", numeric=True),
            Column("PRIVATE", numeric=True),
            Column("TOTAL", numeric=True, rank=1),
            Column("PINNED", rank=2),
            Column("CHAIN", rank=3),
        )
    )
    for chain in chains[:rows]:
        table.add(
            some(chain.models, NAMED) or "-",
            chain.running_requests,
            format_bytes(chain.private_bytes),
            format_bytes(chain.total_bytes),
            "yes" if chain.pinned else "",
            short(chain.chain_digest),
        )
    if not report.chains:
        return ["No variant is loaded; the first request to one loads it."]
    rest = [one for one in report.chains if one not in chains[:rows]]
    lines = table.lines(width) if table.rows or not rest else []
    return [*lines, *fit(_rest(rest), width)] if rest else lines


def _rest(chains: list[LoadedChain]) -> str:
    """The chains that are not listed, in a sentence."""
    running = sum(one.running_requests for one in chains)
    private = format_bytes(sum(one.private_bytes for one in chains))
    pinned = sum(one.pinned for one in chains)
    what = f"{len(chains)} more with {counted(running, 'request')}" if running else f"{len(chains)} more idle"
    names = some([one.models[0] if one.models else short(one.chain_digest) for one in chains], NAMED)
    return f"{what}{f' ({pinned} pinned)' if pinned else ''}, {private} of their own: {names}"
