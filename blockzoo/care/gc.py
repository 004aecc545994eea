"""Deleting what no variant needs, while registrations go on. `blockzoo.store.leases` explains why it is safe.

Nothing is deleted before what needs it (`blockzoo.care.order`), durable after each step.
A collection killed anywhere leaves objects that nothing needs, never one that needs
what is gone. A collection that deleted something ends with writing small packs together
(`blockzoo.store.pack_writing`), which deletes no object.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from blockzoo import layout
from blockzoo.care.base import Holding
from blockzoo.care.holdings import HOLDINGS
from blockzoo.care.order import in_order
from blockzoo.care.variants import naming_the_damaged
from blockzoo.errors import ConflictError
from blockzoo.manifest import BlobId, BlockId, ChainId
from blockzoo.storage.base import ObjectInfo
from blockzoo.store.closure import Walker, ignore_problem
from blockzoo.store.leases import (
    SKEW_S,
    Entry,
    active_leases,
    check_clock,
    drop_expired,
    drop_marker,
    publish_sweep_alone,
    wait_for_sweeps,
    write_entry,
)
from blockzoo.store.zoo_store import ZooStore

GRACE_S = 60.0
"""Seconds between condemning and deleting: lets a worker finish loading a variant that was just removed."""

SWEEP_S = 900.0
"""Seconds that deleting may take before the collection gives up; registrations may wait that long for it."""


@dataclass(frozen=True, slots=True)
class GcReport:
    """What a collection did.

    Attributes:
        deleted: objects deleted, or that would be deleted in a dry run.
        freed_bytes: their stored bytes.
        kept: objects that stay.
        kept_bytes: their stored bytes.
        spared: objects condemned first and spared then, because a registration wanted them meanwhile.
        temp_bytes: bytes that dead writers had left behind.
        finished: false when time ran out; the next collection goes on.
    """

    deleted: int = 0
    freed_bytes: int = 0
    kept: int = 0
    kept_bytes: int = 0
    spared: int = 0
    temp_bytes: int = 0
    finished: bool = True


def collect(
    store: ZooStore,
    *,
    grace_s: float = GRACE_S,
    sweep_s: float = SWEEP_S,
    dry_run: bool = False,
    on_object: Callable[[ObjectInfo], None] | None = None,
    on_stage: Callable[[str, int], None] = lambda *_: None,
    kinds: Sequence[Holding] = HOLDINGS,
) -> GcReport:
    """Delete everything that nothing kept needs: no version of any variant, no approval in force.

    Args:
        store: the zoo.
        grace_s: seconds to wait between condemning and deleting.
        sweep_s: most seconds to spend deleting.
        dry_run: only tell what would go.
        on_object: called after each object is dealt with.
        on_stage: called when another kind of work begins, with how many bytes it is about, 0 for unknown.
        kinds: what a zoo keeps.

    Raises:
        CorruptManifestError, CorruptBlobError, NotFoundError: something reachable is damaged or missing,
            so what it needs is unknown. Nothing is deleted; the message names the variants that are damaged.
        FormatVersionError: the zoo is newer than this version can write.
        ClockSkewError: this machine's clock is wrong, so it cannot tell which leases still hold.
    """
    store.check_writable()
    if not dry_run:
        wait_for_sweeps(
            store.storage,
            store.clock,
            on_wait=lambda other: on_stage(
                f"waiting for another gc, {other.expires - store.clock.now():.0f} s at most", 0
            ),
        )
    on_stage("looking for what no variant needs", 0)
    with naming_the_damaged(store):
        objects = {info.key: info for info in _objects(store)}
        needed = _needed_keys(store, kinds)
    condemned = [info for key, info in objects.items() if key not in needed]
    kept = [info for key, info in objects.items() if key in needed]
    if dry_run or not condemned:
        temp_bytes = 0 if dry_run else _tidy(store)
        return GcReport(len(condemned), _bytes(condemned), len(kept), _bytes(kept), temp_bytes=temp_bytes)
    digests = [digest for info in condemned if (digest := layout.digest_of(info.key))]
    began, whole = store.clock.now(), grace_s + sweep_s + SKEW_S
    until = store.clock.elapsed() + whole
    marker = write_entry(store.storage, layout.CONDEMNED, digests, began + whole, "gc")
    try:
        check_clock(store.storage, store.clock, marker.key, began)
        if grace_s:
            on_stage(
                f"waiting {grace_s:g} s, so that servers finish loading what is to be deleted; "
                "`--grace 0` does not wait, which is safe when no server uses the zoo",
                0,
            )
        store.clock.sleep(grace_s)
        on_stage("deleting", _bytes(condemned))
        doomed, deleted = _sweep(store, marker, until, condemned, on_object, kinds)
    finally:
        drop_marker(store.storage, marker)
    if deleted and len(deleted) == len(doomed):
        _merge_packs(store, sweep_s, on_stage)
    swept, went = set(doomed), set(deleted)
    spared = [info for info in condemned if info not in swept]
    stayed = [*kept, *(info for info in condemned if info not in went)]
    return GcReport(
        deleted=len(deleted),
        freed_bytes=_bytes(deleted),
        kept=len(stayed),
        kept_bytes=_bytes(stayed),
        spared=len(spared),
        temp_bytes=_tidy(store),
        finished=len(deleted) == len(doomed),
    )


def _sweep(
    store: ZooStore,
    marker: Entry,
    until: float,
    condemned: list[ObjectInfo],
    on_object: Callable[[ObjectInfo], None] | None,
    kinds: Sequence[Holding],
) -> tuple[list[ObjectInfo], list[ObjectInfo]]:
    """Look a last time, then delete. Returns what was doomed and what of it is deleted."""

    def left() -> float:
        return _left(store, marker, until)

    if not publish_sweep_alone(store.storage, store.clock, marker):
        return condemned, []
    # Another collection may have moved things into other packs while this one waited for it.
    store.storage.refresh(changed=True)
    with naming_the_damaged(store):
        needed = _needed_keys(store, kinds)
    doomed = [info for info in condemned if info.key not in needed]
    deleted: list[ObjectInfo] = []
    for stage in in_order(store, doomed):
        infos = {info.key: info for info in stage}

        def tell(key: str, infos: Mapping[str, ObjectInfo] = infos) -> None:
            deleted.append(infos[key])
            if left() <= 0:
                _own_up(store, [key], kinds)
            if on_object is not None:
                on_object(infos[key])

        gone = store.storage.delete_all(infos, lambda: left() > SKEW_S, tell)
        if len(gone) < len(stage):
            break
    return doomed, deleted


def _left(store: ZooStore, marker: Entry, until: float) -> float:
    """Return the seconds until others take the marker for a dead one; by the clock that says fewer."""
    return min(marker.expires - store.clock.now(), until - store.clock.elapsed())


def _merge_packs(store: ZooStore, sweep_s: float, on_stage: Callable[[str, int], None]) -> None:
    """Write small packs together. The marker condemns nothing, so no registration waits for it."""
    if not store.storage.mergeable():
        return
    on_stage("writing small packs together", 0)
    began, whole = store.clock.now(), sweep_s + SKEW_S
    until = store.clock.elapsed() + whole
    marker = write_entry(store.storage, layout.CONDEMNED, (), began + whole, "gc")
    try:
        if publish_sweep_alone(store.storage, store.clock, marker):
            store.storage.merge(lambda: _left(store, marker, until) > SKEW_S)
    finally:
        drop_marker(store.storage, marker)


def _own_up(store: ZooStore, keys: Collection[str], kinds: Sequence[Holding]) -> None:
    """Raise ConflictError when a delete that came too late has hit something that is needed by now."""
    needed = {key for kind in kinds for key in kind.needed(store, ignore_problem)}
    for key in needed.intersection(keys):
        raise ConflictError(
            f"this gc was suspended while it deleted {key}, which is needed again",
            hint="Register that checkpoint again, or run `blockzoo verify --repair FROM`.",
            key=key,
        )


def _objects(store: ZooStore) -> Iterator[ObjectInfo]:
    """Yield everything that gc may delete, refs below a tombstone included."""
    # What is not spelled as ours is not ours to delete; `verify` lists it.
    yield from (info for info in store.storage.list_content() if layout.digest_of(info.key))
    yield from store.dead_refs()
    # What damaged packs held that is needed is stored elsewhere by now, or gc ends before it deletes.
    yield from (info for info in store.storage.list(layout.PACKS) if layout.is_pack(info.key))


def _needed_keys(store: ZooStore, kinds: Sequence[Holding]) -> set[str]:
    """Return the keys that leases and kept things protect, reading leases first.

    A registration publishes its ref before it drops its lease, so in this order one of the two is seen; an
    approval does the same with its decision.
    """
    leased = {digest for lease in active_leases(store.storage, store.clock) for digest in lease.digests}
    needed = {key for kind in kinds for key in kind.needed(store, None)}
    # What is leased may not be written yet, or be a damaged leftover.
    loose = Walker(store, ignore_problem)
    for digest in leased:
        _add_leased(store, loose, digest)
    # Of whatever kind they are: a registration that leased them may write them while this deletes.
    kinds_of_keys = (layout.chain_key, layout.block_key, layout.blob_key)
    written = {key(digest) for digest in leased for key in kinds_of_keys}
    return {*needed, *loose.closure.objects(), *written}


def _add_leased(store: ZooStore, walker: Walker, digest: str) -> None:
    """Follow a leased digest as whatever it is; what does not exist needs nothing."""
    if store.storage.size(layout.chain_key(digest)) is not None:
        walker.add_chain(ChainId(digest))
    elif store.storage.size(layout.block_key(digest)) is not None:
        walker.add_block(BlockId(digest))
    # Also when it is no blob: a registration may be about to write it.
    walker.add_blobs([BlobId(digest)])


def _tidy(store: ZooStore) -> int:
    """Remove expired leases and markers, and what dead writers left behind."""
    drop_expired(store.storage, store.clock)
    return store.storage.clean()


def _bytes(objects: Iterable[ObjectInfo]) -> int:
    return sum(info.size for info in objects)
