"""How a conversation reads from the terminal: lines with history, and a pasted text as one message."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

HISTORY_LINES = 1000
QUOTES = '"""'
"""Begins and ends a message of several lines."""
PASTE_GAP_S = 0.03
"""Lines of one paste come at once; nobody types the next line within this time."""


class Messages:
    """The messages that a person types or pastes, or that come through a pipe, a line each.

    A pasted text is one message: where the terminal marks pastes, readline hands them over as one line;
    elsewhere, lines that are there at once belong together. `\"\"\"` begins a message of several typed lines
    and ends it.
    """

    def __init__(self, *, marks_pastes: bool = False) -> None:
        """Prepare; `marks_pastes` says that readline knows where a paste begins and ends."""
        self._is_terminal = sys.stdin.isatty()
        self._joins_lines = self._is_terminal and not marks_pastes

    def read(self, prompt: str) -> str | None:
        """The next message, or None at the end of input; Ctrl-C drops what was typed."""
        while True:
            try:
                return self._message(input(prompt if self._is_terminal else ""))
            except EOFError:
                if self._is_terminal:
                    sys.stdout.write("\n")
                return None
            except KeyboardInterrupt:
                sys.stdout.write("\n")

    def _message(self, line: str) -> str:
        if line.strip().startswith(QUOTES) and self._is_terminal:
            return self._quoted(line.strip().removeprefix(QUOTES))
        lines = [line]
        while self._joins_lines and select.select([sys.stdin], [], [], PASTE_GAP_S)[0]:
            try:
                lines.append(input())
            except EOFError:
                break
        return "\n".join(lines).rstrip("\n")

    def _quoted(self, text: str) -> str:
        """Everything up to the closing quotes."""
        while QUOTES not in text:
            try:
                text += "\n" + input("... ")
            except EOFError:
                break
        return text.partition(QUOTES)[0].strip("\n")


@contextmanager
def line_editing() -> Iterator[Messages]:
    """Editing and history of lines on a terminal; the history is kept where only the user can read it."""
    if not sys.stdin.isatty():
        yield Messages()
        return
    import readline

    # CPython turns it off, because its own prompt cannot deal with a line of several lines.
    readline.parse_and_bind("set enable-bracketed-paste on")
    is_gnu = "libedit" not in (readline.__doc__ or "")
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    path = state / "blockzoo" / "chat_history"
    with suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(HISTORY_LINES)
    try:
        yield Messages(marks_pastes=is_gnu and os.environ.get("TERM", "dumb") != "dumb")
    finally:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            path.touch(mode=0o600)
            readline.write_history_file(path)
