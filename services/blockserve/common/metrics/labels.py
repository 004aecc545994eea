"""Label values that cannot grow without bound."""

from __future__ import annotations

import threading
from collections.abc import Iterable

OTHER = "other"
"""The value that stands for all names beyond the bound."""


class BoundedLabels:
    """Gives the first `limit` names a label of their own, and all others the same. Safe from any thread."""

    def __init__(self, limit: int) -> None:
        """Keep at most `limit` distinct names."""
        self._limit = limit
        self._known: set[str] = set()
        self._lock = threading.Lock()

    def of(self, name: str) -> str:
        """The label value of a name: itself, or `OTHER`. A name keeps its answer."""
        with self._lock:
            if name in self._known:
                return name
            if len(self._known) >= self._limit:
                return OTHER
            self._known.add(name)
            return name

    def retain(self, names: Iterable[str]) -> None:
        """Forget all names but these, so that new ones find room."""
        with self._lock:
            self._known.intersection_update(names)
