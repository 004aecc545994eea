"""Canonical JSON: equal values have equal bytes, so a manifest can be named by its digest.

The rules are RFC 8785 (JSON Canonicalization Scheme) without floating point:
members sorted by the UTF-16 code units of their names, no white space, the
shortest string escapes, UTF-8. Floats are refused because programs disagree on
their spelling; manifests hold them as strings.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from json.encoder import encode_basestring

from blake3 import blake3

from blockzoo.errors import InvalidInputError
from blockzoo.manifest import JsonValue

MAX_SAFE_INTEGER = 2**53 - 1
"""Largest integer that every JSON reader keeps exact (RFC 8785, section 3.2.2.3, by way of I-JSON)."""

MAX_DEPTH = 64
"""Deepest nesting accepted; manifests need 6, and the limit keeps hostile input off the stack."""


def canonical_json(value: JsonValue) -> bytes:
    """Return the canonical bytes of `value`.

    Raises:
        InvalidInputError: a float, an integer beyond 2**53 - 1, a string that is not
            valid Unicode, a member name that is not a string, or nesting beyond `MAX_DEPTH`.
    """
    if _is_plain(value, MAX_DEPTH):
        text = _PLAIN.encode(value)
        # Of other characters, UTF-16 has another order than Python.
        if text.isascii():
            return text.encode("ascii")
    parts: list[str] = []
    _write(value, parts, 0)
    try:
        return "".join(parts).encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidInputError(
            "a string holds half of a surrogate pair, which UTF-8 cannot spell"
        ) from error


def digest_json(value: JsonValue) -> str:
    """Return the BLAKE3 of the canonical bytes as 64 lower-case hex digits."""
    return digest_bytes(canonical_json(value))


def digest_bytes(data: bytes | memoryview) -> str:
    """Return the BLAKE3 of bytes that are canonical already, as 64 lower-case hex digits."""
    return blake3(data).hexdigest()


def parse_json(data: bytes | memoryview) -> JsonValue:
    """Parse JSON without floats, duplicate members or special numbers.

    Raises:
        InvalidInputError: the bytes are not such JSON.
    """
    try:
        value: JsonValue = json.loads(
            bytes(data).decode("utf-8"),
            parse_float=_refuse_number,
            parse_constant=_refuse_number,
            object_pairs_hook=_unique_members,
        )
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"not canonical JSON: {error}") from error
    return value


def seal_json(record: JsonValue) -> bytes:
    """Return the canonical bytes of a record and its digest, for objects whose key is not their digest.

    Raises:
        InvalidInputError: as `canonical_json`.
    """
    return canonical_json({"record": record, "digest": digest_json(record)})


def unseal_json(data: bytes | memoryview) -> JsonValue:
    """Return the record that `seal_json` wrote.

    Raises:
        InvalidInputError: the bytes are not such JSON, or the digest is that of another record.
    """
    fields = parse_json(data)
    record = fields.get("record") if isinstance(fields, dict) else None
    if not isinstance(fields, dict) or digest_json(record) != fields.get("digest"):
        raise InvalidInputError("the record does not have the digest beside it")
    return record


_PLAIN = json.JSONEncoder(
    ensure_ascii=False, check_circular=False, allow_nan=False, sort_keys=True, separators=(",", ":")
)
"""Writes what `_is_plain`, in ASCII, as `_write` does; in C, in a quarter of the time."""


def _is_plain(value: object, depth: int) -> bool:
    """Tell whether nothing can go wrong: only exact types of JSON, integers within bounds, not too deep."""
    kind = type(value)
    if kind is int:
        return -MAX_SAFE_INTEGER <= value <= MAX_SAFE_INTEGER  # type: ignore[operator]
    if kind is not dict and kind is not list and kind is not tuple:
        return kind is str or kind is bool or value is None
    if depth == 0:
        return False
    items: Iterable[object] = value  # type: ignore[assignment]
    if kind is dict:
        if not set(map(type, items)) <= {str}:
            return False
        items = value.values()  # type: ignore[attr-defined]
    # Asked for each member of thousands of manifests, where a generator takes longer than its items.
    for item in items:  # noqa: SIM110
        if type(item) is not str and not _is_plain(item, depth - 1):
            return False
    return True


def _write(value: object, parts: list[str], depth: int) -> None:
    if depth > MAX_DEPTH:
        raise InvalidInputError(f"JSON is nested deeper than {MAX_DEPTH} levels")
    if value is None or isinstance(value, bool | str):
        parts.append(_scalar(value))
    elif isinstance(value, int):
        if abs(value) > MAX_SAFE_INTEGER:
            raise InvalidInputError(
                f"integer {value} cannot be kept exact in JSON", hint="Store it as a string."
            )
        # An IntEnum would otherwise print its name.
        parts.append(str(int(value)))
    elif isinstance(value, list | tuple):
        _write_list(value, parts, depth)
    elif isinstance(value, dict):
        _write_object(value, parts, depth)
    else:
        raise InvalidInputError(
            f"{type(value).__name__} cannot be stored in a manifest",
            hint="Store numbers with fractions as strings.",
        )


def _scalar(value: bool | str | None) -> str:
    if isinstance(value, str):
        # Escapes exactly what RFC 8785 asks for; json.dumps would build an encoder for every string.
        return encode_basestring(value)
    return "null" if value is None else "true" if value else "false"


def _write_list(values: list[object] | tuple[object, ...], parts: list[str], depth: int) -> None:
    parts.append("[")
    for index, item in enumerate(values):
        if index:
            parts.append(",")
        _write(item, parts, depth + 1)
    parts.append("]")


def _write_object(members: dict[object, object], parts: list[str], depth: int) -> None:
    names = []
    for name in members:
        if not isinstance(name, str):
            raise InvalidInputError(f"member name {name!r} is not a string")
        names.append(name)
    parts.append("{")
    for index, name in enumerate(sorted(names, key=_utf16)):
        if index:
            parts.append(",")
        parts.append(_scalar(name))
        parts.append(":")
        _write(members[name], parts, depth + 1)
    parts.append("}")


def _utf16(name: str) -> bytes:
    return name.encode("utf-16-be", "surrogatepass")


def _refuse_number(text: str) -> JsonValue:
    raise ValueError(f"{text} is not an integer")


def _unique_members(pairs: list[tuple[str, JsonValue]]) -> dict[str, JsonValue]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a member name occurs twice")
    return members
