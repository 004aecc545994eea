"""Stop strings that may lie across token borders."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Watches text for stop strings, holding back only what could still become one.

    The first stop string to be complete wins, reading character by character (of two that end together, the
    longer one), so the result does not depend on how the text was cut into pieces.

    Each stop string is followed by a Knuth-Morris-Pratt automaton: constant work per character and string.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        """Watch for `stops` (none empty); `include` leaves the matched string in the text."""
        self._stops = tuple(sorted(set(stops), key=len, reverse=True))
        self._failures = [_failure_table(stop) for stop in self._stops]
        self._states = [0] * len(self._stops)
        self._include = include
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Take more text and give back what may be shown.

        After `matched` is set, everything later is swallowed.
        """
        if self.matched is not None or not self._stops:
            return "" if self.matched is not None else text
        buffer = self._held + text
        for position, char in enumerate(text, start=len(self._held) + 1):
            if (stop := self._advance(char)) is not None:
                self.matched, self._held = stop, ""
                return buffer[: position if self._include else position - len(stop)]
        keep = max(self._states)
        self._held = buffer[len(buffer) - keep :]
        return buffer[: len(buffer) - keep]

    def finish(self) -> str:
        """What was held back and did not become a stop string."""
        held, self._held = self._held, ""
        return held

    def _advance(self, char: str) -> str | None:
        for i, stop in enumerate(self._stops):
            state = self._states[i]
            while state and stop[state] != char:
                state = self._failures[i][state - 1]
            state += stop[state] == char
            if state == len(stop):
                return stop
            self._states[i] = state
        return None


def _failure_table(pattern: str) -> list[int]:
    """table[i]: length of the longest proper prefix of pattern[:i + 1] that is also its suffix."""
    table = [0] * len(pattern)
    length = 0
    for i in range(1, len(pattern)):
        while length and pattern[i] != pattern[length]:
            length = table[length - 1]
        length += pattern[i] == pattern[length]
        table[i] = length
    return table
