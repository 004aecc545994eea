"""A zoo on a storage, below the comfort of `blockzoo.zoo`: opened or created, written, rolled back.

`remove` writes a tombstone above all versions and then deletes them; see `blockzoo.store.objects`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from blockzoo import layout
from blockzoo.clock import Clock, SystemClock
from blockzoo.errors import (
    CorruptManifestError,
    CurrentVersionError,
    FormatVersionError,
    InvalidInputError,
    NoOlderVersionError,
    NotFoundError,
    UnsupportedStoreError,
    ZooNotFoundError,
)
from blockzoo.manifest import ChainId, VariantRecord
from blockzoo.names import check_name
from blockzoo.storage.base import Storage
from blockzoo.store import header
from blockzoo.store.header import FORMAT
from blockzoo.store.leases import LEASE_TTL_S, Entry
from blockzoo.store.objects import Objects
from blockzoo.store.packed import PackedStorage
from blockzoo.store.registration import Registration


class ZooStore(Objects):
    """A zoo. Reading is safe from several threads; writing goes through `registration()`."""

    def __init__(
        self, storage: Storage, clock: Clock, *, min_reader: int = FORMAT, min_writer: int = FORMAT
    ) -> None:
        super().__init__(PackedStorage(storage, writes_packs=min_reader > header.FIRST_FORMAT), clock)
        self.formats = min_reader, min_writer
        self._min_writer = min_writer
        self._batch: tuple[int, Registration] | None = None

    @classmethod
    def open(
        cls,
        storage: Storage,
        *,
        create: bool = False,
        without_header: bool = False,
        clock: Clock | None = None,
    ) -> ZooStore:
        """Open the zoo on a storage, or begin one there.

        Args:
            storage: where it is.
            create: begin a zoo there when there is none.
            without_header: open it also where zoo.json is damaged or missing and the contents show its
                format; for `blockzoo.care.verify`, which repairs it.
            clock: for leases, and for times that are stored.

        Raises:
            ZooNotFoundError: there is none and `create` is false.
            InvalidInputError: `create`, but the place holds something else.
            FormatVersionError: the zoo is newer than this version can read.
            CorruptManifestError: zoo.json is damaged, or missing though there are variants.
            UnsupportedStoreError: the storage does not create conditionally.
        """
        clock = clock or SystemClock()
        try:
            stored = _stored_header(storage, create=create)
            min_reader, min_writer = header.read(stored, storage.url)
        except CorruptManifestError:
            told = header.told_by(storage) if without_header else None
            if told is None:
                raise
            return cls(storage, clock, min_reader=told, min_writer=told)
        if min_reader > FORMAT:
            raise _too_new(storage.url, "read", min_reader)
        # The same bytes again: harmless where conditions are ignored, and it shows that they are.
        if storage.is_remote and storage.put_if_absent(layout.ZOO, [stored]):
            raise UnsupportedStoreError(
                f"{storage.url} overwrites objects that must only be created",
                hint="Use a store with conditional writes (`If-None-Match: *`), or a local folder.",
                url=storage.url,
            )
        return cls(storage, clock, min_reader=min_reader, min_writer=min_writer)

    def header_problem(self) -> str | None:
        """What is wrong with zoo.json; None where nothing is."""
        try:
            stored = bytes(self.storage.get(layout.ZOO))
        except NotFoundError:
            return f"{layout.ZOO} is missing"
        return None if header.is_whole(stored) else f"{layout.ZOO} is damaged"

    def check_writable(self) -> None:
        """Raise FormatVersionError when this version must not write into the zoo."""
        if self._min_writer > FORMAT:
            raise _too_new(self.storage.url, "write", self._min_writer)

    def registration(
        self,
        purpose: str,
        *,
        ttl_s: float = LEASE_TTL_S,
        workers: int | None = None,
        on_bytes: Callable[[int], None] | None = None,
        on_wait: Callable[[Entry], None] | None = None,
    ) -> Registration:
        """Begin to write; see `Registration` for the arguments.

        Raises:
            FormatVersionError: the zoo is newer than this version can write.
        """
        self.check_writable()
        return Registration(
            self,
            purpose,
            ttl_s=ttl_s,
            workers=workers,
            on_bytes=on_bytes,
            on_wait=on_wait,
            shared=self._shared(),
        )

    @contextmanager
    def batch(self, purpose: str) -> Iterator[None]:
        """Lease, look up and make durable what several registrations rely on once.

        The registrations are those begun meanwhile, one after the other, by this thread.
        """
        self._batch = threading.get_ident(), self.registration(purpose)
        try:
            yield
        finally:
            (_, shared), self._batch = self._batch, None
            shared.__exit__(None, None, None)

    def _shared(self) -> Registration | None:
        """The registration of this thread's batch; another one once its lease ran out."""
        if self._batch is None or self._batch[0] != threading.get_ident():
            return None
        thread, shared = self._batch
        if shared.is_over():
            # First another one: whatever interrupts this, `batch` finds one to end.
            self._batch = thread, Registration(self, shared.purpose)
            shared.__exit__(None, None, None)
        return self._batch[1]

    def remove(self, name: str) -> VariantRecord:
        """Remove a variant with all its versions, damaged or not; returns the tombstone.

        Raises:
            VariantNotFoundError: it is not registered.
        """
        self.check_registered(name)
        self.check_writable()
        tombstone = self.add_version(
            VariantRecord(check_name(name), 1, ChainId(""), kind="tombstone", deleted=True)
        )
        self._delete_refs(tombstone.name, [n for n in self._numbers_of(name) if n < tombstone.version])
        return tombstone

    def remove_version(self, name: str, version: int) -> None:
        """Remove one old version, damaged or not.

        Raises:
            VariantNotFoundError: there is no such version.
            CurrentVersionError: it is the current one.
        """
        self.check_registered(name, version)
        self.check_writable()
        if self._numbers_of(name)[-1] == version:
            hint = f"Name an older version, or remove all with `blockzoo rm {name}`."
            raise CurrentVersionError(name, version, hint=hint)
        self._delete_refs(name, [version])

    def rollback(self, name: str, to: int | None = None) -> VariantRecord:
        """Make an older version current again by a new version that equals it.

        Args:
            name: variant.
            to: version to go back to. None: the one before the current, or before the one that the current
                goes back to: each rollback goes one version further back.

        Raises:
            VariantNotFoundError: there is no such version.
            NoOlderVersionError: `to` is None, and there is none before.
            CurrentVersionError: `to` is the current version.
        """
        current = self.resolve(name)
        if to is None:
            to = self._version_before(name, current)
        target = self.resolve(name, to)
        if target.version == current.version:
            hint = f"It is the current version already. `blockzoo show {name}@N` shows version N."
            raise CurrentVersionError(name, to, hint=hint)
        with self.registration(f"rollback {name} to {to}") as registration:
            return registration.commit(
                name,
                target.chain,
                kind=target.kind,
                files=target.files,
                provenance={**target.provenance, "rollback_of": f"{name}@{to}"},
            )

    def _version_before(self, name: str, current: VariantRecord) -> int:
        """The newest version before the content that is current, whichever version brought that."""
        versions = {record.version: record for record in self.versions(name)}
        origin = current.version
        while (earlier := _rollback_target(versions.get(origin))) is not None and earlier < origin:
            origin = earlier
        older = [version for version in versions if version < origin]
        if not older:
            known = ", ".join(f"{name}@{version}" for version in sorted(versions))
            raise NoOlderVersionError(
                f"{name}@{origin} is the oldest version of {name}, so there is none to go back to",
                hint=f"There is {known}. `blockzoo rollback {name} --to N` goes to version N."
                if len(versions) > 1
                else f"{name} has one version. Registering {name} again makes the next one.",
                variant=name,
                version=origin,
            )
        return max(older)


