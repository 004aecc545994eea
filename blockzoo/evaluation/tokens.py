"""The held-out text as token windows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockzoo.errors import (
    EvaluationError,
    IncompatibleBlocksError,
    InvalidInputError,
    MissingPackageError,
)
from blockzoo.evaluation.selection import Pair
from blockzoo.folders.tokenizers.bounds import check_tokenizer
from blockzoo.manifest import BlobId, VariantRecord
from blockzoo.zoo import Zoo

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER_FILE = "tokenizer.json"

MIN_TOKENS = 64
"""Fewest tokens that a mean is taken over; a useful text has thousands."""

MAX_TEXT_BYTES = 16 << 20
"""Longest text that is read; more says little more and takes long to tokenise."""


def tokenise(zoo: Zoo, pair: Pair, text: str, max_tokens: int) -> tuple[BlobId, list[int]]:
    """Return the original's tokenizer and the first tokens of the text, no special tokens added.

    B never sees text, only the token ids of A. When the tokenizers are different files, both must give the
    same ids for the whole text: otherwise B was trained to read the same ids as something else.

    Raises:
        EvaluationError: as `tokens_of`.
        IncompatibleBlocksError: B has no tokenizer, or one that gives other ids.
        MissingPackageError: `tokenizers` is not installed.
    """
    blob, ids = tokens_of(zoo, pair.record_a, text, pair.chain_a.vocab_size)
    other = _blob(pair.record_b)
    if other != blob and (other is None or _encode(zoo, pair.record_b, text) != ids):
        raise IncompatibleBlocksError(
            f"{pair.original.variant} and {pair.substitute.variant} tokenise this text differently",
            hint="Only blocks of models with the same tokenizer can stand in for each other.",
            a=pair.original,
            b=pair.substitute,
        )
    return blob, ids[:max_tokens]


def tokens_of(zoo: Zoo, record: VariantRecord, text: str, vocab_size: int) -> tuple[BlobId, list[int]]:
    """Return a variant's tokenizer and the tokens of a held-out text, no special tokens added.

    Raises:
        EvaluationError: the text is too short or too long, or the tokenizer cannot be used.
        MissingPackageError: `tokenizers` is not installed.
    """
    if len(text) > MAX_TEXT_BYTES:
        raise EvaluationError(
            f"the text has {len(text)} characters", hint=f"Give at most {MAX_TEXT_BYTES} bytes of it."
        )
    blob = _blob(record)
    if blob is None:
        raise EvaluationError(
            f"{record.name}@{record.version} has no {TOKENIZER_FILE}, so the text cannot become tokens",
            hint=f"Register it again from a folder with a {TOKENIZER_FILE}.",
        )
    ids = _encode(zoo, record, text)
    if len(ids) < MIN_TOKENS:
        raise EvaluationError(
            f"the text has {len(ids)} tokens; at least {MIN_TOKENS} are needed",
            hint="Give a longer text: some thousand words like those that your callers send.",
            tokens=len(ids),
        )
    if max(ids) >= vocab_size:
        raise EvaluationError(
            f"the tokenizer of {record.name}@{record.version} gives token {max(ids)}, "
            f"but the model has {vocab_size} rows",
            hint="Register the model with the tokenizer that it was trained with.",
        )
    return blob, ids


def windows(ids: list[int], window_tokens: int) -> list[list[int]]:
    """Cut tokens into windows one after the other; the last may be shorter."""
    return [ids[start : start + window_tokens] for start in range(0, len(ids), window_tokens)]


def decode_text(data: bytes) -> str:
    """Return a file's bytes as text.

    Raises:
        EvaluationError: they are not UTF-8, or too many.
    """
    if len(data) > MAX_TEXT_BYTES:
        raise EvaluationError(
            f"the text has {len(data)} bytes", hint=f"Give at most {MAX_TEXT_BYTES} bytes of it."
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise EvaluationError(
            f"the text is not UTF-8 (byte {error.start})", hint="Convert it, for example with iconv."
        ) from error


def _blob(record: VariantRecord) -> BlobId | None:
    file = record.files.get(TOKENIZER_FILE)
    return file.blob if file else None


def _encode(zoo: Zoo, record: VariantRecord, text: str) -> list[int]:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingPackageError(
            "an evaluation needs the package tokenizers, which is not installed here",
            hint="Install blockzoo[worker,router] on this machine.",
        ) from error
    data = zoo.read_file(record, TOKENIZER_FILE)
    try:
        check_tokenizer(data)  # an earlier release may have registered it
        tokenizer: Tokenizer = Tokenizer.from_buffer(data)
        # Both may be baked into the file.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    except Exception as error:  # the library raises bare Exception
        raise EvaluationError(
            f"{TOKENIZER_FILE} of {record.name}@{record.version} cannot be used: {error}",
            hint=f"Register the variant again with a {TOKENIZER_FILE}.",
        ) from error
    return ids


def check_lengths(max_tokens: int, window_tokens: int, context_length: int) -> None:
    """Raise InvalidInputError for a number of tokens that cannot be evaluated."""
    if max_tokens < MIN_TOKENS:
        raise InvalidInputError(
            f"{max_tokens} tokens are too few", hint=f"Use at least {MIN_TOKENS} tokens, better thousands."
        )
    if not 2 <= window_tokens <= context_length:
        raise InvalidInputError(
            f"windows of {window_tokens} tokens do not fit a model of {context_length}",
            hint=f"Give 2 to {context_length} tokens for a window.",
        )
