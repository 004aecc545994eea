"""Text to token ids, with the `tokenizers` library only (no transformers, no torch)."""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING

from blockserve.common.errors import LEAVING, PromptError
from blockzoo.folders.tokenizers.bounds import MAX_BYTES, check_tokenizer
from blockzoo.folders.tokenizers.facts import AddedToken, TokenizerFacts

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class VariantTokenizer:
    """A tokenizer.json, ready to use; safe to share between threads and requests.

    Attributes:
        raw: the `tokenizers.Tokenizer`.
        special_ids: ids of tokens that never appear in text.
        is_byte_level: the decoder maps token characters to bytes one to one (GPT-2's alphabet).
        longest_token: UTF-8 bytes of the longest token's spelling: about the most text that a token holds.
    """

    def __init__(self, raw: Tokenizer, facts: TokenizerFacts | None = None) -> None:
        # Both may be baked into the file and would silently shorten or pad prompts.
        raw.no_truncation()
        raw.no_padding()
        self.raw = raw
        # The library keeps a token special that a file marks special, whatever another file says of it.
        special = {i for i, token in _present(raw) if token.special}
        special |= _apply(raw, facts) if facts is not None else set()
        self.special_ids = frozenset(special | {i for i, token in _present(raw) if token.special})
        decoder = _decoder_types(raw)
        self.is_byte_level = decoder == ["ByteLevel"]
        self.longest_token = max((len(token.encode()) for token in raw.get_vocab()), default=1)
        self._has_byte_tokens = "ByteFallback" in decoder

    @classmethod
    def from_bytes(cls, data: bytes, facts: TokenizerFacts | None = None) -> VariantTokenizer:
        """Parse tokenizer.json and apply what the files beside it say.

        The bounds of `register` hold here too: an earlier release may have registered the variant, or it may
        have been copied into the zoo from another one.

        Raises:
            PromptError: the bytes are no tokenizer that this version understands, or are beyond the bounds.
        """
        from tokenizers import Tokenizer

        try:
            check_tokenizer(data)
            return cls(Tokenizer.from_buffer(bytes(data)), facts)
        except LEAVING:
            raise
        except BaseException as error:  # the library raises bare Exception, and panics
            raise _unusable(str(error)) from error

    def encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        """Token ids of `text`, with the special tokens of tokenizer.json's post-processor or without.

        Other threads go on meanwhile: `encode_batch` lets go of the interpreter's lock, which `encode` holds.
        """
        (encoding,) = self.raw.encode_batch([text], add_special_tokens=add_special_tokens)
        return tuple(encoding.ids)

    def count(self, text: str) -> int:
        """How many tokens a text has, special ones not added; other threads go on meanwhile."""
        (encoding,) = self.raw.encode_batch([text], add_special_tokens=False)
        return len(encoding)

    def token_id(self, token: str) -> int | None:
        """The id of one token's exact spelling."""
        return self.raw.token_to_id(token)

    def byte_of(self, token_id: int) -> int | None:
        """The byte that a token of a byte-fallback tokenizer stands for; None for every other token."""
        if not self._has_byte_tokens:
            return None
        spelled = _BYTE_TOKEN.fullmatch(self.raw.id_to_token(token_id) or "")
        return None if spelled is None else int(spelled[1], 16)


def refuse_size(size: int) -> None:
    """Refuse a stored tokenizer by its size alone.

    Args:
        size: bytes.

    Raises:
        PromptError: `register` would not take so much.
    """
    if size > MAX_BYTES:
        raise _unusable(f"it has {size} bytes, at most {MAX_BYTES} are taken")


def _unusable(why: str) -> PromptError:
    return PromptError(
        f"the variant's tokenizer.json cannot be used: {why}",
        hint="Register the variant again with a tokenizer.json, or send token ids.",
    )


def _apply(raw: Tokenizer, facts: TokenizerFacts) -> set[int]:
    """Add the tokens that the files beside tokenizer.json name; returns the ids of those that are special."""
    from tokenizers import AddedToken as RawToken

    tokens = facts.to_add(_present(raw))
    raw.add_tokens(
        [
            RawToken(
                token.content,
                special=token.special,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                single_word=token.single_word,
                normalized=not token.special if token.normalized is None else token.normalized,
            )
            for token in tokens
        ]
    )
    raw.encode_special_tokens = facts.split_special_tokens
    ids = (raw.token_to_id(token.content) for token in tokens if token.special)
    return {token_id for token_id in ids if token_id is not None}


def _present(raw: Tokenizer) -> list[tuple[int, AddedToken]]:
    """Ids and added tokens that the tokenizer has."""
    return [
        (
            token_id,
            AddedToken(
                token.content, token.special, token.lstrip, token.rstrip, token.single_word, token.normalized
            ),
        )
        for token_id, token in raw.get_added_tokens_decoder().items()
    ]


_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


def _decoder_types(raw: Tokenizer) -> list[str]:
    """The types of the decoder's steps, in their order."""
    # The state of the Rust object is its JSON.
    decoder = {} if raw.decoder is None else json.loads(raw.decoder.__getstate__())
    steps = decoder.get("decoders", []) if decoder.get("type") == "Sequence" else [decoder]
    return [str(step.get("type")) for step in steps]


class TokenizerCache:
    """Tokenizers by what they are made of: variants of one base share a single parsed copy.

    Safe to call from several threads; one that is being parsed is waited for, not parsed twice.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, Future[VariantTokenizer]] = OrderedDict()

    def ready(self, key: str) -> VariantTokenizer | None:
        """The tokenizer of this key if it has been made; never blocks."""
        with self._lock:
            future = self._entries.get(key)
            if future is None or not future.done() or future.exception() is not None:
                return None
            self._entries.move_to_end(key)
            return future.result()

    def get(self, key: str, make: Callable[[], VariantTokenizer]) -> VariantTokenizer:
        """The tokenizer of this key, made on first use. Blocks.

        Raises:
            PromptError: not a usable tokenizer; nothing is remembered, so a repaired blob works next time.
        """
        with self._lock:
            future = self._entries.get(key)
            owner = future is None
            if future is None:
                future = self._entries[key] = Future()
                while len(self._entries) > self._capacity:
                    self._entries.popitem(last=False)
            self._entries.move_to_end(key)
        if owner:
            try:
                future.set_result(make())
            except BaseException as error:  # noqa: BLE001 - handed to everyone who waits, us included
                with self._lock:
                    if self._entries.get(key) is future:
                        del self._entries[key]
                future.set_exception(error)
        return future.result()
