"""Conversations rendered as a server does it, and as transformers does."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from blockserve.common.api.calls import Conversation
from blockserve.common.errors import ChatTemplateError
from blockserve.common.wire.chat import chat_from_message, chat_to_message
from blockserve.router.intake.chat import ChatRenderer, ChatTemplates


def rendered(conversations: Sequence[Conversation], templates: ChatTemplates) -> list[str]:
    """What the server renders of what comes out of the wire; an error as its text."""

    async def work() -> list[str]:
        renderer = ChatRenderer()
        try:
            return [await one(renderer, conversation) for conversation in conversations]
        finally:
            await renderer.close()

    async def one(renderer: ChatRenderer, conversation: Conversation) -> str:
        try:
            return await renderer.render(templates, chat_from_message(chat_to_message(conversation)))
        except ChatTemplateError as error:
            return f"error: {error}"

    return asyncio.run(work())


def expected(
    reference: Any, template: str, chat: Sequence[Mapping[str, Any]], options: Mapping[str, Any]
) -> str | None:
    """What `apply_chat_template` makes of it; None where transformers or the template refuses.

    Args:
        reference: a tokenizer of transformers.
        template: Jinja source.
        chat: the turns.
        options: `ChatOptions`.
    """
    given = {"add_generation_prompt": "continue_final_message" not in options, **options}
    given |= given.pop("chat_template_kwargs", {})
    try:
        text: str = reference.apply_chat_template(chat, chat_template=template, tokenize=False, **given)
    except (jinja2.TemplateError, ValueError, KeyError, TypeError):
        return None
    return text
