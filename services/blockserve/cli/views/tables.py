"""What the verbs print: tables for people, one JSON value with `--json`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


PIPE_WIDTH = 10_000
"""Columns where there is no terminal: rows are never folded, so that grep and awk see whole ones."""


def stdout() -> Console:
    """The console for results. Made anew each time, because tests and pipes replace `sys.stdout`."""
    from rich.console import Console

    return Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)


def stderr() -> Console:
    """The console for progress, notes and errors."""
    from rich.console import Console

    return Console(file=sys.stderr, highlight=False)


def print_json(value: Any) -> None:
    """Write one JSON value, indented, and nothing else."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def make_table(*columns: str, numeric: Sequence[str] = ()) -> Table:
    """A plain table; the columns in `numeric` are aligned right."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column in numeric else "left", overflow="fold")
    return table


def add_row(table: Table, *cells: object) -> None:
    """Add a row of plain text: a name with brackets is a name, not markup."""
    from rich.text import Text

    table.add_row(*(Text(str(cell)) for cell in cells))


def say(text: str) -> None:
    """Write a line of a result, unwrapped and unformatted."""
    sys.stdout.write(text + "\n")


def note(text: str) -> None:
    """Write a line that is not part of the result."""
    sys.stderr.write(text + "\n")


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


def short(digest: str) -> str:
    """The first twelve digits of a digest, as people compare them."""
    return digest[:12]
