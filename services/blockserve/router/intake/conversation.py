"""What a chat template is given, and what is made of its text: the rules of `apply_chat_template`. Pure.

A turn's keys without a value are left out. Reasoning goes by several names in templates, so it is given
under all of them. To continue the last turn, a mark is put behind its text; the prompt ends where the mark
comes out.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from blockserve.common.api.calls import Conversation
from blockserve.common.errors import ChatTemplateError

_REASONING = ("reasoning_content", "thinking", "reasoning")
_MARK = "CONTINUE_FINAL_MESSAGE_TAG "
"""The mark ends with a space: whether the template trims it tells whether it trims the turn's own."""


def template_context(
    conversation: Conversation, template: str, special_tokens: Mapping[str, str]
) -> dict[str, Any]:
    """The variables that a template sees.

    Args:
        conversation: what is rendered.
        template: its source.
        special_tokens: text by role; the conversation's own variables stand above them.

    Raises:
        ChatTemplateError: there is no last turn to continue, or the template cannot show it.
    """
    messages = [_turn(turn) for turn in conversation.messages]
    if conversation.continue_final_message:
        _mark_last(messages, conversation.continue_final_message, template)
    return {
        **special_tokens,
        **conversation.variables,
        "messages": messages,
        "tools": conversation.tools,
        "documents": conversation.documents,
        "add_generation_prompt": conversation.add_generation_prompt,
    }


def prompt_text(conversation: Conversation, rendered: str) -> str:
    """The prompt, given what the template wrote.

    Raises:
        ChatTemplateError: the template left out the turn that is to be continued.
    """
    field = conversation.continue_final_message
    if not field:
        return rendered
    final = _text_of(dict(conversation.messages[-1]), field)
    place = rendered.rfind(_MARK.strip())
    if place < 0 or final.strip() not in rendered:
        raise _not_shown(field)
    if rendered.startswith(_MARK, place):
        return rendered[:place]
    return rendered[:place].rstrip()


def _turn(turn: Mapping[str, Any]) -> dict[str, Any]:
    given = {key: value for key, value in turn.items() if value is not None}
    reasoning = next((given[key] for key in _REASONING if key in given), None)
    if reasoning is None:
        return given
    return {"thinking": reasoning, **given, "reasoning_content": reasoning}


def _mark_last(messages: Sequence[dict[str, Any]], field: str, template: str) -> None:
    last = messages[-1]
    final = _text_of(last, field)
    fields = [field]
    if field in _REASONING:
        fields = [name for name in _REASONING if last.get(name) == final]
    if not any(name in template for name in fields):
        raise _not_shown(field)
    if isinstance(last[field], list):
        last[field] = parts = copy.deepcopy(last[field])
        part = next(part for part in reversed(parts) if "text" in part)
        part["text"] += _MARK
    else:
        for name in fields:
            last[name] += _MARK


def _text_of(turn: Mapping[str, Any], field: str) -> str:
    """The text of a turn's field, of its last part where it has parts."""
    value = turn.get(field)
    if isinstance(value, list):
        texts = (part["text"] for part in reversed(value) if isinstance(part, dict) and "text" in part)
        value = next(texts, None)
    if not isinstance(value, str):
        raise ChatTemplateError(
            f"there is nothing to continue: the last turn has no text in {field!r}",
            hint="Give the last turn the text that the answer goes on with, or open a new turn.",
        )
    return value


def _not_shown(field: str) -> ChatTemplateError:
    return ChatTemplateError(
        f"the variant's chat template does not show {field!r} of the last turn, so it cannot be continued",
        hint="Render the conversation yourself and send it as text with add_special_tokens=false.",
    )
