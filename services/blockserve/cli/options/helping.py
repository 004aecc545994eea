"""Help texts on narrow terminals: panels of columns where names fit, else a list with whole names."""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from typing import Any

from typer.core import TyperCommand

HELP_COLUMNS = 52
"""Columns that what an option does needs beside its names."""
FRAME_COLUMNS = 16
"""Columns for frames, gaps and the type of a value."""
_OPTIONS = "Options"


class WholeNames(TyperCommand):
    """A command whose help cuts no name of an option."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write panels, or where names would be cut, each option under its name."""
        if self._needed_columns() <= _columns():
            super().format_help(ctx, formatter)
            return
        self.format_usage(ctx, formatter)
        self.format_help_text(ctx, formatter)
        panels: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for option in self.get_params(ctx):
            record = option.get_help_record(ctx)
            if record is not None:
                names, text = record
                panel = getattr(option, "rich_help_panel", None) or _OPTIONS
                panels[panel].append((names, text.replace("\\[", "[")))
        for title, records in panels.items():
            with formatter.section(title):
                formatter.write_dl(records)

    def _needed_columns(self) -> int:
        first = max((len(",".join(option.opts)) for option in self.params), default=0)
        second = max((len(",".join(option.secondary_opts)) for option in self.params), default=0)
        return first + second + FRAME_COLUMNS + HELP_COLUMNS


def _columns() -> int:
    """Columns of the terminal, as typer counts them."""
    given = os.environ.get("TERMINAL_WIDTH", "")
    return int(given) if given.isdigit() else shutil.get_terminal_size().columns
