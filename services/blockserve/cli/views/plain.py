"""Text of others, made safe to show: names, provenance, messages and answers may hold escape sequences.

Written to a terminal as they are, these could move the cursor, hide lines or change the title. Control
characters and those that turn the direction of text are shown as escapes; lines and tabs stay.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """The text with `\\x1b` and the like spelled out."""
    return UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def visible_json(value: Any, indent: int | None = None) -> str:
    """A value as JSON that is safe to show; to programs it is still the same value."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return re.sub(r"[\x7f-\x9f\u2028-\u202e\u2066-\u2069]", lambda found: f"\\u{ord(found[0]):04x}", text)


def write_answer(text: str) -> None:
    """Write a piece of an answer: to programs as it is, to a terminal so that it is safe."""
    sys.stdout.write(visible(text) if sys.stdout.isatty() else text)
