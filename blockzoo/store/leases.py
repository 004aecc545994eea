"""Leases of registrations and markers of collections: how a writer and gc agree without a lock.

A writer first publishes a lease that lists every digest it is going to rely on,
and only then looks which of them exist. A collector goes the other way round:

1. it lists what is unreachable in the marker ``condemned/<id>.json`` and waits;
2. it publishes ``condemned/<id>.sweep`` and only then reads leases, then refs, a last time;
3. it deletes what is still neither leased nor reachable, and removes its markers.

Creations are totally ordered by the storage. If the writer sees no sweep marker,
its lease was there before the collector's last reading and is respected. If it
sees one that condemns a digest it needs, it waits until that collection has ended
and looks again. Leases are read before refs because a writer publishes its ref
before it drops its lease.

Both carry an expiry time, so a killed process blocks nobody for ever. Whoever
depends on its own entry stops `SKEW_S` before the expiry, others respect it until
the expiry; clocks may therefore differ by up to `SKEW_S`. Each process compares its
clock with the storage's, which stamps what it writes (`check_clock`), and refuses to
go on when they differ by more than half of that. An owner also counts its time by a
clock that nobody can set: its entry has run out for it when either clock says so. So
a clock that is set meanwhile ends an operation early and never late. No storage can fence a
deletion, so a collector that is suspended for longer than that inside a single
delete call is the one thing this cannot prevent; it notices and says so.
"""

from __future__ import annotations

import os
import random
import socket
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from blockzoo.canonical import canonical_json, parse_json
from blockzoo.clock import Clock
from blockzoo.digest import is_digest
from blockzoo.errors import (
    BlockzooError,
    ClockSkewError,
    ConflictError,
    CorruptManifestError,
    NotFoundError,
    StorageError,
)
from blockzoo.layout import CONDEMNED, LEASES
from blockzoo.storage.base import Storage

SKEW_S = 30.0
"""Seconds that two machines' clocks may differ by."""

LEASE_TTL_S = 3600.0
"""Seconds a lease holds unless renewed; what a killed registration leased stays this long."""

STAMP_S = 1.0
"""What storages round their times to, at most."""

_POLL_S = 1.0
"""Seconds between two looks at a collection that a registration waits for."""

_SWEEP = ".sweep"


@dataclass(frozen=True, slots=True)
class Entry:
    """A lease or the first marker of a collection.

    Attributes:
        key: where it is stored.
        digests: what it lists.
        expires: seconds since 1970.
        purpose: who wrote it and why, for people.
    """

    key: str
    digests: frozenset[str]
    expires: float
    purpose: str


def write_entry(storage: Storage, folder: str, digests: Iterable[str], expires: float, purpose: str) -> Entry:
    """Publish a lease (folder "leases") or a marker (folder "condemned").

    It need not survive power loss: nor does the process that it stands for.
    """
    entry = Entry(
        f"{folder}/{uuid.uuid4().hex}.json", frozenset(digests), _milliseconds(expires) / 1000, purpose
    )
    body = canonical_json(
        {
            "digests": [*sorted(entry.digests)],
            "expires_ms": _milliseconds(expires),
            "purpose": purpose,
            "writer": f"{socket.gethostname()} pid {os.getpid()}",
        }
    )
    if not storage.put_if_absent(entry.key, [body], durable=False):
        raise ConflictError(f"{entry.key} exists already")
    return entry


def read_entries(storage: Storage, folder: str) -> Iterator[Entry]:
    """Yield the leases or markers in a folder, expired ones too.

    Raises:
        CorruptManifestError: one cannot be read, so nobody can tell what it protects.
    """
    for info in storage.list(folder):
        if info.key.endswith(".json"):
            try:
                yield _parse(info.key, storage.get(info.key))
            except NotFoundError:
                continue  # dropped between listing and reading: no longer protects anything


def active_leases(storage: Storage, clock: Clock) -> list[Entry]:
    """Return the leases that still protect something."""
    return [entry for entry in read_entries(storage, LEASES) if entry.expires > clock.now()]


def publish_sweep(storage: Storage, clock: Clock, marker: Entry) -> None:
    """Announce that a collection is about to read leases and refs for the last time (ClockSkewError)."""
    key, began = marker.key.removesuffix(".json") + _SWEEP, clock.now()
    storage.put_if_absent(key, [b"{}"], durable=False)
    check_clock(storage, clock, key, began)


