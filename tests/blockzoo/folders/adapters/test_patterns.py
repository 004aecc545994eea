"""`blockzoo.folders.adapters.patterns` against `re`, whose meaning it keeps, and what it refuses."""

from __future__ import annotations

import re
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockzoo.errors import AdapterError, MissingPackageError
from blockzoo.folders.adapters.patterns import MAX_PATTERNS, compile_pattern, compile_patterns

ATOMS = [
    "a",
    "q_proj",
    ".",
    r"\.",
    r"\d",
    r"\w",
    r"\W",
    "[a-q]",
    "[^a.]",
    "[]a]",
    r"[\d_-]",
    "1",
    "layers",
    "^",
    "$",
    r"\b",
]
ENDS = ["", "", "*", "+", "?", "*?", "{1,2}", "{,2}", "{2,}?"]
PATHS = [
    "a",
    "q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.11.mlp.up_proj",
    "lm_head",
    "a.a.1",
    "x-{a}",
]
FRAMES = [("", ""), (r"(.*\.)?(", ")$"), (r"(^|.*\.)", r"($|\..*)"), (r"(?:^|.*?\.)", r"\.(?P<idx>\d+)\.")]

pieces = st.builds(str.__add__, st.sampled_from(ATOMS), st.sampled_from(ENDS))
texts = st.recursive(
    pieces,
    lambda inner: st.one_of(
        st.lists(inner, min_size=2, max_size=3).map("".join),
        st.lists(inner, min_size=2, max_size=3).map("|".join).map("({})".format),
        inner.map("(?:{})?".format),
    ),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(texts, st.sampled_from(FRAMES))
def test_a_pattern_means_what_it_means_to_re(text, frame):
    try:
        expected = re.compile(frame[0] + text + frame[1])
    except re.error:
        with pytest.raises(AdapterError, match="regular expression"):
            compile_pattern("rank_pattern", text, *frame)
        return
    try:
        pattern = compile_pattern("rank_pattern", text, *frame)
    except AdapterError as error:
        assert "linear time: " in str(error)  # noqa: PT017 - RE2 refuses an operator on an anchor
        return
    for path in PATHS:
        found = expected.match(path)
        assert pattern.matches(path) == (found is not None)
        assert pattern.matches_all(path) == (expected.fullmatch(path) is not None)
        assert pattern.index(path) == (False if found is None else found.groupdict().get("idx"))


@pytest.mark.parametrize("text", ["a{b}", "{a}", "a{,", "x]", "}{", "a{1,2", r"x-\{a\}", "[{]a[}]"])
def test_braces_that_are_no_operators(text):
    pattern = compile_pattern("target_modules", text)
    for path in ("a{b}", "{a}", "a{,", "x]", "}{", "a{1,2", "x-{a}", "{a}"):
        assert pattern.matches_all(path) == (re.fullmatch(text, path) is not None)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("q(?=_proj)", "lookaround"),
        ("(?<!k)_proj", "lookaround"),
        (r"(q)_\1", "backreference"),
        ("(?P<a>q)(?P=a)", "backreference"),
        ("(q)?(?(1)a|b)", "condition"),
        ("(?>q)", "atomic"),
        ("q++", "possessive"),
        ("q{2}+", "possessive"),
        ("q(?i:x)", "flag"),
        ("q(?#x)", "comment"),
        (r"\x41", "escape"),
        (r"\N{BULLET}", "escape"),
        ("[[:alpha:]]", "class"),
        ("é+", "character"),
        ("q{2000}", "repetition"),
    ],
)
def test_what_linear_time_cannot_express_is_refused_by_name(text, what):
    with pytest.raises(AdapterError, match=what) as caught:
        compile_pattern("target_modules", text)
    assert caught.value.metadata["field"] == "target_modules"


def test_too_many_patterns_are_refused_at_once():
    started = time.process_time()
    with pytest.raises(AdapterError, match=f"at most {MAX_PATTERNS}"):
        compile_patterns("rank_pattern", [f"layers.{n}.q_proj" for n in range(5000)], r"(.*\.)?(", ")$")
    assert time.process_time() - started < 1


def test_as_many_patterns_as_are_allowed_take_moments():
    patterns = compile_patterns("rank_pattern", [rf"layers\.{n}\..*(q|k)_proj" for n in range(MAX_PATTERNS)])
    started = time.process_time()
    assert not any(pattern.matches_all("model.layers.1.mlp.up_proj") for pattern in patterns)
    assert time.process_time() - started < 1


def test_plain_names_need_no_other_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "re2", None)
    assert compile_pattern("rank_pattern", "layers.1.q_proj", r"(.*\.)?(", ")$").matches(
        "model.layers.1.q_proj"
    )
    with pytest.raises(MissingPackageError, match=r"blockzoo\[zoo\]"):
        compile_pattern("target_modules", ".*q_proj")
