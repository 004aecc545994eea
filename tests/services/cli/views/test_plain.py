"""Escape sequences of others are shown, not obeyed; what is readable stays as it is."""

from __future__ import annotations

import io
import json
import sys

import pytest
from rich.text import Text
from rich.tree import Tree

from blockserve.cli.options.failures import report
from blockserve.cli.views.plain import visible, visible_json, write_answer
from blockserve.cli.views.tables import Column, Table, note, print_json, print_table, say, stderr
from blockzoo.errors import BlockzooError

EVIL = "\x1b]0;owned\x07\x1b[2Jname\x9b1m\u202ereversed\r"
SHOWN = r"\x1b]0;owned\x07\x1b[2Jname\x9b1m\u202ereversed\r"


def test_readable_text_is_left_alone() -> None:
    text = "größe 東京 🦁🏳️‍🌈 עברית\n\ttabs"
    assert visible(text) == text
    assert json.loads(visible_json({"a": text})) == {"a": text}


def test_control_characters_are_spelled_out() -> None:
    assert visible(EVIL) == SHOWN
    shown = visible_json([EVIL])
    assert json.loads(shown) == [EVIL]
    assert shown.isprintable()


class Terminal(io.StringIO):
    """Where people look."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("out", [Terminal, io.StringIO])
def test_every_way_to_print_is_safe(monkeypatch: pytest.MonkeyPatch, out: type[io.StringIO]) -> None:
    monkeypatch.setenv("TERM", "dumb")
    both = out()
    monkeypatch.setattr(sys, "stdout", both)
    monkeypatch.setattr(sys, "stderr", both)
    table = Table((Column("name"), Column("kind")))
    table.add(EVIL, EVIL)
    tree = Tree(Text(EVIL))
    tree.add(EVIL.replace("[", ""))
    for line in table.lines(None):
        say(line)
    stderr().print(tree)
    say(EVIL)
    note(EVIL)
    print_json({"name": EVIL})
    report(BlockzooError(EVIL, hint=EVIL, name=EVIL))
    report(BlockzooError(EVIL, hint=EVIL, name=EVIL), as_json=True)
    printed = both.getvalue()
    assert "owned" in printed
    assert not set(printed) & set("\x07\x9b\u202e\r")
    assert "\x1b]" not in printed
    assert "\x1b[2J" not in printed


def test_answers_are_safe_on_a_terminal_and_whole_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    for out, expected in ((Terminal(), SHOWN), (io.StringIO(), EVIL)):
        monkeypatch.setattr(sys, "stdout", out)
        write_answer(EVIL)
        assert out.getvalue() == expected


def test_the_header_of_a_table_is_bold_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    table = Table((Column("NAME"), Column("KIND")))
    table.add("base", EVIL)
    print_table(table)
    assert out.getvalue().startswith("\x1b[1mNAME")
    assert "\x1b]" not in out.getvalue()
