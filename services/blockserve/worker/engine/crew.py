"""How many threads compute a pass: all of them, unless other programs use the cores.

Threads of a matrix product wait for each other busily. Where another program has taken the core of one of
them, the others burn theirs until it comes back: two threads then compute many times slower than one. So the
engine looks a few times a second at what others use of the cores that it may use, and computes with as many
threads as there are cores left.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from blockserve.common.process.cores import CoreTimes, read_core_times

_LOG = logging.getLogger(__name__)

LOOK_SECONDS = 0.25
"""How often it is looked; the kernel counts in hundredths of a second."""

FORGET_SECONDS = 2.0
"""What others did longer ago says nothing about now."""

RAISE_SECONDS = 2.0
"""How long cores have to be free before more threads use them: trying costs a slow pass."""

REPORT_SECONDS = 60.0
"""At most one line in the log in this time."""


class Crew:
    """Chooses the number of threads. Used by the thread that computes."""

    def __init__(
        self,
        most: int,
        *,
        read: Callable[[], CoreTimes | None] = read_core_times,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin with what others use just now.

        Args:
            most: threads where nobody else uses the cores.
            read: what has been used of the cores so far; None where that cannot be known.
            clock: seconds.
        """
        self._most = most
        self._read = read
        self._clock = clock
        self._size = most
        self._seen: tuple[float, CoreTimes] | None = None
        self._room_since: float | None = None
        self._next_report = 0.0

    def size(self) -> int:
        """Threads for the next pass."""
        if self._most == 1:
            return 1
        now = self._clock()
        if self._seen is not None and now - self._seen[0] < LOOK_SECONDS:
            return self._size
        times = self._read()
        if times is None:
            return self._most
        before, self._seen = self._seen, (now, times)
        if before is None or now - before[0] > FORGET_SECONDS:
            self._room_since = None
            self._set(self._left(times.cores - self._running_now(times)), now)
            return self._size
        others = times.busy - before[1].busy - (times.own - before[1].own)
        self._take(self._left(times.cores - max(0.0, others / (now - before[0]))), now)
        return self._size

    def _left(self, free: float) -> int:
        """Threads for as many cores as are free."""
        return max(1, min(self._most, int(free + 0.5)))

    def _running_now(self, times: CoreTimes) -> int:
        """Cores that others use at the moment; a thread that runs only for an instant does not count."""
        again = self._read() if times.running else None
        return times.running if again is None else min(times.running, again.running)

    def _take(self, wanted: int, now: float) -> None:
        """Fewer threads at once, more only after a while."""
        if wanted > self._size and self._room_since is None:
            self._room_since = now
        elif wanted > self._size and now - (self._room_since or now) < RAISE_SECONDS:
            pass
        else:
            self._room_since = None
            self._set(wanted, now)

    def _set(self, size: int, now: float) -> None:
        if size == self._size:
            return
        self._size = size
        if now >= self._next_report:
            self._next_report = now + REPORT_SECONDS
            _LOG.info(
                "computing with %d of %d threads: other programs use the cores (fixed with --num-threads)"
                if size < self._most
                else "computing with %d of %d threads",
                size,
                self._most,
            )
