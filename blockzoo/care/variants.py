"""Variants as a kind that a zoo keeps: their refs, and the chains, blocks and blobs that these need."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress

from blockzoo import layout
from blockzoo.canonical import digest_bytes
from blockzoo.care.base import Fault
from blockzoo.errors import (
    BlobNotFoundError,
    BlockzooError,
    CorruptionError,
    CorruptManifestError,
    ManifestNotFoundError,
    NotFoundError,
)
from blockzoo.manifest import BlobId, BlockId, ChainId, VariantName, VariantRecord
from blockzoo.storage.base import Chunks
from blockzoo.store.blobs import TensorData
from blockzoo.store.closure import Problem, Walker, ignore_problem
from blockzoo.store.objects import Objects, ref_body

FOLDERS = (layout.REFS, layout.CHAINS, layout.BLOCKS, layout.BLOBS)
"""Where they are."""

VersionRef = tuple[VariantName, int]
"""Name and number of a version."""

_NAMED = 10
"""Versions that an error names where many are damaged."""


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


def damaged_versions(store: Objects) -> list[VersionRef]:
    """Return the versions (NAME, N) whose ref, manifests or headers of blobs are damaged or missing."""
    found: list[VersionRef] = []
    for record in store.records(lambda ref: found.append((ref.name, ref.version))):
        problems: list[str] = []
        Walker(store, lambda digest, _, into=problems: into.append(digest)).add_record(record)  # type: ignore[misc]
        if problems:
            found.append((record.name, record.version))
    return sorted(found)


@contextmanager
def naming_the_damaged(store: Objects) -> Iterator[None]:
    """Make an error about an object one that also names the damaged variants, and the ways out."""
    try:
        yield
    except (CorruptionError, BlobNotFoundError, ManifestNotFoundError) as error:
        raise _with_names(store, error) from error


def _with_names(store: Objects, error: BlockzooError) -> BlockzooError:
    damaged = damaged_versions(store)
    if not damaged:
        return error
    newest = {name: numbers[-1] for name, numbers in store.numbers().items()}
    refs = [f"{name}@{version}" for name, version in damaged]
    # An old version can go alone; where the current one is lost, the whole variant goes.
    goes = dict.fromkeys(
        name if (name, newest.get(name, version)) in damaged else f"{name}@{version}"
        for name, version in damaged
    )
    return type(error)(
        f"{_listed(refs)} {'is' if len(refs) == 1 else 'are'} damaged, so it is not known which objects "
        f"{'it needs' if len(refs) == 1 else 'they need'}, and nothing was deleted: {error}",
        hint="`blockzoo verify --repair BACKUP` takes the damaged objects from a backup. Without one, "
        f"`blockzoo rm NAME` gives up what is lost ({_listed(list(goes))}); then gc works again.",
        **{**error.metadata, "variants": _listed(refs)},
    )


def _listed(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


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


def faults_behind(store: Objects, key: str) -> Iterator[Fault]:
    """Walk from one ref, chain, block or blob, and say what is missing behind it."""
    walker = Walker(store, ignore_problem)
    digest = layout.digest_of(key)
    if digest is None:
        with suppress(NotFoundError, CorruptionError):
            walker.add_record(store.read_ref(*_version(key)))
    elif key == layout.chain_key(digest):
        walker.add_chain(ChainId(digest))
    elif key == layout.block_key(digest):
        walker.add_block(BlockId(digest))
    elif key == layout.blob_key(digest):
        walker.add_blobs([BlobId(digest)])
    for needed in walker.closure.objects():
        if store.storage.size(needed) is None:
            yield Fault(needed, missing=True, message=f"{needed} is missing")


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
