"""A zoo on a storage, below the comfort of `blockzoo.zoo`: opened or created, written, rolled back.

`remove` writes a tombstone above all versions and then deletes them; see `blockzoo.store.objects`.
"""

from __future__ import annotations

import importlib.metadata
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from blockzoo import layout
from blockzoo.canonical import canonical_json, digest_json, parse_json
from blockzoo.clock import Clock, SystemClock
from blockzoo.errors import (
    CurrentVersionError,
    FormatVersionError,
    InvalidInputError,
    NoOlderVersionError,
    NotFoundError,
    UnsupportedStoreError,
    ZooNotFoundError,
)
from blockzoo.manifest import ChainId, JsonValue, VariantRecord
from blockzoo.names import check_name
from blockzoo.storage.base import Storage
from blockzoo.store.leases import LEASE_TTL_S, Entry
from blockzoo.store.objects import Objects, damaged
from blockzoo.store.packed import PackedStorage
from blockzoo.store.registration import Registration

FORMAT = 2
"""The zoo format this version begins new zoos with, and the newest it understands.

2 keeps small objects in packs (`blockzoo.store.packs`). A zoo of format 1 stays one, so that programs of
blockzoo 0.1 beside this one go on reading it; a backup of it into a new place is of format 2.
"""

_FIRST_FORMAT = 1


class ZooStore(Objects):
    """A zoo. Reading is safe from several threads; writing goes through `registration()`."""

    def __init__(
        self, storage: Storage, clock: Clock, *, min_reader: int = FORMAT, min_writer: int = FORMAT
    ) -> None:
        super().__init__(PackedStorage(storage, writes_packs=min_reader > _FIRST_FORMAT), clock)
        self.formats = min_reader, min_writer
        self._min_writer = min_writer
        self._batch: tuple[int, Registration] | None = None

    @classmethod
    def open(cls, storage: Storage, *, create: bool = False, clock: Clock | None = None) -> ZooStore:
        """Open the zoo on a storage, or begin one there.

        Raises:
            ZooNotFoundError: there is none and `create` is false.
            InvalidInputError: `create`, but the place holds something else.
            FormatVersionError: the zoo is newer than this version can read.
            CorruptManifestError: zoo.json is damaged.
            UnsupportedStoreError: the storage does not create conditionally.
        """
        try:
            stored = bytes(storage.get(layout.ZOO))
        except NotFoundError:
            if not create:
                raise ZooNotFoundError(
                    f"there is no zoo at {storage.url}",
                    hint="Check the path, or create a zoo by registering a checkpoint there.",
                    url=storage.url,
                ) from None
            stored = _create(storage)
        min_reader, min_writer = _read_format(stored, storage.url)
        if min_reader > FORMAT:
            raise _too_new(storage.url, "read", min_reader)
        # The same bytes again: harmless where conditions are ignored, and it shows that they are.
        if storage.is_remote and storage.put_if_absent(layout.ZOO, [stored]):
            raise UnsupportedStoreError(
                f"{storage.url} overwrites objects that must only be created",
                hint="Use a store with conditional writes (`If-None-Match: *`), or a local folder.",
                url=storage.url,
            )
        return cls(storage, clock or SystemClock(), min_reader=min_reader, min_writer=min_writer)

    def header_problem(self) -> str | None:
        """What is wrong with zoo.json; None where nothing is.

        Zoos of blockzoo 0.1 have no digest in it: there only the form of the fields tells.
        """
        try:
            stored = bytes(self.storage.get(layout.ZOO))
        except NotFoundError:
            return f"{layout.ZOO} is missing"
        return None if _is_whole(stored) else f"{layout.ZOO} is damaged"

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
            self._batch = None
            shared.__exit__(None, None, None)
            self._batch = thread, self.registration(shared.purpose)
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


def _create(storage: Storage) -> bytes:
    for info in storage.list(""):
        raise InvalidInputError(
            f"{storage.url} is not a zoo and not empty (it holds {info.key})",
            hint="Choose an empty folder or one that does not exist yet.",
            url=storage.url,
        )
    body = _header()
    if storage.put_if_absent(layout.ZOO, [body]):
        return body
    # Somebody else began the same zoo a moment earlier.
    return bytes(storage.get(layout.ZOO))


def _header() -> bytes:
    fields: dict[str, JsonValue] = {
        "format": FORMAT,
        "min_reader": FORMAT,
        "min_writer": FORMAT,
        "created_by": f"blockzoo {importlib.metadata.version('blockzoo')}",
    }
    return canonical_json({**fields, "digest": digest_json(fields)})


def _read_format(stored: bytes, url: str) -> tuple[int, int]:
    try:
        fields = parse_json(stored)
    except InvalidInputError as error:
        raise damaged(f"{url}/{layout.ZOO}") from error
    if isinstance(fields, dict):
        min_reader, min_writer = fields.get("min_reader"), fields.get("min_writer")
        if isinstance(min_reader, int) and isinstance(min_writer, int):
            return min_reader, min_writer
    raise damaged(f"{url}/{layout.ZOO}")


def _is_whole(stored: bytes) -> bool:
    try:
        fields = parse_json(stored)
    except InvalidInputError:
        return False
    if not isinstance(fields, dict) or canonical_json(fields) != stored:
        return False
    digest = fields.pop("digest", None)
    if digest is not None:
        return digest == digest_json(fields)
    made = fields.pop("created_by", None)
    return (
        fields == dict.fromkeys(("format", "min_reader", "min_writer"), _FIRST_FORMAT)
        and isinstance(made, str)
        and re.fullmatch(r"blockzoo [0-9]+\.[0-9]+[0-9a-z.+]*", made) is not None
    )


def _too_new(url: str, verb: str, needed: int) -> FormatVersionError:
    return FormatVersionError(
        f"the zoo at {url} needs format {needed} to {verb}; this blockzoo knows format {FORMAT}",
        hint="Upgrade blockzoo.",
        url=url,
        needed=needed,
        known=FORMAT,
    )
