"""A zoo on a storage, below the comfort of `blockzoo.zoo`: manifests by digest, refs by name and number.

Refs are created only, never changed. The highest number of a name is current; `remove`
writes a tombstone above all others and then deletes them, and whatever is left below
a tombstone counts as deleted. Numbers are therefore never used twice.
"""

from __future__ import annotations

import importlib.metadata
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace

from blockzoo import layout
from blockzoo.canonical import canonical_json, digest_bytes, digest_json, parse_json
from blockzoo.clock import Clock, SystemClock
from blockzoo.errors import (
    BlockzooError,
    CorruptManifestError,
    CurrentVersionError,
    FormatVersionError,
    InvalidInputError,
    ManifestNotFoundError,
    NotFoundError,
    UnsupportedStoreError,
    VariantNotFoundError,
    ZooNotFoundError,
)
from blockzoo.manifest import (
    BlockId,
    BlockManifest,
    ChainId,
    ChainManifest,
    JsonValue,
    VariantName,
    VariantRecord,
)
from blockzoo.manifest_json import block_from_json, chain_from_json, variant_from_json, variant_to_json
from blockzoo.names import MAX_VERSION, check_name, near_names
from blockzoo.storage.base import ObjectInfo, Stamp, Storage
from blockzoo.store.blobs import BlobStore
from blockzoo.store.leases import LEASE_TTL_S, Entry
from blockzoo.store.registration import Registration

FORMAT = 1
"""The zoo format this version writes, and the newest it understands."""


