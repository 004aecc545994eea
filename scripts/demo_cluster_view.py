"""What the cluster demo shows while answers stream: a table on a terminal, a line per answer elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

REDRAWS_PER_SECOND = 8


@dataclass
class ClusterAnswer:
    """One variant's answer as its caller gets it; times are `time.monotonic()` seconds.

    Attributes:
        num_repeated: tokens that came although they had come before, or out of order.
        longest_stall: between two chunks.
    """

    variant: str
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    error: str = ""
    num_repeated: int = 0
    longest_stall: float = 0.0
    last_at: float = 0.0

    def add(self, first: int, tokens: Sequence[int], text: str) -> None:
        """Take in a chunk that begins at output token `first`."""
        now = time.monotonic()
        if self.last_at:
            self.longest_stall = max(self.longest_stall, now - self.last_at)
        self.last_at = now
        if first != len(self.tokens):
            self.num_repeated += len(tokens)
            return
        self.tokens.extend(tokens)
        self.text += text


class ClusterView(Protocol):
    """Shows answers while they arrive."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def make_cluster_view(console: Console, answers: Sequence[ClusterAnswer], title: str) -> ClusterView:
    """A table that is redrawn when the console is a terminal, lines at the end otherwise."""
    return _Live(console, answers, title) if console.is_terminal else _Lines(console, answers, title)


class _Live:
    """A table, redrawn on a clock of its own: redrawing for every token would take time from the workers."""

    def __init__(self, console: Console, answers: Sequence[ClusterAnswer], title: str) -> None:
        self._answers, self._title, self._width = answers, title, console.width
        self._live = Live(console=console, get_renderable=self._table, refresh_per_second=REDRAWS_PER_SECOND)

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)

    def _table(self) -> Table:
        table = Table(title=self._title, expand=True, box=None)
        table.add_column("variant", style="bold", no_wrap=True)
        table.add_column("tokens", justify="right")
        table.add_column("answer", ratio=1, no_wrap=True)
        room = max(10, self._width - 30)
        for one in self._answers:
            table.add_row(one.variant, str(len(one.tokens)), Text(one.text.replace("\n", " ")[-room:]))
        return table


class _Lines:
    """A line for each answer when all have ended."""

    def __init__(self, console: Console, answers: Sequence[ClusterAnswer], title: str) -> None:
        self._console, self._answers, self._title = console, answers, title

    def __enter__(self) -> Self:
        self._console.print(f"  {self._title}: {len(self._answers)} answers begin")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for one in self._answers:
            text = one.text.replace("\n", " ")[:70]
            self._console.print(f"  {one.variant:14} {len(one.tokens):4} tokens  {text}", markup=False)
