"""Which chains leave memory when another one needs the room. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence

from blockserve.common.api.cluster import ChainSpan

Sizes = Mapping[Hashable, int]
"""A chain's blocks and adapters with their bytes; what two chains share has one key."""


class _Memory:
    """Bytes of a set of chains, what they share counted once."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._users: Counter[Hashable] = Counter()

    def add(self, sizes: Sizes) -> None:
        for key, num_bytes in sizes.items():
            self.num_bytes += 0 if self._users[key] else num_bytes
            self._users[key] += 1

    def remove(self, sizes: Sizes) -> None:
        for key, num_bytes in sizes.items():
            self._users[key] -= 1
            self.num_bytes -= 0 if self._users[key] else num_bytes


def choose_victims(
    staying: Iterable[Sizes], idle: Sequence[tuple[ChainSpan, Sizes]], budget: int
) -> list[ChainSpan] | None:
    """The chains to unload, least recently used first; None when unloading all of them is not enough.

    A chain whose going frees nothing that is needed (others keep its blocks) is spared.

    Args:
        staying: chains that cannot go, the one that comes included.
        idle: chains that can, least recently used first.
        budget: bytes that all chains together may take.
    """
    memory = _Memory()
    for sizes in (*staying, *(sizes for _, sizes in idle)):
        memory.add(sizes)
    victims: list[tuple[ChainSpan, Sizes]] = []
    for chain, sizes in idle:
        if memory.num_bytes <= budget:
            break
        memory.remove(sizes)
        victims.append((chain, sizes))
    if memory.num_bytes > budget:
        return None
    gone: list[ChainSpan] = []
    for chain, sizes in reversed(victims):
        memory.add(sizes)
        if memory.num_bytes > budget:
            memory.remove(sizes)
            gone.append(chain)
    return gone[::-1]
