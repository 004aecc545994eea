"""From what operators wish to what placement is asked for. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from blockserve.common.api.cluster import Assignment, Run, WorkerId
from blockserve.controller.placement.words import Pin, Wishes, WorkerCapacity
from blockzoo.manifest import ChainId
from blockzoo.store.wishes import PlacementWish

Present = Mapping[WorkerId, Sequence[Assignment]]


@dataclass(frozen=True, slots=True)
class WishedChain:
    """A wish about the chain that a variant's name stands for now.

    Attributes:
        chain: which.
        num_links: its length.
        wish: what is wished.
    """

    chain: ChainId
    num_links: int
    wish: PlacementWish


def to_wishes(
    wished: Iterable[WishedChain],
    names: Mapping[WorkerId, str],
    present: Present,
    *,
    called: Collection[ChainId],
    least_replicas: int = 1,
    evicted: Collection[ChainId] = (),
) -> Wishes:
    """What placement is to heed, with the workers that live.

    A wish for workers of which none lives is one for any worker until one is back; a bar that would leave no
    worker at all is none. A pinned chain stays where it is held whole, so that a pin moves nothing.

    Args:
        wished: what people asked for; chains that two variants share may come twice.
        names: of the workers that take requests, by id.
        present: what they are to hold by now.
        called: chains that have any traffic.
        least_replicas: of chains that have none: their share of no traffic says nothing.
        evicted: chains to let go of; a chain that is wished for is not.
    """
    pins: dict[Pin, None] = {}
    replicas: dict[ChainId, int] = {}
    barred: set[tuple[WorkerId, ChainId]] = set()
    holding: set[ChainId] = set()
    for one in wished:
        homes = _ids(one.wish.workers, names)
        avoided = _ids(one.wish.avoid, names)
        if len(avoided) < len(names):
            barred.update((worker, one.chain) for worker in avoided)
        if one.wish.asks_to_hold:
            holding.add(one.chain)
        pins.update((Pin(worker, one.chain), None) for worker in homes)
        if homes or one.wish.replicas:
            wanted = max(one.wish.replicas, len(homes))
            replicas[one.chain] = max(wanted, replicas.get(one.chain, 0))
        if one.wish.pinned and not homes:
            home = _home(one, names.keys() - set(avoided), present)
            pins.update([(Pin(home, one.chain), None)] if home else [])
    for chain in holding.difference(called):
        replicas.setdefault(chain, least_replicas)
    pinned = {(pin.worker, pin.chain) for pin in pins}
    return Wishes(tuple(pins), replicas, frozenset(evicted) - holding, frozenset(barred - pinned))


def make_room(
    wishes: Wishes,
    homeless: Iterable[ChainId],
    workers: Mapping[WorkerId, WorkerCapacity],
    num_bytes: Mapping[ChainId, int],
) -> Wishes:
    """The same wishes with a home for pinned chains that found no room: what nobody pinned has to go there.

    Args:
        wishes: as placement was asked.
        homeless: pinned chains that it left out.
        workers: that live.
        num_bytes: of the chains that are pinned.
    """
    taken = dict.fromkeys(workers, 0)
    for pin in wishes.pins:
        taken[pin.worker] += num_bytes.get(pin.chain, 0)
    pins = list(wishes.pins)
    for chain in homeless:
        open_to = [worker for worker in sorted(workers) if (worker, chain) not in wishes.barred]
        if not open_to:
            continue
        home = max(open_to, key=lambda worker: _room(workers[worker]) - taken[worker])
        taken[home] += num_bytes.get(chain, 0)
        pins.append(Pin(home, chain))
    return replace(wishes, pins=tuple(dict.fromkeys(pins)))


def _room(worker: WorkerCapacity) -> float:
    return float(worker.block_bytes or "inf")


def _ids(wanted: Collection[str], names: Mapping[WorkerId, str]) -> list[WorkerId]:
    return sorted(worker for worker, name in names.items() if name in wanted)


def _home(one: WishedChain, workers: Collection[WorkerId], present: Present) -> WorkerId | None:
    """A worker that holds all of the chain, one where it is pinned first."""
    whole = Run(0, one.num_links)
    held = [
        (not assigned.pinned, worker)
        for worker in workers
        for assigned in present.get(worker, ())
        if assigned.chain == one.chain and assigned.run == whole
    ]
    return min(held)[1] if held else None
