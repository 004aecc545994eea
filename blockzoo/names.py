"""Names of variants: `NAME` is the current version, `NAME@N` a certain one.

A name becomes a folder of the storage, so the rule leaves no room for path
tricks: ASCII letters, digits, dot, underscore and hyphen, beginning with a letter
or digit, at most 96 characters.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from blockzoo.errors import InvalidNameError
from blockzoo.manifest import VariantName

MAX_NAME_LEN = 96
"""Characters; leaves room for a prefix within the 255 bytes of a file name."""

MAX_VERSION = 999_999_999
"""Highest version number; nine digits bound what `NAME@N` can ask for."""

RESERVED_PREFIX = "unregistered."
"""Names that begin so are given and removed by servers that register what requests name by its place."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")
_HINT = (
    f"Use 1 to {MAX_NAME_LEN} of the characters A-Z a-z 0-9 . _ - and begin with a letter or digit, "
    "for example support-bot."
)


def check_name(name: str) -> VariantName:
    """Return `name` as a variant name.

    Raises:
        InvalidNameError: it breaks the rule in the module docstring.
    """
    if not _NAME.fullmatch(name) or len(name) > MAX_NAME_LEN:
        # The text is cut because a hostile name may be megabytes long.
        raise InvalidNameError(f"{_shorten(name)!r} is not a variant name", hint=_HINT, name=_shorten(name))
    return VariantName(name)


def check_unreserved(name: str) -> VariantName:
    """Return `name` as a name that may be registered.

    Raises:
        InvalidNameError: it breaks the rule in the module docstring, or servers give such names.
    """
    if name.startswith(RESERVED_PREFIX):
        raise InvalidNameError(
            f"{_shorten(name)!r} begins with {RESERVED_PREFIX!r}, as names that servers give and remove",
            hint="Choose another name.",
            name=_shorten(name),
        )
    return check_name(name)


def parse_ref(ref: str) -> tuple[VariantName, int | None]:
    """Split `NAME` or `NAME@N` into the name and the version, None for the current one.

    Raises:
        InvalidNameError: the name breaks the rule or N is not a version number.
    """
    name, at, version = ref.partition("@")
    if not at:
        return check_name(name), None
    if not _VERSION.fullmatch(version):
        raise InvalidNameError(
            f"{_shorten(ref)!r} does not end in a version number",
            hint="Write NAME for the current version or NAME@N with N = 1, 2, ...",
            name=_shorten(ref),
        )
    return check_name(name), int(version)


def near_names(ref: str, names: Iterable[str], *, limit: int = 3) -> list[str]:
    """Return the names that `ref` was probably meant to be, likeliest first."""
    wanted = _shorten(ref).partition("@")[0].casefold()
    by_folded: dict[str, str] = {}
    for name in sorted(names, reverse=True):
        by_folded[name.casefold()] = name
    close = difflib.get_close_matches(wanted, by_folded, n=limit, cutoff=0.6)
    if wanted:
        close += [folded for folded in sorted(by_folded) if wanted in folded and folded not in close]
    return [by_folded[folded] for folded in close[:limit]]


def _shorten(text: str) -> str:
    return text if len(text) <= 2 * MAX_NAME_LEN else text[: 2 * MAX_NAME_LEN] + "..."


def is_based_on(base: str | None, name: str) -> bool:
    """Tell whether a base (NAME@VERSION, or None) is a version of this variant."""
    return base is not None and base.partition("@")[0] == name
