"""A wrong command line: what typer says of it, as one sentence and a hint like every other error."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from blockserve.cli.options.failures import USAGE, show

REASON = "USAGE"

_INVALID = re.compile(
    r"Invalid value(?: for (?P<where>.+?(?: \(env var: '[^']*'\))?))?: (?P<what>.*)", re.DOTALL
)
_OPTION = re.compile(r"-[\w-]+|[A-Z][A-Z_]*")
_LIMITS = {
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    "greater than": "more than",
    "less than": "less than",
}


def is_usage_error(error: BaseException) -> bool:
    """Tell whether typer raised it about the command line; its class comes from one of two packages."""
    return hasattr(error, "format_message") and hasattr(error, "exit_code")


def report_usage(error: Any, *, as_json: bool) -> int:
    """Print what is wrong with the command line; return the exit code."""
    if type(error).__name__ == "NoArgsIsHelpError":
        return USAGE  # the help has been printed in its place
    path = getattr(getattr(error, "ctx", None), "command_path", "blockzoo")
    message = plain(error.format_message())
    show(REASON, message, f"`{path} --help` explains the options.", {}, as_json=as_json)
    return USAGE


def plain(text: str) -> str:
    """What typer says of a value, in words that need no knowledge of types."""
    found = _INVALID.fullmatch(text)
    if found is None:
        return text.rstrip(".")
    what = found["what"].removeprefix("Value error, ").rstrip(".")
    if found["where"] is None:
        return what
    option = _OPTION.search(found["where"])
    name = option[0] if option else found["where"]
    for pattern, say in _SENTENCES:
        if said := pattern.fullmatch(what):
            return say(name, said)
    return f"{name}: {what}"


def _not_one_of(name: str, said: re.Match[str]) -> str:
    *others, last = (choice.strip("'") for choice in said["choices"].split(", "))
    choices = f"{', '.join(others)} or {last}" if others else last
    return f"{name} cannot be {said['given']}: choose {choices}"


_SENTENCES: tuple[tuple[re.Pattern[str], Callable[[str, re.Match[str]], str]], ...] = (
    (re.compile(r"(?P<given>.*) is not one of (?P<choices>'.*')", re.DOTALL), _not_one_of),
    (
        re.compile(rf"Input should be (?P<limit>{'|'.join(_LIMITS)}) (?P<number>\S+)"),
        lambda name, said: f"{name} must be {_LIMITS[said['limit']]} {said['number']}",
    ),
    (
        re.compile(r"Input should be a valid number, .*", re.DOTALL),
        lambda name, _: f"{name} must be a number",
    ),
    (
        re.compile(r"Input should be a valid boolean, .*", re.DOTALL),
        lambda name, _: f"{name} must be true or false",
    ),
    (
        re.compile(r"Input should be a valid integer, .*", re.DOTALL),
        lambda name, _: f"{name} must be a whole number",
    ),
)
