"""What operators wish about placement, kept in the zoo so that it outlives every process of a cluster.

A wish is about a variant's name and follows it to its newest version. Each change is a new numbered object
that is created only if its number is free, and the highest number counts: of two writers at once the slower
one reads what the faster one wrote, and makes its own change to that, so nobody's change is lost. Wishes are
never collected (a few hundred bytes each, made by people) and keep no block alive. Older versions of
blockzoo do not list this folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from blockzoo import layout
from blockzoo.canonical import seal_json, unseal_json
from blockzoo.digest import is_digest
from blockzoo.errors import BlockzooError, ConflictError, CorruptionError, CorruptManifestError, NotFoundError
from blockzoo.manifest import ChainId, JsonValue, VariantName
from blockzoo.names import check_name
from blockzoo.store.zoo_store import ZooStore

MAX_ATTEMPTS = 100
"""Changes by others that one change may meet before it gives up."""
_CACHED = 1 << 12
"""Wishes kept in memory; what can be read never changes."""


@dataclass(frozen=True, slots=True)
class PlacementWish:
    """What is wished about a variant.

    Attributes:
        variant: its name.
        number: of the change that made it so; 0 when nobody ever wished anything.
        pinned: hold it even while nobody calls it.
        replicas: how many workers are to hold it; 0 leaves that to its traffic.
        workers: names of the workers that are to hold it; none leaves that to placement.
        avoid: names of the workers that are not to hold it.
        evicted: the chain that workers were last told to let go of.
        at: seconds since 1970 of the change, by the writer's clock.
    """

    variant: VariantName
    number: int = 0
    pinned: bool = False
    replicas: int = 0
    workers: tuple[str, ...] = ()
    avoid: tuple[str, ...] = ()
    evicted: ChainId | None = None
    at: int = 0

    @property
    def asks_to_hold(self) -> bool:
        """Whether the variant is to be held though nobody calls it."""
        return self.pinned or self.replicas > 0 or bool(self.workers)

    @property
    def is_empty(self) -> bool:
        """Whether placement is free."""
        return not self.asks_to_hold and not self.avoid


class WishBook:
    """The wishes of a zoo. May be used from several threads."""

    def __init__(self, store: ZooStore) -> None:
        """Prepare; nothing is read yet."""
        self._store = store
        self._read = lru_cache(_CACHED)(self._read_stored)

    def current(self) -> tuple[Mapping[VariantName, PlacementWish], Mapping[str, BlockzooError]]:
        """Every variant's wish by name, and what cannot be read, by key: that counts as no wish.

        One listing, and a reading of what is new since the last call.

        Raises:
            StorageError: the storage failed.
        """
        newest: dict[VariantName, int] = {}
        for info in self._store.storage.list(layout.WISHES):
            if (parsed := layout.wish_of(info.key)) is not None:
                name = VariantName(parsed[0])
                newest[name] = max(newest.get(name, 0), parsed[1])
        wishes: dict[VariantName, PlacementWish] = {}
        problems: dict[str, BlockzooError] = {}
        for name, number in sorted(newest.items()):
            try:
                wishes[name] = self._read(name, number)
            except (CorruptionError, NotFoundError) as error:
                problems[layout.wish_key(name, number)] = error
        return wishes, problems

    def change(self, name: str, act: Callable[[PlacementWish], PlacementWish]) -> PlacementWish:
        """Replace a variant's wish by what `act` makes of it; returns the one that counts now.

        `act` is called again when somebody else was faster. A wish that it leaves as it is is not written.

        Raises:
            InvalidNameError: this is no name of a variant.
            ConflictError: others were faster again and again.
            StorageError, FormatVersionError: the zoo cannot be written.
        """
        variant = check_name(name)
        self._store.check_writable()
        for _ in range(MAX_ATTEMPTS):
            before = self._newest(variant)
            wish = act(before)
            if wish == before:
                return before
            wish = replace(wish, number=before.number + 1, at=int(self._store.clock.now()))
            if self._store.storage.put_if_absent(layout.wish_key(variant, wish.number), [wish_body(wish)]):
                return wish
        raise ConflictError(
            f"the placement wishes for {variant} change faster than they can be written",
            hint="Try again.",
            variant=variant,
        )

    def read(self, name: str, number: int) -> PlacementWish:
        """One change.

        Raises:
            NotFoundError: there is none of this number.
            CorruptManifestError: it is damaged.
        """
        return self._read(VariantName(name), number)

    def _newest(self, name: VariantName) -> PlacementWish:
        listing = self._store.storage.list(f"{layout.WISHES}/{name}")
        number = max((parsed[1] for info in listing if (parsed := layout.wish_of(info.key))), default=0)
        if not number:
            return PlacementWish(name)
        try:
            return self._read(name, number)
        except CorruptManifestError:
            # Nobody can tell what it said; the next change takes its place.
            return PlacementWish(name, number)

    def _read_stored(self, name: VariantName, number: int) -> PlacementWish:
        key = layout.wish_key(name, number)
        data = self._store.storage.get(key)
        try:
            wish = _from_json(unseal_json(data), key)
        except BlockzooError as error:
            raise _damaged(key) from error
        if (wish.variant, wish.number) != (name, number):
            raise _damaged(key)
        return wish


def wish_body(wish: PlacementWish) -> bytes:
    """The bytes that a wish is stored as."""
    value: dict[str, JsonValue] = {
        "variant": str(wish.variant),
        "number": wish.number,
        "pinned": wish.pinned,
        "replicas": wish.replicas,
        "workers": [*wish.workers],
        "avoid": [*wish.avoid],
        "evicted": wish.evicted,
        "at": wish.at,
    }
    return seal_json(value)


def _from_json(value: JsonValue, key: str) -> PlacementWish:
    """Read a wish; members that this version does not know are left alone."""
    if not isinstance(value, dict):
        raise _damaged(key)
    variant, pinned, evicted = value.get("variant"), value.get("pinned"), value.get("evicted")
    if not isinstance(variant, str) or not isinstance(pinned, bool):
        raise _damaged(key)
    if evicted is not None and not (isinstance(evicted, str) and is_digest(evicted)):
        raise _damaged(key)
    return PlacementWish(
        variant=check_name(variant),
        number=_count(value.get("number"), key),
        pinned=pinned,
        replicas=_count(value.get("replicas"), key),
        workers=_names(value.get("workers"), key),
        avoid=_names(value.get("avoid"), key),
        evicted=None if evicted is None else ChainId(evicted),
        at=_count(value.get("at"), key),
    )


def _count(value: JsonValue, key: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise _damaged(key)
    return value


def _names(value: JsonValue, key: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise _damaged(key)
    names = tuple(name for name in value if isinstance(name, str) and name.isprintable())
    if len(names) != len(value):
        raise _damaged(key)
    return names


def _damaged(key: str) -> CorruptManifestError:
    return CorruptManifestError(
        f"{key} is damaged",
        hint="Set the placement again with `blockzoo pin`, `place` or `replicas`; it replaces the damaged "
        "record.",
        key=key,
    )