def wait_for_sweeps(
    storage: Storage,
    clock: Clock,
    marker: Entry | None = None,
    on_wait: Callable[[Entry], None] = lambda _: None,
) -> None:
    """Wait until no other collection sweeps.

    Two that write one pack again without different objects would each bring back what the other deleted.
    """
    for other in read_entries(storage, CONDEMNED):
        if marker is not None and other.key == marker.key:
            continue
        announced = False
        while _is_sweeping(storage, clock, other):
            if not announced:
                on_wait(other)
                announced = True
            clock.sleep(_POLL_S)


def publish_sweep_alone(storage: Storage, clock: Clock, marker: Entry) -> bool:
    """Wait until no other collection sweeps, then `publish_sweep`; False where the marker ended before.

    Two that begin at once both step back, each for another time.
    """
    while marker.expires > clock.now():
        publish_sweep(storage, clock, marker)
        others = [entry for entry in read_entries(storage, CONDEMNED) if entry.key != marker.key]
        if not any(_is_sweeping(storage, clock, other) for other in others):
            return True
        storage.delete(marker.key.removesuffix(".json") + _SWEEP)
        clock.sleep(_POLL_S * (1 + random.random()))  # noqa: S311
        wait_for_sweeps(storage, clock, marker)
    return False


def check_clock(storage: Storage, clock: Clock, key: str, began: float) -> None:
    """Compare our clock with the storage's.

    Args:
        storage: has an object that this process wrote a moment ago.
        clock: ours.
        key: of that object.
        began: when writing it began, by our clock.

    Raises:
        ClockSkewError: they differ by so much that two machines may differ by more than `SKEW_S`.
    """
    folder = key.rpartition("/")[0]
    stamp = next((info.modified for info in storage.list(folder) if info.key == key), None)
    if stamp is None:
        return
    ahead, behind = began - stamp, stamp - clock.now()
    if max(ahead, behind) > SKEW_S / 2 + STAMP_S:
        differs = f"{ahead:.0f} s ahead of" if ahead > behind else f"{behind:.0f} s behind"
        raise ClockSkewError(
            f"the clock of this machine is {differs} the clock of the storage of the zoo",
            hint="Set the clocks (NTP); leases that protect blocks from gc are counted by them.",
            seconds=round(max(ahead, behind)),
        )


def drop_marker(storage: Storage, marker: Entry) -> None:
    """End a collection. The order lets nobody see a collection that does not sweep yet."""
    storage.delete(marker.key)
    storage.delete(marker.key.removesuffix(".json") + _SWEEP)


def drop_expired(storage: Storage, clock: Clock) -> None:
    """Remove leases and markers that protect nothing any more (ClockSkewError)."""
    began = clock.now()
    probe = write_entry(storage, CONDEMNED, (), began, "comparing clocks")
    try:
        check_clock(storage, clock, probe.key, began)
    finally:
        storage.delete(probe.key)
    # Twice the skew: an owner whose clock is behind may still be about to find out.
    deadline = clock.now() - 2 * SKEW_S
    for folder in (LEASES, CONDEMNED):
        entries = list(read_entries(storage, folder))
        for entry in entries:
            if entry.expires < deadline:
                drop_marker(storage, entry)
        alive = {entry.key.removesuffix(".json") for entry in entries}
        for info in storage.list(folder):
            if info.key.endswith(_SWEEP) and info.key.removesuffix(_SWEEP) not in alive:
                _drop_orphan_sweep(storage, info.key)


def _drop_orphan_sweep(storage: Storage, key: str) -> None:
    # The marker may have been written after the listing above; a sweep marker always follows its marker.
    if storage.size(key.removesuffix(_SWEEP) + ".json") is None:
        storage.delete(key)


def wait_until_safe(
    storage: Storage, clock: Clock, digests: frozenset[str], on_wait: Callable[[Entry], None] | None = None
) -> None:
    """Wait until no sweeping collection condemns any of the digests, which the caller must have leased.

    Afterwards everything among them that exists stays, and what does not may be written.
    """
    for marker in read_entries(storage, CONDEMNED):
        if marker.digests.isdisjoint(digests):
            continue
        announced = False
        while _is_sweeping(storage, clock, marker):
            if on_wait is not None and not announced:
                on_wait(marker)
                announced = True
            clock.sleep(_POLL_S)


def _is_sweeping(storage: Storage, clock: Clock, marker: Entry) -> bool:
    if marker.expires <= clock.now():
        return False
    if storage.size(marker.key.removesuffix(".json") + _SWEEP) is None:
        return False
    return storage.size(marker.key) is not None


