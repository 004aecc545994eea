"""What operators wish about placement, as callers see it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WishStatus:
    """What is wished about a variant, and what has come of it.

    Attributes:
        variant: its name.
        pinned, replicas, workers, avoid: see `blockzoo.store.wishes.PlacementWish`.
        since: ISO 8601, UTC; "" when nobody ever wished anything.
        chain: that the name stands for now; "" when it is not registered any more.
        placed: names of the workers that are to hold the chain or a part of it, by the placement.
    """

    variant: str
    pinned: bool = False
    replicas: int = 0
    workers: tuple[str, ...] = ()
    avoid: tuple[str, ...] = ()
    since: str = ""
    chain: str = ""
    placed: tuple[str, ...] = ()
