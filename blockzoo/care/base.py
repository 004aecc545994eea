"""What gc, verify and backup ask about each kind of data that a zoo keeps. `holdings` lists the kinds."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

from blockzoo.errors import NotFoundError
from blockzoo.storage.base import Chunks
from blockzoo.store.closure import Problem
from blockzoo.store.leases import LeaseHolder
from blockzoo.store.zoo_store import ZooStore


@dataclass(frozen=True, slots=True)
class Fault:
    """An object that a kind relies on and that is missing or damaged.

    Attributes:
        key: the object; one of the kinds owns it.
        missing: True when it is not stored, False when it is damaged.
        message: what is wrong with it. Not used for an object that is known as faulty already.
        variant: NAME@N of the version that needs it; "" when no variant does.
    """

    key: str
    missing: bool
    message: str
    variant: str = ""


@dataclass(frozen=True, slots=True)
class CopyTask:
    """A copy of one zoo into another.

    Attributes:
        source: where to read.
        destination: where to write.
        names: copy only these variants, and what is about them; everything when None.
        revive: bring back what was removed at the destination.
        reading: lease at the source, which may be read-only.
        writing: lease at the destination.
        on_plan: called once with the stored bytes that are going to be copied.
        on_bytes: called from any thread with the stored bytes of each object just copied.
    """

    source: ZooStore
    destination: ZooStore
    names: frozenset[str] | None
    revive: bool
    reading: LeaseHolder
    writing: LeaseHolder
    on_plan: Callable[[int], None]
    on_bytes: Callable[[int], None]


@dataclass(slots=True)
class Copied:
    """What a copy brought to the destination; the fields are those of `blockzoo.care.backup.CopyReport`."""

    copied: int = 0
    num_bytes: int = 0
    present: int = 0
    added: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    revived: dict[str, str] = field(default_factory=dict)

    def add(self, other: Copied) -> None:
        """Count what another copy brought too."""
        self.copied += other.copied
        self.num_bytes += other.num_bytes
        self.present += other.present
        self.added += other.added
        self.skipped |= other.skipped
        self.revived |= other.revived


def _owns_nothing(_key: str) -> bool:
    return False


def _is_good(_store: ZooStore, _key: str) -> None:
    """Nothing to check: the kind has no objects of its own."""


def _no_good_bytes(_source: ZooStore, key: str) -> Chunks:
    raise NotFoundError(f"{key} is not taken from another zoo", key=key)


def _needs_nothing(_store: ZooStore, _on_problem: Problem | None) -> Collection[str]:
    return ()


def _no_faults(_store: ZooStore, _known: Collection[str]) -> Iterator[Fault]:
    return iter(())


def _stays_behind(_task: CopyTask) -> Copied:
    return Copied()


@dataclass(frozen=True, slots=True)
class Holding:
    """One kind of data that a zoo keeps. Parts that a kind does not name do nothing.

    Attributes:
        name: for people and tests.
        folders: where the objects of this kind are; verify reads all of them.
        owns: whether a key in these folders is spelled as this kind spells keys. Others are strays.
        check: read the object at a key that the kind owns. Raises CorruptionError when it is damaged, and
            NotFoundError when it, or an object that it is decoded with, is missing.
        good_bytes: read from another zoo the verified bytes to store at a key that the kind owns. Raises
            NotFoundError or CorruptionError. By default the kind is not repaired.
        needed: the keys of chains, blocks and blobs that gc must keep. gc calls it after it has read the
            leases: a writer publishes what it wrote before it drops its lease, so one of the two is seen. The
            second argument is called for what cannot be followed; without one the error is raised, and gc
            deletes nothing.
        faults: what the kind relies on and lacks, and the objects of known faults that hurt a variant, once
            for each variant. The second argument has the keys of the known faults; verify adds to it what
            this yields.
        faults_behind: what an object at a key that was just repaired needs and lacks, where that takes less
            than `faults`, which repair asks otherwise.
        copy: bring this kind to another zoo. Called in the order of the list, with leases on both sides. By
            default the kind is not copied.
    """

    name: str
    folders: tuple[str, ...] = ()
    owns: Callable[[str], bool] = _owns_nothing
    check: Callable[[ZooStore, str], None] = _is_good
    good_bytes: Callable[[ZooStore, str], Chunks] = _no_good_bytes
    needed: Callable[[ZooStore, Problem | None], Collection[str]] = _needs_nothing
    faults: Callable[[ZooStore, Collection[str]], Iterator[Fault]] = _no_faults
    faults_behind: Callable[[ZooStore, str], Iterator[Fault]] | None = None
    copy: Callable[[CopyTask], Copied] = _stays_behind
