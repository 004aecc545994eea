"""Writing packs, and putting packs in the place of others: the new one is durable before an old one goes.

Only a collection that sweeps alone takes objects out of packs or merges packs: of two at once, each would
bring back what the other deleted.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from blockzoo import layout
from blockzoo.digest import Buffer
from blockzoo.errors import CorruptManifestError, NotFoundError
from blockzoo.storage.base import Chunks, Storage
from blockzoo.store.known_packs import KnownPacks
from blockzoo.store.pack_merging import groups
from blockzoo.store.packs import Pack, build, read_index


@dataclass(slots=True)
class _Gathered:
    """What packs that are written together hold.

    Attributes:
        objects: their objects, without those of which other packs hold equal copies.
        packs: the packs.
        keepers: the other packs.
    """

    objects: dict[str, Buffer] = field(default_factory=dict)
    packs: list[str] = field(default_factory=list)
    keepers: set[str] = field(default_factory=set)


class PackWriter:
    """See the module docstring.

    Args:
        inner: the storage with the packs.
        known: the packs that this process knows.
    """

    def __init__(self, inner: Storage, known: KnownPacks) -> None:
        self._inner = inner
        self._known = known

    def put(self, key: str, chunks: Chunks) -> None:
        """Store a new pack durably, as `build` made it. Whoever calls announces it."""
        if not self._inner.put_if_absent(key, chunks):
            # Another process wrote the same a moment ago, or it is damaged: so its objects were missing.
            self._inner.replace(key, chunks)
        self._known.add(Pack(key, bytes(chunks[1])))

    def rewrite(
        self,
        key: str,
        without: Collection[str],
        changed: Mapping[str, Buffer],
        may_go_on: Callable[[], bool] = lambda: True,
    ) -> bool:
        """Put a pack without some objects, or with other bytes of some, in its place; tell whether it is.

        Where it is not, all stays as it was, but what is kept may be stored twice.
        """
        if not may_go_on():
            return False
        try:
            pack, body = read_index(self._inner, key), self._inner.get(key)
        except NotFoundError:
            return False
        kept: dict[str, Buffer] = {
            name: changed[name] if name in changed else body[entry.offset : entry.offset + entry.size]
            for name, entry in pack.objects()
            if name not in without
        }
        if kept:
            new, chunks = build(kept)
            if new == key:
                self._inner.replace(key, chunks)
                return True
            if not self._put_kept(new, chunks, kept, changed):
                return False
            self._known.announce()
            if not may_go_on():
                return False
        self._inner.delete(key)
        self._known.forget(key)
        self._inner.sync([key])
        return True

    def _put_kept(
        self, key: str, chunks: Chunks, kept: Mapping[str, Buffer], proven: Collection[str] = ()
    ) -> bool:
        """Store a pack of what is kept of others, unless one is there that may have the good copies.

        Args:
            key: of the pack.
            chunks: its bytes.
            kept: what it holds.
            proven: those objects of it whose bytes are known to be good.
        """
        if not self._inner.put_if_absent(key, chunks):
            try:
                pack, body = read_index(self._inner, key), self._inner.get(key)
            except (NotFoundError, CorruptManifestError):
                pass  # what it held is missing
            else:
                for name, entry in pack.objects():
                    is_same = body[entry.offset : entry.offset + entry.size] == kept[name]
                    if not is_same and name not in proven:
                        return False
            self._inner.replace(key, chunks)
        self._known.add(Pack(key, bytes(chunks[1])))
        return True

    def mergeable(self) -> list[list[str]]:
        """Return the packs that `merge` would write together; see `blockzoo.store.pack_merging`."""
        return self._plan()[0]

    def merge(self, may_go_on: Callable[[], bool]) -> None:
        """Write small packs together, and packs with second copies again without these.

        Every object stays. Only for a collection that sweeps alone.

        Args:
            may_go_on: asked right before each step that deletes or brings something; where it says no, the
                rest stays as it is.
        """
        plan, repeated = self._plan()
        for group in plan:
            if not self._merge(group, repeated, may_go_on):
                return

    def _plan(self) -> tuple[list[list[str]], Mapping[str, Collection[str]]]:
        self._known.refresh(changed=True)
        repeated = self._known.repeated()
        known = self._known.packs()
        sizes = {info.key: info.size for info in self._inner.list(layout.PACKS) if info.key in known}
        return list(groups(sizes, repeated)), repeated

    def _merge(self, group: Sequence[str], repeated: Collection[str], may_go_on: Callable[[], bool]) -> bool:
        """Put one pack in the place of a group; tell whether time is left."""
        found = self._gather(group, repeated)
        new, chunks = build(found.objects)
        if new in found.packs and len(found.packs) == 1:
            return True
        if found.objects and new not in found.packs:
            if not may_go_on():
                return False
            if not self._put_kept(new, chunks, found.objects):
                return True  # its copies differ from these
            self._known.announce()
        # Whoever wrote the copies that stay may not have made them durable yet.
        self._inner.sync(found.keepers | {new} if found.objects else found.keepers)
        gone = [key for key in found.packs if key != new]
        try:
            for key in gone:
                if not may_go_on():
                    return False
                self._inner.delete(key)
                self._known.forget(key)
        finally:
            self._inner.sync(gone)
        return True

    def _gather(self, group: Sequence[str], repeated: Collection[str]) -> _Gathered:
        """Read packs; those that are damaged or hold other bytes of the same object are left out."""
        found = _Gathered()
        for key in group:
            try:
                pack, body = read_index(self._inner, key), self._inner.get(key)
            except (NotFoundError, CorruptManifestError):
                continue
            held: dict[str, Buffer] = {}
            is_sound = True
            for name, entry in pack.objects():
                held[name] = body[entry.offset : entry.offset + entry.size]
                is_whole = len(body) >= entry.offset + entry.size
                is_sound &= is_whole and (name not in found.objects or found.objects[name] == held[name])
            if is_sound:
                found.packs.append(key)
                found.objects |= held
        for name in [name for name in found.objects if name in repeated]:
            keeper = self._keeper(name, found)
            if keeper is not None:
                found.keepers.add(keeper)
                del found.objects[name]
        return found

    def _keeper(self, name: str, found: _Gathered) -> str | None:
        """Return a pack outside of a group that holds the same bytes of an object."""
        for entry in self._known.all_places(name):
            if entry.pack not in found.packs:
                try:
                    copy = self._inner.get_part(entry.pack, entry.offset, entry.size)
                except NotFoundError:
                    continue
                if copy == found.objects[name]:
                    return entry.pack
        return None
