"""Conversations from the command line: what the template is given, and special tokens."""

import io
import json
import sys

import pytest

from support.edge import byte_level_tokenizer, variant_files

SHOWS_ALL = (
    "{{ kind }}|{{ note is string }}|{{ limits }}|{{ tools | tojson if tools else '' }}|"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}


@pytest.fixture
def shown(served):
    """A variant whose templates print what they are given, and a second one of its own name."""
    template = SHOWS_ALL.encode()
    files = variant_files(chat_template_jinja=template) | {
        "additional_chat_templates/short.jinja": b"short:{{ messages[0].content }}"
    }
    served.rig.zoo.add("shown", files=files)
    return served


def prompt_of(served):
    request = served.rig.engine.requests[-1]
    return byte_level_tokenizer().decode(list(request.prompt), skip_special_tokens=False)


def test_template_variables_are_json_or_text(run, shown):
    words = (
        "--template-arg",
        "kind=7",
        "--template-arg",
        "note=a=b",
        "--template-arg",
        'limits={"a": [1, false]}',
    )
    assert run("generate", "shown", "hi", "-m", 1, *words).code == 0
    assert "7|True|{'a': [1, False]}||" in prompt_of(shown)


@pytest.mark.parametrize(
    ("value", "seen"),
    [("false", "False|"), ("null", "None|"), ('"7"', "7|"), ("", "|"), ("NaN", "NaN|"), ("[1", "[1|")],
)
def test_values_as_the_template_sees_them(run, shown, value, seen):
    assert run("generate", "shown", "hi", "-m", 1, "--template-arg", f"kind={value}").code == 0
    assert seen in prompt_of(shown)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--template-arg", "thinking"], "is not KEY=VALUE, as in enable_thinking=false"),
        (["--template-arg", "=1"], "is not KEY=VALUE"),
        (["--template-arg", "a=1", "--template-arg", "a=2"], "a is given twice"),
        (["--template-arg", "tools=[]"], "--tools FILE gives tools"),
        (["--template-arg", "messages=[]"], "The prompt and --system make the messages"),
        (["--tools", "nowhere.json"], "nowhere.json cannot be read: No such file"),
        (["--chat", "--no-special-tokens"], "special tokens that the chat template writes"),
    ],
)
def test_mistakes_are_sentences_and_send_nothing(run, shown, words, sentence):
    outcome = run("generate", "shown", "hi", *words)
    assert outcome.code == 2
    assert sentence in " ".join(outcome.err.replace("│", " ").split())
    assert shown.rig.engine.requests == []


def test_tools_come_from_a_file(run, shown, tmp_path):
    path = tmp_path / "tools.json"
    path.write_text(json.dumps([TOOL]))
    assert run("generate", "shown", "hi", "-m", 1, "--tools", path).code == 0
    assert json.dumps([TOOL]) in prompt_of(shown)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [("{", "is not JSON"), ("{}", "is not a JSON array of tool definitions"), ("[1]", "is not a JSON array")],
)
def test_a_file_without_tools_is_named(run, shown, tmp_path, content, sentence):
    path = tmp_path / "tools.json"
    path.write_text(content)
    outcome = run("generate", "shown", "hi", "--tools", path)
    assert outcome.code == 2
    assert sentence in " ".join(outcome.err.replace("│", " ").split())


def test_a_template_is_chosen_by_name(run, shown):
    assert run("generate", "shown", "hi", "-m", 1, "--template", "short").code == 0
    assert prompt_of(shown).endswith("short:hi")
    outcome = run("generate", "shown", "hi", "--template", "long")
    assert outcome.code == 1
    assert "no chat template named 'long'" in outcome.err


def test_the_beginning_of_the_answer_is_continued(run, served):
    outcome = run("generate", "tale", "hi", "-t", 0, "-m", 2, "--system", "s", "--continue", "The ans")
    assert prompt_of(served).endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nThe ans")
    assert outcome.out == "hello\n"


def test_special_tokens_of_prompts_and_answers(run, served):
    engine = served.rig.engine
    run("generate", "tale", "x", "-m", 1)
    assert prompt_of(served) == "<s>x"
    run("generate", "tale", "x", "-m", 1, "--no-special-tokens")
    assert prompt_of(served) == "x"
    special = byte_level_tokenizer().token_to_id("<|im_end|>")
    engine.token = lambda request, index: special
    assert run("generate", "tale", "x", "-m", 2).out == "\n"
    assert run("generate", "tale", "x", "-m", 2, "--keep-special-tokens").out == "<|im_end|>" * 2 + "\n"


def test_chat_gives_every_turn_the_same(run, shown, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    special = byte_level_tokenizer().token_to_id("<|im_end|>")
    shown.rig.engine.token = lambda request, index: special
    words = ("--template-arg", "kind=7", "--keep-special-tokens")
    outcome = run("chat", "shown", "-m", 1, *words)
    assert outcome.out == "<|im_end|>\n<|im_end|>\n"
    assert prompt_of(shown).startswith("7|")
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n"))
    assert run("chat", "shown", "-m", 1, "--template", "short").code == 0
    assert prompt_of(shown).endswith("short:one")
    assert run("chat", "shown", "--template-arg", "x").code == 2
