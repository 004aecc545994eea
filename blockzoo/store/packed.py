"""A storage whose small objects may lie in packs; everybody above sees one object for each key.

Objects move only from a pack into another, and the new one is durable before the old one goes. So whoever
finds nothing looks whether packs have come, and whoever finds that a pack has gone looks at the list again.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

from blockzoo import layout
from blockzoo.digest import Buffer
from blockzoo.errors import CorruptManifestError, NotFoundError, StorageError
from blockzoo.storage.base import Chunks, ObjectInfo, Staged, Stamp, Storage, keys_right_below
from blockzoo.store.known_packs import KnownPacks, is_own
from blockzoo.store.pack_writing import PackWriter
from blockzoo.store.packs import (
    FOLDERS,
    MAX_OBJECT_BYTES,
    MAX_PACK_BYTES,
    Entry,
    build,
    can_hold,
    read_index,
)

_T = TypeVar("_T")

_TRIES = 10
"""Looks at an object that others keep moving; each move is a whole collection or repair."""


class PackedStorage:
    """See the module docstring. All methods may be called from several threads at once.

    Args:
        inner: the storage that holds objects and packs.
        writes_packs: whether small objects are written as packs; read they are in any case.
    """

    def __init__(self, inner: Storage, *, writes_packs: bool) -> None:
        self.inner = inner
        self.writes_packs = writes_packs
        self._writing = threading.Lock()
        self._known = KnownPacks(inner, has_news=writes_packs)
        self._packs = PackWriter(inner, self._known)
        self._twins: set[str] = set()

    @property
    def url(self) -> str:
        """See `Storage`."""
        return self.inner.url

    @property
    def is_remote(self) -> bool:
        """See `Storage`."""
        return self.inner.is_remote

    # Reading.

    def get(self, key: str) -> memoryview:
        """See `Storage`."""
        return self._look(
            key,
            lambda entry: self.inner.get_part(entry.pack, entry.offset, entry.size),
            lambda: self.inner.get(key),
        )

    def get_part(self, key: str, start: int, length: int) -> memoryview:
        """See `Storage`."""
        return self._look(
            key,
            lambda entry: self.inner.get_part(entry.pack, entry.offset + start, _cut(entry, start, length)),
            lambda: self.inner.get_part(key, start, length),
        )

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """See `Storage`."""
        return self._look(
            key,
            lambda entry: self.inner.get_range(entry.pack, entry.offset + start, _cut(entry, start, length)),
            lambda: self.inner.get_range(key, start, length),
        )

    def size(self, key: str) -> int | None:
        """See `Storage`."""
        try:
            return self._look(key, self._packed_size, lambda: self._loose_size(key))
        except NotFoundError:
            return None

    def present(self, keys: Collection[str], workers: int = 1) -> set[str]:
        """Return the keys that have objects: `size` for many at once, with one look at the list of packs."""
        if not keys:
            return set()
        found = set(self._certain(keys))
        rest = [key for key in keys if key not in found]
        if self.is_remote:
            with ThreadPoolExecutor(workers, thread_name_prefix="blockzoo-look") as pool:
                sizes = list(pool.map(self.inner.size, rest))
        else:
            sizes = [self.inner.size(key) for key in rest]
        found.update(key for key, size in zip(rest, sizes, strict=True) if size is not None)
        return found

    def may_hold(self, key: str) -> bool:
        """Tell whether there is an object, as far as is known without looking for packs."""
        return bool(self.packs_of(key)) or self.inner.size(key) is not None

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """See `Storage`. Of packs themselves, only the damaged ones are listed, below `layout.PACKS`."""
        if prefix == layout.PACKS:
            damaged = self._known.damaged()
            # One that is neither known nor damaged has come since.
            for info in self.inner.list(prefix):
                if info.key in damaged or not (layout.is_pack(info.key) or is_own(info.key)):
                    yield info
            return
        seen: set[str] = set()
        for info in self.inner.list(prefix):
            if not (info.key.startswith(f"{layout.PACKS}/") or is_own(info.key)):
                seen.add(info.key)
                yield info
        if not prefix or prefix.partition("/")[0] in FOLDERS:
            yield from self._in_packs(f"{prefix}/" if prefix else "", seen)

    def keys(self, folder: str) -> set[str]:
        """See `Storage`."""
        return keys_right_below(folder, self.list(folder))

    def list_content(self) -> Iterator[ObjectInfo]:
        """Yield all that may be in packs, from all folders: `list` reads every pack for each folder."""
        seen: set[str] = set()
        for folder in FOLDERS:
            for info in self.inner.list(folder):
                seen.add(info.key)
                yield info
        yield from self._in_packs("", seen)

    def _in_packs(self, prefix: str, seen: set[str]) -> Iterator[ObjectInfo]:
        # What is listed is what is collected and copied, so news are not enough.
        self.refresh(changed=self.is_remote)
        for pack in self._known.all():
            for key, entry in pack.objects():
                if key in seen:
                    self._twins.add(key)
                elif key.startswith(prefix):
                    seen.add(key)
                    yield ObjectInfo(key, entry.size)

    def stamp(self, folder: str) -> Stamp | None:
        """See `Storage`: only of folders whose objects never lie in packs."""
        return self.inner.stamp(folder)

    def packs_of(self, key: str) -> frozenset[str]:
        """Return the packs that hold an object, as far as is known without looking for new ones.

        Raises:
            StorageError: a pack that may hold it cannot be read.
        """
        if not can_hold(key):
            return frozenset()
        return frozenset(entry.pack for entry in self._known.all_places(key))

    # Writing.

    def put_objects(self, objects: Mapping[str, Buffer], workers: int = 1) -> None:
        """Create small objects that were missing a moment ago, durably, together where packs are written.

        Where they are not, blobs are durable before manifests of blocks, those before chains. Packs do not
        tell who was first, so of two processes that store the same at once, both may.
        """
        if self.writes_packs and len(objects) > 1:
            with self._writing:
                there = self._certain(objects)
                missing = {key: data for key, data in objects.items() if key not in there}
                for part in _parts(missing):
                    self._packs.put(*build(part))
                if missing:
                    self._known.announce()
                    self._known.summarise()
            self.inner.sync({entry.pack for entry in there.values()})
            return
        for folder in FOLDERS:
            stage = {key: data for key, data in objects.items() if key.startswith(f"{folder}/")}
            if stage:
                self._put_loose(stage, workers)

    def put_if_absent(self, key: str, data: Chunks, *, durable: bool = True) -> bool:
        """See `Storage`."""
        if can_hold(key) and self.size(key) is not None:
            return False
        return self.inner.put_if_absent(key, data, durable=durable)

    def stage(self, data: Chunks) -> Staged:
        """See `Storage`: for objects that are too large for packs."""
        return self.inner.stage(data)

    def flush(self, staged: Sequence[Staged]) -> None:
        """See `Storage`."""
        self.inner.flush(staged)

    def replace(self, key: str, data: Chunks) -> None:
        """See `Storage`: in every pack that holds it. A gc that rewrites such a pack may undo it."""
        self.replace_all([key], lambda _: data)

    def replace_all(self, keys: Iterable[str], bring: Callable[[str], Chunks | None]) -> set[str]:
        """Do as `replace` for many objects: each pack is written again once, for all of them that it holds.

        Args:
            keys: of the objects.
            bring: returns the bytes to store, or None to leave an object as it is. It is called once for each
                pack that holds the object, so that only the bytes for one pack are in memory.

        Returns:
            The keys whose objects are replaced everywhere.
        """
        keys = list(keys)
        if any(map(can_hold, keys)):
            self.refresh(changed=self.is_remote)
        held: dict[str, set[str]] = defaultdict(set)
        done: set[str] = set()
        failed: set[str] = set()
        for key in keys:
            packs = self.packs_of(key)
            for pack in packs:
                held[pack].add(key)
            data = None if packs else bring(key)
            if data is not None:
                self.inner.replace(key, data)
                done.add(key)
        for pack, members in held.items():
            found = ((key, bring(key)) for key in members)
            changed = {key: b"".join(data) for key, data in found if data is not None}
            with suppress(CorruptManifestError):
                if changed and self._packs.rewrite(pack, (), changed):
                    done |= changed.keys()
                    failed.update(members - changed.keys())
                    continue
            failed.update(members)
        if held:
            self.refresh(changed=True)
        return done - failed

    def delete(self, key: str) -> bool:
        """See `Storage`; packs that held it are written again. Many are deleted faster by `delete_all`."""
        if layout.is_pack(key) and not self._is_damaged(key):
            return False
        if not can_hold(key):
            return self.inner.delete(key)
        self.refresh(changed=self.is_remote)
        was_packed = bool(self.packs_of(key))
        self.delete_all([key])
        return self.inner.delete(key) or was_packed

    def delete_all(
        self,
        keys: Iterable[str],
        may_go_on: Callable[[], bool] = lambda: True,
        on_gone: Callable[[str], None] = lambda _: None,
    ) -> Sequence[str]:
        """Delete objects that do not need each other, durably. What shares a pack goes in one step.

        Args:
            keys: of objects in packs that were there at the last `list`, or on their own.
            may_go_on: asked right before each step that deletes; where it says no, the rest stays.
            on_gone: told each key that is gone.

        Returns:
            The keys that are gone.
        """
        places = {key: self.packs_of(key) for key in keys}
        leaving: dict[str, set[str]] = defaultdict(set)
        for key, packs in places.items():
            for pack in packs:
                leaving[pack].add(key)
        gone: list[str] = []
        left = {key: len(packs) for key, packs in places.items()}
        try:
            for key in [key for key, packs in places.items() if not packs]:
                if not may_go_on():
                    return gone
                if layout.is_pack(key) and not self._is_damaged(key):
                    continue
                self.inner.delete(key)
                gone.append(key)
                on_gone(key)
            for pack, without in leaving.items():
                if not self._packs.rewrite(pack, without, {}, may_go_on):
                    return gone
                for key in without:
                    # Two registrations at once may have put one on its own and one into a pack.
                    if key in self._twins or not self.is_remote:
                        self.inner.delete(key)
                    left[key] -= 1
                    if not left[key]:
                        gone.append(key)
                        on_gone(key)
            return gone
        finally:
            self.inner.sync(gone)
            if leaving:
                self.refresh(changed=True)

    def _is_damaged(self, pack: str) -> bool:
        """Tell whether a pack that was found damaged still is: a registration may have written it again."""
        try:
            read_index(self.inner, pack)
        except (CorruptManifestError, NotFoundError):
            return True
        return False

    def mergeable(self) -> bool:
        """Tell whether `merge` would do anything; reads what packs hold of the same objects."""
        return self.writes_packs and bool(self._packs.mergeable())

    def merge(self, may_go_on: Callable[[], bool]) -> None:
        """Write small packs together and drop second copies; see `PackWriter.merge`."""
        try:
            self._packs.merge(may_go_on)
        finally:
            self.refresh(changed=True)

    def sync(self, keys: Iterable[str]) -> None:
        """See `Storage`."""
        entries = {key: self._find(key) if can_hold(key) else None for key in keys}
        self.inner.sync({key if entry is None else entry.pack for key, entry in entries.items()})

    def copies(self, key: str, length: int | None = None) -> Sequence[memoryview]:
        """Return an object as each of the packs that hold it does; none where that is one or none.

        Args:
            key: of the object.
            length: bytes of it, all when None.
        """
        for _ in range(_TRIES):
            entries = self._known.all_places(key) if can_hold(key) else []
            if len(entries) < 2:
                return []
            try:
                return [
                    self.inner.get_part(
                        entry.pack, entry.offset, entry.size if length is None else _cut(entry, 0, length)
                    )
                    for entry in entries
                ]
            except NotFoundError:
                self.refresh(changed=True)
        raise _keeps_moving(key)

    def doubt(self) -> None:
        """Believe nothing that was read of packs before: they may have been damaged since."""
        self._known.doubt()

    def clean(self) -> int:
        """See `Storage`."""
        if self.writes_packs:
            self._known.summarise()
        return self.inner.clean()

    def refresh(self, *, changed: bool = False) -> None:
        """Learn which packs came and went.

        Args:
            changed: something did for sure, so neither stamps nor news are believed.
        """
        self._known.refresh(changed=changed)

    def _certain(self, keys: Iterable[str]) -> dict[str, Entry]:
        """Return where in packs objects are now; of many at once, with one look at the packs.

        A registration asks this after it has leased them, so what is here stays, and others know of it.
        """
        keys = [key for key in keys if can_hold(key)]
        self.refresh()
        for _ in range(_TRIES):
            found = self._packed(keys)
            if self._known.are_there({entry.pack for entry in found.values()}):
                self._known.announce_late()
                return found
        raise _keeps_moving(f"{len(keys)} objects")

    def _packed(self, keys: Sequence[str]) -> dict[str, Entry]:
        """Return where in packs objects are, as far as is known without looking; of many at once."""
        candidates = self._known.candidates(keys)
        return {key: entry for key in candidates if (entry := self._find(key)) is not None}

    def _find(self, key: str) -> Entry | None:
        # Two writers at once may have stored a tensor as it is and as a difference, which is smaller. Only
        # what all find as it is can be a base.
        return max(self._known.places(key), key=_preferred, default=None)

    def _look(self, key: str, packed: Callable[[Entry], _T], loose: Callable[[], _T]) -> _T:
        if not can_hold(key):
            return loose()
        entry = self._find(key)
        for _ in range(_TRIES):
            try:
                return loose() if entry is None else packed(entry)
            except NotFoundError:
                tried = entry
                self.refresh(changed=tried is not None)
                entry = self._find(key)
                # A pack that was known from a summary may have gone since: what it held is in another one.
                if entry is None and tried is None and not self._known.is_old:
                    if self._known.failure is not None:
                        raise self._known.failure from None
                    raise
        raise _keeps_moving(key)

    def _packed_size(self, entry: Entry) -> int:
        if self.inner.size(entry.pack) is None:
            raise NotFoundError(f"{entry.pack} does not exist", key=entry.pack)
        return entry.size

    def _loose_size(self, key: str) -> int:
        size = self.inner.size(key)
        if size is None:
            raise NotFoundError(f"{key} does not exist", key=key)
        return size

    def _put_loose(self, objects: Mapping[str, Buffer], workers: int) -> None:
        staged: dict[str, Staged] = {}

        def stage(item: tuple[str, Buffer]) -> None:
            staged[item[0]] = self.inner.stage([item[1]])

        try:
            with ThreadPoolExecutor(workers, thread_name_prefix="blockzoo-write") as pool:
                list(pool.map(stage, objects.items()))
                self.inner.flush(list(staged.values()))
                list(pool.map(lambda item: item[1].publish(item[0]), staged.items()))
        finally:
            for body in staged.values():
                body.discard()
        self.inner.sync(objects)


def _parts(objects: Mapping[str, Buffer]) -> Iterator[dict[str, Buffer]]:
    """Cut objects into packs of at most `MAX_PACK_BYTES`, or one object."""
    part: dict[str, Buffer] = {}
    num_bytes = 0
    for key, data in objects.items():
        size = memoryview(data).nbytes
        if part and num_bytes + size > MAX_PACK_BYTES:
            yield part
            part, num_bytes = {}, 0
        part[key] = data
        num_bytes += size
    if part:
        yield part


def as_small(chunks: Chunks) -> bytes | None:
    """Return the bytes of an object that belongs into a pack, None for a larger one."""
    # `len` counts elements of a memoryview and bytes of all else, so it never counts too many bytes.
    if sum(map(len, chunks)) >= MAX_OBJECT_BYTES:
        return None
    data = b"".join(chunks)
    return data if len(data) < MAX_OBJECT_BYTES else None


def _preferred(entry: Entry) -> tuple[int, str]:
    return entry.size, entry.pack


def _keeps_moving(what: str) -> StorageError:
    return StorageError(
        f"{what} moved {_TRIES} times while being looked for", hint="Run the command again.", key=what
    )


def _cut(entry: Entry, start: int, length: int) -> int:
    return max(min(length, entry.size - start), 0)
