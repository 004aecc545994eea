"""At most so many lines a second of one kind in the log: what callers provoke must not fill a disk."""

from __future__ import annotations

import time
from collections.abc import Callable


class LogLimiter:
    """Says whether a line may be written, and what to add about those that were left out. One event loop."""

    def __init__(self, per_second: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin with none written.

        Args:
            per_second: lines of a second.
            clock: seconds.
        """
        self._per_second = per_second
        self._clock = clock
        self._second = 0
        self._written = self._left_out = 0

    def left_out(self) -> str | None:
        """What to add to a line that is written now; None when it must be left out."""
        second = int(self._clock())
        if second != self._second:
            self._second, self._written = second, 0
        if self._written >= self._per_second:
            self._left_out += 1
            return None
        self._written += 1
        count, self._left_out = self._left_out, 0
        return f" ({count} more were left out)" if count else ""
