"""`blockzoo quantize`: what it says, what it prints as JSON, and what it refuses."""

from __future__ import annotations

import pytest

from blockzoo import Zoo
from support.models import SENTENCES, make_checkpoint
from support.quantised import INT8_SPECS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(INT8_SPECS["int8-llama"], tmp_path_factory.mktemp("checkpoint") / "even")


@pytest.fixture
def even(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("BLOCKZOO_ZOO", str(tmp_path / "zoo"))
    zoo = Zoo.open(tmp_path / "zoo", create=True)
    zoo.register(folder, name="even")
    return zoo


def test_people_read_what_it_cost(run, even, tmp_path):
    text = tmp_path / "held-out.txt"
    text.write_text(" ".join(SENTENCES))
    outcome = run("quantize", "even", "--text", text, "--max-tokens", "100")
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    assert lines[0].startswith("Made even-int8@1 of even@1 in ")
    assert lines[0].endswith("its answers are approximate")
    assert "of layers and head became" in lines[1]
    assert "off by at most 0." in lines[2]
    assert lines[3].startswith("  perplexity ")
    assert lines[3].endswith("of 100 tokens")
    shown = run("show", "even-int8").out
    assert "even@1, quantised to int8" in shown
    assert "same most likely token" in shown


def test_without_a_text_it_says_that_nobody_knows(run, even):
    outcome = run("quantize", "even", "--name", "fast")
    assert "measure it with --text FILE" in outcome.out
    again = run("quantize", "even", "-n", "fast", "--json")
    assert again.json["unchanged"]
    assert again.json["quality"] is None
    assert set(again.json) == {
        "name", "version", "chain", "source", "unchanged", "num_bytes", "new_bytes", "stored_bytes", "errors",
        "quality", "seconds",
    }  # fmt: skip


def test_what_is_refused(run, even, zoo, monkeypatch):
    monkeypatch.setenv("BLOCKZOO_ZOO", even.url)
    assert "is no known format" in run("quantize", "even", "--format", "int3").err
    assert run("quantize", "nobody").code == 3
    outcome = run("quantize", "even", "--server", "127.0.0.1:1")
    assert outcome.code == 2
    assert "--server" in outcome.err
    monkeypatch.setenv("BLOCKZOO_ZOO", zoo.url)
    assert "needs a multiple of 64" in run("quantize", "base").err
