"""Asking before something is lost."""

from __future__ import annotations

import sys

import typer

from blockserve.cli.options.failures import FAILURE
from blockserve.cli.views.tables import note


def confirm(question: str, *, yes: bool) -> None:
    """Return when the person agrees; end the command otherwise.

    Without a terminal nobody can answer, so `--yes` is needed there.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise typer.BadParameter(f"{question} There is no terminal to answer on: pass --yes.")
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        note("Nothing was changed.")
        raise typer.Exit(FAILURE)
