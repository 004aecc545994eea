"""Copying a zoo into another: backup, and restore, which is the same copy the other way round.

A copy brings what variants need in the order of dependence (raw blobs, differences,
blocks, chains, refs), each verified before it is written, so an interrupted copy is
a valid zoo and the next one goes on where it stopped. Objects that are there already
are not copied again. A backup is an ordinary zoo: it can be listed and served from.

Refs keep their numbers. Where both sides hold a name, the higher number wins and
the other side's refs are never overwritten:

- a version that the destination lacks and that is newer than its newest is added;
- older ones are not brought back, because somebody removed them there; `revive` does bring them back;
- a tombstone travels too, so a variant removed at the source is removed in the copy;
- the same number with other content is a conflict, reported and left alone.

Equivalence records travel with the decisions about them: all of them, or with `names`
those about two chains of these variants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from blockzoo.care.base import Copied, CopyTask, Holding
from blockzoo.care.holdings import HOLDINGS
from blockzoo.store.leases import LeaseHolder
from blockzoo.store.zoo_store import ZooStore


@dataclass(frozen=True, slots=True)
class CopyReport:
    """What a backup or restore did.

    Attributes:
        copied: objects written.
        copied_bytes: their stored bytes.
        present: objects that were there already.
        added: versions (`name@n`) that the destination has now and had not.
        skipped: versions and decisions that were not copied, with the reason.
        revived: versions that came back under another number: `name@n` at the source -> `name@n` now.
    """

    copied: int
    copied_bytes: int
    present: int
    added: tuple[str, ...]
    skipped: dict[str, str]
    revived: dict[str, str]


def copy_zoo(
    source: ZooStore,
    destination: ZooStore,
    *,
    names: Iterable[str] | None = None,
    revive: bool = False,
    on_plan: Callable[[int], None] | None = None,
    on_bytes: Callable[[int], None] | None = None,
    kinds: Sequence[Holding] = HOLDINGS,
) -> CopyReport:
    """Bring the variants of one zoo to another, and whatever else is kept with them.

    Args:
        source: where to read; leased while it is read, if it can be written.
        destination: where to write.
        names: only these variants; all when None.
        revive: bring back what was removed at the destination: single versions under their numbers, those
            of a removed variant under numbers above its tombstone (`blockzoo.care.reviving`).
        on_plan: called once with the stored bytes that are going to be copied.
        on_bytes: called from any thread with the stored bytes of each object just copied.
        kinds: what a zoo keeps; each is copied after those before it.

    Raises:
        CorruptBlobError, CorruptManifestError, NotFoundError: the source is damaged; what was copied
            before stays and is valid.
        VariantNotFoundError: a name in `names` is not registered at the source.
        StorageError: the destination failed; StorageFullError when it has no room.
    """
    destination.check_writable()
    wanted = None if names is None else frozenset(names)
    for name in wanted or ():
        source.resolve(name)
    report = Copied()
    with _lease(source, "backup (reading)") as reading, _lease(destination, "backup") as writing:
        task = CopyTask(
            source, destination, wanted, revive, reading, writing, on_plan or _ignore, on_bytes or _ignore
        )
        for kind in kinds:
            report.add(kind.copy(task))
    return CopyReport(
        report.copied, report.num_bytes, report.present, tuple(report.added), report.skipped, report.revived
    )


def _ignore(_: int) -> None:
    """Take no notice of progress."""


@contextmanager
def _lease(store: ZooStore, purpose: str) -> Iterator[LeaseHolder]:
    lease = LeaseHolder(store.storage, store.clock, purpose)
    try:
        yield lease
    finally:
        lease.release()
