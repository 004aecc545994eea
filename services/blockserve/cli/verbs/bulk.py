"""`register --all`: many folders, one registration each."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockserve.cli.options.failures import exit_code
from blockserve.cli.views.progress import progress
from blockserve.cli.views.reports import print_many, print_one_of_many
from blockserve.cli.views.tables import note, print_json

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

    def add(self, name: str, result: RegisterResult | BlockzooError) -> None:
        """Take down what became of one."""
        from blockzoo.errors import BlockzooError

        if isinstance(result, BlockzooError):
            self.failed[name] = result
        else:
            self.done[name] = result

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "registered": [result.to_json() for result in self.done.values()],
            "failed": [
                {"name": name, "reason": error.reason, "message": str(error), "hint": error.hint}
                for name, error in self.failed.items()
            ],
        }


def register_all(
    zoo: Zoo | RemoteZoo, path: Path, base: str | None, *, jobs: int | None, force_base: bool, as_json: bool
) -> int:
    """Register what a folder or a list names; returns the exit code.

    A failure is reported and the others go on. Ctrl-C ends after the registration at hand is undone, or
    finished by the process that began it.

    Raises:
        InvalidInputError: `jobs` are asked of a server, which registers what comes over one connection.
        VariantNotFoundError: neither the zoo nor the list has a variant `base`; nothing was registered.
        UnsupportedAdapterError: `base` is an adapter, and so is one of the list; nothing was registered.
    """
    from blockzoo.errors import InvalidInputError
    from blockzoo.registering.batch import check_base, read_batch
    from blockzoo.zoo import Zoo

    if jobs is not None and not isinstance(zoo, Zoo):
        raise InvalidInputError("--jobs does not go with --server", hint="Leave it out.")
    entries = read_batch(path, base)
    if base is not None and base.partition("@")[0] not in {entry.name for entry in entries}:
        check_base(entries, base, zoo.resolve(base))
    outcome = Outcome()
    try:
        with closing(_registered(zoo, entries, jobs)) as results:
            for number, (entry, result) in enumerate(results, 1):
                outcome.add(entry.name, result)
                if not as_json:
                    print_one_of_many(number, len(entries), entry.name, result, force_base=force_base)
    except KeyboardInterrupt:
        note(
            f"At least {len(outcome.done)} of {len(entries)} are in the zoo. "
            "The same command goes on from there: it finds them unchanged."
        )
        raise
    if as_json:
        print_json(outcome.to_json())
    else:
        print_many(list(outcome.done.values()), len(outcome.failed))
    return max(map(exit_code, outcome.failed.values()), default=0)


def _registered(
    zoo: Zoo | RemoteZoo, entries: Sequence[BatchEntry], jobs: int | None
) -> Generator[tuple[BatchEntry, RegisterResult | BlockzooError], None, None]:
    """Register one after the other, but runs of adapters with several processes where the zoo is at hand."""
    from blockzoo.registering.parallel import is_adapter, register_in_parallel, useful_jobs
    from blockzoo.zoo import Zoo

    for are_adapters, group in groupby(entries, is_adapter):
        run = list(group)
        number = useful_jobs(len(run), zoo.url, jobs) if are_adapters and isinstance(zoo, Zoo) else 1
        if number > 1:
            yield from register_in_parallel(zoo.url, run, number)
            continue
        with zoo.batch():
            for entry in run:
                yield entry, _register(zoo, entry)


def _register(zoo: Zoo | RemoteZoo, entry: BatchEntry) -> RegisterResult | BlockzooError:
    from blockzoo.errors import BlockzooError

    try:
        with progress() as reporter:
            return zoo.register(
                entry.source, name=entry.name, base=entry.base, revision=entry.revision, progress=reporter
            )
    except BlockzooError as error:
        if error.reason == "UNAVAILABLE":
            raise
        return error
