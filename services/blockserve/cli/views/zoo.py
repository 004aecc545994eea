"""What the verbs about a zoo show: ls, show, du, diff, verify."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from blockserve.cli.views.tables import (
    NAMES,
    Column,
    Table,
    cells_of,
    counted,
    draw_facts,
    fit,
    fold,
    format_bytes,
    printable,
    short,
    some,
)
from blockserve.cli.views.words import describe_run

if TYPE_CHECKING:
    from blockzoo.care.verify import Problem
    from blockzoo.reports.values import (
        Applied,
        DiffReport,
        LinkDiff,
        Run,
        ShowReport,
        UsageReport,
        VariantRow,
    )

_DIGEST = re.compile("[0-9a-f]{64}")

PROBLEMS = 20
"""Problems that `verify` shows as rows."""

NAMED = 4
"""Variants that are named where many share something."""


def variants_table(rows: Sequence[VariantRow]) -> Table:
    """`ls`: one row for each variant."""
    table = Table(
        (
            Column("NAME", cuts=NAMES, tight=22),
            Column("VERSION", numeric=True, rank=4),
            Column("KIND", rank=3),
            Column("BASE", cuts=15, rank=1),
            Column("CHECKPOINT", numeric=True, rank=5),
            Column("PRIVATE", numeric=True, rank=6),
            Column("STORED", numeric=True),
            Column("REGISTERED", rank=1),
        )
    )
    for row in rows:
        sizes = map(format_bytes, (row.checkpoint_bytes, row.private_bytes, row.private_stored_bytes))
        table.add(row.name, row.version, row.kind, row.base or "-", *sizes, row.registered_at[:10])
    return table


def draw_variant(report: ShowReport, width: int | None) -> list[str]:
    """`show`: one variant, its chain and its files."""
    current = "current" if report.current else "old"
    versions = ", ".join(map(str, report.versions))
    head = f"{report.name}@{report.version} ({current}; versions {versions}), {report.kind}, {report.family}"
    facts = {
        "chain": report.chain,
        "context": f"{report.context_length} tokens, vocabulary {report.vocab_size}",
        "bytes": f"{format_bytes(report.checkpoint_bytes)} as a checkpoint, "
        f"{format_bytes(report.private_bytes)} private, {format_bytes(report.stored_bytes)} stored in all",
        **{printable(key): printable(value) for key, value in sorted(report.provenance.items())},
    }
    files = Table((Column("FILE", cuts=NAMES), Column("BYTES", numeric=True)))
    for name, size in sorted(report.files.items()):
        if not name.startswith("."):
            files.add(name, format_bytes(size))
    if report.missing:
        lost = counted(len(report.missing), "missing object")
        facts["damaged"] = (
            f"{lost}, for example {report.missing[0]}: "
            "`blockzoo verify --repair BACKUP` or registering it again brings back what is missing"
        )
    drawn = fit(report.draw(), None if width is None else width - 2)
    return [
        *fit(head, width),
        *(f"  {line}" for line in drawn),
        *draw_facts(facts, width),
        "",
        *_links(report).lines(width),
        "",
        *files.lines(width),
    ]


def _links(report: ShowReport) -> Table:
    table = Table(
        (
            Column("LINKS"),
            Column("BYTES", numeric=True, rank=1),
            Column("APPLIED", folds=22, cuts=NAMES),
            Column("SHARED WITH", folds=18, cuts=NAMES),
        )
    )
    for run in report.runs:
        applied = "; ".join(map(_describe_applied, run.applied)) or "-"
        table.add(run.label, format_bytes(run.num_bytes), applied, _shared(run))
    return table


def _shared(run: Run) -> str:
    return some(run.shared_with, NAMED) or "nobody"


def _describe_applied(item: Applied) -> str:
    ranks = f" rank {'/'.join(map(str, item.ranks))}" if item.ranks else ""
    methods = f" with {', '.join(item.methods)}" if item.methods else ""
    return f"{item.kind}{ranks}{methods} on {', '.join(item.modules)} ({format_bytes(item.num_bytes)})"


def draw_usage(report: UsageReport, width: int | None) -> list[str]:
    """`du`: sizes of variants, and of all of them together."""
    table = Table(
        (
            Column("NAME", cuts=NAMES),
            Column("VERSIONS", numeric=True, rank=3),
            Column("CHECKPOINTS", numeric=True, rank=2),
            Column("PRIVATE", numeric=True, rank=4),
            Column("STORED", numeric=True, rank=1),
            Column("RM FREES", numeric=True),
        )
    )
    for row in report.rows:
        sizes = (row.checkpoint_bytes, row.private_bytes, row.private_stored_bytes, row.freed_bytes)
        table.add(row.name, row.versions, *map(format_bytes, sizes))
    totals = {
        "as checkpoints": (
            report.checkpoint_bytes,
            "each version alone, adapters merged",
        ),
        "distinct": (report.distinct_bytes, ""),
        "stored": (report.stored_bytes, f"checkpoints would take {report.sharing_factor:.1f} times as much"),
        "manifests": (report.manifest_bytes, ""),
    }
    if report.unreachable_bytes:
        totals["unreachable"] = report.unreachable_bytes, "`blockzoo gc` frees it"
    remarks = []
    if report.damaged:
        verb = "is" if len(report.damaged) == 1 else "are"
        remarks.append(
            f"{some(report.damaged, NAMED)} {verb} damaged, so sizes may be too low: "
            "`blockzoo verify` says what is missing."
        )
    if report.format == 1:
        remarks.append(
            "The zoo is of format 1, one file for each object. `blockzoo backup NEW_PLACE` makes a copy of "
            "format 2, which has far fewer files and can be served in its place."
        )
    lines = [f"{name:<14} {format_bytes(size):>8}   {text}".rstrip() for name, (size, text) in totals.items()]
    return [
        *table.lines(width),
        "",
        *(part for line in lines for part in fold_totals(line, width)),
        *(part for remark in remarks for part in ("", *fit(remark, width))),
    ]


def fold_totals(line: str, width: int | None) -> list[str]:
    """A line of totals, its remark on the next line where there is no room."""
    if width is None or cells_of(line) <= width:
        return [line]
    figures, _, remark = line.rpartition("   ")
    return [figures.rstrip(), *(f"  {part}" for part in fold(remark, width - 2))]


def draw_diff(report: DiffReport, width: int | None) -> list[str]:
    """`diff`: what differs, links that differ alike in one row."""
    summary = (
        f"  {report.equal} links equal, {report.adapters} differ in adapters only, "
        f"{report.different} differ; {format_bytes(report.changed_bytes)} of base blocks changed"
    )
    lines = [*fit(f"{report.a} -> {report.b}", width), *fold(summary, width)]
    changed = [link for link in report.links if link.status != "equal"]
    if changed:
        table = Table(
            (
                Column("LINKS"),
                Column("STATUS", folds=10),
                Column("CHANGED", folds=24, cuts=NAMES),
                Column("BYTES", numeric=True),
            )
        )
        for (kind, status, names, applied), group in groupby(changed, _alike):
            links = list(group)
            size = sum(tensor.changed_bytes for link in links for tensor in link.tensors)
            if applied:
                names = (*names, "what is applied")
                size += sum(link.applied_bytes_b for link in links)
            table.add(_label(kind, links), status, ", ".join(names), format_bytes(size))
        lines += table.lines(width)
    if report.files:
        shown = ", ".join(name for name in report.files if not name.startswith(".")) or "-"
        lines += fit(f"  files: {shown}", width)
    return lines


def _alike(link: LinkDiff) -> tuple[str, str, tuple[str, ...], bool]:
    applied = link.status == "adapters" or link.applied_bytes_a != link.applied_bytes_b
    return link.kind, link.status, tuple(tensor.name for tensor in link.tensors), applied


def _label(kind: str, links: list[LinkDiff]) -> str:
    if kind != "layer":
        return kind
    first = links[0].position
    return describe_run(first, links[-1].position - first + 1, links[-1].position + 1)


def problems_table(problems: Sequence[Problem]) -> Table:
    """`verify`: what is wrong, and whom it hurts; of many problems the first, which are the worst."""
    table = Table(
        (
            Column("PROBLEM", folds=18, cuts=NAMES),
            Column("HURTS", folds=20, cuts=NAMES),
            Column("REPAIRED", rank=1),
            Column("OBJECT", cuts=20, rank=2),
        )
    )
    for problem in problems[:PROBLEMS]:
        hurts = some(problem.variants, NAMED) or "nobody"
        # The last column has the whole digest.
        message = _DIGEST.sub(lambda found: short(found[0]), problem.message)
        table.add(message, hurts, "yes" if problem.repaired else "no", problem.key)
    return table