def _rollback_target(record: VariantRecord | None) -> int | None:
    """The version that a record went back to, None where it brought its own content."""
    _, _, version = (record.provenance.get("rollback_of", "") if record else "").rpartition("@")
    return int(version) if version.isdigit() else None


def _stored_header(storage: Storage, *, create: bool) -> bytes:
    try:
        return bytes(storage.get(layout.ZOO))
    except NotFoundError:
        if any(layout.version_of(info.key) for info in storage.list(layout.REFS)):
            raise header.unreadable(storage.url, "missing") from None
    if create:
        return _create(storage)
    raise ZooNotFoundError(
        f"there is no zoo at {storage.url}",
        hint="Check the path, or create a zoo by registering a checkpoint there.",
        url=storage.url,
    )


def _create(storage: Storage) -> bytes:
    for info in storage.list(""):
        raise InvalidInputError(
            f"{storage.url} is not a zoo and not empty (it holds {info.key})",
            hint="Choose an empty folder or one that does not exist yet.",
            url=storage.url,
        )
    body = header.body()
    if storage.put_if_absent(layout.ZOO, [body]):
        return body
    # Somebody else began the same zoo a moment earlier.
    return bytes(storage.get(layout.ZOO))


def _too_new(url: str, verb: str, needed: int) -> FormatVersionError:
    return FormatVersionError(
        f"the zoo at {url} needs format {needed} to {verb}; this blockzoo knows format {FORMAT}",
        hint="Upgrade blockzoo.",
        url=url,
        needed=needed,
        known=FORMAT,
    )
