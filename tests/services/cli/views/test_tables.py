import io
import re
import threading

import pytest

from blockserve.cli.views import progress
from blockserve.cli.views import tables as output


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1500, "1.5 kB"), (99_940, "99.9 kB"), (99_960, "100 kB"),
     (999_499, "999 kB"), (999_600, "1 MB"), (269_060_552, "269 MB"), (5e9, "5 GB"), (2.5e12, "2.5 TB")],
)  # fmt: skip
def test_format_bytes(count, text):
    assert output.format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.213, "0.21 s"),
        (3.44, "3.4 s"),
        (42.4, "42 s"),
        (125, "2 min 05 s"),
        (119.7, "2 min 00 s"),
        (11_520, "3 h 12 min"),
    ],
)
def test_format_seconds(seconds, text):
    assert output.format_seconds(seconds) == text


def test_cells_are_text_and_not_markup(capsys):
    table = output.Table((output.Column("NAME"),))
    table.add("[red]x[/red]")
    output.print_table(table)
    assert "[red]x[/red]" in capsys.readouterr().out


def test_what_comes_from_files_does_not_steer_the_terminal():
    table = output.Table((output.Column("NAME"),))
    table.add("a\x1b[2Jb\nc\u202e\x9b1m é 日")
    assert table.lines(None)[1] == r"a\x1b[2Jb\nc\u202e\x9b1m é 日"


class Recorder(io.StringIO):
    """A stream that tells when a sign has come a number of times."""

    def __init__(self, wanted, terminal=False, sign="\n"):
        super().__init__()
        self.wanted = wanted
        self.terminal = terminal
        self.sign = sign
        self.reached = threading.Event()

    def isatty(self):
        return self.terminal

    def write(self, text):
        written = super().write(text)
        if self.getvalue().count(self.sign) >= self.wanted:
            self.reached.set()
        return written


def test_lines_come_while_work_goes_on(monkeypatch):
    stream = Recorder(wanted=2)
    monkeypatch.setattr(progress.sys, "stderr", stream)
    lines = progress.Lines(first_after_s=0.001, every_s=0.001)
    lines.start("copying", 2_000_000)
    lines.advance(500_000)
    assert stream.reached.wait(60)
    lines.finish()
    assert lines.describe() == ""
    lines.close()
    assert stream.getvalue().splitlines()[-1].startswith("copying: 500 kB of 2 MB, ")


def test_a_task_without_a_known_end(monkeypatch):
    monkeypatch.setattr(progress.sys, "stderr", Recorder(wanted=1))
    lines = progress.Lines(first_after_s=1000, every_s=1000)
    lines.start("deleting", 0)
    assert re.fullmatch(r"deleting: [0-9.]+ s", lines.describe())
    lines.advance(10)
    assert lines.describe().startswith("deleting: 10 B, ")
    lines.close()


def test_short_work_shows_nothing(monkeypatch):
    stream = Recorder(wanted=1)
    monkeypatch.setattr(progress.sys, "stderr", stream)
    with progress.progress() as reporter:
        reporter.start("copying", 100)
        reporter.advance(100)
        reporter.finish()
    assert isinstance(reporter, progress.Lines)
    assert stream.getvalue() == ""


def test_a_terminal_gets_a_bar_that_goes_away(monkeypatch):
    stream = Recorder(wanted=1, terminal=True, sign="verifying")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress.sys, "stderr", stream)
    monkeypatch.setattr(progress, "BAR_AFTER_S", 0.0)
    with pytest.raises(KeyboardInterrupt), progress.progress() as reporter:  # noqa: PT012
        assert isinstance(reporter, progress.Bars)
        reporter.start("verifying", 1000)
        reporter.advance(10)
        assert stream.reached.wait(60)
        raise KeyboardInterrupt
    # The cursor is back: a bar hides it while it moves.
    assert stream.getvalue().count("\x1b[?25l") == stream.getvalue().count("\x1b[?25h")


