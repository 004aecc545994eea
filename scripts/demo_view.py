"""What the demo shows while answers stream: columns on a terminal, prefixed lines elsewhere."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

MIN_COLUMN = 34  # characters below which an answer is hard to read
PANEL_LINES = 11


@dataclass
class Answer:
    """One variant's answer as it arrives; times are `time.monotonic()` seconds."""

    variant: str
    sent_at: float = field(default_factory=time.monotonic)
    first_at: float | None = None
    last_at: float | None = None
    num_tokens: int = 0
    text: str = ""

    def add(self, text: str, num_tokens: int) -> None:
        """Take in a chunk."""
        self.last_at = time.monotonic()
        if self.first_at is None:
            self.first_at = self.last_at
        self.num_tokens += num_tokens
        self.text += text

    @property
    def time_to_first_token(self) -> float:
        """Seconds from sending to the first token, at the client."""
        return (self.first_at or time.monotonic()) - self.sent_at

    @property
    def tokens_per_second(self) -> float:
        """Tokens after the first, over the time they took."""
        if self.first_at is None or self.last_at is None or self.last_at == self.first_at:
            return 0.0
        return (self.num_tokens - 1) / (self.last_at - self.first_at)


class View(Protocol):
    """Shows answers while they arrive."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def update(self, answer: Answer) -> None:
        """The answer has grown."""

    def end(self, answer: Answer) -> None:
        """The answer is complete."""


def make_view(console: Console, answers: Sequence[Answer]) -> View:
    """Columns when the console is a terminal, lines otherwise."""
    return Columns(console, answers) if console.is_terminal else Lines(console, answers)


class Columns:
    """All answers side by side, redrawn as they grow."""

    def __init__(self, console: Console, answers: Sequence[Answer]) -> None:
        self._answers = answers
        # Drawn on a clock of its own: redrawing for every token would take time from the server.
        self._live = Live(get_renderable=self._draw, console=console, refresh_per_second=8)

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)

    def update(self, answer: Answer) -> None:
        """Nothing to do: the next redraw shows it."""

    def end(self, answer: Answer) -> None:
        """Nothing to do: the next redraw shows it."""

    def _draw(self) -> Table:
        per_row = max(1, min(len(self._answers), shutil.get_terminal_size().columns // MIN_COLUMN))
        grid = Table.grid(expand=True)
        for _ in range(per_row):
            grid.add_column(ratio=1)
        for start in range(0, len(self._answers), per_row):
            panels = [_panel(answer) for answer in self._answers[start : start + per_row]]
            grid.add_row(*panels, *[""] * (per_row - len(panels)))
        return grid


def _panel(answer: Answer) -> Panel:
    speed = ""
    if answer.first_at is not None:
        speed = f"first token {answer.time_to_first_token:.2f} s, {answer.tokens_per_second:.0f} tokens/s"
    return Panel(Text(answer.text), title=answer.variant, subtitle=speed or "waiting", height=PANEL_LINES)


class Lines:
    """Each answer in lines that begin with the variant's name, as they fill up."""

    def __init__(self, console: Console, answers: Sequence[Answer]) -> None:
        self._console = console
        self._indent = max(len(answer.variant) for answer in answers)
        self._shown = {answer.variant: 0 for answer in answers}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def update(self, answer: Answer) -> None:
        """Print what fills a line."""
        self._print(answer, at_end=False)

    def end(self, answer: Answer) -> None:
        """Print the rest."""
        self._print(answer, at_end=True)

    def _print(self, answer: Answer, *, at_end: bool) -> None:
        width = 100 - self._indent
        while rest := answer.text[self._shown[answer.variant] :]:
            cut = _line_end(rest, width)
            if cut is None:
                if not at_end:
                    return
                cut = len(rest)
            self._shown[answer.variant] += cut
            line = f"{answer.variant:>{self._indent}} | {rest[:cut].strip()}"
            self._console.print(Text(line), soft_wrap=True)


def _line_end(text: str, width: int) -> int | None:
    """Where the first full line of a text ends, None when none is full yet."""
    newline = text.find("\n", 0, width)
    if newline >= 0:
        return newline + 1
    if len(text) <= width:
        return None
    space = text.rfind(" ", 0, width)
    return space + 1 if space > 0 else width
