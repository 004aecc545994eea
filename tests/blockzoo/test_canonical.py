from __future__ import annotations

import enum
import json
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockzoo import canonical
from blockzoo.canonical import (
    MAX_DEPTH,
    MAX_SAFE_INTEGER,
    canonical_json,
    digest_json,
    parse_json,
    seal_json,
    unseal_json,
)
from blockzoo.errors import InvalidInputError

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-MAX_SAFE_INTEGER, MAX_SAFE_INTEGER)
    | st.text(st.characters(exclude_categories=["Cs"]))
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=4)
    ),
    max_leaves=20,
)


def test_member_order_of_rfc_8785():
    # The example of section 3.2.3: the emoji is a surrogate pair in UTF-16 and therefore precedes U+FB33.
    value = {
        "\u20ac": "Euro Sign",
        "\r": "Carriage Return",
        "\ufb33": "Hebrew Letter Dalet With Dagesh",
        "1": "One",
        "\U0001f600": "Emoji: Grinning Face",
        "\u0080": "Control",
        "\u00f6": "Latin Small Letter O With Diaeresis",
    }
    order = ["Carriage Return", "One", "Control", "Latin Small Letter O With Diaeresis", "Euro Sign"]
    order += ["Emoji: Grinning Face", "Hebrew Letter Dalet With Dagesh"]
    assert list(json.loads(canonical_json(value)).values()) == order


def test_string_escapes_of_rfc_8785():
    # Section 3.2.2.2: two-character escapes where they exist, lower-case \u00xx for other controls.
    text = "\u20ac$\u000f\u000aA'\u0042\u0022\u005c\\\"\u002f\b\t\n\f\r\u007f\u2028"
    expected = '"\u20ac$\\u000f\\nA\'B\\"\\\\\\\\\\"/\\b\\t\\n\\f\\r\u007f\u2028"'
    assert canonical_json(text).decode() == expected


def test_no_white_space_and_nested_order():
    assert (
        canonical_json({"b": [1, {"d": None, "c": True}], "a": -0}) == b'{"a":0,"b":[1,{"c":true,"d":null}]}'
    )


@pytest.mark.parametrize(
    "value",
    [1.0, float("nan"), 2**53, -(2**53), b"bytes", {1: 2}, {"a": {"b": 0.5}}, "\ud800", {"\udfff": 1}],
)
def test_refused(value):
    with pytest.raises(InvalidInputError):
        canonical_json(value)


def test_deep_nesting_is_refused_not_overflown():
    value: list = []
    for _ in range(MAX_DEPTH + 1):
        value = [value]
    with pytest.raises(InvalidInputError, match="nested deeper"):
        canonical_json(value)
    with pytest.raises(InvalidInputError):
        parse_json(b"[" * 100_000)


def test_enum_values_are_spelled_by_value():
    class Kind(enum.StrEnum):
        LAYER = "layer"

    class Count(enum.IntEnum):
        TWO = 2

    assert canonical_json([Kind.LAYER, Count.TWO]) == b'["layer",2]'


@settings(max_examples=60, deadline=None)
@given(VALUES)
def test_round_trip_and_stability(value):
    data = canonical_json(value)
    assert parse_json(data) == value
    assert canonical_json(parse_json(data)) == data


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.text(max_size=3), st.integers(0, 3), min_size=2, max_size=6))
def test_insertion_order_does_not_matter(members):
    backwards = dict(reversed(members.items()))
    assert digest_json(members) == digest_json(backwards)


@pytest.mark.parametrize("data", [b"1.5", b"NaN", b"Infinity", b'{"a":1,"a":2}', b"\xff", b"{", b"", b"1e3"])
def test_unreadable_json(data):
    with pytest.raises(InvalidInputError):
        parse_json(data)


def test_a_sealed_record_comes_back_and_a_changed_one_is_refused():
    record = {"name": "tale", "version": 2}
    data = seal_json(record)
    assert unseal_json(data) == record
    changed = data.replace(b"tale", b"Tale")
    without = canonical_json({"digest": digest_json(record)})
    for damaged in (changed, data[:-1], b"[]", canonical_json(record), without):
        with pytest.raises(InvalidInputError):
            unseal_json(damaged)


@given(VALUES)
def test_the_fast_way_writes_the_same(value):
    with patch.object(canonical, "_is_plain", lambda value, depth: False):
        slow = canonical_json(value)
    assert canonical_json(value) == slow


@pytest.mark.parametrize(
    "value", [{1: "a"}, {True: 1}, [2**53], {"a": -(2**53)}, [1.0], {"a": {"b": [None, 0.5]}}, [{"a": {1}}]]
)
def test_the_fast_way_refuses_the_same(value):
    with pytest.raises(InvalidInputError):
        canonical_json(value)


def test_enumerations_are_written_as_their_values():
    class Size(enum.IntEnum):
        SMALL = 3

    class Kind(enum.StrEnum):
        PLAIN = "plain"

    assert canonical_json({"b": Size.SMALL, Kind.PLAIN: Kind.PLAIN}) == b'{"b":3,"plain":"plain"}'
