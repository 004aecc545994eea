"""Taking and showing operators' wishes about placement: what a controller and a router do alike.

Whoever is asked writes to the zoo, and the leading controller reads it there within its next period; so any
controller and any router may be asked, and no wish depends on who leads or on the shared state.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from blockserve.common.api.cluster import ClusterView
from blockserve.common.api.placement import WishStatus
from blockserve.common.errors import WorkerNotFoundError
from blockzoo.errors import (
    BlockzooError,
    InvalidInputError,
    NotFoundError,
    StorageError,
    VariantNotFoundError,
)
from blockzoo.manifest import ChainId, VariantName
from blockzoo.names import check_name
from blockzoo.store.wishes import PlacementWish, WishBook
from blockzoo.zoo import Zoo

log = logging.getLogger(__name__)

EVICT_SECONDS = 6.0
"""How long an evicted chain is held by nobody. Routers look every 2 s and forget what was asked of them
before; what is asked for after that loads it again."""
MAX_WORKERS = 1000
"""Copies that may be wished for, and workers that may be named: what placement is measured with."""


class WishKeeper:
    """Checks wishes and writes them. One event loop; the zoo is worked on in threads."""

    def __init__(self, zoo: Zoo, view: Callable[[], ClusterView]) -> None:
        """Prepare.

        Args:
            zoo: where wishes are kept.
            view: the cluster as last seen.
        """
        self._zoo = zoo
        self._view = view
        self._book = WishBook(zoo.store)

    async def wish(
        self,
        variant: str,
        *,
        pinned: bool | None = None,
        replicas: int | None = None,
        workers: Sequence[str] | None = None,
    ) -> WishStatus:
        """Change what is wished about a variant; None leaves a part as it is.

        Args:
            variant: its name; the wish follows it to its newest version.
            pinned: hold it even while nobody calls it.
            replicas: how many workers are to hold it; 0 leaves that to its traffic.
            workers: names or ids of the workers that are to hold it; none leaves that to placement.

        Raises:
            InvalidInputError: a version was named, or a number is absurd.
            VariantNotFoundError: it is not registered.
            WorkerNotFoundError: no live worker has one of the names.
            StorageError, ConflictError: the wish could not be written.
        """
        self._check(variant, replicas, workers)
        named = None if workers is None else tuple(dict.fromkeys(map(self._live_name, workers)))

        def change(wish: PlacementWish) -> PlacementWish:
            changed = replace(
                wish,
                pinned=wish.pinned if pinned is None else pinned,
                replicas=wish.replicas if replicas is None else replicas,
                workers=wish.workers if named is None else named,
                avoid=tuple(name for name in wish.avoid if name not in (named or ())),
            )
            # An eviction is an event: a later change must not look like another one.
            return wish if changed == wish else replace(changed, evicted=None)

        return await self._change(variant, lambda _: change)

    async def evict(self, variant: str, worker: str = "") -> WishStatus:
        """Withdraw all that is wished about a variant and have workers let go of it; calls load it again.

        Args:
            variant: its name.
            worker: have only this one let go, and not hold it again until it is placed there.

        Raises: as `wish`.
        """
        self._check(variant)
        wishes, _ = await asyncio.to_thread(self._book.current)
        known = wishes.get(check_name(variant))
        if not worker:
            return await self._change(
                variant,
                lambda chain: lambda wish: PlacementWish(wish.variant, wish.number, evicted=chain),
                also_removed=known is not None,
            )
        name = worker if known is not None and worker in known.workers else self._live_name(worker)

        def bar(wish: PlacementWish) -> PlacementWish:
            others = tuple(one for one in wish.workers if one != name)
            return replace(wish, workers=others, avoid=tuple(sorted({*wish.avoid, name})), evicted=None)

        return await self._change(variant, lambda _: bar)

    async def list(self) -> tuple[WishStatus, ...]:
        """Every variant's wish that is not empty, by name."""
        wishes, problems = await asyncio.to_thread(self._book.current)
        for key, error in problems.items():
            log.warning("a wish cannot be read key=%s: %s", key, error)
        kept = [wish for wish in wishes.values() if not wish.is_empty]
        chains = await asyncio.to_thread(lambda: [chain_of(self._zoo, wish) for wish in kept])
        return tuple(self._status(wish, chain) for wish, chain in zip(kept, chains, strict=True))

    async def _change(
        self,
        variant: str,
        act: Callable[[ChainId | None], Callable[[PlacementWish], PlacementWish]],
        *,
        also_removed: bool = False,
    ) -> WishStatus:
        """Write a change; `also_removed` allows it for a variant that is not registered any more."""

        def write() -> tuple[PlacementWish, ChainId | None]:
            chain: ChainId | None = None
            try:
                chain = self._zoo.resolve(variant).chain
            except VariantNotFoundError:
                if not also_removed:
                    raise
            return self._book.change(variant, act(chain)), chain

        wish, chain = await asyncio.to_thread(write)
        log.info(
            "wish variant=%s number=%d pinned=%s replicas=%d workers=%s avoid=%s",
            variant, wish.number, wish.pinned, wish.replicas, ",".join(wish.workers), ",".join(wish.avoid),
        )  # fmt: skip
        return self._status(wish, chain)

    def _check(
        self, variant: str, replicas: int | None = None, workers: Collection[str] | None = None
    ) -> None:
        if "@" in variant:
            raise InvalidInputError(
                "a placement wish holds for all versions of a name",
                hint="Leave out the version.",
                field="variant",
            )
        check_name(variant)
        if replicas is not None and not 0 <= replicas <= MAX_WORKERS:
            raise InvalidInputError(
                f"replicas: {replicas} is not within 0 to {MAX_WORKERS}",
                hint="0 lets the number follow the traffic.",
                field="replicas",
            )
        if workers is not None and len(workers) > MAX_WORKERS:
            raise InvalidInputError(f"workers: {len(workers)} are more than {MAX_WORKERS}", field="workers")

    def _live_name(self, worker: str) -> str:
        records = [one.record for one in self._view().workers.values()]
        for record in records:
            if worker in (record.name, record.id):
                return record.name
        names = ", ".join(sorted(record.name for record in records)) or "none"
        raise WorkerNotFoundError(
            f"there is no worker {worker[:200]!r}", hint=f"Live workers: {names}.", worker=worker[:200]
        )

    def _status(self, wish: PlacementWish, chain: ChainId | None) -> WishStatus:
        view = self._view()
        placed = {
            view.workers[worker].record.name
            for worker, assigned in view.placement.workers.items()
            if worker in view.workers and any(one.chain == chain for one in assigned)
        }
        since = datetime.datetime.fromtimestamp(wish.at, datetime.UTC).isoformat() if wish.number else ""
        return WishStatus(
            variant=wish.variant,
            pinned=wish.pinned,
            replicas=wish.replicas,
            workers=wish.workers,
            avoid=wish.avoid,
            since=since,
            chain=chain or "",
            placed=tuple(sorted(placed)),
        )


class EvictionFeed:
    """Tells a router which chains were evicted since it last looked. For one thread at a time."""

    def __init__(self, book: WishBook) -> None:
        """Prepare; the first look tells of everything that was ever evicted."""
        self._book = book
        self._seen: Mapping[VariantName, PlacementWish] = {}

    def __call__(self) -> list[ChainId]:
        """Chains whose eviction is new; none when the zoo cannot be read."""
        try:
            wishes, _ = self._book.current()
        except StorageError as error:
            log.warning("evictions cannot be read: %s", error)
            return []
        fresh = [wish for name, wish in wishes.items() if self._seen.get(name) != wish]
        self._seen = wishes
        return [wish.evicted for wish in fresh if wish.evicted is not None]


def chain_of(zoo: Zoo, wish: PlacementWish) -> ChainId | None:
    """The chain that a wish's variant runs now; None when it is not registered or damaged (StorageError)."""
    try:
        return zoo.resolve(wish.variant).chain
    except NotFoundError:
        return None
    except StorageError:
        raise
    except BlockzooError as error:
        log.warning("a wished variant cannot be read variant=%s: %s", wish.variant, error)
        return None
