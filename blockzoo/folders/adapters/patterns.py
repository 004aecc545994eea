"""Patterns that an adapter's author wrote, matched in linear time with the meaning that `re` gives them.

`re` backtracks: a short pattern can keep the interpreter busy for longer than anyone waits, and an adapter
may come from a stranger. Patterns without operators go to `re` inside a frame of ours, where they cannot
backtrack. All others go to RE2, whose time is linear in the length of the module's path. RE2 differs from
`re` in some syntax, so only what both read alike is let through; the rest (lookaround, backreferences and
the like) is refused by name. Paths of modules are ASCII without line breaks, so Unicode classes and `$`
before a line break make no difference.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol, cast

from blockzoo.errors import AdapterError
from blockzoo.extras import named_extras

MAX_CHARS = 4096
"""Characters of one pattern."""

MAX_PATTERNS = 2048
"""Patterns of one field: a rank for each linear module of the largest models needs half of it."""

MAX_TOTAL_CHARS = 1 << 18
"""Characters of all patterns of one field."""

_MEMORY = 1 << 18
"""Bytes that RE2 may use for one pattern; a larger program is refused."""

_PLAIN = re.compile(r"[A-Za-z0-9_.]*")

_SAME = re.compile(
    r"""
      [A-Za-z0-9_./:,=@#~<>"'!%&;`\ -]             # literals, and the dot
    | \\[dDwWsSbBA]                                # classes and anchors
    | \\[!-/:-@\[-`{-~]                            # escaped punctuation
    | \[\^?\]?(?:[^\]\\\[]|\\[dDwWsS]|\\[!-/:-@\[-`{-~])*\]
    | \((?!\?) | \(\?: | \(\?P<[A-Za-z_][A-Za-z0-9_]*> | \) | \|
    | \A\(\?[is]+\)                                # flags for the whole pattern
    | [*+?]\??(?!\+)
    | \{[0-9]+(?:,[0-9]*)?\}\??(?!\+)
    | [\^$]
    """,
    re.VERBOSE,
)
"""What `re` and RE2 read alike."""

_READINGS = (
    (re.compile(r"\\Z"), r"\\z"),
    (re.compile(r"\{,([0-9]*)\}(?!\??\+)"), r"{0,\1}"),
    (_SAME, r"\g<0>"),
    (re.compile(r"(?!\{[0-9]*,?[0-9]*\}\??\+)[{}\]]"), r"\\\g<0>"),
)
"""What `re` reads, and how RE2 spells it. The first that fits counts."""

_REFUSED = (
    (re.compile(r"\(\?<?[=!]"), "lookaround"),
    (re.compile(r"\\[1-9]|\(\?P="), "a backreference"),
    (re.compile(r"\(\?\("), "a condition on a group"),
    (re.compile(r"\(\?>"), "an atomic group"),
    (re.compile(r"(?:[*+?]|\{[0-9]*,?[0-9]*\})\+"), "a possessive quantifier"),
    (re.compile(r"\(\?"), "a flag inside the pattern, or a comment"),
    (re.compile(r"\\"), "an escape other than a class, an anchor or punctuation"),
    (re.compile(r"\["), "a character class with a bracket or an escaped letter inside"),
)


class _Compiled(Protocol):
    """What of `re` and of RE2 is used here."""

    def match(self, text: str) -> Any: ...
    def fullmatch(self, text: str) -> Any: ...


@dataclass(frozen=True, slots=True)
class ModulePattern:
    """One pattern, ready to be matched with paths of modules.

    Attributes:
        text: as the adapter's author wrote it.
        compiled: with its frame.
    """

    text: str
    compiled: _Compiled

    def matches(self, path: str) -> bool:
        """Whether the pattern with its frame matches from the start of a path."""
        return self.compiled.match(path) is not None

    def matches_all(self, path: str) -> bool:
        """Whether the pattern with its frame matches a whole path."""
        return self.compiled.fullmatch(path) is not None

    def index(self, path: str) -> str | bool | None:
        """The group "idx" of a match from the start; None if it took no part, False without a match."""
        found = self.compiled.match(path)
        return False if found is None else cast("str | None", found.groupdict().get("idx"))


def compile_pattern(field: str, text: str, before: str = "", after: str = "") -> ModulePattern:
    """Compile one pattern of adapter_config.json.

    Args:
        field: where it stands, for errors.
        text: the pattern.
        before: what PEFT puts in front of it.
        after: what PEFT puts behind it.

    Raises:
        AdapterError: no regular expression, too long, or one that cannot be matched in linear time.
        MissingPackageError: it has operators, and google-re2 is not installed.
    """
    if len(text) > MAX_CHARS:
        raise _refusal(field, text, f"has {len(text)} characters; at most {MAX_CHARS} are allowed")
    if _PLAIN.fullmatch(text):
        return ModulePattern(text, re.compile(before + text + after))
    linear = _as_re2(field, text)
    try:
        re.compile(before + text + after)
    except (re.error, RecursionError, OverflowError) as error:
        raise _refusal(field, text, f"is no regular expression: {error}") from error
    return ModulePattern(text, _compile_re2(field, text, before + linear + after))


def compile_patterns(
    field: str, texts: Iterable[str], before: str = "", after: str = ""
) -> tuple[ModulePattern, ...]:
    """Compile the patterns of one field, in their order; see `compile_pattern`.

    Raises:
        AdapterError: also when there are too many of them.
    """
    texts = list(texts)
    check_number(field, texts)
    return tuple(compile_pattern(field, text, before, after) for text in texts)


def check_number(field: str, texts: list[str]) -> None:
    """Raise AdapterError when a field holds more patterns, or more text, than anybody needs."""
    total = sum(map(len, texts))
    if len(texts) > MAX_PATTERNS or total > MAX_TOTAL_CHARS:
        raise AdapterError(
            f"adapter_config.json: {field} holds {len(texts)} patterns of {total} characters; at most "
            f"{MAX_PATTERNS} patterns of {MAX_TOTAL_CHARS} characters are allowed",
            hint="Use fewer patterns; the name of a module without its layer matches in every layer.",
            field=field,
        )


def _as_re2(field: str, text: str) -> str:
    """The pattern as RE2 spells it."""
    pieces, position = [], 0
    while position < len(text):
        piece, end = _next_piece(field, text, position)
        pieces.append(piece)
        position = end
    return "".join(pieces)


def _next_piece(field: str, text: str, position: int) -> tuple[str, int]:
    for reading, spelling in _READINGS:
        if found := reading.match(text, position):
            return found.expand(spelling), found.end()
    what = next((name for mark, name in _REFUSED if mark.match(text, position)), None)
    what = what or f"the character {text[position]!r}"
    raise _refusal(
        field,
        text,
        f"holds {what}, which cannot be matched in linear time",
        hint="Write the pattern without it, or list the modules by name.",
    )


def _compile_re2(field: str, text: str, pattern: str) -> _Compiled:
    with named_extras():
        import re2
    options = re2.Options()
    options.log_errors = False
    options.max_mem = _MEMORY
    try:
        return cast(_Compiled, re2.compile(pattern, options))
    except re2.error as error:
        problem = error.args[0] if error.args else ""
        said = problem.decode(errors="replace") if isinstance(problem, bytes) else str(problem)
        raise _refusal(field, text, f"cannot be matched in linear time: {said[:120]}") from error


def _refusal(field: str, text: str, problem: str, hint: str = "") -> AdapterError:
    return AdapterError(
        f"adapter_config.json: the pattern {text[:80]!r} of {field} {problem}", hint=hint, field=field
    )
