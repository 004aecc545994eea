"""Text from tokens one at a time: whole characters, nothing lost, nothing twice."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockserve.router.answers.detokenizer import (
    MAX_PENDING_TOKENS,
    ByteLevelDetokenizer,
    SilentDetokenizer,
    WindowDetokenizer,
    detokenizer,
)
from blockserve.router.intake.tokenizer import VariantTokenizer
from support.edge import byte_fallback_tokenizer, byte_level_tokenizer

BYTE_LEVEL = VariantTokenizer(byte_level_tokenizer())
BYTE_FALLBACK = VariantTokenizer(byte_fallback_tokenizer())


def pieces(tokenizer: VariantTokenizer, ids: list[int], prompt: tuple[int, ...] = ()) -> list[str]:
    text = detokenizer(tokenizer, prompt)
    return [*(text.push(token) for token in ids), text.finish()]


def test_each_kind_of_tokenizer_gets_its_detokenizer() -> None:
    assert isinstance(detokenizer(BYTE_LEVEL, ()), ByteLevelDetokenizer)
    assert isinstance(detokenizer(BYTE_FALLBACK, ()), WindowDetokenizer)
    assert isinstance(detokenizer(None, ()), SilentDetokenizer)


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK], ids=["byte-level", "byte-fallback"])
def test_a_character_of_three_tokens_appears_with_the_third(tokenizer: VariantTokenizer) -> None:
    ids = list(tokenizer.encode("a€", add_special_tokens=False))
    got = pieces(tokenizer, ids, prompt=(ids[0],))
    assert "".join(got).lstrip() == "a€"
    assert got[-2] == "€"
    assert got[-4:-2] == ["", ""]


@given(st.lists(st.integers(0, BYTE_LEVEL.raw.get_vocab_size() - 1), max_size=40))
def test_byte_level_pieces_add_up_to_the_decoding_of_the_whole(ids: list[int]) -> None:
    assert "".join(pieces(BYTE_LEVEL, ids)) == BYTE_LEVEL.raw.decode(ids, skip_special_tokens=True)


@given(st.text(max_size=30))
def test_byte_fallback_gives_the_text_back(text: str) -> None:
    space = BYTE_FALLBACK.token_id("▁")
    ids = BYTE_FALLBACK.encode(text, add_special_tokens=False)
    # The context token keeps the leading space mark from being stripped; a text of its own has one more.
    expected = " " + text if text else text
    assert "".join(pieces(BYTE_FALLBACK, list(ids), prompt=(space,))) == expected.replace("▁", " ")


def test_the_first_token_keeps_its_leading_space() -> None:
    prompt = BYTE_FALLBACK.encode("b", add_special_tokens=False)
    following = BYTE_FALLBACK.encode("a", add_special_tokens=False)
    assert pieces(BYTE_FALLBACK, list(following), prompt)[0] == " a"


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK], ids=["byte-level", "byte-fallback"])
def test_special_tokens_have_no_text(tokenizer: VariantTokenizer) -> None:
    end = tokenizer.token_id("</s>")
    assert end is not None
    assert pieces(tokenizer, [end, end]) == ["", "", ""]


def test_bytes_that_never_become_text_are_not_held_for_ever() -> None:
    byte = BYTE_FALLBACK.token_id("<0x80>")
    assert byte is not None
    got = pieces(BYTE_FALLBACK, [byte] * 3 * MAX_PENDING_TOKENS)
    assert got[: MAX_PENDING_TOKENS - 1] == [""] * (MAX_PENDING_TOKENS - 1)
    assert got[MAX_PENDING_TOKENS - 1] != ""
    assert set("".join(got)) == {"\ufffd"}


def test_half_a_character_at_the_end_is_shown_as_replacement() -> None:
    half = list(BYTE_LEVEL.encode("€", add_special_tokens=False))[:2]
    assert pieces(BYTE_LEVEL, half) == ["", "", "\ufffd"]


def test_a_token_outside_the_vocabulary_has_no_text() -> None:
    assert pieces(BYTE_LEVEL, [10**6]) == ["", ""]


def test_without_a_tokenizer_there_is_no_text() -> None:
    text = detokenizer(None, (1,))
    assert text.push(5) + text.finish() == ""


@pytest.mark.model
def test_smollm2_random_tokens_add_up(smollm2: Path) -> None:
    tokenizer = VariantTokenizer.from_bytes((smollm2 / "tokenizer.json").read_bytes())

    @settings(max_examples=200, deadline=None)
    @given(st.lists(st.integers(0, tokenizer.raw.get_vocab_size() - 1), max_size=60))
    def check(ids: list[int]) -> None:
        assert "".join(pieces(tokenizer, ids)) == tokenizer.raw.decode(ids, skip_special_tokens=True)

    check()
