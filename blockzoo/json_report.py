"""Results as JSON for `--json`: the same field names as in Python, nested dataclasses as objects."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class JsonReport:
    """Base of result dataclasses."""

    __slots__ = ()

    def to_json(self) -> dict[str, Any]:
        """Return the result in terms of JSON; properties are not included."""
        fields: dict[str, Any] = _plain(self)
        return fields


def _plain(value: object) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value