def test_a_bar_counts_in_the_unit_it_is_told(monkeypatch):
    stream = Recorder(wanted=1, terminal=True, sign="tokens")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress.sys, "stderr", stream)
    monkeypatch.setattr(progress, "BAR_AFTER_S", 0.0)
    with progress.progress(unit="tokens") as reporter:
        reporter.start("evaluating a[b]:2", 4096)
        assert stream.reached.wait(60)
    assert "evaluating a[b]:2" in stream.getvalue()
    assert "0 of 4096 tokens" in stream.getvalue()
    assert "bytes" not in stream.getvalue()


def test_quiet_reports_nothing():
    with progress.progress(quiet=True) as reporter:
        reporter.start("x", 1)
        reporter.advance(1)
        reporter.finish()


def test_fold_never_breaks_a_word() -> None:
    assert output.fold("one two three", 7) == ["one two", "three"]
    assert output.fold("averylongword two", 5) == ["averylongword", "two"]
    assert output.fold("", 5) == [""]
    assert output.fold("  it takes 25.4 kB and 3 min", 14) == ["  it takes", "  25.4 kB and", "  3 min"]
    assert output.fold("日本 語", 4) == ["日本", "語"]


def test_a_table_without_room_becomes_paragraphs() -> None:
    table = output.Table((output.Column("NAME"), output.Column("SIZE", numeric=True)))
    table.add("a-name-that-is-long", "5 MB")
    assert table.lines(15) == ["a-name-…is-long", "  size 5 MB"]


def test_cut_keeps_both_ends() -> None:
    name = "unregistered.3fd1cc78675e76ea249c9a16c81752ed"
    assert output.cut(name, 45) == name
    assert output.cut(name, 20) == name[:10] + "…" + name[-9:]
    assert [len(output.cut(name, width)) for width in (1, 2, 3, 44)] == [1, 2, 3, 44]
    assert output.cells_of(output.cut("日本語の名前です", 7)) <= 7


def test_a_terminal_without_the_sign_gets_dots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output.sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="latin-1"))
    assert output.cut("abcdefghijklm", 9) == "abc...klm"


def test_names_that_are_cut_stay_different() -> None:
    table = output.Table((output.Column("NAME", cuts=8), output.Column("SIZE", rank=1)))
    table.add("a-long-name-of-one-zoo", "5 MB")
    table.add("a-long-nome-of-one-zoo", "6 MB")
    lines = table.lines(26)
    assert lines[1].split()[0] != lines[2].split()[0]
    assert all("…" in line for line in lines[1:])
    # Where too little room is left to tell them apart, the other column goes.
    assert [len(line.split()) for line in table.lines(20)] == [1, 1, 1]


def test_long_names_are_cut_before_columns_of_all_rows_are_left_out() -> None:
    table = output.Table((output.Column("NAME", cuts=8), output.Column("SIZE", rank=1)))
    table.add("a-name-that-is-long", "5 MB")
    table.add("short", "6 MB")
    assert table.lines(16) == ["NAME        SIZE", "a-nam…long  5 MB", "short       6 MB"]


def test_a_column_of_the_first_rank_is_left_out_only_when_names_are_tight() -> None:
    columns = (
        output.Column("NAME", cuts=12, tight=6),
        output.Column("A", rank=2),
        output.Column("B", rank=1),
    )
    table = output.Table(columns)
    table.add("a-name-that-is-long", "aaaa", "bbbb")
    assert table.lines(24)[0].split() == ["NAME", "A", "B"]
    assert table.lines(20)[0].split() == ["NAME", "B"]
    assert table.lines(12) == ["NAME    B", "a-n…ng  bbbb"]


@pytest.mark.parametrize(
    "whole", ["12 variants", "1 pre-emption", "9.77 MB", "3 min", ">= 95.0%", "(= 9)", "`blockzoo gc`"]
)
def test_what_belongs_together_is_not_parted(whole: str) -> None:
    width = len(whole)
    assert output.fold(f"{'x' * (width - 3)} {whole} y", width)[1] == whole
    assert output.fold(f"{whole} y", width - 1)[0] == whole.split()[0]  # but for want of room
