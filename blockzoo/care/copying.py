"""Copying variants into another zoo, in the order of dependence; `blockzoo.care.backup` has the rules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from blockzoo import layout
from blockzoo.canonical import digest_bytes
from blockzoo.care.base import Copied, CopyTask
from blockzoo.care.reviving import revived
from blockzoo.errors import CorruptManifestError, FormatVersionError, StorageError
from blockzoo.manifest import BlobId, VariantName, VariantRecord
from blockzoo.storage.base import Chunks, Staged
from blockzoo.store.blobs import TensorData
from blockzoo.store.closure import Walker
from blockzoo.store.leases import LeaseHolder
from blockzoo.store.packed import as_small
from blockzoo.store.packs import MAX_PACK_BYTES
from blockzoo.store.zoo_store import ZooStore

REMOVED = "removed at the destination"
"""Begins the reason why a version is not copied that `revive` may bring back."""
OLDER = "older than what the destination holds"
"""The reason for a version below the newest one there, where it was removed or never was."""
CONFLICT = "conflict"
"""Begins the reason why a version is not copied where another one has its number."""

_WORKERS = 2
_REMOTE_WORKERS = 8
_GROUP_BYTES = 4 * MAX_PACK_BYTES
"""Stored bytes copied between two renewals of the lease, and held in memory on the way to an object store."""


@dataclass(frozen=True, slots=True)
class _Version:
    """A version to copy: as the source has it, and as the destination shall have it."""

    record: VariantRecord
    written: VariantRecord


@dataclass(frozen=True, slots=True)
class _Plan:
    """Versions to copy in the order of writing, what is left out why, and which version became which."""

    copies: list[_Version]
    skipped: dict[str, str]
    revived: dict[str, str]


def copy_variants(task: CopyTask) -> Copied:
    """Copy versions of variants with what they need; raises as `blockzoo.care.backup.copy_zoo` does."""
    plan = _plan_refs(task)
    _hold_source(task.source, task.reading, plan)
    copied, num_bytes, present = _copy_objects(task, plan)
    added = _copy_refs(task.destination, plan, task.writing)
    return Copied(copied, num_bytes, present, added, plan.skipped, plan.revived)


def _plan_refs(task: CopyTask) -> _Plan:
    plan = _Plan([], {}, {})
    theirs = task.destination.numbers()
    for name, numbers in task.source.numbers().items():
        if task.names is None or name in task.names:
            _plan_name(plan, task, name, numbers, theirs.get(name, []))
    return plan


def _plan_name(plan: _Plan, task: CopyTask, name: VariantName, numbers: list[int], theirs: list[int]) -> None:
    source, destination = task.source, task.destination
    live = source.versions(name)
    newest = theirs[-1] if theirs else 0
    is_removed = bool(theirs) and destination.read_ref(name, newest).deleted
    tombstone_there = destination.last_tombstone(name) if task.revive and theirs else 0
    if live and live[0].version < tombstone_there and _may_revive(destination, live, tombstone_there, theirs):
        _plan_revival(plan, destination, live, tombstone_there, theirs)
        return
    if is_removed and live and live[-1].version < newest:
        plan.skipped.update(dict.fromkeys(map(_ref, live), REMOVED))
        return
    # A tombstone only matters where there is something to hide.
    tombstone = numbers[-1] if not live else max((n for n in numbers if n < live[0].version), default=0)
    if theirs and tombstone > newest:
        record = source.read_ref(name, tombstone)
        plan.copies.append(_Version(record, record))
    for record in live:
        reason = _reason_to_skip(destination, record, theirs, tombstone_there if task.revive else None)
        if reason is None:
            plan.copies.append(_Version(record, record))
        elif reason:
            plan.skipped[_ref(record)] = reason


def _may_revive(destination: ZooStore, live: list[VariantRecord], tombstone: int, theirs: list[int]) -> bool:
    """Whether nothing but these versions stands above the tombstone: what came later stays current."""
    if theirs[-1] == tombstone:
        return True
    newest = revived(live[-1], tombstone)
    return (
        newest is not None
        and theirs[-1] == newest.version
        and destination.read_ref(newest.name, newest.version) == newest
    )


def _plan_revival(
    plan: _Plan, destination: ZooStore, live: list[VariantRecord], tombstone: int, theirs: list[int]
) -> None:
    # The newest is written first: from then on the name means what it is to mean, and the others lie below.
    for record in reversed(live):
        written = revived(record, tombstone)
        if written is None:
            plan.skipped[_ref(record)] = f"{REMOVED}, where no version numbers are left"
        elif written.version not in theirs:
            plan.copies.append(_Version(record, written))
        elif destination.read_ref(written.name, written.version) != written:
            plan.skipped[_ref(record)] = (
                f"{CONFLICT}: the destination holds something else as {_ref(written)}"
            )


def _reason_to_skip(
    destination: ZooStore, record: VariantRecord, theirs: list[int], tombstone: int | None
) -> str | None:
    """Return None to copy the record, "" when it is there already, otherwise why not.

    `tombstone` is the newest one at the destination, 0 without one, None unless versions are brought back.
    """
    if not theirs or record.version > theirs[-1]:
        return None
    if tombstone is not None and record.version < tombstone:
        return f"{REMOVED}, where newer versions are registered"
    if record.version not in theirs:
        return OLDER if tombstone is None else None
    if destination.read_ref(record.name, record.version) != record:
        return f"{CONFLICT}: the destination holds something else under this number"
    return ""


def _ref(record: VariantRecord) -> str:
    return f"{record.name}@{record.version}"


def _hold_source(source: ZooStore, lease: LeaseHolder, plan: _Plan) -> None:
    """Keep gc away from what is being read. The chains are enough: it keeps what a leased chain needs."""
    records = [copy.record for copy in plan.copies]
    digests = {file.blob for record in records for file in record.files.values()}
    try:
        source.check_writable()
        lease.hold({*digests, *(record.chain for record in records if not record.deleted)})
    except (StorageError, FormatVersionError):
        # A backup on read-only storage has no gc either.
        return


def _copy_objects(task: CopyTask, plan: _Plan) -> tuple[int, int, int]:
    """Copy what the planned records need; returns objects copied, their stored bytes, objects present."""
    source, destination, lease = task.source, task.destination, task.writing
    walker = Walker(source)
    for copy in plan.copies:
        walker.add_record(copy.record)
    closure = walker.closure
    differences = {blob for blob in closure.blobs if closure.bases[blob] is not None}
    stages = [
        [layout.blob_key(blob) for blob in sorted(closure.blobs - differences)],
        [layout.blob_key(blob) for blob in sorted(differences)],
        [layout.block_key(block) for block in sorted(closure.blocks)],
        [layout.chain_key(chain) for chain in sorted(closure.chains)],
    ]
    # Leased before looking, as every writer does.
    lease.hold(closure.digests())
    present = {info.key for info in destination.storage.list_content()}
    sizes = {info.key: info.size for info in source.storage.list_content()}
    missing = [[key for key in stage if key not in present] for stage in stages]
    task.on_plan(sum(sizes.get(key, 0) for stage in missing for key in stage))
    num_bytes = 0
    for stage in missing:
        for group in _groups(stage, sizes):
            lease.renew()
            num_bytes += _copy_group(source, destination, group, task.on_bytes)
    destination.storage.sync(key for stage in stages for key in stage)
    copied = sum(map(len, missing))
    return copied, num_bytes, sum(map(len, stages)) - copied


def _copy_group(
    source: ZooStore, destination: ZooStore, keys: list[str], on_bytes: Callable[[int], None]
) -> int:
    """Copy objects that do not need each other, and make them durable."""
    storage = destination.storage
    staged: dict[str, Staged] = {}
    small: dict[str, bytes] = {}

    def stage(key: str) -> int:
        chunks = _verified_chunks(source, destination, key)
        body = as_small(chunks)
        if body is None:
            staged[key] = storage.stage(chunks)
        else:
            small[key] = body
        size = sum(memoryview(chunk).nbytes for chunk in chunks)
        on_bytes(size)
        return size

    workers = _REMOTE_WORKERS if storage.is_remote or source.storage.is_remote else _WORKERS
    try:
        with ThreadPoolExecutor(workers, thread_name_prefix="blockzoo-copy") as pool:
            num_bytes = sum(pool.map(stage, keys))
            storage.flush(list(staged.values()))
            list(pool.map(lambda item: item[1].publish(item[0]), staged.items()))
        storage.put_objects(small, workers)
    finally:
        for item in staged.values():
            item.discard()
    storage.sync(keys)
    return num_bytes


def _groups(keys: list[str], sizes: dict[str, int]) -> Iterator[list[str]]:
    group: list[str] = []
    total = 0
    for key in keys:
        group.append(key)
        total += sizes.get(key, 0)
        if total >= _GROUP_BYTES:
            yield group
            group, total = [], 0
    if group:
        yield group


def _verified_chunks(source: ZooStore, destination: ZooStore, key: str) -> Chunks:
    """Return an object's bytes as the destination shall store them, checked against the digest."""
    digest = layout.digest_of(key)
    assert digest is not None, key
    if key != layout.blob_key(digest):
        data = source.storage.get(key)
        if digest_bytes(data) != digest:
            raise CorruptManifestError(
                f"{key} is damaged in {source.storage.url}", hint="Run `blockzoo verify` there.", key=key
            )
        return [data]
    blob = BlobId(digest)
    stored = source.blobs.read_object(blob)
    data = source.blobs.decode(blob, stored)
    info = source.blobs.info(blob)
    if info.base is None or destination.blobs.info(info.base).base is None:
        return [stored]
    # The destination came by the base another way and keeps it as a difference: depth one forbids a second.
    return destination.blobs.encode(TensorData(info.dtype, info.shape, data), None)


def _copy_refs(destination: ZooStore, plan: _Plan, lease: LeaseHolder) -> list[str]:
    added = []
    for copy in plan.copies:
        lease.check()
        if not destination.put_ref(copy.written):
            plan.skipped[_ref(copy.record)] = f"{CONFLICT}: registered there meanwhile"
            continue
        added.append(_ref(copy.written))
        if copy.written.version != copy.record.version:
            plan.revived[_ref(copy.record)] = _ref(copy.written)
    return added
