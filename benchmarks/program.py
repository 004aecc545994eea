"""A benchmark that is a program of its own: `python benchmarks/hop.py`, with `--quick` to see that it works.

It writes its result file as `run.py` does, and ends with one line a bar: bar, stretch, measured.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from harness import CACHE, RESULTS, RUNS, Benchmark, CheckFailedError, Row, summarize, write

from blockserve.common.process.event_loop import run_in_event_loop

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured.

    Attributes:
        runs: samples of each side.
        quick: a tiny model and a few tokens, to see that the program works; nothing worth keeping.
        complete: whether every case is measured.
    """

    runs: int = RUNS
    quick: bool = False
    complete: bool = True

    @property
    def folder(self) -> Path:
        """Where the result goes; one that says less than the committed results promise stays in the cache."""
        return RESULTS if self.runs >= RUNS and self.complete else CACHE / "bench" / "results"


@dataclass(frozen=True, slots=True)
class Bar:
    """What a row has to reach.

    Attributes:
        row: its id.
        bar: the value that is asked for.
        stretch: the value that is hoped for.
        at_most: whether smaller is better.
        per_peer: whether the ratio to the peer counts, or the median of ours itself.
        per_round: whether that ratio is the median of the ratios of each round, or that of the medians.
    """

    row: str
    bar: float
    stretch: float | None = None
    at_most: bool = False
    per_peer: bool = True
    per_round: bool = False

    def verdict(self, rows: Sequence[Row]) -> str:
        """The bar, the stretch and what was measured, in one line."""
        (row,) = (row for row in rows if row.id == self.row)
        value = self._measured(row)
        assert value is not None
        sense = "at most" if self.at_most else "at least"
        stretch = "" if self.stretch is None else f", stretch {self.stretch:g}"
        how = "reached" if self._holds(value, self.bar) else "MISSED"
        if self.stretch is not None and self._holds(value, self.stretch):
            how = "stretch reached"
        return f"{self.row}: bar {sense} {self.bar:g}{stretch}, measured {value:.3g}: {how}"

    def _measured(self, row: Row) -> float | None:
        if not self.per_peer:
            return median(row.ours)
        return row.round_ratio if self.per_round else row.ratio

    def _holds(self, value: float, bound: float) -> bool:
        return value <= bound if self.at_most else value >= bound


@dataclass(frozen=True, slots=True)
class Program:
    """A benchmark and its bars.

    Attributes:
        id: of the benchmark, and the name of its result file.
        title: what is measured.
        measure: measures; told how much and where to say what it is doing.
        bars: what its rows have to reach.
    """

    id: str
    title: str
    measure: Callable[[Scale, Say], Awaitable[list[Row]]]
    bars: Sequence[Bar]

    @property
    def benchmark(self) -> Benchmark:
        """For `run.py`."""
        return Benchmark(self.id, self.title, "; ".join(map(_in_words, self.bars)), self._measure_fully)

    def _measure_fully(self, say: Say) -> list[Row]:
        return run_in_event_loop(_collect(self.measure, Scale(), say))

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """`report` as the command line asks for it."""
        return self.report(scale_of(scale_parser(self.title).parse_args(arguments)))

    def report(self, scale: Scale) -> int:
        """Measure, write the result, say whether the bars are reached; exit status 1 when a check is red."""
        started = time.monotonic()
        try:
            rows = run_in_event_loop(_collect(self.measure, scale, _say))
        except CheckFailedError as error:
            print(f"  RED: {error}; nothing is reported")
            return 1
        path = write(self.id, rows, scale.folder)
        for row in rows:
            print(f"  {summarize(row)}")
        print(f"  {path.parent.name}/{path.name} written after {time.monotonic() - started:.0f} s")
        for bar in self.bars:
            print(bar.verdict(rows), flush=True)
        return 0


def scale_parser(title: str) -> argparse.ArgumentParser:
    """The options that every program has."""
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--quick", action="store_true", help="tiny model, one run: does it work?")
    parser.add_argument("--runs", type=int, default=RUNS, help=f"samples of each side (default {RUNS})")
    return parser


def scale_of(options: argparse.Namespace) -> Scale:
    """How much those options ask for."""
    return Scale(runs=1, quick=True) if options.quick else Scale(runs=options.runs)


async def _collect(
    measure: Callable[[Scale, Say], Awaitable[list[Row]]], scale: Scale, say: Say
) -> list[Row]:
    return await measure(scale, say)


def _say(text: str) -> None:
    print(f"  {text}", flush=True)


def _in_words(bar: Bar) -> str:
    stretch = "" if bar.stretch is None else f", stretch {bar.stretch:g}"
    return f"{bar.row} {'at most' if bar.at_most else 'at least'} {bar.bar:g}{stretch}"
