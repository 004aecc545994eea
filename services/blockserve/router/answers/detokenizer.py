"""Token ids to text, one token at a time, never half a character.

Byte-level tokenizers (GPT-2's alphabet: Llama 3, Qwen, SmolLM2, new Mistral) are decoded as bytes, which is
exact: the pieces always add up to the decoding of the whole. Other decoders (byte fallback, word pieces)
look at neighbouring tokens, so a short window of earlier tokens is decoded again with each new one, and the
difference is what is new.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from functools import cache
from typing import Protocol

from blockserve.router.intake.tokenizer import VariantTokenizer

REPLACEMENT = "�"

# A character has at most four bytes, so at most three tokens can wait for a fourth; more are not text.
MAX_PENDING_TOKENS = 8

# How many prompt tokens give the first output token its context (a leading space, for one).
CONTEXT_TOKENS = 5


class Detokenizer(Protocol):
    """Turns the tokens of one answer into text."""

    def push(self, token_id: int) -> str:
        """The text that this token completes; "" for a special token or half a character."""
        ...

    def finish(self) -> str:
        """What was still held back: replacement characters for bytes that never became text."""
        ...


def detokenizer(tokenizer: VariantTokenizer | None, prompt: Sequence[int]) -> Detokenizer:
    """The detokenizer for one request.

    Args:
        tokenizer: the variant's, or None when it has none: then the answer is token ids only.
        prompt: the request's prompt, for decoders that look at the tokens before.
    """
    if tokenizer is None:
        return SilentDetokenizer()
    if tokenizer.is_byte_level:
        return ByteLevelDetokenizer(tokenizer)
    return WindowDetokenizer(tokenizer, prompt)


class SilentDetokenizer:
    """For variants without a tokenizer."""

    def push(self, token_id: int) -> str:
        """Nothing."""
        del token_id
        return ""

    def finish(self) -> str:
        """Nothing."""
        return ""


class ByteLevelDetokenizer:
    """Maps each token to its bytes and decodes UTF-8 incrementally."""

    def __init__(self, tokenizer: VariantTokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """See `Detokenizer`."""
        if token_id in self._tokenizer.special_ids:
            return ""
        token = self._tokenizer.raw.id_to_token(token_id)
        return "" if token is None else self._utf8.decode(_token_bytes(token))

    def finish(self) -> str:
        """See `Detokenizer`."""
        return self._utf8.decode(b"", final=True)


@cache
def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes for code points from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _token_bytes(token: str) -> bytes:
    table = _byte_of_char()
    try:
        return bytes([table[char] for char in token])
    except KeyError:
        # An added token spelled outside the alphabet is plain text.
        return token.encode()


class WindowDetokenizer:
    """Decodes a window of tokens before and after each new one; the difference is the new text."""

    def __init__(self, tokenizer: VariantTokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-CONTEXT_TOKENS:])
        self._shown = len(self._ids)
        self._window = 0

    def push(self, token_id: int) -> str:
        """See `Detokenizer`."""
        if token_id in self._tokenizer.special_ids:
            return ""
        self._ids.append(token_id)
        before, after = self._texts()
        waiting = after.endswith(REPLACEMENT) and len(self._ids) - self._shown < MAX_PENDING_TOKENS
        if waiting or len(after) <= len(before):
            return ""
        self._window, self._shown = self._shown, len(self._ids)
        return after[len(before) :]

    def finish(self) -> str:
        """See `Detokenizer`."""
        before, after = self._texts()
        self._shown = len(self._ids)
        return after[len(before) :]

    def _texts(self) -> tuple[str, str]:
        """The window's text without and with the tokens that wait."""
        window = self._ids[self._window :]
        decode = self._tokenizer.raw.decode
        return decode(window[: self._shown - self._window]), decode(window)
