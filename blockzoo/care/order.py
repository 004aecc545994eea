"""The order in which a collection deletes: nothing goes before what needs it.

Chains need blocks, blocks blobs, differences their bases. What lies in one pack goes in one step,
whatever kinds it is of, so packs are put in an order in which none goes before one that needs something
of it. Packs that need each other, which collections and repairs that were killed can leave, lose one kind
after the other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise

from blockzoo import layout
from blockzoo.care.variants import bases_of
from blockzoo.errors import BlockzooError
from blockzoo.manifest import BlobId, BlockId, ChainId
from blockzoo.storage.base import ObjectInfo
from blockzoo.store.objects import Objects

_DIFFERENCES = "differences"
_BOTH = "both"
_KINDS = ("refs", layout.CHAINS, layout.BLOCKS, _DIFFERENCES, _BOTH, layout.BLOBS, layout.PACKS)
"""What is of one kind needs only what comes after it here. Of what two registrations stored at once, one copy
may be a difference, while other differences are to the other one."""


def in_order(store: Objects, doomed: Iterable[ObjectInfo]) -> Iterator[list[ObjectInfo]]:
    """Yield what may be deleted together, most needing first; each must be durable before the next."""
    kinds: dict[str, list[ObjectInfo]] = defaultdict(list)
    for info in doomed:
        bases = bases_of(store, info.key)
        is_both = None in bases and len(bases) > 1
        kind = _BOTH if is_both else _DIFFERENCES if bases - {None} else info.key.partition("/")[0]
        kinds[kind].append(info)
    yield kinds.pop("refs", [])
    broken = kinds.pop(layout.PACKS, [])
    yield from _objects_in_order(store, kinds)
    yield broken


def _objects_in_order(store: Objects, kinds: Mapping[str, list[ObjectInfo]]) -> Iterator[list[ObjectInfo]]:
    places: dict[str, frozenset[str]] = {}
    members: dict[str, list[ObjectInfo]] = defaultdict(list)
    for kind, infos in kinds.items():
        for info in infos:
            places[info.key] = store.storage.packs_of(info.key) or frozenset([kind])
            members[min(places[info.key])].append(info)
    try:
        batches = list(_batches(store, places))
    except CycleError:
        yield from (kinds.get(kind, []) for kind in _KINDS)
        return
    for batch in batches:
        yield [info for place in batch for info in members[place]]


def _batches(store: Objects, places: Mapping[str, Collection[str]]) -> Iterator[tuple[str, ...]]:
    """Yield places, packs or kinds of loose objects, that may go together.

    Raises:
        CycleError: some need each other.
    """
    waits_for: dict[str, set[str]] = {place: set() for found in places.values() for place in found}
    loose = [kind for kind in _KINDS if kind in waits_for]
    for earlier, later in pairwise(loose):
        waits_for[later].add(earlier)
    for key, own in places.items():
        for needed in _needs(store, key):
            for place in places.get(needed, ()):
                waits_for[place].update(own)
        for place in own:  # all of them go when one does
            waits_for[place].update(own)
    sorter = TopologicalSorter({place: found - {place} for place, found in waits_for.items()})
    sorter.prepare()
    while ready := sorter.get_ready():
        yield ready
        sorter.done(*ready)


def _needs(store: Objects, key: str) -> Iterable[str]:
    """Return the keys that an object names; a damaged one needs nothing that can be known."""
    folder, digest = key.partition("/")[0], layout.digest_of(key)
    assert digest is not None, key
    try:
        if folder == layout.CHAINS:
            links = store.get_chain(ChainId(digest)).links
            return {layout.block_key(block) for link in links for block in (link.base, *link.applied)}
        if folder == layout.BLOCKS:
            tensors = store.get_block(BlockId(digest)).tensors.values()
            return {layout.blob_key(blob) for tensor in tensors for blob in tensor.blobs}
        bases = store.bases(BlobId(digest))
    except BlockzooError:
        return ()
    return {layout.blob_key(base) for base in bases if base is not None}
