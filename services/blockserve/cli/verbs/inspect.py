"""Verbs that look: ls, show, du, diff."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blockserve.cli.options.place import Place, at_a_place
from blockserve.cli.options.shared import JsonOption, RefArgument
from blockserve.cli.views.tables import note, print_json, print_lines, print_table, say, terminal_width
from blockserve.cli.views.zoo import draw_diff, draw_usage, draw_variant, variants_table

FirstArgument = Annotated[str, typer.Argument(metavar="A", help="NAME or NAME@N.")]
SecondArgument = Annotated[str, typer.Argument(metavar="B", help="NAME or NAME@N.")]

if TYPE_CHECKING:
    from blockzoo.reports.values import VariantRow


class Order(StrEnum):
    """What `ls` can be sorted by."""

    NAME = "name"
    SIZE = "size"
    STORED = "stored"
    AGE = "age"
    BASE = "base"


@at_a_place
def ls(
    pattern: Annotated[
        str | None,
        typer.Argument(metavar="[PATTERN]", help="Only names that match, as in 'support-*'; quote it."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="VARIANT", help="Only variants registered on this one (or NAME@N)."),
    ] = None,
    sort: Annotated[
        Order,
        typer.Option(
            "--sort",
            help="By name, or base; or the largest (size, stored) or newest (age) first; equal ones by name.",
        ),
    ] = Order.NAME,
    limit: Annotated[
        int | None, typer.Option("--limit", "-n", metavar="N", min=1, help="Only the first N of them.")
    ] = None,
    as_json: JsonOption = False,
    *,
    place: Place,
) -> None:
    """List the variants of a zoo.

    CHECKPOINT is what a variant would take as a checkpoint of its own, PRIVATE the part of it that no
    other variant has, and STORED what that part takes in the zoo. `blockzoo du` says what removing a
    variant would free. A narrow terminal cuts long names and shows fewer columns; --json has all. What
    was read of chains, which never change, is kept in the cache folder (~/.cache/blockzoo), which may be
    deleted. So `ls` does not notice damage: `show` and `du` name missing objects, and `blockzoo verify`
    finds what is missing or damaged.

    \b
    Examples:
      blockzoo ls
      blockzoo ls 'support-*' --sort age
      blockzoo ls --base smollm2 --sort stored --limit 10
      blockzoo ls --server models.example:7450
      blockzoo ls --json | jq -r '.variants[].name'
    """
    with place.open() as zoo:
        url, rows = zoo.url, zoo.ls()
    if base is not None:
        _check_base(base, rows)
    found = [row for row in rows if _matches(row, pattern, base)]
    shown = sorted(found, key=_ORDERS[sort])[:limit]
    if as_json:
        print_json({"zoo": url, "variants": [row.to_json() for row in shown]})
    elif shown:
        print_table(variants_table(shown))
        if len(shown) < len(found):
            note(f"{len(found) - len(shown)} more of {len(found)} are not listed (--limit).")
    elif rows:
        note(f"None of the {len(rows)} variants is meant by that.")
    else:
        say("The zoo is empty. Register a checkpoint: blockzoo register FOLDER --name NAME")


_ORDERS: dict[Order, Callable[[VariantRow], Any]] = {
    Order.NAME: lambda row: row.name,
    Order.SIZE: lambda row: (-row.checkpoint_bytes, row.name),
    Order.STORED: lambda row: (-row.private_stored_bytes, row.name),
    Order.AGE: lambda row: (not row.registered_at, _descending(row.registered_at), row.name),
    Order.BASE: lambda row: (row.base or "", row.name),
}


def _check_base(base: str, rows: Sequence[VariantRow]) -> None:
    """Refuse a base that neither is registered nor was when a variant was registered on it."""
    from blockzoo.errors import VariantNotFoundError
    from blockzoo.names import near_names

    name = base.partition("@")[0]
    known = {row.name for row in rows} | {(row.base or "").partition("@")[0] for row in rows}
    if name not in known:
        raise VariantNotFoundError(name, near_names(name, sorted(known - {""})))


def _descending(text: str) -> tuple[int, ...]:
    """Sorts texts from last to first."""
    return tuple(-ord(char) for char in text)


def _matches(row: VariantRow, pattern: str | None, base: str | None) -> bool:
    if pattern is not None and not fnmatchcase(row.name, pattern):
        return False
    if base is None:
        return True
    return row.base == base if "@" in base else (row.base or "").partition("@")[0] == base


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
        print_lines(draw_variant(report, terminal_width()))


@at_a_place
def du(as_json: JsonOption = False, *, place: Place) -> None:
    """Show the sizes of variants, as checkpoints and in the zoo.

    CHECKPOINTS is what the variants would take as checkpoints of their own: an adapter counts as a copy of
    its base with the adapter merged into it. PRIVATE is what no other variant has, STORED what that takes
    in the zoo. RM FREES is what `blockzoo rm` and `blockzoo gc` would free: not what other variants are
    stored as differences to.

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
        print_lines(draw_usage(report, terminal_width()))


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
        print_lines(draw_diff(report, terminal_width()))
