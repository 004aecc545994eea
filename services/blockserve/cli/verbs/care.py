"""Verbs that keep a zoo healthy: gc, verify, backup, restore."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from blockserve.cli.options.failures import CORRUPTION
from blockserve.cli.options.place import Place, at_a_place, at_hand, needs_zoo
from blockserve.cli.options.shared import DEFAULT_ZOO, JsonOption, ZooOption, open_zoo
from blockserve.cli.views.progress import progress
from blockserve.cli.views.reports import print_copy, print_gc, print_restored, print_verify
from blockserve.cli.views.tables import print_json

if TYPE_CHECKING:
    from blockzoo.care.backup import CopyReport
    from blockzoo.care.gc import GcReport
    from blockzoo.care.verify import VerifyReport

NamesOption = Annotated[
    list[str] | None, typer.Option("--name", "-n", metavar="NAME", help="Only this variant; may be repeated.")
]


@at_a_place
def gc(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be deleted, and delete nothing.")
    ] = False,
    grace: Annotated[
        float | None,
        typer.Option(
            "--grace",
            metavar="SECONDS",
            min=0,
            help="Seconds between marking objects and deleting them, so that servers finish loading a "
            "variant that was just removed. 0 is safe when no server uses the zoo. Default: 60.",
        ),
    ] = None,
    as_json: JsonOption = False,
    *,
    place: Place,
) -> None:
    """Delete objects that no variant needs any more.

    Safe while registrations and servers run, and safe to interrupt: the next gc continues.

    \b
    Examples:
      blockzoo gc --dry-run
      blockzoo gc
      blockzoo gc --grace 0
    """
    from blockzoo.care.gc import GRACE_S

    grace_s = GRACE_S if grace is None else grace
    with progress() as reporter, place.open() as zoo:
        report = zoo.gc(grace_s=grace_s, dry_run=dry_run, progress=reporter)
    if as_json:
        print_json({"dry_run": dry_run, **_as_json(report)})
    else:
        print_gc(report, dry_run=dry_run)


@at_a_place
def verify(
    repair_from: Annotated[
        str | None,
        typer.Option(
            "--repair", metavar="FROM", help="Another zoo, for example a backup, to take good copies from."
        ),
    ] = None,
    as_json: JsonOption = False,
    *,
    place: Place,
) -> None:
    """Read every object back, and name the variants that damage affects.

    Shows the worst problems; --json has all. With --repair, what is damaged or missing is taken from another
    zoo, and only what was repaired is read again. --repair writes the zoo itself and takes no --server.

    Ends with exit code 5 when something is damaged or missing and was not repaired.

    \b
    Examples:
      blockzoo verify
      blockzoo verify --repair /backups/zoo
    """
    if repair_from is not None and place.server is not None:
        raise needs_zoo("verify --repair", f"--server or BLOCKZOO_SERVER names {place.server}")
    with progress() as reporter, place.open(without_header=True) as zoo:
        repair = {} if repair_from is None else {"repair_from": repair_from}
        report = zoo.verify(progress=reporter, **repair)
    if as_json:
        print_json({"ok": report.ok, **_as_json(report)})
    else:
        print_verify(report, repairing=repair_from is not None)
    if not report.ok:
        raise typer.Exit(CORRUPTION)


@at_hand
def backup(
    destination: Annotated[
        str, typer.Argument(metavar="DEST", help="The zoo to copy to; created if it does not exist.")
    ],
    names: NamesOption = None,
    zoo: ZooOption = DEFAULT_ZOO,
    as_json: JsonOption = False,
) -> None:
    """Copy variants into another zoo.

    Only objects that the other zoo lacks are copied, and each is checked against its digest. This reads the
    zoo itself and takes no --server.

    \b
    Examples:
      blockzoo backup /backups/zoo
      blockzoo backup s3://backups/zoo --name support-bot
    """
    with progress() as reporter:
        report = open_zoo(zoo).backup(destination, names=names, progress=reporter)
    if as_json:
        print_json(_as_json(report))
    else:
        print_copy(report, "Backed up")


@at_hand
def restore(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="The zoo to copy from, for example a backup.")
    ],
    names: NamesOption = None,
    revive: Annotated[
        bool,
        typer.Option(
            "--revive", help="Also bring back what was removed here since the backup, with all its versions."
        ),
    ] = False,
    zoo: ZooOption = DEFAULT_ZOO,
    as_json: JsonOption = False,
) -> None:
    """Bring variants back from another zoo.

    A zoo that does not exist yet is created. Versions that this zoo has already stay as they are.
    Versions keep their numbers. Only where a whole variant was removed here are its numbers used up: --revive
    then brings its versions back under higher numbers, and prints which became which. This writes the zoo
    itself and takes no --server.

    \b
    Examples:
      blockzoo restore /backups/zoo
      blockzoo restore /backups/zoo --name support-bot --revive
    """
    with progress() as reporter:
        opened = open_zoo(zoo, create=True)
        report = opened.restore(source, names=names, revive=revive, progress=reporter)
    if as_json:
        print_json(_as_json(report))
    else:
        print_restored(report, revive=revive)


def _as_json(report: GcReport | VerifyReport | CopyReport) -> dict[str, Any]:
    import dataclasses

    return dataclasses.asdict(report)
