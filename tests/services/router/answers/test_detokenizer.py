"""Text from tokens one at a time: whole characters, nothing lost, nothing twice."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockserve.router.answers.detokenizer import (
    LONG_RUN_TOKENS,
    ByteLevelDetokenizer,
    SilentDetokenizer,
    WindowDetokenizer,
    detokenizer,
)
from blockserve.router.intake.tokenizer import VariantTokenizer
from support.edge import (
    byte_fallback_tokenizer,
    byte_level_tokenizer,
    metaspace_tokenizer,
    suffix_tokenizer,
    word_piece_tokenizer,
)

BYTE_LEVEL = VariantTokenizer(byte_level_tokenizer())
BYTE_FALLBACK = VariantTokenizer(byte_fallback_tokenizer())
KINDS = {
    "byte fallback": BYTE_FALLBACK,
    "metaspace": VariantTokenizer(metaspace_tokenizer()),
    "word pieces": VariantTokenizer(word_piece_tokenizer()),
    "suffixes": VariantTokenizer(suffix_tokenizer()),
}


def pieces(
    tokenizer: VariantTokenizer, ids: list[int], prompt: tuple[int, ...] = (), *, skip: bool = True
) -> list[str]:
    text = detokenizer(tokenizer, prompt, skip_special_tokens=skip)
    return [*(text.push(token) for token in ids), text.finish()]


def test_each_kind_of_tokenizer_gets_its_detokenizer() -> None:
    assert isinstance(detokenizer(BYTE_LEVEL, ()), ByteLevelDetokenizer)
    assert isinstance(detokenizer(BYTE_FALLBACK, ()), WindowDetokenizer)
    assert isinstance(detokenizer(None, ()), SilentDetokenizer)


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK], ids=["byte-level", "byte-fallback"])
@pytest.mark.parametrize("following", ["", "b"])
def test_a_character_of_three_tokens_is_never_cut(tokenizer: VariantTokenizer, following: str) -> None:
    """It appears with its third token; of byte tokens a later one may still change it, so with the next."""
    ids = list(tokenizer.encode(f"a€{following}", add_special_tokens=False))
    got = pieces(tokenizer, ids, prompt=(ids[0],))
    assert "".join(got).lstrip() == f"a€{following}"
    whole = [piece for piece in got if piece][-2:]
    last = "€" + following if tokenizer is BYTE_FALLBACK else following or "€"
    assert whole[-1] == last


def decoded(tokenizer: VariantTokenizer, ids: list[int], context: list[int], *, skip: bool) -> str:
    """What the tokenizer itself makes of an answer to a prompt that ends with a token."""
    before = tokenizer.raw.decode(context, skip_special_tokens=skip)
    whole = tokenizer.raw.decode(context + ids, skip_special_tokens=skip)
    assert whole.startswith(before)
    return whole[len(before) :]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_pieces_add_up_to_the_decoding_of_the_whole(kind: str, data: st.DataObject, skip: bool) -> None:
    """Any tokens, after prompts that end with a word, inside a character, with special tokens, or nowhere."""
    tokenizer = KINDS[kind]
    tokens = st.integers(0, tokenizer.raw.get_vocab_size() - 1)
    ids = data.draw(st.lists(tokens, max_size=LONG_RUN_TOKENS))
    words = [
        i
        for i in range(tokenizer.raw.get_vocab_size())
        if tokenizer.byte_of(i) is None and tokenizer.raw.decode([i]).strip()
    ]
    context = data.draw(st.lists(st.sampled_from(words), max_size=1))
    other = [i for i in range(tokenizer.raw.get_vocab_size()) if tokenizer.byte_of(i) is not None]
    ignored = data.draw(st.lists(st.sampled_from([*other, *tokenizer.special_ids]), max_size=5))
    got = pieces(tokenizer, ids, prompt=(*context, *ignored), skip=skip)
    assert "".join(got) == decoded(tokenizer, ids, context, skip=skip)


@given(st.text(alphabet="ab .龘靐😀é\n", max_size=30), st.text(alphabet="ab 龘😀", max_size=8))
def test_the_text_of_byte_tokens_comes_back_after_any_prompt(text: str, prompt: str) -> None:
    before = BYTE_FALLBACK.encode("a" + prompt, add_special_tokens=False)
    ids = BYTE_FALLBACK.encode(text, add_special_tokens=False)
    assert "".join(pieces(BYTE_FALLBACK, list(ids), before)) == (" " + text if text else "")


def test_a_long_run_of_byte_tokens_is_shown_as_it_comes() -> None:
    text = "龘" * LONG_RUN_TOKENS
    ids = [
        i
        for i in BYTE_FALLBACK.encode(text, add_special_tokens=False)
        if BYTE_FALLBACK.byte_of(i) is not None
    ]
    got = pieces(BYTE_FALLBACK, ids)
    assert "".join(got) == text
    assert got[:LONG_RUN_TOKENS] == [""] * LONG_RUN_TOKENS
    assert max(map(len, got[LONG_RUN_TOKENS + 3 :])) == 1
    (word,) = BYTE_FALLBACK.encode("b", add_special_tokens=False)
    assert "".join(pieces(BYTE_FALLBACK, [*ids, word, *ids[:3], word])) == f"{text} b龘 b"
    assert "".join(pieces(BYTE_FALLBACK, [*ids, *ids[:2], word])) == f"{text}\ufffd\ufffd b"


@given(st.lists(st.integers(0, BYTE_LEVEL.raw.get_vocab_size() - 1), max_size=40), st.booleans())
def test_byte_level_pieces_add_up_to_the_decoding_of_the_whole(ids: list[int], skip: bool) -> None:
    assert "".join(pieces(BYTE_LEVEL, ids, skip=skip)) == BYTE_LEVEL.raw.decode(ids, skip_special_tokens=skip)


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
    got = pieces(BYTE_FALLBACK, [byte] * 3 * LONG_RUN_TOKENS)
    assert got[:LONG_RUN_TOKENS] == [""] * LONG_RUN_TOKENS
    assert got[LONG_RUN_TOKENS] == "\ufffd" * (LONG_RUN_TOKENS + 1)
    assert "".join(got) == "\ufffd" * 3 * LONG_RUN_TOKENS


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
