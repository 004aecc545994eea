from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockzoo.errors import InvalidNameError
from blockzoo.layout import ref_key, version_of
from blockzoo.names import MAX_NAME_LEN, check_name, near_names, parse_ref


@pytest.mark.parametrize("name", ["a", "SmolLM2-135M-Instruct", "0", "a.b_c-d", "v1..2", "x" * MAX_NAME_LEN])
def test_good_names(name):
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../a",
        "a/b",
        "a\\b",
        "/a",
        "-a",
        "_a",
        ".a",
        "a b",
        "a\n",
        "a\0",
        "é",
        "a@1",
        "a:b",
        "%2e",
        "~",
        "x" * (MAX_NAME_LEN + 1),
        "\u0661",
        "a" * 10_000_000,
    ],
)
def test_bad_names(name):
    with pytest.raises(InvalidNameError) as caught:
        check_name(name)
    assert caught.value.hint
    assert len(str(caught.value)) < 1000


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_whatever_passes_stays_one_path_component(name):
    try:
        checked = check_name(name)
    except InvalidNameError:
        return
    assert version_of(ref_key(checked, 7)) == (name, 7)
    assert "/" not in name
    assert name not in (".", "..")


def test_refs():
    assert parse_ref("bot") == ("bot", None)
    assert parse_ref("bot@12") == ("bot", 12)


@pytest.mark.parametrize(
    "ref",
    [
        "bot@",
        "bot@0",
        "bot@01",
        "bot@-1",
        "bot@1.0",
        "bot@1@2",
        "@1",
        "bot@1234567890",
        "bot@\u0661",
        "bot@1\n",
    ],
)
def test_bad_refs(ref):
    with pytest.raises(InvalidNameError):
        parse_ref(ref)


def test_near_names():
    names = ["support-bot", "support-bot-de", "sql", "SmolLM2"]
    assert near_names("suport-bot", names)[0] == "support-bot"
    assert near_names("smollm2@3", names) == ["SmolLM2"]
    assert near_names("sup", names) == ["support-bot", "support-bot-de"]
    assert near_names("zzz", names) == []
    assert near_names("", names) == []
