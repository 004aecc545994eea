"""Every screen at 60, 80 and 120 columns, with 1, 12 and 300 variants and 1, 4 and 40 workers.

The files in screens/ hold what is shown, to be read by people; of long screens only both ends.
WRITE_SCREENS=1 writes them again.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from unittest import mock

import pytest

from blockserve.cli.views.equivalence import print_measured, print_record, print_records
from blockserve.cli.views.placement import print_wishes
from blockserve.cli.views.reports import (
    HISTORY,
    dependence,
    note_doubt,
    print_copy,
    print_exported,
    print_gc,
    print_many,
    print_one_of_many,
    print_registered,
    print_removed,
    print_restored,
    print_rolled_back,
    print_verify,
)
from blockserve.cli.views.server import draw_status, headline
from blockserve.cli.views.tables import cells_of, note, print_table
from blockserve.cli.views.trace import draw_call
from blockserve.cli.views.zoo import draw_diff, draw_usage, draw_variant, variants_table
from blockzoo.care.gc import GcReport
from blockzoo.folders.export import ExportResult
from blockzoo.reports.values import RemoveReport
from support.screens import (
    call,
    cluster,
    copied,
    difference,
    name,
    records,
    registration,
    rolled_back,
    shown,
    status,
    usage,
    variant_rows,
    verified,
    wishes,
    worker,
)

SCREENS = Path(__file__).with_name("screens")
WIDTHS = (60, 80, 120)
VARIANTS = (1, 12, 300)
WORKERS = (1, 4, 40)
HEIGHT = 24
END = 12
"""Lines that are kept of each end of a long screen."""

Draw = Callable[[int, int | None], list[str]]


class Terminal(io.StringIO):
    """A standard output of some width, or a pipe."""

    def __init__(self, width: int | None) -> None:
        super().__init__()
        self.width = width

    def isatty(self) -> bool:
        return self.width is not None


def printing(act: Callable[[int], None]) -> Draw:
    """What is printed, results and notes, as lines."""

    def draw(count: int, width: int | None) -> list[str]:
        terminal = Terminal(width)
        size = {"COLUMNS": str(width or 80), "TERM": "dumb"}
        with mock.patch.dict(os.environ, size), redirect_stdout(terminal), redirect_stderr(terminal):
            act(count)
        return terminal.getvalue().splitlines()

    return draw


def _register(count: int) -> None:
    print_registered(registration(count - 1))
    note_doubt(registration(0).base_doubt)


def _register_all(count: int) -> None:
    for number in range(count):
        print_one_of_many(number + 1, count, name(number), registration(number))
    print_many([registration(number) for number in range(count)], 0)


def _gc(count: int) -> None:
    print_gc(
        GcReport(12 * count, 9_770_000 * count, 1200, 290_000_000, 2, 3_000, finished=False), dry_run=False
    )


def _export(_count: int) -> None:
    print_exported(ExportResult("support-bot@3", "/home/someone/exported", ("a", "b"), 9_770_000))


def _rm(count: int) -> None:
    dependants = [name(number) for number in range(1, count)]
    versions = "its one version" if count == 1 else f"all {count} versions"
    note(f"{dependence(dependants)}Remove base with {versions}? [y/N]")
    print_removed(RemoveReport("base", tuple(range(1, count + 1)), ()), dependants)


def _rollback(count: int) -> None:
    versions = rolled_back(count + 1)
    print_rolled_back(versions[-1], versions[-HISTORY:], count + 1)


@dataclass(frozen=True)
class Screen:
    """One screen.

    Attributes:
        draw: count and width -> lines.
        counts: of variants or workers.
        fits_height: whether it is one of those that are watched.
        names: how names that it has to account for are spelled, by number; None where it has other ways.
    """

    draw: Draw
    counts: tuple[int, ...] = VARIANTS
    fits_height: bool = False
    names: Callable[[int], str] | None = None


OF: dict[str, Screen] = {
    "ls": Screen(printing(lambda count: print_table(variants_table(variant_rows(count)))), names=name),
    "du": Screen(lambda count, width: draw_usage(usage(count), width), names=name),
    "show": Screen(lambda count, width: draw_variant(shown(count), width)),
    "diff": Screen(lambda _count, width: draw_diff(difference(), width), (1,)),
    "status": Screen(lambda count, width: draw_status(status(count), width)),
    "status-all": Screen(
        lambda count, width: draw_status(status(count), width, everything=True),
        names=lambda number: f"{name(number)}@{1 + number % 3}",
    ),
    "watch": Screen(lambda count, width: draw_status(status(count), width, HEIGHT), fits_height=True),
    "cluster": Screen(lambda count, width: draw_status(cluster(count), width), WORKERS, names=worker),
    "cluster-of-300": Screen(
        lambda count, width: draw_status(cluster(count, 300), width), WORKERS, names=worker
    ),
    "cluster-watch": Screen(
        lambda count, width: draw_status(cluster(count), width, HEIGHT), WORKERS, fits_height=True
    ),
    "trace": Screen(lambda count, width: draw_call(call(count), width), WORKERS, names=worker),
    "place": Screen(printing(lambda count: print_wishes(wishes(count))), names=name),
    "equivalence-evaluate": Screen(
        printing(lambda count: print_measured([report.record for report in records(count)]))
    ),
    "equivalence-list": Screen(printing(lambda count: print_records(records(count)))),
    "equivalence-show": Screen(printing(lambda count: print_record(records(count)[0])), (1,)),
    "verify": Screen(printing(lambda count: print_verify(verified(count), repairing=False))),
    "register": Screen(printing(_register), (1, 12)),
    "register-all": Screen(printing(_register_all), names=lambda number: f"{name(number)}@{1 + number % 3}"),
    "export": Screen(printing(_export), (1,)),
    "rm": Screen(printing(_rm)),
    "rollback": Screen(printing(_rollback)),
    "gc": Screen(printing(_gc), (1, 12)),
    "backup": Screen(
        printing(lambda count: print_copy(copied(count), "Backed up")),
        names=lambda number: f"{name(number)}@4",
    ),
    "restore": Screen(
        printing(lambda count: print_restored(copied(count), revive=False)),
        names=lambda number: f"{name(number)}@4",
    ),
}
CASES = [(title, count) for title, screen in OF.items() for count in screen.counts]
every_case = pytest.mark.parametrize(("title", "count"), CASES)
every_width = pytest.mark.parametrize("width", WIDTHS)


@cache
def draw(title: str, count: int, width: int | None) -> list[str]:
    return OF[title].draw(count, width)


def words_of(lines: list[str]) -> set[str]:
    return {word.strip(";,.") for line in lines for word in line.split()}


def stands_for(cut: str, words: set[str]) -> bool:
    """Whether a word that was cut has the ends of one of these."""
    start, _, end = cut.partition("…")
    return any(word.startswith(start) and word.endswith(end) for word in words)


@every_width
@every_case
def test_lines_fit(title: str, count: int, width: int) -> None:
    for line in draw(title, count, width):
        assert cells_of(line) <= width, line
        assert line == line.rstrip()


@every_width
@every_case
def test_no_word_is_cut_without_an_ellipsis(title: str, count: int, width: int) -> None:
    whole = words_of(draw(title, count, None))
    heads = {word.lower() for word in whole if word.isupper()}  # of columns, where a row is a paragraph
    strange = words_of(draw(title, count, width)) - whole - heads
    if OF[title].fits_height:  # sums up what has no room
        strange = {word for word in strange if "…" in word}
    assert all("…" in word and stands_for(word, whole) for word in strange), strange


@every_width
@every_case
def test_every_name_is_there(title: str, count: int, width: int) -> None:
    if (spelled := OF[title].names) is None:
        return
    found = words_of(draw(title, count, width))
    cut = [word for word in found if "…" in word]
    for number in range(count):
        wanted = spelled(number)
        assert wanted in found or any(stands_for(word, {wanted}) for word in cut), wanted


@every_width
@pytest.mark.parametrize("title", ["status", "watch"])
@pytest.mark.parametrize("count", VARIANTS)
def test_variants_without_a_row_are_counted(title: str, count: int, width: int) -> None:
    lines = draw(title, count, width)
    table = lines[next(number for number, line in enumerate(lines) if line.startswith("VARIANTS")) + 1 :]
    more = [number for number, line in enumerate(table) if re.match(r"\d+ more ", line)]
    rows = table[: more[0]] if more else table
    assert len(rows) + sum(int(table[number].split()[0]) for number in more) == count


@every_width
@pytest.mark.parametrize("count", WORKERS)
def test_workers_without_a_row_are_counted(count: int, width: int) -> None:
    lines = draw("cluster-watch", count, width)
    table = lines[next(number for number, line in enumerate(lines) if line.startswith("WORKER ")) + 1 :]
    rows = table[: table.index("")]
    more = int(rows.pop().split()[1]) if rows[-1].startswith("and ") else 0
    assert sum(line[0] != " " for line in rows) + more == count


@every_width
@pytest.mark.parametrize("count", VARIANTS)
def test_problems_without_a_row_are_counted(count: int, width: int) -> None:
    lines = draw("verify", count, width)
    text = " ".join(lines)
    more = re.search(r"and (\d+) more; --json has all of them", text)
    rows = sum(line.startswith(("missing ", "bytes ")) for line in lines)
    assert rows + (int(more[1]) if more else 0) == count + 1


@every_width
@every_case
def test_a_watched_screen_fits_its_terminal(title: str, count: int, width: int) -> None:
    if OF[title].fits_height:
        assert len(draw(title, count, width)) <= HEIGHT


HEAD = re.compile(r"[A-Z][A-Z0-9-]*( [A-Z][A-Z0-9-]*)*(  +[A-Z][A-Z0-9-]*( [A-Z][A-Z0-9-]*)*)+")
CELL = re.compile(r"\S+( \S+)*")
AFTER = re.compile(r"and \d|\d+ more |\d+ problem|\d+ tokens in|  files:|No |$")
NUMERIC = frozenset(
    [
        "VERSION",
        "VERSIONS",
        "CHECKPOINT",
        "CHECKPOINTS",
        "PRIVATE",
        "STORED",
        "BYTES",
        "RUNNING",
        "WAITING",
        "STEP",
        "MEMORY",
        "COUNT",
        "REPLICAS",
        "REQUESTS",
        "CHAINS",
        "CALLS",
        "MIXED",
        "TOKENS",
        "TOTAL",
        "PROMPT",
        "DECODE",
        "LONGEST",
        "WAITED",
        "TIME",
        "SHARE",
        "KL",
        "WORST",
        "TOP-1",
        "WEIGHTS",
        "NO",
        "MOST",
        "SEQUENCES",
    ]
) | {"RM FREES", "KV PAGES", "PER TOKEN", "MOST SEQUENCES", "MOST CHAINS"}
FIRST = {
    **dict.fromkeys(("ls", "du"), "NAME"), "show": "LINKS", "diff": "LINKS", "verify": "PROBLEM",
    **dict.fromkeys(("status", "status-all", "watch"), "SEGMENT"), "trace": "PART", "place": "VARIANT",
    **dict.fromkeys(("cluster", "cluster-of-300", "cluster-watch"), "WORKER"), "equivalence-show": "NO",
    **dict.fromkeys(("equivalence-list", "equivalence-evaluate"), "ID"),
}  # fmt: skip
"""The first column of the screens that have tables."""
PARAGRAPHS = {
    ("show", 60),
    ("place", 60),
    ("equivalence-evaluate", 60),
    ("equivalence-list", 60),
    ("equivalence-show", 60),
}
"""Screens that are too narrow for their table, whose rows are paragraphs."""


@every_width
@every_case
def test_columns_are_aligned(title: str, count: int, width: int) -> None:
    """Numbers end where the head of their column ends, and texts begin where it begins."""
    lines = draw(title, count, width)
    heads = [number for number, line in enumerate(lines) if HEAD.fullmatch(line)]
    if title in FIRST and (title, width) not in PARAGRAPHS:
        assert any(lines[number].startswith(f"{FIRST[title]} ") for number in heads)
    for number in heads:
        left, right = set(), set()
        for found in CELL.finditer(lines[number]):
            if found[0] in NUMERIC:
                right.add(found.end())
            else:
                left.add(found.start())
        for line in lines[number + 1 :]:
            if AFTER.match(line):
                break
            for found in CELL.finditer(line):
                assert (found.start() in left) != (found.end() in right) or found.start() in left, line
                if re.fullmatch(r"[\d.]{1,8}%?( ([kMG]?B|m?s))?", found[0]):
                    assert found.end() in right, line


@pytest.mark.parametrize("title", OF)
def test_screens_are_those_that_were_looked_at(title: str) -> None:
    file = SCREENS / f"{title}.txt"
    text = "\n".join(
        f"=== {count} at {width}\n{_ends(draw(title, count, width))}\n"
        for count in OF[title].counts
        for width in WIDTHS
    )
    if os.environ.get("WRITE_SCREENS"):
        SCREENS.mkdir(exist_ok=True)
        file.write_text(text)
    assert text == file.read_text()


def _ends(lines: list[str]) -> str:
    if len(lines) <= 3 * END:
        return "\n".join(lines)
    between = f"[{len(lines) - 2 * END} lines]"
    return "\n".join([*lines[:END], between, *lines[-END:]])


@pytest.mark.parametrize("title", ["ls", "du"])
def test_in_a_pipe_a_row_is_a_line_and_names_are_whole(title: str) -> None:
    lines = draw(title, 300, None)
    assert all(any(line.startswith(f"{name(n)} ") for line in lines) for n in range(300))
    assert max(map(len, lines)) < 150


@every_case
def test_in_a_pipe_nothing_is_cut(title: str, count: int) -> None:
    assert not any("…" in line for line in draw(title, count, None))


@every_width
def test_a_long_name_costs_the_other_rows_no_column(width: int) -> None:
    """One name of the server's own among those that people gave."""
    with_it, without = draw("ls", 12, width)[0], draw("ls", 4, width)[0]
    assert with_it.split() == without.split()


def test_idle_variants_are_one_line_and_busy_ones_come_first() -> None:
    lines = draw_status(status(300), 120)
    table = lines[lines.index("") :]
    first = next(number for number, line in enumerate(lines) if line.startswith("VARIANTS"))
    assert next(number for number, line in enumerate(lines) if line.startswith("SEGMENT")) < first
    assert all(line.split()[1] == "1" for line in lines[first + 1 : first + 1 + 43])
    assert any(line.startswith("257 more idle (1 pinned), ") for line in table)
    everything = draw_status(status(300), 120, everything=True)
    assert not any("idle" in line for line in everything)


def test_without_pages_none_are_counted() -> None:
    report = replace(status(1), kv_pages_total=0, kv_pages_used=0, kv_bytes_total=0)
    assert "0 of 0" not in "\n".join([*draw_status(report, 80), headline(report)])
    assert "1795840286409" not in "\n".join(draw_status(cluster(4), 120))
