"""Which packs are written together into one: small ones, and those with second copies of objects.

Two processes that store the same object at once both do, and each registration makes a pack of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

SMALL_PACK_BYTES = 4 << 20
"""Packs below are merged. An adapter of rank 16 on SmolLM2-135M has 10 MB, so it keeps its own pack, and
all of that goes with it."""

MAX_MERGED_BYTES = 32 << 20
"""Bytes of a merged pack. When one of its variants is removed, gc copies the others."""

MIN_MERGED = 8
"""Packs that are worth merging; so an object is copied once each time its pack grows eightfold."""

MAX_MOVED_BYTES = 1 << 30
"""Bytes that one collection copies in this way; the next one goes on."""


def groups(sizes: Mapping[str, int], repeated: Mapping[str, Collection[str]]) -> Iterator[list[str]]:
    """Yield packs to write into one, or one pack to write again without second copies.

    Args:
        sizes: bytes of each pack.
        repeated: the packs of each object that lies in several.
    """
    left = MAX_MOVED_BYTES
    merged: set[str] = set()
    for group in _small(sizes):
        left -= sum(sizes[pack] for pack in group)
        if left < 0:
            return
        merged.update(group)
        yield group
    # The largest pack keeps its copy, so that less is copied.
    shrinking = {
        pack
        for packs in repeated.values()
        for pack in sorted(packs & sizes.keys(), key=lambda pack: (sizes[pack], pack))[:-1]
    }
    for pack in sorted(shrinking - merged, key=lambda pack: (sizes[pack], pack)):
        left -= sizes[pack]
        if left < 0:
            return
        yield [pack]


def _small(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    group: list[str] = []
    num_bytes = 0
    for pack, size in sorted(sizes.items(), key=lambda item: (item[1], item[0])):
        if size >= SMALL_PACK_BYTES:
            break
        if num_bytes + size > MAX_MERGED_BYTES:
            if len(group) >= MIN_MERGED:
                yield group
            group, num_bytes = [], 0
        group.append(pack)
        num_bytes += size
    if len(group) >= MIN_MERGED:
        yield group
