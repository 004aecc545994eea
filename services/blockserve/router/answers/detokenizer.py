"""Token ids to text, one token at a time, never half a character.

The pieces add up to what the tokenizer makes of the whole answer.

Byte-level tokenizers (GPT-2's alphabet: Llama 3, Qwen, SmolLM2, new Mistral) are decoded as bytes. Other
decoders (byte fallback, metaspace, word pieces) look at the token before, so each token is decoded together
with it, and what its text adds is new.

A byte-fallback decoder (Llama 2, Mistral 7B v0.1) joins neighbouring byte tokens and reads them as one text:
a byte that is no UTF-8 makes replacement characters of the whole run. So a run is shown when the next token
ends it. A run of more than `LONG_RUN_TOKENS`, as in scripts that have no tokens of their own, is shown
character by character from then on; only there can a broken byte come after characters that were shown.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from functools import cache
from itertools import takewhile
from typing import Protocol

from blockserve.router.intake.tokenizer import VariantTokenizer

REPLACEMENT = "�"

MAX_PENDING_TOKENS = 8
"""A character has at most four bytes, so at most three tokens can wait for a fourth; more are not text."""

CONTEXT_TOKENS = 64
"""How far back in the prompt a token is looked for that gives the answer its context (a leading space)."""

LONG_RUN_TOKENS = 32
"""Byte tokens in a row that are held back until the run has ended."""


class Detokenizer(Protocol):
    """Turns the tokens of one answer into text."""

    def push(self, token_id: int) -> str:
        """The text that this token completes; "" for a special token or half a character."""
        ...

    def finish(self) -> str:
        """What was still held back: replacement characters for bytes that never became text."""
        ...


def detokenizer(
    tokenizer: VariantTokenizer | None, prompt: Sequence[int], *, skip_special_tokens: bool = True
) -> Detokenizer:
    """The detokenizer for one request.

    Args:
        tokenizer: the variant's, or None when it has none: then the answer is token ids only.
        prompt: the request's prompt, for decoders that look at the tokens before.
        skip_special_tokens: leave special tokens out of the text.
    """
    if tokenizer is None:
        return SilentDetokenizer()
    skipped = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
    if tokenizer.is_byte_level:
        return ByteLevelDetokenizer(tokenizer, skipped)
    return WindowDetokenizer(tokenizer, prompt, skipped)


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

    def __init__(self, tokenizer: VariantTokenizer, skipped: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """See `Detokenizer`."""
        if token_id in self._skipped:
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
    """Decodes each token together with the one before it; what its text adds is new."""

    def __init__(self, tokenizer: VariantTokenizer, prompt: Sequence[int], skipped: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._run: _ByteRun | None = None
        self._restart(_context(tokenizer, prompt))

    def push(self, token_id: int) -> str:
        """See `Detokenizer`."""
        if token_id in self._skipped:
            return ""
        byte = self._tokenizer.byte_of(token_id)
        if byte is None:
            return self._end_long_run(token_id) + self._take(token_id)
        self._window.append(token_id)
        self._run = self._run or _ByteRun()
        return self._run.push(byte)

    def finish(self) -> str:
        """See `Detokenizer`."""
        ended = self._end_long_run(None)
        return ended or _added(self._sent, self._decode(self._window))

    def _take(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._decode(self._window)
        waits = len(self._window) - self._context_length
        if self._run is None and text.endswith(REPLACEMENT) and waits < MAX_PENDING_TOKENS:
            return ""
        added = _added(self._sent, text)
        self._run = None
        self._restart([token_id])
        return added

    def _end_long_run(self, following: int | None) -> str:
        """What a run that began to be shown still has; what follows it is decoded without it."""
        if self._run is None or not self._run.num_shown:
            return ""
        ended, self._run = self._run.finish(), None
        context = self._window[: self._context_length]
        self._restart(context or ([] if following is None else [following]))
        return ended

    def _restart(self, context: list[int]) -> None:
        self._window, self._context_length = context, len(context)
        self._sent = self._decode(context)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.raw.decode(ids, skip_special_tokens=bool(self._skipped))


class _ByteRun:
    """Neighbouring byte tokens.

    Attributes:
        num_shown: bytes of it that have been shown; 0 while it is short.
    """

    def __init__(self) -> None:
        self.num_shown = 0
        self._bytes = bytearray()
        self._is_broken = False

    def push(self, byte: int) -> str:
        """The characters that this byte completes; "" while the run is short."""
        self._bytes.append(byte)
        if len(self._bytes) <= LONG_RUN_TOKENS:
            return ""
        rest = bytes(self._bytes[self.num_shown :])
        text = None if self._is_broken else _whole_characters(rest)
        if text is None:
            self._is_broken = True
            return self.finish()
        self.num_shown += len(text.encode())
        return text

    def finish(self) -> str:
        """A replacement character for each byte that was not shown."""
        count = len(self._bytes) - self.num_shown
        self.num_shown = len(self._bytes)
        return REPLACEMENT * count


def _whole_characters(data: bytes) -> str | None:
    """The text of UTF-8 that may end inside a character; None for other bytes."""
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(data)
    except UnicodeDecodeError:
        return None


def _context(tokenizer: VariantTokenizer, prompt: Sequence[int]) -> list[int]:
    """The last token of a prompt that is neither special nor part of a character; one with text, if any."""
    blank: list[int] = []
    for token_id in reversed(prompt[-CONTEXT_TOKENS:]):
        if token_id in tokenizer.special_ids or tokenizer.byte_of(token_id) is not None:
            continue
        text = tokenizer.raw.decode([token_id])
        if text.strip(f" {REPLACEMENT}"):
            return [token_id]
        if not blank and REPLACEMENT not in text:
            blank = [token_id]
    return blank


def _added(before: str, after: str) -> str:
    """What a longer window's text has more; of one that changed what was shown, what follows the change."""
    if after.startswith(before):
        return after[len(before) :]
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, after, strict=False)))
    return after[common:]
