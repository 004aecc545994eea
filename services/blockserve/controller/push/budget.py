"""A bound on the bytes that wait in memory, shared by all pushes."""

from __future__ import annotations

import threading

from blockserve.common.errors import PushCapacityError

RETRY_AFTER_SECONDS = 2.0
"""About the time in which a push stores what it has."""


class Budget:
    """Counts bytes; safe from several threads."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self.used = 0

    def take(self, num_bytes: int) -> None:
        """Count bytes in; raises PushCapacityError when they are too many."""
        with self._lock:
            if self.used + num_bytes > self._limit:
                raise PushCapacityError(
                    f"pushes hold {self.used} bytes that are not stored yet, the maximum of this server",
                    retry_after=RETRY_AFTER_SECONDS,
                    hint="Try again when other pushes are done, or raise controller.max_unstored_bytes.",
                )
            self.used += num_bytes

    def give(self, num_bytes: int) -> None:
        """Count bytes out."""
        with self._lock:
            self.used -= num_bytes
