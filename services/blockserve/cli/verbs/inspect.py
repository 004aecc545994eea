"""Verbs that look: ls, show, du, diff."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Annotated

import typer

from blockserve.cli.options.place import Place, at_a_place
from blockserve.cli.options.shared import JsonOption, RefArgument
from blockserve.cli.views.tables import add_row, format_bytes, make_table, print_json, say, stdout

FirstArgument = Annotated[str, typer.Argument(metavar="A", help="NAME or NAME@N.")]
SecondArgument = Annotated[str, typer.Argument(metavar="B", help="NAME or NAME@N.")]

if TYPE_CHECKING:
    from blockzoo.reports.values import (
        Applied,
        DiffReport,
        LinkDiff,
        Run,
        ShowReport,
        UsageReport,
        VariantRow,
    )


@at_a_place
def ls(as_json: JsonOption = False, *, place: Place) -> None:
    """List the variants of a zoo.

    PRIVATE counts the bytes that only this variant needs: removing it frees about that much.

    \b
    Examples:
      blockzoo ls
      blockzoo ls --zoo s3://models/zoo
      blockzoo ls --server models.example:7450
      blockzoo ls --json | jq -r '.variants[].name'
    """
    with place.open() as zoo:
        url, rows = zoo.url, zoo.ls()
    if as_json:
        print_json({"zoo": url, "variants": [row.to_json() for row in rows]})
    elif rows:
        _print_rows(rows)
    else:
        say("The zoo is empty. Register a checkpoint: blockzoo register FOLDER --name NAME")


@at_a_place
def show(ref: RefArgument, as_json: JsonOption = False, *, place: Place) -> None:
    """Show one variant: its chain of blocks, and who shares them.

    Consecutive links of the same kind are one line. In the drawing, brackets mark links that only this
    variant uses.

    \b
    Examples:
      blockzoo show support-bot
      blockzoo show support-bot@2
      blockzoo show support-bot --json | jq .chain
    """
    with place.open() as zoo:
        report = zoo.show(ref)
    if as_json:
        print_json(report.to_json())
    else:
        _print_variant(report)


@at_a_place
def du(as_json: JsonOption = False, *, place: Place) -> None:
    """Show the sizes of variants, as checkpoints and in the zoo.

    \b
    Examples:
      blockzoo du
      blockzoo du --json | jq .sharing_factor
    """
    with place.open() as zoo:
        report = zoo.du()
    if as_json:
        print_json(report.to_json())
    else:
        _print_usage(report)


@at_a_place
def diff(a: FirstArgument, b: SecondArgument, as_json: JsonOption = False, *, place: Place) -> None:
    """Show what differs between two variants, or two versions of one.

    \b
    Examples:
      blockzoo diff smollm2 support-bot
      blockzoo diff support-bot@1 support-bot@2
    """
    with place.open() as zoo:
        report = zoo.diff(a, b)
    if as_json:
        print_json(report.to_json())
    else:
        _print_diff(report)


def _print_rows(rows: list[VariantRow]) -> None:
    table = make_table(
        "NAME", "VERSION", "KIND", "BASE", "CHECKPOINT", "PRIVATE", "REGISTERED",
        numeric=("VERSION", "CHECKPOINT", "PRIVATE"),
    )  # fmt: skip
    for row in rows:
        sizes = (format_bytes(row.checkpoint_bytes), format_bytes(row.private_bytes))
        add_row(table, row.name, row.version, row.kind, row.base or "-", *sizes, row.registered_at[:10])
    stdout().print(table)


def _print_variant(report: ShowReport) -> None:
    current = "current" if report.current else "old"
    versions = ", ".join(map(str, report.versions))
    say(f"{report.name}@{report.version} ({current}; versions {versions}), {report.kind}, {report.family}")
    say(f"  {report.draw()}")
    facts = {
        "chain": report.chain,
        "context": f"{report.context_length} tokens, vocabulary {report.vocab_size}",
        "bytes": f"{format_bytes(report.checkpoint_bytes)} as a checkpoint, "
        f"{format_bytes(report.private_bytes)} private, {format_bytes(report.stored_bytes)} stored in all",
        **dict(sorted(report.provenance.items())),
    }
    width = max(map(len, facts))
    for key, value in facts.items():
        say(f"  {key:<{width}}  {value}")
    say("")
    table = make_table("LINKS", "KIND", "BYTES", "APPLIED", "SHARED WITH", numeric=("BYTES",))
    for run in report.runs:
        applied = "; ".join(map(_describe_applied, run.applied)) or "-"
        add_row(table, run.label, run.kind, format_bytes(run.num_bytes), applied, _shared(run))
    stdout().print(table)
    files = make_table("FILE", "BYTES", numeric=("BYTES",))
    for name, size in sorted(report.files.items()):
        if not name.startswith("."):
            add_row(files, name, format_bytes(size))
    say("")
    stdout().print(files)


def _shared(run: Run) -> str:
    if not run.shared_with:
        return "nobody"
    more = len(run.shared_with) - 4
    return ", ".join(run.shared_with[:4]) + (f" and {more} more" if more > 0 else "")


def _describe_applied(item: Applied) -> str:
    ranks = "/".join(map(str, item.ranks))
    return f"{item.kind} rank {ranks} on {', '.join(item.modules)} ({format_bytes(item.num_bytes)})"


def _print_usage(report: UsageReport) -> None:
    numeric = ("VERSIONS", "CHECKPOINTS", "PRIVATE", "PRIVATE STORED")
    table = make_table("NAME", *numeric, numeric=numeric)
    for row in report.rows:
        sizes = (row.checkpoint_bytes, row.private_bytes, row.private_stored_bytes)
        add_row(table, row.name, row.versions, *map(format_bytes, sizes))
    stdout().print(table)
    say("")
    say(f"as checkpoints   {format_bytes(report.checkpoint_bytes):>8}")
    say(f"distinct         {format_bytes(report.distinct_bytes):>8}")
    say(
        f"stored           {format_bytes(report.stored_bytes):>8}   "
        f"checkpoints would take {report.sharing_factor:.1f} times as much"
    )
    say(f"manifests        {format_bytes(report.manifest_bytes):>8}")
    if report.unreachable_bytes:
        say(f"unreachable      {format_bytes(report.unreachable_bytes):>8}   `blockzoo gc` frees it")


def _print_diff(report: DiffReport) -> None:
    say(f"{report.a} -> {report.b}")
    say(
        f"  {report.equal} links equal, {report.adapters} differ in adapters only, "
        f"{report.different} differ; {format_bytes(report.changed_bytes)} of base blocks changed"
    )
    changed = [link for link in report.links if link.status != "equal"]
    if changed:
        table = make_table("LINKS", "STATUS", "CHANGED", "BYTES", numeric=("BYTES",))
        for (kind, status, names, applied), group in groupby(changed, _alike):
            links = list(group)
            size = sum(tensor.changed_bytes for link in links for tensor in link.tensors)
            if applied:
                names = (*names, "what is applied")
                size += sum(link.applied_bytes_b for link in links)
            add_row(table, _label(kind, links), status, ", ".join(names), format_bytes(size))
        stdout().print(table)
    if report.files:
        say(f"  files: {', '.join(name for name in report.files if not name.startswith('.')) or '-'}")


def _alike(link: LinkDiff) -> tuple[str, str, tuple[str, ...], bool]:
    applied = link.status == "adapters" or link.applied_bytes_a != link.applied_bytes_b
    return link.kind, link.status, tuple(tensor.name for tensor in link.tensors), applied


def _label(kind: str, links: list[LinkDiff]) -> str:
    """Layers are numbered as in the checkpoint: the embedding stands before them."""
    if kind != "layer":
        return kind
    first, last = links[0].position - 1, links[-1].position - 1
    return f"layer {first}" if first == last else f"layers {first}-{last}"
