"""Variants as a kind that a zoo keeps: their refs, and the chains, blocks and blobs that these need."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from blockzoo import layout
from blockzoo.canonical import digest_bytes
from blockzoo.care.base import Fault
from blockzoo.errors import BlockzooError, CorruptionError, CorruptManifestError, NotFoundError
from blockzoo.manifest import BlobId, BlockId, ChainId, VariantRecord
from blockzoo.storage.base import Chunks
from blockzoo.store.blobs import TensorData
from blockzoo.store.closure import Problem, Walker, ignore_problem
from blockzoo.store.objects import Objects, ref_body

FOLDERS = (layout.REFS, layout.CHAINS, layout.BLOCKS, layout.BLOBS)
"""Where they are."""


def owns(key: str) -> bool:
    """Tell whether a key is spelled as a ref, chain, block or blob."""
    if layout.version_of(key) is not None:
        return True
    digest = layout.digest_of(key)
    return digest is not None and key != layout.equivalence_key(digest)


def check(store: Objects, key: str) -> None:
    """Read a ref, chain, block or blob; raises CorruptionError or NotFoundError."""
    digest = layout.digest_of(key)
    if digest is None:
        store.read_ref(*_version(key))
    elif key == layout.blob_key(digest):
        store.blobs.read(BlobId(digest))
    elif key == layout.chain_key(digest):
        store.get_chain(ChainId(digest))
    else:
        store.get_block(BlockId(digest))


def good_bytes(source: Objects, key: str) -> Chunks:
    """Return an object's verified bytes from another zoo; raises NotFoundError or CorruptionError."""
    digest = layout.digest_of(key)
    if digest is None:
        return [ref_body(source.read_ref(*_version(key)))]
    if key != layout.blob_key(digest):
        data = source.storage.get(key)
        if digest_bytes(data) != digest:
            raise CorruptManifestError(f"{key} is damaged in {source.storage.url} too", key=key)
        return [data]
    blob = BlobId(digest)
    info = source.blobs.info(blob)
    # Decoded, because the base that the source used may not be here.
    return source.blobs.encode(TensorData(info.dtype, info.shape, source.blobs.read(blob)), None)


def needed_keys(store: Objects, on_problem: Problem | None = None) -> Collection[str]:
    """Return the keys of the chains, blocks and blobs that any version of any variant needs.

    Args:
        store: the zoo.
        on_problem: called for what is missing or damaged. Without it the error is raised.
    """
    while True:
        records = store.records()
        walker = Walker(store, on_problem)
        try:
            for record in records:
                walker.add_record(record)
        except BlockzooError:
            # Another collection may have deleted what a variant needed that was removed meanwhile.
            if store.records() == records:
                raise
        else:
            return walker.closure.objects()


def faults(store: Objects, known: Collection[str]) -> Iterator[Fault]:
    """Walk every version on its own: what it lacks, and which of the known faults hurt it."""
    for name, numbers in store.numbers().items():
        for version in numbers:
            try:
                record = store.read_ref(name, version)
            except NotFoundError:
                continue
            except CorruptManifestError:
                key = layout.ref_key(name, version)
                yield Fault(key, missing=False, message=f"{key} is damaged", variant=f"{name}@{version}")
                continue
            if not record.deleted:
                yield from _faults_of(store, record, known)


def is_difference(store: Objects, key: str) -> bool:
    """Tell whether a key is that of a blob stored as a difference; False when it cannot be read."""
    return base_of(store, key) is not None


def bases_of(store: Objects, key: str) -> set[BlobId | None]:
    """Return what the copies of a blob are differences to; nothing for what is none or cannot be read."""
    digest = layout.digest_of(key)
    if digest is None or key != layout.blob_key(digest):
        return set()
    try:
        return store.bases(BlobId(digest))
    except (CorruptionError, NotFoundError):
        return set()


def base_of(store: Objects, key: str) -> str | None:
    """Return the key of what a difference is to; None for what is none or cannot be read."""
    digest = layout.digest_of(key)
    if digest is None or key != layout.blob_key(digest):
        return None
    try:
        base = store.blobs.info(BlobId(digest)).base
    except (CorruptionError, NotFoundError):
        return None
    return None if base is None else layout.blob_key(base)


def _faults_of(store: Objects, record: VariantRecord, known: Collection[str]) -> Iterator[Fault]:
    ref = f"{record.name}@{record.version}"
    # A damaged blob hides its base, which is found damaged or missing by itself when repair comes again.
    walker = Walker(store, ignore_problem)
    walker.add_record(record)
    for key in walker.closure.objects():
        missing = key not in known and store.storage.size(key) is None
        if missing and store.storage.size(layout.ref_key(record.name, record.version)) is None:
            return  # removed while it was being read
        if missing or key in known:
            yield Fault(key, missing=True, message=f"{key} is missing", variant=ref)


def _version(key: str) -> tuple[str, int]:
    version = layout.version_of(key)
    assert version is not None, key
    return version
