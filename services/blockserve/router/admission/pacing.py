"""When a refused caller should come back, by what the server has measured.

Little's law: with `running` answers at a time, each taking `service` seconds, one ends every
service / running seconds and makes room for one more. Each refused caller is told the next such moment that
no other was told, so those who wait as told come back one by one and find room, instead of all at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable

SMOOTHING = 0.1
"""Weight of the newest answer in the mean service time."""
SHORTEST_SECONDS = 0.05
"""Minimum delay in a refusal: about one round trip."""


class Pacer:
    """Measures how long answers take and spreads the returns of refused callers. One event loop."""

    def __init__(
        self, first_delay: float, max_delay: float, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Make a pacer that has measured nothing.

        Args:
            first_delay: told while nothing is measured, seconds.
            max_delay: most that is told, seconds.
            clock: seconds.
        """
        self._first_delay = first_delay
        self._max_delay = max_delay
        self._clock = clock
        self._service: float | None = None
        self._next_return = 0.0

    def note_served(self, seconds: float) -> None:
        """An answer took this long from its first pass to its end."""
        known = self._service
        self._service = seconds if known is None else known + SMOOTHING * (seconds - known)

    def interval(self, running: int) -> float | None:
        """Seconds between two answers' ends with `running` in progress; None while nothing is measured."""
        return None if self._service is None else self._service / max(1, running)

    def wait(self, ahead: int, running: int) -> float:
        """Seconds in the queue behind `ahead` others; 0 while nothing is measured."""
        return ahead * (self.interval(running) or 0.0)

    def delay(self, running: int) -> float:
        """Seconds after which a caller who is refused now should come back."""
        interval = self.interval(running)
        if interval is None:
            return self._first_delay
        now = self._clock()
        self._next_return = min(max(self._next_return, now) + interval, now + self._max_delay)
        return min(max(self._next_return - now, SHORTEST_SECONDS), self._max_delay)
