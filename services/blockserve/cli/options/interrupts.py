"""Ctrl-C as a wish to stop, where an exception in the middle of anything would do harm."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any, Self


class Interruptible:
    """Within it Ctrl-C calls a function and raises nothing.

    KeyboardInterrupt comes between any two steps of Python: while a lock is held, in the middle of a
    clean-up, or when what it should have stopped has just ended, and then it ends what comes next.

    Args:
        stop: what Ctrl-C calls, each time; it must not wait for anything.

    Attributes:
        is_stopped: whether Ctrl-C was pressed.
    """

    def __init__(self, stop: Callable[[], None]) -> None:
        self.is_stopped = False
        self._stop = stop
        self._former: Any = None

    def __enter__(self) -> Self:
        former = signal.getsignal(signal.SIGINT)
        # Other threads get no signals, and who was started in the background of a script ignores this one.
        if threading.current_thread() is threading.main_thread() and former not in (None, signal.SIG_IGN):
            self._former = former
            signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._former is not None:
            signal.signal(signal.SIGINT, self._former)

    def _handle(self, *_: object) -> None:
        self.is_stopped = True
        self._stop()
