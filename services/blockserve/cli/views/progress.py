"""Progress of long operations on stderr: a bar on a terminal, a plain line now and then elsewhere.

Nothing is shown for what is over within a second, and nothing goes to stdout.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from blockserve.cli.views.tables import format_bytes, format_seconds, note

if TYPE_CHECKING:
    from blockzoo.progress import Progress

BYTES = "bytes"
BAR_AFTER_S = 0.8
LINE_AFTER_S = 2.0
LINE_EVERY_S = 10.0
MAX_TITLE = 45
"""Characters beside the bar; a terminal of 80 columns has room for both."""


class _Shown(Protocol):
    def start(self, task: str, total_bytes: int) -> None: ...

    def advance(self, num_bytes: int) -> None: ...

    def finish(self) -> None: ...

    def close(self) -> None: ...


@contextmanager
def progress(*, quiet: bool = False, unit: str = BYTES) -> Iterator[Progress]:
    """A reporter for one operation; what it drew is gone at the end, however the operation ends.

    Args:
        quiet: report nothing.
        unit: what the operation counts, when it is not bytes.
    """
    if quiet:
        from blockzoo.progress import NoProgress

        yield NoProgress()
        return
    shown: _Shown = Bars(unit) if sys.stderr.isatty() else Lines(unit=unit)
    try:
        yield shown
    finally:
        shown.close()


class Bars:
    """A moving bar for the task at hand."""

    def __init__(self, unit: str = BYTES) -> None:
        """Prepare the bar; it appears when the operation has taken a while."""
        from rich import progress as rich_progress
        from rich.text import Text

        from blockserve.cli.views.tables import stderr

        class Amount(rich_progress.ProgressColumn):
            """What is done, of how much, in the units of all other sizes; nothing is shown for nothing."""

            def render(self, task: rich_progress.Task) -> Text:
                counted = task.total is not None or task.completed
                return Text(
                    describe_amount(int(task.completed), int(task.total or 0), unit) if counted else ""
                )

        columns: list[rich_progress.ProgressColumn] = [Amount()]
        if unit == BYTES:
            columns.append(rich_progress.TimeRemainingColumn(compact=True))
        self._bars = rich_progress.Progress(
            rich_progress.TextColumn("{task.description}", markup=False),
            rich_progress.BarColumn(bar_width=20),
            *columns,
            console=stderr(),
            transient=True,
        )
        self._timer = threading.Timer(BAR_AFTER_S, self._bars.start)
        self._timer.daemon = True
        self._timer.start()
        self._task: rich_progress.TaskID | None = None

    def start(self, task: str, total_bytes: int) -> None:
        """Replace the bar by one for this task; a total of 0 moves without an end."""
        self.finish()
        if len(task) > MAX_TITLE:
            # A long one is said above the bar, which keeps its beginning.
            note(task)
            task = task.partition(",")[0]
        self._task = self._bars.add_task(task, total=total_bytes or None)

    def advance(self, num_bytes: int) -> None:
        """Move on."""
        if self._task is not None:
            self._bars.advance(self._task, num_bytes)

    def finish(self) -> None:
        """Take the bar away."""
        if self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None

    def close(self) -> None:
        """Give the terminal back."""
        self._timer.cancel()
        self._timer.join()
        self._bars.stop()


class Lines:
    """A line every few seconds, for logs."""

    def __init__(
        self, *, first_after_s: float = LINE_AFTER_S, every_s: float = LINE_EVERY_S, unit: str = BYTES
    ) -> None:
        """Start the thread that writes."""
        self._unit = unit
        self._lock = threading.Lock()
        self._title = ""
        self._total = self._done = 0
        self._started = time.monotonic()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._write, args=(first_after_s, every_s), daemon=True)
        self._thread.start()

    def start(self, task: str, total_bytes: int) -> None:
        """Begin a task."""
        with self._lock:
            self._title, self._total, self._done = task, total_bytes, 0
            self._started = time.monotonic()

    def advance(self, num_bytes: int) -> None:
        """Move on."""
        with self._lock:
            self._done += num_bytes

    def finish(self) -> None:
        """End the task; the next line is about the next one."""
        with self._lock:
            self._title = ""

    def close(self) -> None:
        """Stop writing."""
        self._closed.set()
        self._thread.join()

    def describe(self) -> str:
        """The line as it would be written now; empty between tasks."""
        with self._lock:
            if not self._title:
                return ""
            seconds = format_seconds(time.monotonic() - self._started)
            if not (self._total or self._done):
                return f"{self._title}: {seconds}"
            return f"{self._title}: {describe_amount(self._done, self._total, self._unit)}, {seconds}"

    def _write(self, first_after_s: float, every_s: float) -> None:
        delay = first_after_s
        while not self._closed.wait(delay):
            delay = every_s
            if line := self.describe():
                sys.stderr.write(line + "\n")
                sys.stderr.flush()


def describe_amount(done: int, total: int, unit: str) -> str:
    """What is done, of how much where that is known."""
    counts = [done, total] if total else [done]
    if unit == BYTES:
        return " of ".join(map(format_bytes, counts))
    return f"{' of '.join(map(str, counts))} {unit}"
