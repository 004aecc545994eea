"""A line on the terminal while somebody waits for the first word of an answer; gone when it comes."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Self

from blockserve.cli.views.tables import format_seconds

AFTER_S = 1.0
EVERY_S = 0.5
CLEAR = "\r\x1b[K"


class Waiting:
    """Shows what is waited for, and how long already; nothing where standard error is no terminal.

    Args:
        what: says what is waited for; asked in a thread of its own each time the line is drawn, and what it
            raises is passed over.
    """

    def __init__(
        self, what: Callable[[], str], *, after_s: float = AFTER_S, every_s: float = EVERY_S
    ) -> None:
        self._what = what
        self._after_s, self._every_s = after_s, every_s
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._is_drawn = False
        self._started = time.monotonic()
        self._thread = threading.Thread(target=self._show, name="blockzoo-waiting", daemon=True)

    def __enter__(self) -> Self:
        return self.begin()

    def __exit__(self, *exception: object) -> None:
        self.end()

    def begin(self) -> Self:
        """Show the line from now on, when it has taken a while."""
        if sys.stderr.isatty():
            self._thread.start()
        return self

    def end(self) -> None:
        """Take the line away; may be called again."""
        with self._lock:
            self._over.set()
            if self._is_drawn:
                self._is_drawn = False
                sys.stderr.write(CLEAR)
                sys.stderr.flush()

    def _show(self) -> None:
        delay = self._after_s
        while not self._over.wait(delay):
            delay = self._every_s
            text = ""
            with suppress(Exception):
                text = self._what()
            seconds = format_seconds(time.monotonic() - self._started)
            with self._lock:
                if text and not self._over.is_set():
                    sys.stderr.write(f"{CLEAR}[{text}, {seconds}]")
                    sys.stderr.flush()
                    self._is_drawn = True
