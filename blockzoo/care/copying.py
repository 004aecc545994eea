"""Copying variants into another zoo, in the order of dependence; `blockzoo.care.backup` has the rules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from blockzoo import layout
from blockzoo.canonical import digest_bytes
from blockzoo.care.base import Copied, CopyTask
from blockzoo.errors import CorruptManifestError, FormatVersionError, StorageError
from blockzoo.manifest import BlobId, VariantName, VariantRecord
from blockzoo.storage.base import Chunks, Staged
from blockzoo.store.blobs import TensorData
from blockzoo.store.closure import Walker
from blockzoo.store.leases import LeaseHolder
from blockzoo.store.zoo_store import ZooStore

_WORKERS = 2
_REMOTE_WORKERS = 8
_GROUP_BYTES = 256 << 20
"""Stored bytes copied between two renewals of the lease, and held in memory on the way to an object store."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """Records to copy, each with whether it takes a new number, and what is left out why."""

    copies: list[tuple[VariantRecord, bool]]
    skipped: dict[str, str]


def copy_variants(task: CopyTask) -> Copied:
    """Copy versions of variants with what they need; raises as `blockzoo.care.backup.copy_zoo` does."""
    plan = _plan_refs(task)
    _hold_source(task.source, task.reading, plan)
    copied, num_bytes, present = _copy_objects(task, plan)
    added = _copy_refs(task.destination, plan, task.writing)
    return Copied(copied, num_bytes, present, added, plan.skipped)


def _plan_refs(task: CopyTask) -> _Plan:
    plan = _Plan([], {})
    theirs = task.destination.numbers()
    for name, numbers in task.source.numbers().items():
        if task.names is None or name in task.names:
            _plan_name(plan, task, name, numbers, theirs.get(name, []))
    return plan


def _plan_name(plan: _Plan, task: CopyTask, name: VariantName, numbers: list[int], theirs: list[int]) -> None:
    source, destination = task.source, task.destination
    live = source.versions(name)
    newest = theirs[-1] if theirs else 0
    removed = bool(theirs) and destination.read_ref(name, newest).deleted
    if removed and live and live[-1].version < newest:
        if task.revive:
            plan.copies.append((live[-1], True))
        else:
            plan.skipped[f"{name}@{live[-1].version}"] = "removed at the destination"
        return
    # A tombstone only matters where there is something to hide.
    tombstone = numbers[-1] if not live else max((n for n in numbers if n < live[0].version), default=0)
    if theirs and tombstone > newest:
        plan.copies.append((source.read_ref(name, tombstone), False))
    for record in live:
        reason = _reason_to_skip(destination, record, theirs)
        if reason is None:
            plan.copies.append((record, False))
        elif reason:
            plan.skipped[f"{name}@{record.version}"] = reason


def _reason_to_skip(destination: ZooStore, record: VariantRecord, theirs: list[int]) -> str | None:
    """Return None to copy the record, "" when it is there already, otherwise why not."""
    if not theirs or record.version > theirs[-1]:
        return None
    if record.version not in theirs:
        return "older than what the destination holds"
    if destination.read_ref(record.name, record.version) != record:
        return "conflict: the destination holds something else under this number"
    return ""


def _hold_source(source: ZooStore, lease: LeaseHolder, plan: _Plan) -> None:
    """Keep gc away from what is being read. The chains are enough: it keeps what a leased chain needs."""
    records = [record for record, _ in plan.copies]
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
    for record, _ in plan.copies:
        walker.add_record(record)
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
    folders = (layout.BLOBS, layout.BLOCKS, layout.CHAINS)
    present = {info.key for folder in folders for info in destination.storage.list(folder)}
    sizes = {info.key: info.size for folder in folders for info in source.storage.list(folder)}
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

    def stage(key: str) -> int:
        chunks = _verified_chunks(source, destination, key)
        staged[key] = storage.stage(chunks)
        size = sum(memoryview(chunk).nbytes for chunk in chunks)
        on_bytes(size)
        return size

    workers = _REMOTE_WORKERS if storage.is_remote or source.storage.is_remote else _WORKERS
    try:
        with ThreadPoolExecutor(workers, thread_name_prefix="blockzoo-copy") as pool:
            num_bytes = sum(pool.map(stage, keys))
            storage.flush(list(staged.values()))
            list(pool.map(lambda item: item[1].publish(item[0]), staged.items()))
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
    for record, renumber in plan.copies:
        lease.check()
        if renumber:
            record = destination.add_version(record)
        elif not destination.put_ref(record):
            plan.skipped[f"{record.name}@{record.version}"] = "conflict: registered there meanwhile"
            continue
        added.append(f"{record.name}@{record.version}")
    return added
