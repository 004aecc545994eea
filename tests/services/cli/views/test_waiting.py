"""The line that is shown until an answer begins."""

import io
import re
import threading

import pytest

from blockserve.cli.views import waiting as view


class Screen(io.StringIO):
    """Tells when something was drawn."""

    def __init__(self, terminal=True):
        super().__init__()
        self.terminal = terminal
        self.drawn = threading.Event()

    def isatty(self):
        return self.terminal

    def write(self, text):
        written = super().write(text)
        if "[" in text.removeprefix(view.CLEAR):
            self.drawn.set()
        return written


@pytest.fixture
def see(monkeypatch):
    """Put a screen in place of standard error; called in the test, because pytest puts its own before it."""

    def see(terminal=True):
        screen = Screen(terminal)
        monkeypatch.setattr(view.sys, "stderr", screen)
        return screen

    return see


def test_the_line_is_gone_when_the_answer_begins(see):
    screen = see()
    with view.Waiting(lambda: "the server loads tale", after_s=0.001, every_s=0.001) as waiting:
        assert screen.drawn.wait(60)
        waiting.end()
        shown = screen.getvalue()
        assert re.search(r"\[the server loads tale, [0-9.e-]+ s\]\r\x1b\[K$", shown)
    assert screen.getvalue() == shown


def test_a_quick_answer_shows_nothing(see):
    screen = see()
    with view.Waiting(lambda: "x"):
        pass
    assert screen.getvalue() == ""


def test_what_cannot_be_said_is_not(see):
    screen = see()
    asked = threading.Event()

    def fail():
        asked.set()
        raise OSError("gone")

    with view.Waiting(fail, after_s=0.001, every_s=0.001):
        assert asked.wait(60)
    assert screen.getvalue() == ""


def test_nothing_is_shown_in_a_pipe(see):
    screen = see(terminal=False)
    asked = threading.Event()
    with view.Waiting(lambda: asked.set() or "x", after_s=0.0, every_s=0.001):
        assert not asked.wait(0.05)
    assert screen.getvalue() == ""
