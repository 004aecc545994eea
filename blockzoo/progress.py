"""How long operations report what they have done."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives progress: one call at a time, but possibly from threads of the operation's own."""

    def start(self, task: str, total_bytes: int) -> None:
        """A task begins; the one before it has finished."""
        ...

    def advance(self, num_bytes: int) -> None:
        """This many more bytes are done."""
        ...

    def finish(self) -> None:
        """The task that was started has ended."""
        ...


class NoProgress:
    """Reports nothing."""

    def start(self, task: str, total_bytes: int) -> None:
        """Ignore the start of a task."""

    def advance(self, num_bytes: int) -> None:
        """Ignore an advance."""

    def finish(self) -> None:
        """Ignore the end of a task."""
