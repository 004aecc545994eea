"""The packs that this process knows, and which of them holds an object.

What packs hold is learned from summaries, and from the index of each pack that none lists. Before anybody is
sent to a place, the index of its pack is read; the newest are kept.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from typing import TypeVar

from blockzoo import layout
from blockzoo.errors import CorruptManifestError, NotFoundError, StorageError
from blockzoo.storage.base import Stamp, Storage
from blockzoo.store.pack_index import PackIndex
from blockzoo.store.pack_summary import build_summary, read_summary
from blockzoo.store.packs import Entry, Pack, read_index

_T = TypeVar("_T")
_R = TypeVar("_R")

BELIEVED_S = 30.0
"""Seconds that a listing of an object store is believed while no writer has announced a new pack. Writers
announce before they return, so only a pack that another tool copied there is seen late, by so much."""

_TRIES = 10
"""Listings until two agree; each that does not is a whole collection or repair."""
_READERS = 16
"""Threads for requests over a network, which mostly wait."""
_WINDOW = 256
"""Packs read at a time, whose indexes are in memory then."""
_INDEX_BYTES = 8 << 20
"""Bytes of indexes that are kept; that of an adapter has 20 KB."""
_ASK_EACH = 32
"""Packs up to which one question for each beats a listing."""
_MANY_NEW = 64
"""New packs from which on summaries are read; those of thousands have tens of megabytes."""
_SUMMARISE_FROM = 256
"""Packs in no summary that are worth one: reading them takes a fifth of a second."""
_MOST_SUMMARIES = 8
"""Summaries in whose place one of all packs is written."""


class KnownPacks:
    """See the module docstring. All methods may be called from several threads at once.

    Args:
        inner: the storage with the packs.
        has_news: whether writers announce new packs there.
    """

    def __init__(self, inner: Storage, *, has_news: bool) -> None:
        self._inner = inner
        self._has_news = has_news and inner.is_remote
        self._lock = threading.RLock()
        self._index = PackIndex()
        self._read: OrderedDict[str, Pack] = OrderedDict()
        self._read_bytes = 0
        self._sound: set[str] = set()  # whose index this process has read
        self._damaged: set[str] = set()
        self._unreadable: dict[str, StorageError] = {}
        self._stamp: Stamp | None = None
        self._news: bytes | None = None
        self._listed_at = 0.0
        self._is_old = True
        self._has_unannounced = False
        self._summaries: dict[str, Collection[str]] = {}  # which packs each lists
        self._unsound: set[str] = set()  # summaries that are damaged

    @property
    def failure(self) -> StorageError | None:
        """Why the index of a pack could not be read, so that nobody knows what it holds."""
        with self._lock:
            return next(iter(self._unreadable.values()), None)

    @property
    def is_old(self) -> bool:
        """Whether a pack turned out to have gone since the last look."""
        with self._lock:
            return self._is_old

    def packs(self) -> frozenset[str]:
        """Return the packs that are known."""
        with self._lock:
            return frozenset(self._index.packs)

    # Looking.

    def refresh(self, *, changed: bool = False) -> None:
        """Learn which packs came and went.

        Args:
            changed: something did for sure, or may have gone, so neither stamps nor news are believed.
        """
        with self._lock:
            now = time.monotonic()
            is_late = now - self._listed_at >= BELIEVED_S
            # A pack may be damaged only while another tool writes it, or be written again.
            is_sure = not (changed or self._is_old or self._unreadable or (self._damaged and is_late))
            stamp = None if changed else self._inner.stamp(layout.PACKS)
            if is_sure and stamp is not None and stamp == self._stamp:
                return
            news = self._read_news()
            if is_sure and news is not None and news == self._news and not is_late:
                return
            self._unreadable.clear()
            self._damaged.clear()
            self._is_old = True  # until this has gone well
            for attempt in range(_TRIES):
                listed, summaries = self._list()
                if listed == self._index.packs | self._damaged | self._unreadable.keys():
                    break
                # A listing may miss both of two packs of which one takes the other's place meanwhile, so
                # there is another.
                self._learn(listed, summaries, is_patient=attempt < _TRIES // 2)
            self._stamp = None if self._unreadable else stamp
            self._news, self._listed_at = news, now
            self._is_old = False

    def are_there(self, packs: Collection[str]) -> bool:
        """Tell whether all of these still exist; where not, look which came in their place.

        On a folder `refresh` has seen to it. In an object store it may have believed that none is new, which
        does not tell whether one has gone.
        """
        if self._inner.is_remote and packs:
            if len(packs) > _ASK_EACH:
                self.refresh(changed=True)
            else:
                for key, size in zip(packs, self._each(self._inner.size, packs), strict=True):
                    if size is None:
                        self._has_gone(key)
        with self._lock:
            if not self._is_old and self._index.packs >= set(packs):
                return True
        self.refresh(changed=True)
        return False

    def candidates(self, keys: Sequence[str]) -> list[str]:
        """Return those of many keys that packs may hold: what is new is rejected at once."""
        with self._lock:
            return self._index.candidates(keys)

    def places(self, key: str) -> Iterator[Entry]:
        """Yield every place of an object, as far as packs are known.

        Raises:
            StorageError: none was found, and a pack that may hold it cannot be read.
        """
        with self._lock:
            packs = self._index.find(key)
        error: StorageError | None = None
        was_found = False
        for name in packs:
            try:
                pack = self.read(name)
            except StorageError as problem:
                error = problem
                continue
            entry = None if pack is None else pack.find(key)
            if entry is not None:
                was_found = True
                yield entry
        if error is not None and not was_found:
            raise error

    def all_places(self, key: str) -> list[Entry]:
        """Return every place of an object, where a pack has gone after another look; raises as `places`."""
        for _ in range(_TRIES):
            found = list(self.places(key))
            with self._lock:
                if not self._is_old:
                    break
            self.refresh()
        return found

    def read(self, key: str) -> Pack | None:
        """Return the index of a pack that is known, None where it has gone or is damaged.

        Raises:
            StorageError: it cannot be read.
        """
        with self._lock:
            pack = self._read.get(key)
            if pack is not None:
                self._read.move_to_end(key)
                return pack
        try:
            pack = read_index(self._inner, key)
        except NotFoundError:
            self._has_gone(key)
            return None
        except CorruptManifestError:
            # One bad pack must not hide the others; `verify` names it, and what it held is missing.
            with self._lock:
                self._forget(key)
                self._damaged.add(key)
            return None
        with self._lock:
            self._keep(pack)
        return pack

    def all(self) -> Iterator[Pack]:
        """Yield every pack, those too that come meanwhile; without those that cannot be read."""
        seen: set[str] = set()
        while True:
            with self._lock:
                new = [key for key in self._index.packs if key not in seen]
            if not new:
                return
            seen.update(new)
            yield from (pack for pack in self._readable(new) if pack is not None)
            with self._lock:
                is_old = self._is_old
            if is_old:
                self.refresh()

    def damaged(self) -> frozenset[str]:
        """Return the packs whose index is damaged; reads those indexes that this process has not read."""
        with self._lock:
            self.refresh(changed=True)
            unread = self._index.packs - self._sound
        for _ in self._readable(list(unread)):
            pass
        with self._lock:
            return frozenset(self._damaged)

    def repeated(self) -> dict[str, set[str]]:
        """Return the objects that lie in several packs, and those packs."""
        with self._lock:
            packs: set[str] = set().union(*self._index.repeated())
        found: dict[str, set[str]] = {}
        for pack in self._readable(sorted(packs)):
            if pack is not None:
                for name, _ in pack.objects():
                    found.setdefault(name, set()).add(pack.key)
        return {name: held for name, held in found.items() if len(held) > 1}

    # Changing.

    def add(self, pack: Pack) -> None:
        """Know a pack that this process wrote."""
        with self._lock:
            self._damaged.discard(pack.key)
            self._index.add([pack])
            self._keep(pack)
            self._has_unannounced = True

    def forget(self, key: str) -> None:
        """Know nothing of a pack that this process deleted."""
        with self._lock:
            self._forget(key)

    def announce(self) -> None:
        """Let other processes know that there is a new pack, before anybody relies on it."""
        if self._has_news:
            self._inner.replace(layout.PACK_CHANGES, [os.urandom(16)])
        self._has_unannounced = False

    def announce_late(self) -> None:
        """Announce what this process wrote and could not announce."""
        if self._has_unannounced:
            self.announce()

    def doubt(self) -> None:
        """Read every index again before anything is said of it: it may have been damaged since."""
        with self._lock:
            self._sound.clear()
            self._read.clear()
            self._read_bytes = 0

    def summarise(self) -> None:
        """Write what packs hold, where many are in no summary. That it fails harms nothing."""
        with suppress(StorageError), self._lock:
            if len(self._unsummarised()) < _SUMMARISE_FROM:
                return
            listed = self._listed_summaries()
            for key in listed:
                self._load(key)
            packs = sorted(self._unsummarised())
            if len(packs) < _SUMMARISE_FROM:
                return
            replaced = set(self._unsound)
            num_listed = sum(map(len, self._summaries.values()))
            if len(listed) >= _MOST_SUMMARIES or num_listed > 2 * len(self._index):
                packs, replaced = sorted(self._index.packs), listed
            key, body = build_summary(packs, self._index.entries_of(packs))
            if key in self._unsound:
                self._inner.delete(key)
            self._inner.put_if_absent(key, body, durable=False)
            self._summaries[key] = packs
            for old in replaced - {key}:
                self._inner.delete(old)
                self._summaries.pop(old, None)
            self._unsound.clear()

    def _unsummarised(self) -> set[str]:
        return set(self._index.packs).difference(*self._summaries.values())

    def _list(self) -> tuple[set[str], set[str]]:
        """Return the keys of all packs and of all summaries."""
        listed = self._inner.keys(layout.PACKS)
        # Asked several times for each registration, and nearly all of thousands of keys are known.
        packs = listed & self._index.packs
        others = listed - packs
        packs.update(filter(layout.is_pack, others))
        summaries = set(filter(layout.is_summary, others))
        self._summaries = {key: self._summaries[key] for key in summaries if key in self._summaries}
        return packs, summaries

    def _learn(self, listed: set[str], summaries: Collection[str], *, is_patient: bool) -> None:
        self._damaged &= listed
        for key in self._index.packs - listed:
            self._forget(key)
        known = self._damaged | self._unreadable.keys()
        if len(listed - self._index.packs - known) >= _MANY_NEW:
            is_whole = True
            for key in summaries:
                is_whole &= self._load(key, listed - known)
            if not is_whole and is_patient and summaries != self._listed_summaries():
                return  # another has come in the place of one; reading thousands of packs takes longer
        new = iter(sorted(listed - self._index.packs - known))
        while window := list(islice(new, _WINDOW)):
            packs = [pack for pack in self._each(self._read_new, window) if pack is not None]
            self._index.add(packs)
            for pack in packs:
                self._keep(pack)

    def _listed_summaries(self) -> set[str]:
        return set(filter(layout.is_summary, self._inner.keys(layout.PACKS)))

    def _load(self, key: str, there: Collection[str] = ()) -> bool:
        """Learn from a summary, unless that was done; tell whether it is sound."""
        if key not in self._summaries:
            try:
                size = self._inner.size(key)
                if size is None:
                    return False
                summary = read_summary(self._inner, key, size)
            except CorruptManifestError:
                self._unsound.add(key)
                return False
            except (NotFoundError, StorageError):
                return False
            self._summaries[key] = summary.packs
            self._index.add_summary(summary.packs, summary.entries, there)
        return True

    def _read_new(self, key: str) -> Pack | None:
        try:
            return read_index(self._inner, key)
        except NotFoundError:
            return None
        except CorruptManifestError:
            self._damaged.add(key)
            return None
        except StorageError as error:
            # As it would be with the file of one object: only who needs it fails.
            self._unreadable[key] = error
            return None

    def _readable(self, keys: Sequence[str]) -> Iterator[Pack | None]:
        """Yield the index of each pack, None where it cannot be read."""

        def read(key: str) -> Pack | None:
            with suppress(StorageError):
                return self.read(key)
            return None

        for start in range(0, len(keys), _WINDOW):
            yield from self._each(read, keys[start : start + _WINDOW])

    def _each(self, act: Callable[[_T], _R], items: Collection[_T]) -> list[_R]:
        if self._inner.is_remote and len(items) > 1:
            with ThreadPoolExecutor(_READERS, thread_name_prefix="blockzoo-packs") as pool:
                return list(pool.map(act, items))
        return [act(item) for item in items]

    def _has_gone(self, key: str) -> None:
        with self._lock:
            self._forget(key)
            self._is_old = True

    def _forget(self, key: str) -> None:
        self._index.forget(key)
        self._sound.discard(key)
        pack = self._read.pop(key, None)
        if pack is not None:
            self._read_bytes -= len(pack.index)

    def _keep(self, pack: Pack) -> None:
        self._sound.add(pack.key)
        if pack.key not in self._read:
            self._read_bytes += len(pack.index)
        self._read[pack.key] = pack
        self._read.move_to_end(pack.key)
        while self._read_bytes > _INDEX_BYTES and len(self._read) > 1:
            _, old = self._read.popitem(last=False)
            self._read_bytes -= len(old.index)

    def _read_news(self) -> bytes | None:
        if not self._has_news:
            return None
        try:
            return bytes(self._inner.get(layout.PACK_CHANGES))
        except NotFoundError:
            return None


def is_own(key: str) -> bool:
    """Tell whether a key is of what this module stores for itself: whatever is lost of it is made again."""
    return layout.is_summary(key) or key == layout.PACK_CHANGES
