"""The one way to write into a zoo: lease, look, write what is missing, commit a ref in one step.

Any step may be the last one of a killed process. What it leaves behind is
unreachable and goes with the next gc; refs only ever name what is complete:
blobs are durable before block manifests are written, those before the chain, the
chain before the ref. Small objects wait in memory and become durable together, as one
pack or in that order, before the ref or as soon as they are many.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from types import TracebackType

from blockzoo.canonical import canonical_json, digest_bytes
from blockzoo.digest import blob_id
from blockzoo.errors import (
    BlobNotFoundError,
    ConflictError,
    ManifestNotFoundError,
    NotFoundError,
    StorageError,
)
from blockzoo.layout import blob_key, block_key, chain_key
from blockzoo.manifest import BlobId, BlockId, BlockManifest, ChainId, ChainManifest, FileRef, VariantRecord
from blockzoo.manifest_json import block_bytes, chain_to_json
from blockzoo.names import check_name
from blockzoo.storage.base import Staged
from blockzoo.store.blobs import TensorData, file_data
from blockzoo.store.closure import Walker
from blockzoo.store.leases import LEASE_TTL_S, Entry, LeaseHolder
from blockzoo.store.objects import Objects
from blockzoo.store.packed import as_small
from blockzoo.store.packs import MAX_OBJECT_BYTES, MAX_PACK_BYTES
from blockzoo.store.writing import Committed, Stored

_GROUP_BYTES = 512 << 20
"""Tensor bytes written under one lease object; bounds what an interrupted upload has to repeat."""

_LOCAL_WORKERS = 2
_REMOTE_WORKERS = 16
"""Threads: a disk is busy with few, requests over a network mostly wait."""


class Registration:
    """A write into the zoo, as a context manager. Used by one thread; works with several of its own.

    Callers begin one with `ZooStore.registration`, which checks the format of the zoo first.

    Args:
        store: the zoo.
        purpose: what is being written, for people who look at leases.
        ttl_s: seconds a lease lives without renewal.
        workers: threads to hash, compress and write with; chosen by the storage when None.
        on_bytes: called from any thread with the number of tensor bytes just dealt with.
        on_wait: called when a gc that condemned something needed here has to be waited for.
        shared: another registration of the same thread, open longer than this one, which relies on
            variants in its place.
    """

    def __init__(
        self,
        store: Objects,
        purpose: str,
        *,
        ttl_s: float = LEASE_TTL_S,
        workers: int | None = None,
        on_bytes: Callable[[int], None] | None = None,
        on_wait: Callable[[Entry], None] | None = None,
        shared: Registration | None = None,
    ) -> None:
        self._store = store
        self._storage = store.storage
        self._shared = shared
        self.purpose = purpose
        self._lease: LeaseHolder = LeaseHolder(
            store.storage, store.clock, purpose, ttl_s, None if shared is None else shared._lease
        )
        remote = store.storage.is_remote
        self._workers = workers or (_REMOTE_WORKERS if remote else min(_LOCAL_WORKERS, os.cpu_count() or 1))
        self._on_bytes = on_bytes or (lambda _: None)
        self._on_wait = on_wait
        self._sure: set[str] = set() if shared is None else set(shared._sure)
        self._relied: set[tuple[ChainId, frozenset[BlobId]]] = set()
        self._waiting: dict[str, bytes] = {}
        self._waiting_bytes = 0
        self._created = 0

    def __enter__(self) -> Registration:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            # Nothing was committed since: what is stored all the same need not be sent or written again.
            with suppress(StorageError, ConflictError):
                self.flush()
        self._lease.release()

    def is_over(self) -> bool:
        """Tell whether the lease ran out."""
        try:
            self._lease.check()
        except ConflictError:
            return True
        return False

    def renew(self) -> None:
        """Extend the lease when half of its time is over; raises ConflictError when all of it is."""
        self._lease.renew()

    def flush(self) -> None:
        """Store the small objects that wait in memory; `commit` does so too.

        Raises:
            ConflictError: the lease ran out, so what they need may be gone.
        """
        if self._waiting:
            self._lease.check()
            self._storage.put_objects(self._waiting, self._workers)
        self._waiting, self._waiting_bytes = {}, 0

    def missing(self, blobs: Sequence[BlobId]) -> set[BlobId]:
        """Lease blobs, then say which of them are not stored; the others stay while this is open."""
        self._hold(blobs)
        there = self._present(map(blob_key, blobs))
        return {blob for blob in blobs if blob_key(blob) not in there}

    def put_tensors(self, tensors: Sequence[TensorData]) -> list[Stored]:
        """Store tensors that are missing; one call with many is much faster than many calls.

        Small ones are stored when `commit` is called, or when many have gathered.

        Raises:
            InvalidInputError: bytes, shape and type of a tensor disagree.
            BlobNotFoundError, CorruptBlobError: a base cannot be read.
            StorageError: the storage failed; StorageFullError when it has no room.
            ConflictError: the lease ran out.
        """
        stored: list[Stored] = []
        for group in _groups(tensors):
            stored += self._put_group(group)
        return stored

    def put_file(self, data: bytes) -> FileRef:
        """Store a small file that belongs to a variant."""
        return FileRef(self.put_tensors([file_data(data)])[0].blob, len(data))

    def put_blocks(self, blocks: Sequence[BlockManifest]) -> list[BlockId]:
        """Store block manifests whose blobs are stored; returns their ids in order."""
        bodies = [block_bytes(block) for block in blocks]
        ids = [BlockId(digest_bytes(body)) for body in bodies]
        self._put_manifests(
            [(block_key(digest), digest, body) for digest, body in zip(ids, bodies, strict=True)]
        )
        for digest, block in zip(ids, blocks, strict=True):
            self._store.remembered.add_block(digest, block)
        return ids

    def put_block(self, block: BlockManifest) -> BlockId:
        """Store one block manifest."""
        return self.put_blocks([block])[0]

    def put_chain(self, chain: ChainManifest) -> ChainId:
        """Store a chain manifest whose blocks are stored."""
        body = canonical_json(chain_to_json(chain))
        digest = ChainId(digest_bytes(body))
        self._put_manifests([(chain_key(digest), digest, body)])
        self._store.remembered.add_chain(digest, chain)
        return digest

    def rely_on(self, chain: ChainId) -> None:
        """Lease a stored chain and all it needs, for building on it.

        Raises:
            ManifestNotFoundError, BlobNotFoundError: part of it is not stored (any more).
        """
        self._require(chain, ())

    def rely_on_variant(self, record: VariantRecord) -> None:
        """Lease the chain and the files of a version, for building on it; raises as `rely_on` does."""
        if self._shared is not None:
            self._shared.rely_on_variant(record)
            self._sure |= self._shared._sure
            return
        wanted = record.chain, frozenset(file.blob for file in record.files.values())
        if wanted not in self._relied:
            self._require(*wanted)
            self._relied.add(wanted)

    def commit(
        self,
        name: str,
        chain: ChainId,
        *,
        kind: str,
        files: Mapping[str, FileRef] | None = None,
        provenance: Mapping[str, str] | None = None,
    ) -> VariantRecord:
        """Make the chain the next version of a variant. This is the step that counts.

        Raises:
            InvalidNameError: `name` is not a variant name.
            ManifestNotFoundError, BlobNotFoundError: something that the variant needs is not stored.
            ConflictError: the lease ran out, so nothing was committed.
        """
        draft = VariantRecord(check_name(name), 1, chain, kind, dict(files or {}), dict(provenance or {}))
        self._complete(draft)
        record = self._store.add_version(draft)
        self._confirm(record)
        return record

    def commit_unless_same(
        self,
        name: str,
        chain: ChainId,
        *,
        kind: str,
        files: Mapping[str, FileRef],
        provenance: Mapping[str, str],
    ) -> Committed:
        """Make the chain the next version of a variant, unless the current one is the same.

        What such a version lacked is stored again. Raises as `commit` does.
        """
        draft = VariantRecord(check_name(name), 1, chain, kind, dict(files), dict(provenance))
        self._complete(draft)
        record, is_new = self._store.add_unless_same(draft)
        if is_new:
            self._confirm(record)
            return Committed(record)
        return Committed(record, unchanged=True, restored=self._created)

    def _complete(self, draft: VariantRecord) -> None:
        """Make sure that all that a version needs is stored and stays."""
        self.flush()
        self._require(draft.chain, [file.blob for file in draft.files.values()])
        self._lease.renew()

    def _confirm(self, record: VariantRecord) -> None:
        """Deal with a process that slept through its lease in the middle of the commit."""
        try:
            self._lease.check()
        except ConflictError:
            problems: list[str] = []
            Walker(self._store, lambda digest, _: problems.append(digest)).add_record(record)
            if problems:
                self._store.withdraw(record)
                raise

    def _require(self, chain: ChainId, blobs: Iterable[BlobId]) -> None:
        """Lease the closure, and make sure of whatever was not leased before."""
        self._hold([chain, *blobs])
        # What is missing by now is found missing below, whatever is remembered of it.
        walker = Walker(self._store, with_bases=False, manifests=self._store.remembered)
        walker.add_chain(chain)
        walker.add_blobs(blobs)
        closure = walker.closure
        self._hold(closure.digests())
        # Looked up after the lease: the walk itself may have read what was being deleted.
        doubtful = {key: digest for key, digest in closure.objects().items() if digest not in self._sure}
        for key in doubtful.keys() - self._present(doubtful):
            raise self._missing(key, doubtful[key])
        if doubtful:
            self._storage.sync(doubtful)
        self._sure |= closure.digests()

    def _missing(self, key: str, digest: str) -> NotFoundError:
        if key == blob_key(digest):
            return BlobNotFoundError(f"blob {digest} is not in the zoo any more", blob=digest)
        return ManifestNotFoundError(f"manifest {digest} is not in the zoo any more", digest=digest)

    def _present(self, keys: Iterable[str]) -> set[str]:
        """Of these keys, those whose objects are stored or about to be."""
        keys = set(keys)
        waiting = keys & self._waiting.keys()
        return waiting | self._storage.present(keys - waiting, self._workers)

    def _store_later(self, objects: Mapping[str, bytes]) -> None:
        """Take small objects that are missing and leased."""
        for key, body in objects.items():
            self._waiting[key] = body
            self._waiting_bytes += len(body)
            if self._waiting_bytes >= MAX_PACK_BYTES:
                self.flush()

    def _hold(self, digests: Iterable[str]) -> None:
        self._lease.hold(digests, self._on_wait)

    def _put_group(self, tensors: Sequence[TensorData]) -> list[Stored]:
        bases = self._resolve_bases(tensors)
        drafts = [_Draft(tensor, base) for tensor, base in zip(tensors, bases, strict=True)]
        try:
            with _pool(self._workers) as pool:
                _each(pool, self._prepare, drafts)
                self._on_bytes(sum(draft.num_bytes for draft in drafts if not draft.is_large))
                self._hold(draft.blob for draft in drafts)
                missing = _first_of_each(drafts, self._present(draft.key for draft in drafts))
                _each(pool, self._stage, [draft for draft in missing if not draft.is_staged])
                large = [draft for draft in missing if draft.staged is not None]
                self._storage.flush([draft.staged for draft in large if draft.staged is not None])
                list(pool.map(_publish, large))
            for draft in missing:
                draft.created |= draft.small is not None
            self._store_later({draft.key: draft.small for draft in missing if draft.small is not None})
            # Also what was there before: whoever wrote it may not have made it durable yet.
            self._storage.sync({draft.key for draft in drafts} - self._waiting.keys())
            self._sure.update(draft.blob for draft in drafts)
            self._created += sum(draft.created for draft in missing)
        finally:
            for draft in drafts:
                draft.discard()
        return [
            Stored(draft.blob, draft.created, draft.stored_bytes if draft.created else 0) for draft in drafts
        ]

    def _resolve_bases(self, tensors: Sequence[TensorData]) -> list[BlobId | None]:
        """Lease the bases before looking at them: only a leased raw blob is sure to stay raw."""
        wanted = {tensor.base for tensor in tensors if tensor.base is not None}
        if any(blob_key(base) in self._waiting for base in wanted):
            self.flush()
        self._hold(wanted)
        bases = [self._store.blobs.delta_base(tensor.base, tensor.dtype, tensor.shape) for tensor in tensors]
        further = {base for base in bases if base is not None} - wanted
        if further:
            self._hold(further)
            bases = [
                self._store.blobs.delta_base(tensor.base, tensor.dtype, tensor.shape) for tensor in tensors
            ]
        return bases

    def _prepare(self, draft: _Draft) -> None:
        """Hash, and bring what is large to the storage when it seems to be missing."""
        tensor = draft.tensor
        draft.blob = tensor.blob or blob_id(tensor.dtype, tensor.shape, tensor.data, threads=1)
        draft.key = blob_key(draft.blob)
        # Only a hint: nothing is leased yet, and packs may have come. `_put_group` looks again.
        if draft.is_large and not self._storage.may_hold(draft.key):
            self._stage(draft)
        if draft.is_large:
            self._on_bytes(draft.num_bytes)

    def _stage(self, draft: _Draft) -> None:
        base = draft.base if draft.base != draft.blob else None
        chunks = self._store.blobs.encode(draft.tensor, base)
        draft.small = as_small(chunks)
        if draft.small is not None:
            draft.stored_bytes = len(draft.small)
            return
        draft.stored_bytes = sum(memoryview(chunk).nbytes for chunk in chunks)
        draft.staged = self._storage.stage(chunks)

    def _put_manifests(self, manifests: Sequence[tuple[str, str, bytes]]) -> None:
        self._hold(digest for _, digest, _ in manifests)
        unique = {key: body for key, _, body in manifests}
        there = self._present(unique)
        self._storage.sync(there - self._waiting.keys())
        self._store_later({key: body for key, body in unique.items() if key not in there})
        self._created += len(unique.keys() - there)
        self._sure.update(digest for _, digest, _ in manifests)


class _Draft:
    """A tensor on its way into the zoo; when its object is made, it is `small` or `staged`."""

    __slots__ = (
        "base",
        "blob",
        "created",
        "is_large",
        "key",
        "num_bytes",
        "small",
        "staged",
        "stored_bytes",
        "tensor",
    )

    def __init__(self, tensor: TensorData, base: BlobId | None) -> None:
        self.tensor = tensor
        self.base = base
        self.num_bytes = memoryview(tensor.data).nbytes
        self.is_large = self.num_bytes >= MAX_OBJECT_BYTES
        self.blob = BlobId("")
        self.key = ""
        self.small: bytes | None = None
        self.staged: Staged | None = None
        self.stored_bytes = 0
        self.created = False

    @property
    def is_staged(self) -> bool:
        return self.small is not None or self.staged is not None

    def discard(self) -> None:
        self.small = None
        if self.staged is not None:
            self.staged.discard()
            self.staged = None


def _each(pool: ThreadPoolExecutor, act: Callable[[_Draft], None], drafts: Sequence[_Draft]) -> None:
    """Act on all: a small tensor takes less time than handing it to a thread."""
    large = [draft for draft in drafts if draft.is_large]
    results = pool.map(act, large)
    for draft in drafts:
        if not draft.is_large:
            act(draft)
    list(results)


def _publish(draft: _Draft) -> None:
    assert draft.staged is not None
    draft.created = draft.staged.publish(draft.key)
    draft.staged = None


def _first_of_each(drafts: Sequence[_Draft], there: set[str]) -> list[_Draft]:
    """The drafts to store: of equal tensors the first, of those that are there none."""
    found: dict[str, _Draft] = {}
    for draft in drafts:
        if draft.key in there or found.setdefault(draft.key, draft) is not draft:
            draft.discard()
    return list(found.values())


def _groups(tensors: Sequence[TensorData]) -> Iterator[list[TensorData]]:
    group: list[TensorData] = []
    total = 0
    for tensor in tensors:
        group.append(tensor)
        total += memoryview(tensor.data).nbytes
        if total >= _GROUP_BYTES:
            yield group
            group, total = [], 0
    if group:
        yield group


@contextmanager
def _pool(workers: int) -> Iterator[ThreadPoolExecutor]:
    """A pool that gives up its queue at the first error or Ctrl-C instead of working through it."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="blockzoo-write")
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=True, cancel_futures=True)
        raise
    pool.shutdown()
