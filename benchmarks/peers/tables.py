"""What a table of the benchmark is: cases that share the processes they measure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Generic, TypeVar

from harness import Row
from peers.turns import Options

E = TypeVar("E")
"""Engines of a table."""


@dataclass(frozen=True, slots=True)
class Case(Generic[E]):
    """One line of the table of cases.

    Attributes:
        id: its name in `--only` and of its result file.
        title: what is measured.
        bar: what the result should be, in words.
        run: measures.
    """

    id: str
    title: str
    bar: str
    run: Callable[[E, Options], list[Row]]

    @property
    def command(self) -> str:
        """How to repeat it."""
        return command(self.id)


@dataclass(frozen=True, slots=True)
class Table(Generic[E]):
    """Cases that are measured on the same processes, and shown in one figure.

    Attributes:
        id: of its figure.
        cases: in order.
        open: starts the processes for the chosen cases, and ends them.
    """

    id: str
    cases: Sequence[Case[E]]
    open: Callable[[Options, Sequence[str]], AbstractContextManager[E]]


def command(case: str) -> str:
    """How a case is repeated."""
    return f"python benchmarks/run_peers.py --only {case}"