class LeaseHolder:
    """The leases of one registration: grows with what it relies on, and renews itself when it grows.

    Used by one thread.

    Args:
        storage: of the zoo.
        clock: what the time is.
        purpose: for people who look at leases.
        ttl_s: seconds a lease lives without renewal.
        beside: one that is released later. What it holds is held; it is renewed and checked with this one.
    """

    def __init__(
        self,
        storage: Storage,
        clock: Clock,
        purpose: str,
        ttl_s: float = LEASE_TTL_S,
        beside: LeaseHolder | None = None,
    ) -> None:
        self._beside = beside
        self._storage = storage
        self._clock = clock
        self._purpose = purpose
        self._ttl_s = ttl_s
        self._entries: list[Entry] = []
        self._until = 0.0  # when the first of them ends, by the clock that nobody sets
        self._offset = 0.0  # how far the clock was ahead of that one when the first was written
        self.held: set[str] = set()

    def hold(self, digests: Iterable[str], on_wait: Callable[[Entry], None] | None = None) -> None:
        """Lease the digests; when this returns, those that exist stay.

        Raises:
            ConflictError: an earlier lease of this holder ran out.
            ClockSkewError: this machine's clock is wrong; see `check_clock`.
        """
        self.renew()
        new = frozenset(digests) - self.held
        if self._beside is not None:
            new -= self._beside.held
        if not new:
            return
        if self._entries and abs(self._ahead() - self._offset) <= STAMP_S:
            self._entries.append(self._write(new))
        else:
            # Others would count a further entry by the clock that was set meanwhile.
            self._begin(self.held | new)
        wait_until_safe(self._storage, self._clock, new, on_wait)
        self.held |= new
        self.check()

    def renew(self) -> None:
        """Extend the leases when half of their time is over; raises ConflictError when all of it is."""
        if self._beside is not None:
            self._beside.renew()
        self.check()
        if not self._entries or self._remaining() > self._ttl_s / 2:
            return
        self._begin(self.held)

    def _begin(self, digests: Iterable[str]) -> None:
        """Put one entry in the place of all earlier ones, and see by its stamp whether our clock is right."""
        began, until, offset = self._clock.now(), self._clock.elapsed() + self._ttl_s, self._ahead()
        entry = self._write(digests)
        try:
            check_clock(self._storage, self._clock, entry.key, began)
        except BlockzooError:
            # Whoever tries again finds the earlier entries, and is checked again.
            self._storage.delete(entry.key)
            raise
        old, self._entries, self._until, self._offset = self._entries, [entry], until, offset
        for one in old:
            self._storage.delete(one.key)

    def _ahead(self) -> float:
        return self._clock.now() - self._clock.elapsed()

    def _write(self, digests: Iterable[str]) -> Entry:
        expires = self._clock.now() + self._ttl_s
        return write_entry(self._storage, LEASES, digests, expires, self._purpose)

    def check(self) -> None:
        """Raise ConflictError when a lease ran out, so that what was found to exist may be gone."""
        if self._beside is not None:
            self._beside.check()
        if self._entries and self._remaining() <= SKEW_S:
            raise ConflictError(
                f"the lease of this operation ({self._purpose}) ran out before it was finished",
                hint="Run it again; data that is stored already is not written twice.",
            )

    def release(self) -> None:
        """Drop the leases."""
        for entry in self._entries:
            # What was committed stays committed when the storage fails just now; the lease ends by itself.
            with suppress(StorageError):
                self._storage.delete(entry.key)
        self._entries = []
        self.held = set()

    def _remaining(self) -> float:
        by_wall = min(entry.expires for entry in self._entries) - self._clock.now()
        return min(by_wall, self._until - self._clock.elapsed())


def _milliseconds(seconds: float) -> int:
    return int(seconds * 1000)


def _parse(key: str, data: memoryview) -> Entry:
    try:
        fields = parse_json(data)
        if isinstance(fields, dict):
            digests, expires, purpose = fields.get("digests"), fields.get("expires_ms"), fields.get("purpose")
            if isinstance(digests, list) and isinstance(expires, int) and all(map(is_digest, digests)):
                return Entry(key, frozenset(map(str, digests)), expires / 1000, str(purpose))
    except BlockzooError as error:
        raise _unreadable(key) from error
    raise _unreadable(key)


def _unreadable(key: str) -> CorruptManifestError:
    return CorruptManifestError(
        f"{key} cannot be read",
        hint="Delete this object when no registration or gc is running on any machine.",
        key=key,
    )
