"""What the verbs print: tables for people, one JSON value with `--json`.

Tables are laid out for a width: columns that do not fit are folded at spaces and long names are cut in the
middle, then the least important columns are left out, and at last each row becomes a short paragraph. A cut
word has an ellipsis and keeps both ends; no other word is broken. In a pipe a row is one line, and whole.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from blockserve.cli.views.plain import visible, visible_json

if TYPE_CHECKING:
    from rich.console import Console

GAP = "  "
INDENT = "  "
NAMES = 30
"""Columns up to which names are whole; longer ones are cut rather than that other columns are left out."""
_NBSP = "\N{NO-BREAK SPACE}"
ELLIPSIS = "…"
"""Stands for the middle of a word that is too long."""
_JOINED = re.compile(r"(?<![^\s(])(?:\d[\d.]*|[<>]?=|\(=) (?=\w)|\d (?=(?:[Bsh]\b|\(=))|`[^`]{1,40}`")
"""What lines are not cut in: a number and its unit or what it counts, a bound, and a short command."""


def stderr() -> Console:
    """The console for progress, notes and errors. Made anew each time, because tests replace `sys.stderr`."""
    from blockserve.cli.views.console import SafeConsole

    return SafeConsole(file=sys.stderr, highlight=False)


def print_json(value: Any) -> None:
    """Write one JSON value, indented, and nothing else."""
    sys.stdout.write(visible_json(value, indent=2) + "\n")
    sys.stdout.flush()


def terminal_width() -> int | None:
    """Columns of the terminal that results go to; None where they go elsewhere, and lines may be long."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def terminal_height() -> int | None:
    """Lines of the terminal that results go to, or None."""
    return shutil.get_terminal_size().lines if sys.stdout.isatty() else None


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table.

    Attributes:
        name: its head.
        numeric: whether cells are aligned right.
        folds: width down to which cells may be folded at spaces rather than that columns are left out; 0 for
            cells that are not folded.
        cuts: width down to which words may be cut in the middle, as far as they stay different; 0 for words
            that are shown whole.
        tight: a smaller such width, for where a column of rank 1 would be left out otherwise; 0 for none.
        rank: the higher, the sooner it is left out where there is no room; 0 never.
    """

    name: str
    numeric: bool = False
    folds: int = 0
    cuts: int = 0
    tight: int = 0
    rank: int = 0


@dataclass(slots=True)
class Table:
    """Rows of plain text under named columns; the first column names the row.

    Attributes:
        columns: from left to right.
        rows: one text for each column.
    """

    columns: tuple[Column, ...]
    rows: list[list[str]] = field(default_factory=list)

    def add(self, *cells: object) -> None:
        """Add a row."""
        assert len(cells) == len(self.columns)
        self.rows.append([printable(str(cell)) for cell in cells])

    def lines(self, width: int | None) -> list[str]:
        """The table as lines of at most `width` columns; None: as wide as it is."""
        kept = [n for n, column in enumerate(self.columns) if not column.rank or any(r[n] for r in self.rows)]
        least = cache(self._least)
        while width is not None:
            worst = max(kept, key=lambda index: (self.columns[index].rank, index))
            rank = self.columns[worst].rank
            widths = self._fit(kept, width, least, tight=False)
            if widths is None and rank < 2:
                widths = self._fit(kept, width, least, tight=True)
            if widths is not None:
                return self._draw(kept, widths)
            if not rank:
                return self._paragraphs(kept, width)
            kept.remove(worst)
        return self._draw(kept, [self._natural(index) for index in kept])

    def _texts(self, index: int) -> list[str]:
        return [self.columns[index].name, *(row[index] for row in self.rows)]

    def _natural(self, index: int) -> int:
        return max(map(cells_of, self._texts(index)))

    def _least(self, index: int, tight: bool) -> int:
        """The narrowest that a column is made: few lines are needed, and no two names look alike."""
        natural, column = self._natural(index), self.columns[index]
        if tight and column.tight:
            folds, cuts = (column.tight if wide else 0 for wide in (column.folds, column.cuts))
            column = replace(column, folds=folds, cuts=cuts)
        if not column.folds and not column.cuts:
            return natural
        head, *texts = ([text] if not column.folds else _words(text) for text in self._texts(index))
        words = {word for text in texts for word in text}
        longest = max(map(cells_of, words), default=0)
        if column.cuts < longest and column.cuts:
            longest = _distinct(words, column.cuts)
        return max(longest, *map(cells_of, head), min(natural, column.folds))

    def _fit(
        self, kept: Sequence[int], width: int, least: Callable[[int, bool], int], *, tight: bool
    ) -> list[int] | None:
        """Widths of the columns, or None where they do not fit."""
        room = width - len(GAP) * (len(kept) - 1)
        widths = [least(index, tight) for index in kept]
        spare = room - sum(widths)
        if spare < 0:
            return None
        wants = [self._natural(index) - given for index, given in zip(kept, widths, strict=True)]
        order = sorted(range(len(kept)), key=lambda place: wants[place])
        for number, place in enumerate(order):
            sharers = sum(wants[other] > 0 for other in order[number:]) or 1
            given = min(wants[place], max(spare // sharers, 0)) if wants[place] else 0
            widths[place] += given
            spare -= given
        # What rounding and narrow columns left over goes to the widest.
        for place in sorted(range(len(kept)), key=lambda place: -wants[place]):
            more = min(spare, self._natural(kept[place]) - widths[place])
            widths[place] += more
            spare -= more
        return widths

    def _draw(self, kept: Sequence[int], widths: Sequence[int]) -> list[str]:
        lines = []
        for row in ([column.name for column in self.columns], *self.rows):
            folded = [fit(row[index], width) for index, width in zip(kept, widths, strict=True)]
            for number in range(max(map(len, folded))):
                cells = [
                    _align(part[number] if number < len(part) else "", width, self.columns[index].numeric)
                    for part, index, width in zip(folded, kept, widths, strict=True)
                ]
                lines.append(GAP.join(cells).rstrip())
        return lines

    def _paragraphs(self, kept: Sequence[int], width: int) -> list[str]:
        """Each row as its name and, indented, what the other columns say."""
        lines = []
        for row in self.rows:
            first = self.columns[kept[0]]
            lines += fit(f"{first.name.lower()} {row[kept[0]]}" if first.numeric else row[kept[0]], width)
            told = [
                f"{self.columns[index].name.lower()}{_NBSP if len(row[index]) < 10 else ' '}{row[index]}"
                for index in kept[1:]
                if row[index] not in ("", "-")
            ]
            folded = fit("; ".join(told), width - len(INDENT))
            lines += [INDENT + line.replace(_NBSP, " ") for line in folded]
        return lines


def as_many_as_fit(draw: Callable[[int], list[str]], rows: int, most: int | None) -> list[str]:
    """What `draw` makes of as many rows as go into `most` lines; at least one, and all where most is None."""
    while most is not None and rows > 1 and len(draw(rows)) > most:
        rows -= max(1, (len(draw(rows)) - most) // 3)
    return draw(max(rows, 1))


def print_lines(lines: Iterable[str]) -> None:
    """Write lines of a result."""
    for line in lines:
        say(line)
    sys.stdout.flush()


def print_table(table: Table) -> None:
    """Write a table for the terminal, or the lack of one; its head in bold where that can be shown."""
    first, *rest = table.lines(terminal_width()) or [""]
    is_header = first.lstrip().startswith(table.columns[0].name)
    sys.stdout.write((bold(visible(first)) if is_header else visible(first)) + "\n")
    print_lines(rest)


def bold(text: str) -> str:
    """The text in bold, on a terminal that can."""
    plain = not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb"
    return text if plain else f"\x1b[1m{text}\x1b[0m"


def say(text: str) -> None:
    """Write a line of a result; on a terminal folded at spaces where it is too long."""
    sys.stdout.write("\n".join(fold(visible(text), terminal_width())) + "\n")


def note(text: str) -> None:
    """Write a line that is not part of the result; folded as `say` does."""
    width = shutil.get_terminal_size().columns if sys.stderr.isatty() else None
    sys.stderr.write("\n".join(fold(visible(text), width)) + "\n")


def fold(text: str, width: int | None) -> list[str]:
    """Cut a text at spaces into lines of at most `width` columns, indented like the first of them.

    A word that is longer has a line of its own, and no number is parted from its unit.
    """
    if width is None or cells_of(text) <= width:
        return [text]
    blank = text[: len(text) - len(text.lstrip(" "))]
    # What belongs together is parted where it has no room together.
    joined = _words(text.lstrip(" "))
    parts = (word.split(_NBSP) if cells_of(word) > width - len(blank) else [word] for word in joined)
    first, *words = (part for several in parts for part in several)
    lines = [blank + first]
    for word in words:
        longer = f"{lines[-1]} {word}"
        if cells_of(longer) > width:
            lines.append(blank + word)
        else:
            lines[-1] = longer
    return [line.rstrip().replace(_NBSP, " ") for line in lines]


def fit(text: str, width: int | None) -> list[str]:
    """What `fold` makes of a text, with words cut that are longer than a line.

    For screens, whose words are whole in a pipe. Commands and paths that people copy are for `fold`.
    """
    lines = fold(text, width)
    if width is None:
        return lines
    return [line if cells_of(line) <= width else _cut_line(line, width) for line in lines]


def _cut_line(line: str, width: int) -> str:
    word = line.lstrip(" ")
    indent = len(line) - len(word)
    return line[:indent] + cut(word, width - indent)


def cut(word: str, width: int) -> str:
    """A word of at most `width` columns: both ends, and an ellipsis in place of the middle."""
    if cells_of(word) <= width:
        return word
    ellipsis = _ellipsis(sys.stdout.encoding)
    room = max(width - len(ellipsis), 0)
    return _beginning(word, room - room // 2) + ellipsis + _beginning(word[::-1], room // 2)[::-1]


@cache
def _ellipsis(encoding: str | None) -> str:
    """What a terminal of some encoding can show."""
    try:
        ELLIPSIS.encode(encoding or "utf-8")
    except UnicodeEncodeError:
        return "..."
    return ELLIPSIS


def _beginning(word: str, width: int) -> str:
    """As much of a word as goes into `width` columns."""
    if word.isascii():
        return word[: max(width, 0)]
    while word and cells_of(word) > width:
        word = word[:-1]
    return word


def _distinct(words: Iterable[str], least: int) -> int:
    """The width, from `least` on, at which different words are different when they are cut."""
    known, width = set(words), least
    while not _are_distinct(known, width):
        width += 1
    return width


def _are_distinct(words: Iterable[str], width: int) -> bool:
    seen: set[str] = set()
    for word in words:
        seen_as = cut(word, width)
        if seen_as in seen:
            return False
        seen.add(seen_as)
    return True


def _words(text: str) -> list[str]:
    """What a line may be cut between."""
    return _JOINED.sub(lambda found: found[0].replace(" ", _NBSP), text).split(" ")


def cells_of(text: str) -> int:
    """Columns that a text takes on a terminal."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def _align(text: str, width: int, right: bool) -> str:
    blank = " " * max(0, width - cells_of(text))
    return blank + text if right else text + blank


