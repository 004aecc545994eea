"""What is in a zoo on a storage: manifests by digest, refs by name and number.

Refs are created only, never changed. The highest number of a name is current. A tombstone above
all others removes the name, and every ref below a tombstone counts as deleted, whether or not it
is still stored. Numbers are therefore never used twice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

from blockzoo import layout
from blockzoo.canonical import digest_bytes, parse_json, seal_json, unseal_json
from blockzoo.clock import Clock
from blockzoo.digest import is_digest
from blockzoo.errors import (
    BlockzooError,
    CorruptBlobError,
    CorruptManifestError,
    InvalidInputError,
    ManifestNotFoundError,
    NotFoundError,
    VariantNotFoundError,
)
from blockzoo.manifest import (
    BlobId,
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
from blockzoo.storage.base import ObjectInfo, Stamp
from blockzoo.store.blobs import MAX_HEADER, BlobStore
from blockzoo.store.packed import PackedStorage
from blockzoo.store.remembered import Remembered


@dataclass(frozen=True, slots=True)
class DamagedRef:
    """A version of a variant whose ref cannot be read.

    Attributes:
        name, version: what it names.
        error: what is wrong with it.
    """

    name: VariantName
    version: int
    error: BlockzooError


OnDamage = Callable[[DamagedRef], None]
"""Told of each damaged ref, so that one does not hide all others."""


def ignore_damage(ref: DamagedRef) -> None:
    """For those who only look for something else."""
    del ref


class Objects:
    """The blobs, manifests and refs of a zoo. Reading is safe from several threads.

    It checks no format and holds no lease: what writes goes through `blockzoo.store.zoo_store.ZooStore`.

    Args:
        storage: where the zoo is.
        clock: for leases, and for times that are stored.
    """

    def __init__(self, storage: PackedStorage, clock: Clock) -> None:
        self.storage = storage
        self.clock = clock
        self.blobs = BlobStore(storage)
        self.remembered = Remembered(self)

    def get_block(self, block: BlockId) -> BlockManifest:
        """Return a block manifest; raises ManifestNotFoundError or CorruptManifestError."""
        return block_from_json(self.read_manifest(layout.block_key(block), block))

    def get_chain(self, chain: ChainId) -> ChainManifest:
        """Return a chain manifest; raises ManifestNotFoundError or CorruptManifestError."""
        return chain_from_json(self.read_manifest(layout.chain_key(chain), chain))

    def bases(self, blob: BlobId) -> set[BlobId | None]:
        """Return what each stored copy of a blob is a difference to, None for one that is none.

        There are several where registrations at once have stored it; raises as `BlobStore.info` does.
        """
        found = {self.blobs.info(blob).base}
        for head in self.storage.copies(layout.blob_key(blob), MAX_HEADER):
            with suppress(CorruptBlobError):
                found.add(self.blobs.parse(blob, head).base)
        return found

    def has_manifest(self, digest: str) -> bool:
        """Tell whether a block or chain of this digest is stored."""
        return any(self.storage.size(key(digest)) is not None for key in (layout.block_key, layout.chain_key))

    def read_manifest(self, key: str, digest: str) -> JsonValue:
        """Return the JSON at `key`, verified against its digest."""
        data = self.read_manifest_bytes(key, digest)
        try:
            return parse_json(data)
        except InvalidInputError as error:
            raise damaged(key) from error

    def read_manifest_bytes(self, key: str, digest: str) -> memoryview:
        """Return the canonical JSON at `key` as it is stored, verified against its digest."""
        try:
            if not is_digest(digest):
                raise NotFoundError(f"{digest[:80]!r} is no digest")
            data = self.storage.get(key)
        except NotFoundError as error:
            raise ManifestNotFoundError(
                f"manifest {key} is not in the zoo",
                hint="Run `blockzoo verify --repair FROM`.",
                digest=digest,
            ) from error
        if digest_bytes(data) != digest:
            raise damaged(key)
        return data

    def numbers(self) -> dict[VariantName, list[int]]:
        """Return the stored version numbers of every name, ascending, tombstones too."""
        found: dict[VariantName, list[int]] = defaultdict(list)
        for info in self.storage.list(layout.REFS):
            parsed = layout.version_of(info.key)
            if parsed is not None:
                found[VariantName(parsed[0])].append(parsed[1])
        return {name: sorted(numbers) for name, numbers in sorted(found.items())}

    def versions(self, name: str, on_damage: OnDamage | None = None) -> list[VariantRecord]:
        """Return the versions of a variant, oldest first; empty when it is not registered.

        Args:
            name: of the variant.
            on_damage: called for each ref that is damaged. Without it the error is raised.
        """
        return self._live(check_name(name), self._numbers_of(name), on_damage)

    def records(self, on_damage: OnDamage | None = None) -> list[VariantRecord]:
        """Return every version of every variant: the roots of the zoo; `on_damage` as in `versions`."""
        return [
            record
            for name, numbers in self.numbers().items()
            for record in self._live(name, numbers, on_damage)
        ]

    def dead_refs(self) -> Iterator[ObjectInfo]:
        """Yield the refs below a tombstone, which count as deleted and which a crash left behind."""
        tombstones: dict[str, int] = {}
        for info in self.storage.list(layout.REFS):
            parsed = layout.version_of(info.key)
            if parsed is None:
                continue
            name, version = parsed
            if name not in tombstones:
                tombstones[name] = self.last_tombstone(name)
            if version < tombstones[name]:
                yield info

    def variants(self, on_damage: OnDamage | None = None) -> list[VariantRecord]:
        """Return the current version of every variant, by name; `on_damage` as in `versions`."""
        current = (self._newest(name, numbers, on_damage) for name, numbers in self.numbers().items())
        return [record for record in current if record is not None and not record.deleted]

    def names(self) -> list[str]:
        """Return the names of the registered variants that can be read."""
        return [record.name for record in self.variants(ignore_damage)]

    def resolve(self, name: str, version: int | None = None) -> VariantRecord:
        """Return a version of a variant, the current one when None.

        Raises:
            VariantNotFoundError: it is not registered; suggests near names.
        """
        check_name(name)
        if version is None:
            record = self.current(name)
            if record is not None:
                return record
        else:
            damaged: dict[int, BlockzooError] = {}
            for record in self.versions(name, lambda ref: damaged.update({ref.version: ref.error})):
                if record.version == version:
                    return record
            if version in damaged:
                raise damaged[version]
        ref = name if version is None else f"{name}@{version}"
        raise VariantNotFoundError(ref, self._suggest(name, version))

    def check_registered(self, name: str, version: int | None = None) -> None:
        """Raise VariantNotFoundError as `resolve` does; a version whose ref is damaged is registered."""
        with suppress(CorruptManifestError):
            self.resolve(name, version)

    def current(self, name: str) -> VariantRecord | None:
        """Return the current version of a variant, None when it is not registered."""
        record = self._newest(VariantName(check_name(name)), self._numbers_of(name))
        return None if record is None or record.deleted else record

    def stamp(self, name: str) -> Stamp | None:
        """Return what changes with the versions of a variant; see `Storage.stamp`."""
        return self.storage.stamp(f"{layout.REFS}/{check_name(name)}")

    def add_version(self, draft: VariantRecord) -> VariantRecord:
        """Store a record under the next free number. For `Registration` and tombstones only."""
        while True:
            record = _numbered(draft, self._numbers_of(draft.name))
            if self.put_ref(record):
                return record

    def add_unless_same(self, draft: VariantRecord) -> tuple[VariantRecord, bool]:
        """Store a record under the next free number, unless the current version is the same.

        Looked at again whenever another writer takes the number, so of two writers of the same content one
        makes a version.

        Returns:
            The version that has this content now, and whether it was stored by this call.
        """
        while True:
            numbers = self._numbers_of(draft.name)
            newest = self._newest(draft.name, numbers, ignore_damage)
            if newest is not None and newest.has_content_of(draft):
                return newest, False
            record = _numbered(draft, numbers)
            if self.put_ref(record):
                return record, True

    def put_ref(self, record: VariantRecord) -> bool:
        """Create the ref of a record unless its number is taken; tell whether it was free."""
        return self.storage.put_if_absent(layout.ref_key(record.name, record.version), [ref_body(record)])

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
            record = variant_from_json(unseal_json(data))
        except BlockzooError as error:
            raise damaged(key) from error
        if (record.name, record.version) != (name, version):
            raise damaged(key)
        return record

    def last_tombstone(self, name: str) -> int:
        """Return the number of the newest tombstone of a name, 0 where there is none."""
        for version in reversed(self._numbers_of(name)):
            try:
                if self.read_ref(name, version).deleted:
                    return version
            except NotFoundError:
                continue
        return 0

    def _numbers_of(self, name: str) -> list[int]:
        parsed = (layout.version_of(info.key) for info in self.storage.list(f"{layout.REFS}/{name}"))
        return sorted(item[1] for item in parsed if item is not None)

    def _live(
        self, name: VariantName, numbers: list[int], on_damage: OnDamage | None = None
    ) -> list[VariantRecord]:
        """Read from the newest down to the first tombstone."""
        live: list[VariantRecord] = []
        for version in reversed(numbers):
            record = self._read_or_tell(name, version, on_damage)
            if record is None:
                continue
            if record.deleted:
                break
            live.append(record)
        return live[::-1]

    def _read_or_tell(
        self, name: VariantName, version: int, on_damage: OnDamage | None
    ) -> VariantRecord | None:
        """A stored record; None when it was removed since the listing, or is damaged and that was told."""
        try:
            return self.read_ref(name, version)
        except NotFoundError:
            return None
        except CorruptManifestError as error:
            if on_damage is None:
                raise
            on_damage(DamagedRef(name, version, error))
            return None

    def _newest(
        self, name: VariantName, numbers: list[int], on_damage: OnDamage | None = None
    ) -> VariantRecord | None:
        for version in reversed(numbers):
            try:
                return self.read_ref(name, version)
            except NotFoundError:
                continue  # removed since the listing
            except CorruptManifestError as error:
                if on_damage is None:
                    raise
                # An older version must not stand in for it without a word.
                on_damage(DamagedRef(name, version, error))
                return None
        return None

    def _delete_refs(self, name: str, versions: list[int]) -> None:
        keys = [layout.ref_key(name, version) for version in versions]
        for key in keys:
            self.storage.delete(key)
        self.storage.sync(keys)

    def _suggest(self, name: str, version: int | None) -> list[str]:
        if version is not None:
            known = [f"{name}@{record.version}" for record in self.versions(name, ignore_damage)]
            if known:
                return known[-3:]
        return near_names(name, self.names())


def _numbered(draft: VariantRecord, numbers: list[int]) -> VariantRecord:
    """The record as the version after the newest of these."""
    version = (numbers[-1] if numbers else 0) + 1
    if version > MAX_VERSION:
        raise InvalidInputError(f"{draft.name} has no version numbers left", hint="Register another name.")
    return replace(draft, version=version)


def ref_body(record: VariantRecord) -> bytes:
    """Return the bytes that a version of a variant is stored as."""
    return seal_json(variant_to_json(record))


def damaged(key: str) -> CorruptManifestError:
    """Return the error for an object that is not what its key says."""
    return CorruptManifestError(
        f"{key} is damaged", hint="Run `blockzoo verify --repair FROM` with a backup.", key=key
    )
