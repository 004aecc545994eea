"""What the verbs that change a zoo or look after it say when they are done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from blockserve.cli.views.tables import counted, format_bytes, format_seconds, note, print_table, say
from blockserve.cli.views.zoo import PROBLEMS, problems_table

if TYPE_CHECKING:
    from blockzoo.care.backup import CopyReport
    from blockzoo.care.gc import GcReport
    from blockzoo.care.verify import VerifyReport
    from blockzoo.errors import BlockzooError
    from blockzoo.folders.export import ExportResult
    from blockzoo.manifest import VariantRecord
    from blockzoo.quantising.quantise import QuantiseResult
    from blockzoo.registering.folder import RegisterResult
    from blockzoo.reports.values import RemoveReport

HISTORY = 10
"""Versions that `rollback` lists."""


def print_registered(result: RegisterResult) -> None:
    """`register` and `pull`."""
    record = result.record
    ref = f"{record.name}@{record.version}"
    if result.unchanged:
        say(f"{ref} has exactly this content already; {_written(result)}.")
        return
    known = max(0.0, 1 - result.new_bytes / result.num_bytes) if result.num_bytes else 0.0
    say(f"Registered {ref} ({record.kind}) in {format_seconds(result.seconds)}")
    say(
        f"  {format_bytes(result.num_bytes)} in the folder, {known:.0%} of it known; "
        f"{format_bytes(result.new_bytes)} new, {format_bytes(result.stored_bytes)} stored"
    )
    for remark in result.remarks:
        say(f"  {remark}")
    if notes := record.provenance.get("notes"):
        say(f"  note: {notes}")
    if aside := record.provenance.get("set_aside"):
        say(f"  fields without effect here: {aside}")
    if result.ignored:
        names = ", ".join(result.ignored[:3]) + (", ..." if len(result.ignored) > 3 else "")
        say(
            f"  {len(result.ignored)} tensors are not part of the model and are kept for export only: {names}"
        )


def print_quantised(result: QuantiseResult) -> None:
    """`quantize`."""
    from blockzoo.quantising.quantise import describe

    record = result.record
    ref = f"{record.name}@{record.version}"
    if result.unchanged:
        say(f"{ref} has exactly this content already.")
    else:
        say(f"Made {ref} of {result.source} in {format_seconds(result.seconds)}; its answers are approximate")
    say(
        f"  {format_bytes(result.num_bytes)} of layers and head became {format_bytes(result.new_bytes)}; "
        f"{format_bytes(result.stored_bytes)} stored"
    )
    worst = max(result.errors, key=lambda at: result.errors[at])
    say(f"  weights of a block are off by at most {result.errors[worst]:.2%}, at position {worst}")
    if result.quality is None:
        say("  what it lost is not known: measure it with --text FILE")
    else:
        say(f"  {describe(result.quality)}")


def note_doubt(doubt: str) -> None:
    """`register` of an adapter that may belong to another base."""
    note(
        f"Warning: {doubt}. On another model of the same shape its answers are wrong. "
        "If they are the same model, --force-base says so."
    )


def _written(result: RegisterResult) -> str:
    """What an unchanged registration wrote: only what the zoo had lost."""
    if not result.restored:
        return "nothing was written"
    lost = counted(result.restored, "object")
    return f"{lost} of it {'was' if result.restored == 1 else 'were'} missing in the zoo and stored again"


def print_one_of_many(
    number: int, total: int, name: str, result: RegisterResult | BlockzooError, *, force_base: bool = False
) -> None:
    """`register --all`, for one of the list as soon as it is done."""
    from blockzoo.errors import BlockzooError

    place = f"{number:>{len(str(total))}}/{total}"
    if isinstance(result, BlockzooError):
        note(f"{place}  {name}: Error: {result}. {result.hint}".rstrip())
        return
    ref = f"{result.record.name}@{result.record.version}"
    if result.unchanged:
        restored = f"; {counted(result.restored, 'missing object')} stored again" if result.restored else ""
        say(f"{place}  {ref} has this content already{restored}")
        return
    say(f"{place}  {ref}  {format_bytes(result.new_bytes)} new, {format_seconds(result.seconds)}")
    if result.base_doubt and not force_base:
        note(f"{place}  {name}: Warning: {result.base_doubt}.")


def print_many(done: Sequence[RegisterResult], failed: int) -> None:
    """`register --all`, at the end."""
    unchanged = sum(result.unchanged for result in done)
    stored = sum(result.stored_bytes for result in done)
    say(
        f"{len(done) - unchanged} registered, {unchanged} unchanged, {failed} failed; "
        f"{format_bytes(stored)} stored"
    )
    if failed:
        note("Correct the folders that failed and run the command again: the others are found unchanged.")


def print_exported(result: ExportResult) -> None:
    """`export`."""
    say(f"Wrote {result.ref} to {result.path}: {len(result.files)} files, {format_bytes(result.num_bytes)}")


def print_removed(report: RemoveReport, dependants: Sequence[str]) -> None:
    """`rm`; `dependants` are the variants that were registered on what was removed."""
    removed = ", ".join(f"{report.name}@{version}" for version in report.removed)
    if len(report.removed) > HISTORY:
        first, last = min(report.removed), max(report.removed)
        removed = f"{len(report.removed)} versions of {report.name}, from {first} to {last}"
    say(f"Removed {removed}. `blockzoo gc` frees the bytes that no other variant uses.")
    if dependants:
        say(
            f"{_listed(dependants)} still {'uses' if len(dependants) == 1 else 'use'} its blocks, which stay."
        )


def print_rolled_back(record: VariantRecord, versions: Sequence[VariantRecord], count: int) -> None:
    """`rollback`; `versions` are the last of `count`."""
    say(f"{record.name}@{record.version} is current now, and the same as {record.provenance['rollback_of']}.")
    left_out = "..., " if count > len(versions) else ""
    say(f"  versions: {left_out}{', '.join(map(_describe_version, versions))}")
    say(f"  `blockzoo rollback {record.name} --to N` goes to any of them.")


def dependence(dependants: Sequence[str]) -> str:
    """What a person should know before removing a base."""
    if not dependants:
        return ""
    one = len(dependants) == 1
    return (
        f"{_listed(dependants)} {'was' if one else 'were'} registered on it and "
        f"{'keeps' if one else 'keep'} working. "
    )


def _listed(names: Sequence[str], most: int = 5) -> str:
    """Names as people list them: a, b and c; of many, the first few."""
    shown = [*names[:most], *([f"{len(names) - most} more"] if len(names) > most else [])]
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def _describe_version(record: VariantRecord) -> str:
    origin = record.provenance.get("rollback_of")
    return f"{record.version}" + (f" (= {origin.rpartition('@')[2]})" if origin else "")


def print_gc(report: GcReport, *, dry_run: bool) -> None:
    """`gc`."""
    verb = "Would delete" if dry_run else "Deleted"
    say(
        f"{verb} {counted(report.deleted, 'object')}, {format_bytes(report.freed_bytes)}; "
        f"{report.kept} stay, {format_bytes(report.kept_bytes)}"
    )
    if report.temp_bytes:
        say(f"Removed {format_bytes(report.temp_bytes)} that interrupted writers had left.")
    if report.spared:
        say(f"Spared {counted(report.spared, 'object')} that a registration needs by now.")
    if not report.finished:
        say("Deleting took too long and stopped early; run `blockzoo gc` again to delete the rest.")


def print_verify(report: VerifyReport, *, repairing: bool) -> None:
    """`verify`."""
    say(f"Read {counted(report.objects, 'object')}, {format_bytes(report.num_bytes)}")
    if report.strays:
        belong = (
            "does not belong to a zoo and harms"
            if len(report.strays) == 1
            else "do not belong to a zoo and harm"
        )
        say(f"{counted(len(report.strays), 'object')} {belong} nothing, for example {report.strays[0]}")
    if not report.problems:
        say("Everything is as it should be.")
        return
    print_table(problems_table(report.problems))
    if len(report.problems) > PROBLEMS:
        say(f"and {len(report.problems) - PROBLEMS} more; --json has all of them.")
    left = sum(not problem.repaired for problem in report.problems)
    hurt = {ref for problem in report.problems if not problem.repaired for ref in problem.variants}
    say(
        f"{counted(len(report.problems), 'problem')}, {len(report.problems) - left} repaired; "
        f"{counted(len(hurt), 'version')} of variants {'is' if len(hurt) == 1 else 'are'} damaged."
    )
    if not report.ok:
        way_out = (
            "the other zoo has no good copy"
            if repairing
            else "`blockzoo verify --repair FROM` takes good copies from a backup"
        )
        say(f"{left} not repaired: {way_out}.")


def print_copy(report: CopyReport, done: str) -> None:
    """`backup` and `restore`; `done` is the word for it."""
    present = f"{report.present} {'was' if report.present == 1 else 'were'} there"
    say(
        f"{done} {counted(len(report.added), 'version')}: {counted(report.copied, 'object')}, "
        f"{format_bytes(report.copied_bytes)}; {present}"
    )
    origins = {now: before for before, now in report.revived.items()}
    for ref in report.added:
        say(f"  {ref}, which was {origins[ref]} before it was removed" if ref in origins else f"  {ref}")
    for ref, reason in sorted(report.skipped.items()):
        say(f"  {ref} skipped: {reason}")


def print_restored(report: CopyReport, *, revive: bool) -> None:
    """`restore`, and how to bring back what it left out."""
    from blockzoo.care.copying import CONFLICT, OLDER, REMOVED

    print_copy(report, "Restored")
    reasons = report.skipped.values()
    if not revive and any(reason.startswith((REMOVED, OLDER)) for reason in reasons):
        say("`blockzoo restore SOURCE --revive` also brings back what was removed here or is older.")
    if any(reason.startswith(CONFLICT) for reason in reasons):
        say("Where both hold something else under one number, `--zoo NEW_PLACE` restores into another zoo.")