class ZooStore:
    """A zoo. Reading is safe from several threads; writing goes through `registration()`."""

    def __init__(self, storage: Storage, clock: Clock, min_writer: int) -> None:
        self.storage = storage
        self.clock = clock
        self.blobs = BlobStore(storage)
        self._min_writer = min_writer

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
                f"{storage.url} overwrites objects that should only be created",
                hint="Use a store with conditional writes (`If-None-Match: *`), or a local folder.",
                url=storage.url,
            )
        return cls(storage, clock or SystemClock(), min_writer)

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
        """Begin to write; see `Registration` for the arguments."""
        return Registration(self, purpose, ttl_s=ttl_s, workers=workers, on_bytes=on_bytes, on_wait=on_wait)

    def get_block(self, block: BlockId) -> BlockManifest:
        """Return a block manifest; raises ManifestNotFoundError or CorruptManifestError."""
        return block_from_json(self.read_manifest(layout.block_key(block), block))

    def get_chain(self, chain: ChainId) -> ChainManifest:
        """Return a chain manifest; raises ManifestNotFoundError or CorruptManifestError."""
        return chain_from_json(self.read_manifest(layout.chain_key(chain), chain))

    def has_manifest(self, digest: str) -> bool:
        """Tell whether a block or chain of this digest is stored."""
        return any(self.storage.size(key(digest)) is not None for key in (layout.block_key, layout.chain_key))

    def read_manifest(self, key: str, digest: str) -> JsonValue:
        """Return the JSON at `key`, verified against its digest."""
        try:
            data = self.storage.get(key)
        except NotFoundError as error:
            raise ManifestNotFoundError(
                f"manifest {key} is not in the zoo",
                hint="Run `blockzoo verify --repair FROM`.",
                digest=digest,
            ) from error
        if digest_bytes(data) != digest:
            raise _damaged(key)
        try:
            return parse_json(data)
        except InvalidInputError as error:
            raise _damaged(key) from error

    def numbers(self) -> dict[VariantName, list[int]]:
        """Return the stored version numbers of every name, ascending, tombstones too."""
        found: dict[VariantName, list[int]] = defaultdict(list)
        for info in self.storage.list(layout.REFS):
            parsed = layout.version_of(info.key)
            if parsed is not None:
                found[VariantName(parsed[0])].append(parsed[1])
        return {name: sorted(numbers) for name, numbers in sorted(found.items())}

    def versions(self, name: str) -> list[VariantRecord]:
        """Return the versions of a variant, oldest first; empty when it is not registered."""
        return self._live(check_name(name), self._numbers_of(name))

    def records(self) -> list[VariantRecord]:
        """Return every version of every variant: the roots of the zoo."""
        return [record for name, numbers in self.numbers().items() for record in self._live(name, numbers)]

    def dead_refs(self) -> Iterator[ObjectInfo]:
        """Yield the refs below a tombstone, which count as deleted and which a crash left behind."""
        tombstones: dict[str, int] = {}
        for info in self.storage.list(layout.REFS):
            parsed = layout.version_of(info.key)
            if parsed is None:
                continue
            name, version = parsed
            if name not in tombstones:
                tombstones[name] = self._last_tombstone(name)
            if version < tombstones[name]:
                yield info

    def variants(self) -> list[VariantRecord]:
        """Return the current version of every variant, by name."""
        current = (self._newest(name, numbers) for name, numbers in self.numbers().items())
        return [record for record in current if record is not None and not record.deleted]

    def names(self) -> list[str]:
        """Return the names of the registered variants."""
        return [record.name for record in self.variants()]

    def resolve(self, name: str, version: int | None = None) -> VariantRecord:
        """Return a version of a variant, the current one when None.

        Raises:
            VariantNotFoundError: it is not registered; suggests near names.
        """
        check_name(name)
        if version is None:
            record = self._newest(VariantName(name), self._numbers_of(name))
            if record is not None and not record.deleted:
                return record
        else:
            for record in self.versions(name):
                if record.version == version:
                    return record
        ref = name if version is None else f"{name}@{version}"
        raise VariantNotFoundError(ref, self._suggest(name, version))

    def stamp(self, name: str) -> Stamp | None:
        """Return what changes with the versions of a variant; see `Storage.stamp`."""
        return self.storage.stamp(f"{layout.REFS}/{check_name(name)}")

    def remove(self, name: str) -> VariantRecord:
        """Remove a variant with all its versions; returns the tombstone.

        Raises:
            VariantNotFoundError: it is not registered.
        """
        self.resolve(name)
        self.check_writable()
        tombstone = self.add_version(
            VariantRecord(check_name(name), 1, ChainId(""), kind="tombstone", deleted=True)
        )
        self._delete_refs(tombstone.name, [n for n in self._numbers_of(name) if n < tombstone.version])
        return tombstone

    def remove_version(self, name: str, version: int) -> VariantRecord:
        """Remove one old version; returns what it was.

        Raises:
            VariantNotFoundError: there is no such version.
            CurrentVersionError: it is the current one.
        """
        record = self.resolve(name, version)
        self.check_writable()
        if self.resolve(name).version == version:
            hint = f"Name an older version, or remove all with `blockzoo rm {name}`."
            raise CurrentVersionError(name, version, hint=hint)
        self._delete_refs(record.name, [version])
        return record

    def rollback(self, name: str, to: int | None = None) -> VariantRecord:
        """Make an older version current again by a new version that equals it.

        Args:
            name: variant.
            to: version to go back to, the one before the current when None.

        Raises:
            VariantNotFoundError: there is no such version.
            CurrentVersionError: `to` is the current version.
        """
        current = self.resolve(name)
        if to is None:
            older = [record.version for record in self.versions(name) if record.version < current.version]
            if not older:
                raise VariantNotFoundError(f"{name}@{current.version - 1}", [f"{name}@{current.version}"])
            to = older[-1]
        target = self.resolve(name, to)
        if target.version == current.version:
            hint = f"It is in use already. `blockzoo show {name}@N` says what version N was."
            raise CurrentVersionError(name, to, hint=hint)
        with self.registration(f"rollback {name} to {to}") as registration:
            return registration.commit(
                name,
                target.chain,
                kind=target.kind,
                files=target.files,
                provenance={**target.provenance, "rollback_of": f"{name}@{to}"},
            )

    def add_version(self, draft: VariantRecord) -> VariantRecord:
        """Store a record under the next free number. For `Registration` and tombstones only."""
        while True:
            numbers = self._numbers_of(draft.name)
            record = replace(draft, version=(numbers[-1] if numbers else 0) + 1)
            if record.version > MAX_VERSION:
                raise InvalidInputError(
                    f"{draft.name} has no version numbers left", hint="Register another name."
                )
            if self.put_ref(record):
                return record

    def put_ref(self, record: VariantRecord) -> bool:
        """Create the ref of a record unless its number is taken; tell whether it was free."""
        value = variant_to_json(record)
        body = canonical_json({"record": value, "digest": digest_json(value)})
        return self.storage.put_if_absent(layout.ref_key(record.name, record.version), [body])

    def withdraw(self, record: VariantRecord) -> None:
        """Take back a version that was committed a moment ago and turned out incomplete."""
        self._delete_refs(record.name, [record.version])

    def read_ref(self, name: str, version: int) -> VariantRecord:
        """Return a stored record, tombstone or not.

        Raises:
            NotFoundError: there is none.
            CorruptManifestError: it is damaged.
        """
        key = layout.ref_key(name, version)
        data = self.storage.get(key)
        try:
            fields = parse_json(data)
            if not isinstance(fields, dict) or digest_json(fields.get("record")) != fields.get("digest"):
                raise _damaged(key)
            record = variant_from_json(fields["record"])
        except BlockzooError as error:
            raise _damaged(key) from error
        if (record.name, record.version) != (name, version):
            raise _damaged(key)
        return record

    def _numbers_of(self, name: str) -> list[int]:
        parsed = (layout.version_of(info.key) for info in self.storage.list(f"{layout.REFS}/{name}"))
        return sorted(item[1] for item in parsed if item is not None)

    def _live(self, name: VariantName, numbers: list[int]) -> list[VariantRecord]:
        """Read from the newest down to the first tombstone."""
        live: list[VariantRecord] = []
        for version in reversed(numbers):
            try:
                record = self.read_ref(name, version)
            except NotFoundError:
                continue  # removed since the listing
            if record.deleted:
                break
            live.append(record)
        return live[::-1]

    def _last_tombstone(self, name: str) -> int:
        for version in reversed(self._numbers_of(name)):
            try:
                if self.read_ref(name, version).deleted:
                    return version
            except NotFoundError:
                continue
        return 0

    def _newest(self, name: VariantName, numbers: list[int]) -> VariantRecord | None:
        for version in reversed(numbers):
            try:
                return self.read_ref(name, version)
            except NotFoundError:
                continue  # removed since the listing
        return None

    def _delete_refs(self, name: str, versions: list[int]) -> None:
        keys = [layout.ref_key(name, version) for version in versions]
        for key in keys:
            self.storage.delete(key)
        self.storage.sync(keys)

    def _suggest(self, name: str, version: int | None) -> list[str]:
        if version is not None:
            known = [f"{name}@{record.version}" for record in self.versions(name)]
            if known:
                return known[-3:]
        return near_names(name, [record.name for record in self.variants()])


