"""Time as a value that tests can replace."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """What leases and gc need of time."""

    def now(self) -> float:
        """Return seconds since 1970, comparable between machines up to `leases.SKEW_S`."""

    def elapsed(self) -> float:
        """Return seconds since some moment, by a clock that nobody sets and that no suspend stops."""

    def sleep(self, seconds: float) -> None:
        """Wait."""


class SystemClock:
    """The machine's clock."""

    def now(self) -> float:
        """See `Clock`."""
        return time.time()

    def elapsed(self) -> float:
        """See `Clock`."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def sleep(self, seconds: float) -> None:
        """See `Clock`."""
        time.sleep(seconds)
