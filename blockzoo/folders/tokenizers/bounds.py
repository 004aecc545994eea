"""What a tokenizer.json may hold: known components, bounded in number, in size and in the text they make.

A tokenizer is a program from whoever made the checkpoint, and the library that runs it sets no bounds: a
chain of replacements can multiply a text until memory is gone, and a pattern can keep a thread busy for ever.
Vocabularies are bounded by the size of the file; they are skipped here, so that megabytes cost little.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from blockzoo.canonical import digest_bytes
from blockzoo.errors import InvalidConfigError, UnsupportedFeatureError
from blockzoo.extras import named_extras
from blockzoo.folders.files import TOKENIZER

if TYPE_CHECKING:
    from pydantic import TypeAdapter

MAX_BYTES = 96 << 20
"""Largest tokenizer.json; those of Gemma 3 have a third of it."""
MAX_ADDED_TOKENS = 1 << 16
MAX_ADDED_CHARS = 1024
"""Of one added token."""
MAX_COMPONENTS = 128
"""Of all kinds together, steps of sequences included."""
MAX_DEPTH = 8
MAX_PATTERN_CHARS = 4096
MAX_TEXT_CHARS = 1024
"""What a component puts into a text at one place."""
MAX_GROWTH = 256.0
"""How much longer normalising may make a text; the decoder has the same bound."""

_STEPS = {
    "normalizer": ("normalizers", frozenset({
        "BertNormalizer", "ByteLevel", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled",
        "Prepend", "Replace", "Sequence", "Strip", "StripAccents",
    })),
    "pre_tokenizer": ("pretokenizers", frozenset({
        "BertPreTokenizer", "ByteLevel", "CharDelimiterSplit", "Digits", "FixedLength", "Metaspace",
        "Punctuation", "Sequence", "Split", "UnicodeScripts", "Whitespace", "WhitespaceSplit",
    })),
    "post_processor": ("processors", frozenset({
        "BertProcessing", "ByteLevel", "RobertaProcessing", "Sequence", "TemplateProcessing",
    })),
    "decoder": ("decoders", frozenset({
        "BPEDecoder", "ByteFallback", "ByteLevel", "CTC", "Fuse", "Metaspace", "Replace", "Sequence", "Strip",
        "WordPiece",
    })),
}  # fmt: skip
"""By the kind of component: the field in which a sequence keeps its steps, and the types that are known."""
_MODELS = (None, "BPE", "Unigram", "WordLevel", "WordPiece")

Step = Mapping[str, Any]


@dataclass
class _Added:
    content: Any = None


@dataclass
class _Model:
    type: Any = None


@dataclass
class _File:
    """The fields that are looked at; all others are skipped while the file is read."""

    added_tokens: list[_Added] | None = None
    normalizer: Any = None
    pre_tokenizer: Any = None
    post_processor: Any = None
    decoder: Any = None
    model: _Model | None = None


def check_tokenizer(data: bytes) -> None:
    """Refuse a tokenizer.json with unknown components, or beyond the bounds of this module.

    Raises:
        InvalidConfigError: it is no tokenizer, or too large.
        UnsupportedFeatureError: it names a component that is not known, or one that has no bound.
    """
    if len(data) > MAX_BYTES:
        raise _invalid(f"has {len(data)} bytes, at most {MAX_BYTES} are taken")
    digest = digest_bytes(data)
    if digest not in _checked:
        _check(data)
        if len(_checked) >= _MAX_CHECKED:
            _checked.clear()
        _checked.add(digest)


_MAX_CHECKED = 256
_checked: set[str] = set()
"""Digests of files that are right: adapters of one base often bring the same."""


def _check(data: bytes) -> None:
    try:
        file: _File = _reader().validate_json(data)
    except ValueError as error:
        raise _invalid(f"is not a tokenizer: {str(error)[:200]}") from error
    if file.model is not None and file.model.type not in _MODELS:
        raise _unsupported(f"a model of type {str(file.model.type)[:80]!r}, which is not known")
    _check_added([str(token.content) for token in file.added_tokens or ()])
    steps = [(kind, step) for kind in _STEPS for step in _flatten(kind, getattr(file, kind), 0)]
    _check_decoder([step for kind, step in steps if kind == "decoder"])
    if len(steps) > MAX_COMPONENTS:
        raise _unsupported(f"{len(steps)} components, more than {MAX_COMPONENTS}")
    for kind in _STEPS:
        growth = 1.0
        for step in (step for of, step in steps if of == kind):
            growth *= _growth(step)
            _check_template(step)
            _check_pattern(step)
        if growth > MAX_GROWTH:
            raise _unsupported(f"a {kind} that can make a text {growth:.0f} times as long")


def _check_decoder(steps: Sequence[Step]) -> None:
    """Refuse what makes text of an answer's beginning depend on its end, which a stream cannot know."""
    types = [step["type"] for step in steps if step["type"] != "Sequence"]
    if "Fuse" in types and "ByteLevel" in types[types.index("Fuse") :]:
        raise _unsupported("a decoder that joins tokens before it reads them as bytes")
    if any(step["type"] == "Strip" and step.get("stop") for step in steps):
        raise _unsupported("a decoder that strips the end of the text")


@cache
def _reader() -> TypeAdapter[_File]:
    with named_extras():
        from pydantic import TypeAdapter
    return TypeAdapter(_File)


def _check_added(tokens: list[str]) -> None:
    if len(tokens) > MAX_ADDED_TOKENS:
        raise _unsupported(f"{len(tokens)} added tokens, more than {MAX_ADDED_TOKENS}")
    longest = max(map(len, tokens), default=0)
    if longest > MAX_ADDED_CHARS:
        raise _unsupported(f"an added token of {longest} characters, more than {MAX_ADDED_CHARS}")


