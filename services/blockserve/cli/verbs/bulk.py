"""`register --all`: many folders, one registration each."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockserve.cli.options.failures import exit_code
from blockserve.cli.views.progress import progress
from blockserve.cli.views.tables import counted, format_bytes, format_seconds, note, print_json, say

if TYPE_CHECKING:
    from blockserve.client.zoo import RemoteZoo
    from blockzoo.errors import BlockzooError
    from blockzoo.registering.batch import BatchEntry
    from blockzoo.registering.folder import RegisterResult
    from blockzoo.zoo import Zoo


@dataclass
class Outcome:
    """What became of a list.

    Attributes:
        done: results by name.
        failed: errors by name.
    """

    done: dict[str, RegisterResult] = field(default_factory=dict)
    failed: dict[str, BlockzooError] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "registered": [result.to_json() for result in self.done.values()],
            "failed": [
                {"name": name, "reason": error.reason, "message": str(error), "hint": error.hint}
                for name, error in self.failed.items()
            ],
        }


def register_all(zoo: Zoo | RemoteZoo, path: Path, base: str | None, *, as_json: bool) -> int:
    """Register what a folder or a list names; returns the exit code.

    A failure is reported and the others go on. Ctrl-C ends after the registration at hand is undone.

    Raises:
        VariantNotFoundError: neither the zoo nor the list has a variant `base`; nothing was registered.
        UnsupportedAdapterError: `base` is an adapter, and so is one of the list; nothing was registered.
    """
    from blockzoo.registering.batch import check_base, read_batch

    entries = read_batch(path, base)
    if base is not None and base.partition("@")[0] not in {entry.name for entry in entries}:
        check_base(entries, base, zoo.resolve(base))
    outcome = Outcome()
    try:
        with zoo.batch():
            for number, entry in enumerate(entries, 1):
                _add(zoo, entry, outcome)
                if not as_json:
                    _tell(number, len(entries), entry.name, outcome)
    except KeyboardInterrupt:
        note(
            f"{len(outcome.done)} of {len(entries)} are in the zoo. "
            "The same command goes on from there: it finds them unchanged."
        )
        raise
    if as_json:
        print_json(outcome.to_json())
    else:
        _summarise(outcome)
    return max(map(exit_code, outcome.failed.values()), default=0)


def _add(zoo: Zoo | RemoteZoo, entry: BatchEntry, outcome: Outcome) -> None:
    from blockzoo.errors import BlockzooError

    try:
        outcome.done[entry.name] = _register(zoo, entry)
    except BlockzooError as error:
        if error.reason == "UNAVAILABLE":
            raise
        outcome.failed[entry.name] = error


def _register(zoo: Zoo | RemoteZoo, entry: BatchEntry) -> RegisterResult:
    with progress() as reporter:
        return zoo.register(
            entry.source, name=entry.name, base=entry.base, revision=entry.revision, progress=reporter
        )


def _tell(number: int, total: int, name: str, outcome: Outcome) -> None:
    place = f"{number:>{len(str(total))}}/{total}"
    if name in outcome.failed:
        error = outcome.failed[name]
        note(f"{place}  {name}: Error: {error}. {error.hint}".rstrip())
        return
    result = outcome.done[name]
    ref = f"{result.record.name}@{result.record.version}"
    if result.unchanged:
        restored = f"; {counted(result.restored, 'missing object')} stored again" if result.restored else ""
        say(f"{place}  {ref} has this content already{restored}")
        return
    say(f"{place}  {ref}  {format_bytes(result.new_bytes)} new, {format_seconds(result.seconds)}")
    if result.base_doubt:
        note(f"{place}  {name}: Warning: {result.base_doubt}.")


def _summarise(outcome: Outcome) -> None:
    unchanged = sum(result.unchanged for result in outcome.done.values())
    stored = sum(result.stored_bytes for result in outcome.done.values())
    words = f"{len(outcome.done) - unchanged} registered, {unchanged} unchanged, {len(outcome.failed)} failed"
    say(f"{words}; {format_bytes(stored)} stored")
    if outcome.failed:
        note("Correct the folders that failed and run the command again: the others are found unchanged.")
