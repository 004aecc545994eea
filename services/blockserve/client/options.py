"""What callers may pass to `generate` and `chat`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

Message = Mapping[str, Any]
"""One turn, as `apply_chat_template` of transformers takes it: {"role": ..., "content": ...}.

The content is a text or a list of text parts ({"type": "text", "text": ...}). A turn may have `tool_calls`,
`tool_call_id`, `name`, and whatever else the variant's template reads.
"""


class ChatOptions(TypedDict, total=False):
    """How a conversation becomes a prompt.

    Attributes:
        tools: tool definitions for the template.
        documents: texts for the template to quote.
        chat_template_kwargs: further variables for the template, for example {"enable_thinking": False}.
        template_name: which of the variant's templates; by default `tool_use` with tools where there is one.
        add_generation_prompt: open the assistant's turn; True unless the last turn is continued.
        continue_final_message: go on with the last turn; the name of its field, or True for `content`.
    """

    tools: Sequence[Mapping[str, Any]] | None
    documents: Sequence[Mapping[str, Any]] | None
    chat_template_kwargs: Mapping[str, Any]
    template_name: str
    add_generation_prompt: bool
    continue_final_message: bool | str


class TokenizeOptions(ChatOptions, total=False):
    """Keyword arguments of `tokenize`; those of a conversation, and `add_special_tokens` for a text."""

    add_special_tokens: bool


class GenerateOptions(TypedDict, total=False):
    """Keyword arguments; see `blockproto.v1` for their meaning."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    n: int
    max_tokens: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    include_stop: bool
    min_tokens: int
    logprobs: int
    prompt_logprobs: bool
    priority: int
    allow_equivalents: bool
    cache_salt: str
    request_id: str
    add_special_tokens: bool
    skip_special_tokens: bool
    timeout: float


class ChatCallOptions(GenerateOptions, ChatOptions, total=False):
    """Keyword arguments of `chat`."""
