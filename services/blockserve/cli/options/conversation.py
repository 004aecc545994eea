"""Options of the verbs that send conversations: what the variant's template is given besides the turns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

CONVERSATION = "Conversation"
_OWN_OPTION = {"tools": "--tools FILE gives tools.", "messages": "The prompt and --system make the messages."}
_FIXED = frozenset(("messages", "tools", "documents", "add_generation_prompt"))

TemplateArgOption = Annotated[
    list[str] | None,
    typer.Option(
        "--template-arg",
        metavar="KEY=VALUE",
        rich_help_panel=CONVERSATION,
        help="Variable for the chat template, as enable_thinking=false; VALUE is JSON, or else text. "
        "May be repeated.",
    ),
]
TemplateOption = Annotated[
    str | None,
    typer.Option(
        "--template",
        metavar="NAME",
        rich_help_panel=CONVERSATION,
        help="Which of the variant's chat templates. Default: `tool_use` with tools, if there is one.",
    ),
]
ToolsOption = Annotated[
    Path | None,
    typer.Option(
        "--tools",
        metavar="FILE",
        rich_help_panel=CONVERSATION,
        help="Tools for the chat template: a JSON array of tool definitions.",
    ),
]
ContinueOption = Annotated[
    str | None,
    typer.Option(
        "--continue",
        metavar="TEXT",
        rich_help_panel=CONVERSATION,
        help="The answer begins with TEXT; the variant goes on, and what it adds is printed.",
    ),
]
KeepSpecialTokensOption = Annotated[
    bool,
    typer.Option(
        "--keep-special-tokens", help="Print special tokens such as <|im_end|> if the answer has them."
    ),
]


def template_options(arguments: Sequence[str] | None, template: str | None) -> dict[str, Any]:
    """`--template-arg` and `--template` as keyword arguments of `Client.chat`.

    Raises:
        typer.BadParameter: an argument is not KEY=VALUE, is given twice, or has an option of its own.
    """
    options: dict[str, Any] = {}
    if arguments:
        options["chat_template_kwargs"] = _variables(arguments)
    if template is not None:
        options["template_name"] = template
    return options


def _variables(arguments: Sequence[str]) -> dict[str, Any]:
    variables: dict[str, Any] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not key or not equals:
            _refuse("--template-arg", f"{argument!r} is not KEY=VALUE, as in enable_thinking=false")
        if key in _FIXED:
            _refuse("--template-arg", f"{key} is no variable of its own. {_OWN_OPTION.get(key, '')}".rstrip())
        if key in variables:
            _refuse("--template-arg", f"{key} is given twice")
        variables[key] = _value(value)
    return variables


def _value(text: str) -> Any:
    """JSON where it is JSON; NaN and Infinity are words of Python's parser and not of JSON."""
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return text


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)


def read_tools(path: Path) -> list[dict[str, Any]]:
    """The tool definitions of `--tools`.

    Raises:
        typer.BadParameter: the file cannot be read, or holds something else than a JSON array of objects.
    """
    try:
        tools = json.loads(path.expanduser().read_bytes())
    except OSError as error:
        _refuse("--tools", f"{path} cannot be read: {error.strerror}")
    except (ValueError, RecursionError) as error:
        _refuse("--tools", f"{path} is not JSON: {error}")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        example = '[{"type": "function", "function": {"name": ...}}]'
        _refuse("--tools", f"{path} is not a JSON array of tool definitions, as {example}")
    return tools


def _refuse(option: str, message: str) -> NoReturn:
    raise typer.BadParameter(message, param_hint=option)