def _create(storage: Storage) -> bytes:
    for info in storage.list(""):
        raise InvalidInputError(
            f"{storage.url} is not a zoo and not empty (it holds {info.key})",
            hint="Choose an empty folder or one that does not exist yet.",
            url=storage.url,
        )
    body = canonical_json(
        {
            "format": FORMAT,
            "min_reader": FORMAT,
            "min_writer": FORMAT,
            "created_by": f"blockzoo {importlib.metadata.version('blockzoo')}",
        }
    )
    if storage.put_if_absent(layout.ZOO, [body]):
        return body
    # Somebody else began the same zoo a moment earlier.
    return bytes(storage.get(layout.ZOO))


def _read_format(stored: bytes, url: str) -> tuple[int, int]:
    try:
        fields = parse_json(stored)
    except InvalidInputError as error:
        raise _damaged(f"{url}/{layout.ZOO}") from error
    if isinstance(fields, dict):
        min_reader, min_writer = fields.get("min_reader"), fields.get("min_writer")
        if isinstance(min_reader, int) and isinstance(min_writer, int):
            return min_reader, min_writer
    raise _damaged(f"{url}/{layout.ZOO}")


def _too_new(url: str, verb: str, needed: int) -> FormatVersionError:
    return FormatVersionError(
        f"the zoo at {url} needs format {needed} to {verb}; this blockzoo knows format {FORMAT}",
        hint="Upgrade blockzoo.",
        url=url,
        needed=needed,
        known=FORMAT,
    )


def _damaged(key: str) -> CorruptManifestError:
    return CorruptManifestError(
        f"{key} is damaged", hint="Run `blockzoo verify --repair FROM` with a backup.", key=key
    )
