"""What is going on and what has ended lately: remembered by key, the ended ones up to a bound."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Recent(Generic[K, V]):
    """Entries by key. Those that run stay until they end; then the oldest go first."""

    def __init__(self, limit: int) -> None:
        """Remember `limit` ended entries at most."""
        self.limit = limit
        self._running: dict[K, V] = {}
        self._ended: OrderedDict[K, V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._running) + len(self._ended)

    def get(self, key: K) -> V | None:
        """An entry, running or ended."""
        found = self._running.get(key)
        return self._ended.get(key) if found is None else found

    def begin(self, key: K, value: V) -> None:
        """An entry runs, again perhaps; one of the same key is replaced."""
        self._ended.pop(key, None)
        self._running[key] = value

    def end(self, key: K) -> None:
        """An entry has ended; one that does not run is left alone."""
        if key not in self._running:
            return
        self._ended[key] = self._running.pop(key)
        while len(self._ended) > self.limit:
            self._ended.popitem(last=False)

    def running(self) -> Iterator[V]:
        """What runs, in the order in which it began."""
        return iter(list(self._running.values()))

    def items(self) -> Iterator[tuple[K, V]]:
        """All entries: those that have ended, then those that run."""
        yield from list(self._ended.items())
        yield from list(self._running.items())