def printable(text: str) -> str:
    """The text with control characters spelled out: what comes from a file must not steer the terminal."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def counted(count: int, word: str) -> str:
    """1 chain, 2 chains."""
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def some(names: Sequence[str], most: int = 4) -> str:
    """Names in a row; of many, the first few and how many more there are."""
    more = len(names) - most
    return ", ".join(names) if more <= 1 else f"{', '.join(names[:most])} and {more} more"


def format_bytes(count: float) -> str:
    """Decimal units, three significant digits: 269 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or abs(count) >= 99.95 else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def format_seconds(seconds: float) -> str:
    """0.21 s, 3.4 s, 2 min 05 s, 3 h 12 min."""
    if seconds < 0.0005:
        return "0 s"
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def draw_facts(facts: dict[str, str], width: int | None) -> list[str]:
    """Names and values side by side, long values folded under their beginning."""
    left = max(map(cells_of, facts)) + 4
    lines = []
    for key, value in facts.items():
        first, *rest = fold(value, None if width is None else max(20, width - left))
        if width is not None and left + max(map(cells_of, (first, *rest))) > width:
            lines += [f"  {key}", *(f"    {line}" for line in fit(value, width - 4))]
            continue
        lines += [f"  {key:<{left - 4}}  {first}", *(f"{'':<{left}}{line}" for line in rest)]
    return lines


def short(digest: str) -> str:
    """The first twelve digits of a digest, as people compare them."""
    return digest[:12]
