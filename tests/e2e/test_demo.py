"""What the demo prints, and the demo itself on the real model."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from blockserve.common.api.engine import SegmentReport

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def demo(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import demo

    return demo


@pytest.fixture
def view(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import demo_view

    return demo_view


def segment(first, count):
    return SegmentReport("id", first, count, 1, 1, 1, 1, 0, 1, 1)


@pytest.mark.parametrize(
    ("first", "count", "label"),
    [
        (0, 32, "embedding, layers 0-29, head"),
        (0, 23, "embedding, layers 0-21"),
        (23, 8, "layers 22-29"),
        (30, 1, "layer 29"),
        (31, 1, "head"),
        (0, 1, "embedding"),
    ],
)
def test_segments_in_words(demo, first, count, label):
    assert demo.segment_label(segment(first, count), last=31) == label


def test_lines_hold_the_whole_answer_and_name_the_variant(view):
    out = io.StringIO()
    answer = view.Answer("kjv")
    lines = view.make_view(Console(file=out, width=200), [answer, view.Answer("longer-name")])
    words = " ".join(f"word{number}" for number in range(60))
    with lines:
        for start in range(0, len(words), 7):
            answer.add(words[start : start + 7], 1)
            lines.update(answer)
        lines.end(answer)
    printed = out.getvalue().splitlines()
    assert len(printed) > 3
    assert all(line.startswith("        kjv | ") and len(line) <= 110 for line in printed)
    assert " ".join(line.partition(" | ")[2] for line in printed) == words


def test_lines_wait_until_a_line_is_full(view):
    out = io.StringIO()
    answer = view.Answer("a")
    lines = view.Lines(Console(file=out, width=200), [answer])
    answer.add("short", 1)
    lines.update(answer)
    assert out.getvalue() == ""
    lines.end(answer)
    assert out.getvalue() == "a | short\n"


def test_a_word_longer_than_the_line_is_cut(view):
    out = io.StringIO()
    answer = view.Answer("a")
    lines = view.Lines(Console(file=out, width=400), [answer])
    answer.add("x" * 250, 1)
    lines.end(answer)
    assert [len(line) for line in out.getvalue().splitlines()] == [103, 103, 56]


def test_brackets_in_an_answer_are_not_markup(view):
    out = io.StringIO()
    answer = view.Answer("a")
    lines = view.Lines(Console(file=out, width=200), [answer])
    answer.add("[bold]x[/bold] [/]", 1)
    lines.end(answer)
    assert out.getvalue() == "a | [bold]x[/bold] [/]\n"


def test_columns_show_every_answer_on_a_terminal(view):
    out = io.StringIO()
    answers = [view.Answer(name) for name in ("base", "kjv", "hacker")]
    columns = view.make_view(Console(file=out, width=120, height=60, force_terminal=True), answers)
    with columns:
        for answer in answers:
            answer.add(f"I am {answer.variant}", 2)
            columns.end(answer)
    assert all(f"I am {answer.variant}" in out.getvalue() for answer in answers)


def test_speed_counts_tokens_after_the_first(view):
    answer = view.Answer("a", sent_at=10.0, first_at=10.5, last_at=12.5, num_tokens=21)
    assert answer.time_to_first_token == 0.5
    assert answer.tokens_per_second == 10.0


def test_a_model_that_is_not_there_is_told(tmp_path):
    done = run_demo("--model", str(tmp_path / "none"), "--zoo", str(tmp_path / "zoo"))
    assert done.returncode == 1
    assert "make model" in done.stdout
    assert not (tmp_path / "zoo").exists()


@pytest.mark.model
@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_demo_runs_twice(smollm2, tmp_path):
    zoo = tmp_path / "zoo"
    first = run_demo("--model", str(smollm2), "--zoo", str(zoo))
    assert first.returncode == 0, first.stdout + first.stderr
    for name in ("smollm2", "kjv", "bierce", "spanish", "hacker"):
        assert f"{name} | " in first.stdout
    assert "layers 0-21" in first.stdout
    assert "times less" in first.stdout
    second = run_demo("--model", str(smollm2), "--zoo", str(zoo))
    assert second.returncode == 0, second.stdout + second.stderr
    assert second.stdout.count("already there") == 5


def run_demo(*arguments):
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "GOMP_SPINCOUNT": "1000"}
    command = [sys.executable, str(ROOT / "scripts" / "demo.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
