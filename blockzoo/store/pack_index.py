"""Which pack holds what, in memory, for lookups by key."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from blockzoo.store.packs import Entry, Pack, prefix_of

_SLOT_BITS = 20


class PackIndex:
    """Which pack holds what: sorted runs, merged as they grow, so that thousands of packs are a dozen runs.

    Sixteen bytes an object: a zoo of a thousand adapters has half a million.
    """

    def __init__(self, packs: Iterable[Pack] = ()) -> None:
        self._packs: list[Pack] = []
        self._runs: list[tuple[array[int], array[int]]] = []
        for pack in packs:
            self.add(pack)

    def add(self, pack: Pack) -> None:
        """Know the objects of one more pack."""
        places = np.arange(len(pack), dtype=np.uint64) | np.uint64(len(self._packs) << _SLOT_BITS)
        self._packs.append(pack)
        if not len(pack):
            return
        self._runs.append((_array(pack.prefixes()), _array(places)))
        while len(self._runs) > 1 and len(self._runs[-2][0]) < 2 * len(self._runs[-1][0]):
            self._runs[-2:] = [_merged(self._runs[-2], self._runs[-1])]

    def candidates(self, keys: Sequence[str]) -> list[str]:
        """Return those of many keys that `find` may find: what is new is rejected all at once."""
        wanted = np.fromiter(map(prefix_of, keys), np.uint64, len(keys))
        found = np.zeros(len(keys), np.bool_)
        for run, _ in self._runs:
            prefixes = np.frombuffer(run, np.uint64)
            at = np.minimum(np.searchsorted(prefixes, wanted), len(prefixes) - 1)
            found |= prefixes[at] == wanted
        return [key for key, is_candidate in zip(keys, found.tolist(), strict=True) if is_candidate]

    def find(self, key: str) -> Iterator[Entry]:
        """Yield every place of an object."""
        prefix = prefix_of(key)
        for prefixes, places in self._runs:
            at = bisect_left(prefixes, prefix)
            while at < len(prefixes) and prefixes[at] == prefix:
                number, slot = places[at] >> _SLOT_BITS, places[at] & ((1 << _SLOT_BITS) - 1)
                named, entry = self._packs[number].at(slot)
                if named == key:
                    yield entry
                at += 1


def _array(values: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> array[int]:
    made = array("Q")
    made.frombytes(values.tobytes())
    return made


def _merged(
    one: tuple[array[int], array[int]], other: tuple[array[int], array[int]]
) -> tuple[array[int], array[int]]:
    prefixes = np.concatenate([np.frombuffer(run[0], np.uint64) for run in (one, other)])
    places = np.concatenate([np.frombuffer(run[1], np.uint64) for run in (one, other)])
    order = np.argsort(prefixes, kind="stable")
    return _array(prefixes[order]), _array(places[order])
