"""Which packs may hold an object, in memory, for lookups by key.

An object takes eight bytes: the first 40 bits of its digest, then 24 bits with the number of its pack.
Two objects may share those 40 bits, so a lookup yields packs to look into, and who asks looks.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from blockzoo.store.packs import Pack, prefix_of

Entries = npt.NDArray[np.uint64]
"""Objects as the docstring of this module says, ascending."""

NUMBER_BITS = 24
_NUMBER = np.uint64((1 << NUMBER_BITS) - 1)
_PREFIX = ~_NUMBER
_FEW = 64
"""Packs that have gone and whose entries are kept at least: taking them out costs a pass over everything."""


@dataclass(slots=True)
class _Run:
    """Sorted entries.

    Attributes:
        entries: their numbers count from `first`.
        first: the number of the run's first pack.
        is_fixed: whether they are those of a summary, which are shared with other processes where the
            storage maps them, so they are not merged with others.
    """

    entries: Entries
    first: int
    is_fixed: bool
    view: memoryview = field(init=False)

    def __post_init__(self) -> None:
        # numpy takes longer than Python for a single number.
        self.view = self.entries.data


class PackIndex:
    """Packs and their objects: sorted runs, merged as they grow, so that thousands of packs are a dozen runs.

    A pack is forgotten by its number, so that costs the same however many packs there are.
    """

    def __init__(self) -> None:
        self._names: list[str | None] = []
        self._numbers: dict[str, int] = {}
        self._runs: list[_Run] = []

    def __contains__(self, key: object) -> bool:
        return key in self._numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @property
    def packs(self) -> AbstractSet[str]:
        """The packs that are known; changes with them."""
        return self._numbers.keys()

    def add(self, packs: Iterable[Pack]) -> None:
        """Know the objects of more packs; those that are known already stay as they are."""
        first = len(self._names)
        found: list[Entries] = []
        for pack in packs:
            if pack.key not in self._numbers:
                number = self._enter(pack.key)
                found.append((pack.prefixes() & _PREFIX) | np.uint64(number - first))
        if not found:
            return
        entries = np.concatenate(found)
        entries.sort()
        self._runs.append(_Run(entries, first, is_fixed=False))
        while self._is_last_short():
            self._runs[-2:] = [self._merged(self._runs[-2:])]

    def add_summary(self, packs: Sequence[str], entries: Entries, there: Collection[str]) -> None:
        """Know the packs of a summary that are there and not known yet.

        Args:
            packs: those of the summary.
            entries: their objects; the number of a pack is its place in `packs`.
            there: the packs that exist.
        """
        first = len(self._names)
        is_new = [key in there and key not in self._numbers for key in packs]
        if any(is_new):
            for key, is_wanted in zip(packs, is_new, strict=True):
                self._enter(key) if is_wanted else self._names.append(None)
            self._runs.append(_Run(entries, first, is_fixed=True))

    def forget(self, key: str) -> None:
        """Know nothing of a pack any more."""
        number = self._numbers.pop(key, None)
        if number is not None:
            self._names[number] = None
            if len(self._names) > 2 * len(self._numbers) + _FEW:
                self._compact()

    def candidates(self, keys: Sequence[str]) -> list[str]:
        """Return those of many keys for which `find` may yield something: what is new is rejected at once."""
        wanted = np.fromiter(map(prefix_of, keys), np.uint64, len(keys)) & _PREFIX
        found = np.zeros(len(keys), np.bool_)
        for run in self._runs:
            if len(run.entries):
                at = np.minimum(np.searchsorted(run.entries, wanted), len(run.entries) - 1)
                found |= run.entries[at] & _PREFIX == wanted
        return [key for key, is_candidate in zip(keys, found.tolist(), strict=True) if is_candidate]

    def find(self, key: str) -> list[str]:
        """Return the packs that may hold an object; no other one does."""
        low = prefix_of(key) >> NUMBER_BITS << NUMBER_BITS
        high = low + (1 << NUMBER_BITS)
        found: dict[str, None] = {}
        for run in self._runs:
            at = bisect_left(run.view, low)
            while at < len(run.view) and run.view[at] < high:
                name = self._names[run.first + run.view[at] - low]
                if name is not None:
                    found[name] = None
                at += 1
        return list(found)

    def entries_of(self, packs: Sequence[str]) -> Entries:
        """Return the objects of some of the packs; the number of a pack is its place in `packs`."""
        new = np.full(len(self._names), -1, np.int64)
        new[[self._numbers[key] for key in packs]] = np.arange(len(packs))
        return self._renumbered(self._runs, new)

    def repeated(self) -> Iterator[set[str]]:
        """Yield sets of packs of which several may hold the same object."""
        packs = list(self._numbers)
        entries = self.entries_of(packs)
        is_same = np.zeros(len(entries) + 1, np.bool_)  # as the entry before it
        prefixes = entries >> np.uint64(NUMBER_BITS)
        is_same[1:-1] = prefixes[1:] == prefixes[:-1]
        shared = entries[is_same[1:] | is_same[:-1]]
        prefixes = shared >> np.uint64(NUMBER_BITS)
        for group in np.split(shared, np.flatnonzero(prefixes[1:] != prefixes[:-1]) + 1):
            found = {packs[number] for number in (group & _NUMBER).tolist()}
            if len(found) > 1:
                yield found

    def _enter(self, key: str) -> int:
        number = self._numbers[key] = len(self._names)
        self._names.append(key)
        return number

    def _is_last_short(self) -> bool:
        if len(self._runs) < 2:
            return False
        before, last = self._runs[-2:]
        return not (before.is_fixed or last.is_fixed) and len(before.entries) < 2 * len(last.entries)

    def _merged(self, runs: Sequence[_Run]) -> _Run:
        """Make one run of several that follow each other, without what has gone."""
        first = min(run.first for run in runs)
        new = np.arange(len(self._names), dtype=np.int64) - first
        new[[number for number, name in enumerate(self._names[first:], first) if name is None]] = -1
        return _Run(self._renumbered(runs, new), first, is_fixed=False)

    def _compact(self) -> None:
        """Take the entries of all packs that have gone out."""
        packs = list(self._numbers)
        entries = self.entries_of(packs)
        self._names, self._numbers = list(packs), {key: number for number, key in enumerate(packs)}
        self._runs = [_Run(entries, 0, is_fixed=False)]

    def _renumbered(self, runs: Sequence[_Run], new: npt.NDArray[np.int64]) -> Entries:
        """Return the entries of runs with the new numbers of their packs, without those of packs at -1."""
        parts = [np.zeros(0, np.uint64)]
        for run in runs:
            numbers = new[(run.entries & _NUMBER).astype(np.int64) + run.first]
            stays = numbers >= 0
            parts.append((run.entries[stays] & _PREFIX) | numbers[stays].astype(np.uint64))
        entries = np.concatenate(parts)
        entries.sort()
        return entries