def _flatten(kind: str, value: Any, depth: int) -> Iterator[Step]:
    """The steps of a component, those of sequences in their place."""
    if value is None:
        return
    field, known = _STEPS[kind]
    type_ = value.get("type") if isinstance(value, dict) else None
    if type_ not in known:
        raise _unsupported(f"a {kind} of type {str(type_)[:80]!r}, which is not known")
    yield value
    if type_ != "Sequence":
        return
    steps = value.get(field)
    if not isinstance(steps, list) or depth == MAX_DEPTH:
        raise _unsupported(f"a sequence of {kind}s that cannot be read, or is nested {MAX_DEPTH} deep")
    for step in steps:
        if step is None:
            raise _unsupported(f"an empty {kind}")
        yield from _flatten(kind, step, depth + 1)


def _growth(step: Step) -> float:
    """Most characters that a step makes of one."""
    for field in ("content", "prepend", "replacement", "prefix", "cleanup"):
        if isinstance(text := step.get(field), str) and len(text) > MAX_TEXT_CHARS:
            raise _unsupported(f"a text of {len(text)} characters in {step['type']}")
    if step["type"] == "Replace":
        kind, pattern = _pattern(step)
        content = str(step.get("content", ""))
        return max(1.0, len(content) / len(pattern)) if kind == "String" and pattern else 1.0 + len(content)
    if step["type"] == "Precompiled":
        return float(max(1, _longest_target(step.get("precompiled_charsmap"))))
    return (
        4.0 if step["type"] == "ByteLevel" and "normalizers" not in step and "use_regex" not in step else 1.0
    )


def _longest_target(encoded: Any) -> int:
    """Characters of the longest text in a map of SentencePiece: a tree, then texts that end with a zero."""
    if encoded is None:
        return 1
    try:
        data = base64.b64decode(encoded, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise _invalid("has a precompiled_charsmap that is not base64") from error
    texts = data[4 + int.from_bytes(data[:4], "little") :].split(b"\0")
    return max(len(text.decode(errors="replace")) for text in texts)


def _check_template(step: Step) -> None:
    """A template that names the text twice would have it twice."""
    if step["type"] != "TemplateProcessing":
        return
    for field in ("single", "pair"):
        pieces = step.get(field)
        if not isinstance(pieces, list) or len(pieces) > MAX_COMPONENTS:
            raise _unsupported(f"a template whose {field} is no short list")
        texts = [piece["Sequence"] for piece in pieces if isinstance(piece, dict) and "Sequence" in piece]
        names = [str(text.get("id")) if isinstance(text, dict) else "" for text in texts]
        if len(set(names)) != len(names):
            raise _unsupported("a template that repeats the text")
    special = step.get("special_tokens") or {}
    ids = special.values() if isinstance(special, dict) else ()
    if sum(len(token.get("ids") or ()) for token in ids if isinstance(token, dict)) > MAX_TEXT_CHARS:
        raise _unsupported(f"a template of more than {MAX_TEXT_CHARS} special tokens")


def _pattern(step: Step) -> tuple[str, str]:
    """Whether a pattern is a "String" or a "Regex", and its text; ("", "") without one."""
    pattern = step.get("pattern")
    if isinstance(pattern, dict) and len(pattern) == 1:
        ((kind, text),) = pattern.items()
        if kind in ("String", "Regex") and isinstance(text, str):
            return kind, text
    if pattern is None:
        return "", ""
    raise _unsupported(f"a pattern in {step['type']} that is neither a string nor a regular expression")


_BACKWARD = re.compile(r"\\[1-9]|\\[gk][<'{]|\(\?(?:P[=>]|R|&|[0-9])")
_ENDLESS = re.compile(r"[*+]|\{[0-9]*,\}")


def _check_pattern(step: Step) -> None:
    """Refuse patterns whose matching can take a time that grows without measure in the text's length."""
    kind, pattern = _pattern(step)
    if len(pattern) > MAX_PATTERN_CHARS:
        raise _unsupported(f"a pattern of {len(pattern)} characters, more than {MAX_PATTERN_CHARS}")
    if kind != "Regex":
        return
    groups, just_closed = [False], False  # whether each open group repeats something without end
    for position in _outside_classes(pattern):
        if _BACKWARD.match(pattern, position):
            raise _unsupported(f"the pattern {pattern[:80]!r} with a backreference or a recursion")
        if pattern[position] == "(":
            groups.append(False)
        elif pattern[position] == ")" and len(groups) > 1:
            just_closed = groups.pop()
            groups[-1] = groups[-1] or just_closed
            continue
        elif _ENDLESS.match(pattern, position):
            if just_closed:
                raise _unsupported(f"the pattern {pattern[:80]!r} with a repetition inside a repetition")
            groups[-1] = True
        just_closed = False


def _outside_classes(pattern: str) -> Iterator[int]:
    """Where the pieces of a pattern begin: characters and escapes, character classes as a whole."""
    position = depth = 0
    while position < len(pattern):
        char = pattern[position]
        if not depth:
            yield position
        if char == "\\":
            position += 1
        elif char == "[":
            depth += 1
            # What follows at once is part of the class, a bracket too.
            position += pattern.startswith("^", position + 1)
            position += pattern.startswith("]", position + 1)
        elif char == "]" and depth:
            depth -= 1
        position += 1


def _invalid(problem: str) -> InvalidConfigError:
    return InvalidConfigError(f"{TOKENIZER} {problem}", file=TOKENIZER)


def _unsupported(what: str) -> UnsupportedFeatureError:
    return UnsupportedFeatureError(
        f"{TOKENIZER} has {what}",
        hint="Register the checkpoint without tokenizer.json and send token ids, or report the tokenizer if "
        "people use it.",
        file=TOKENIZER,
    )
