"""What callers get: the values behind the messages of `blockproto.v1`, for servers and clients alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from blockserve.common.api.tokens import FinishReason, PositionLogprobs


@dataclass(frozen=True, slots=True)
class RequestInfo:
    """What the server resolved before the first token.

    Attributes:
        model: the variant's name.
        version: which version of it answers.
        chain_digest: the chain of blocks that runs it.
        seed: what to send to get the same answer again.
        prompt_tokens: length of the prompt.
        approximations: empty when the variant runs exactly as registered.
    """

    model: str
    version: int
    chain_digest: str
    seed: int
    prompt_tokens: int
    approximations: tuple[str, ...] = ()

    @property
    def ref(self) -> str:
        """`name@version`."""
        return f"{self.model}@{self.version}"


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens that were processed for a request, all its choices together."""

    prompt_tokens: int
    completion_tokens: int
    cached_prompt_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Finish:
    """How an answer ended.

    Attributes:
        reason: stop or length.
        matched: the stop string, or the id of the stop token, that ended it.
        usage: tokens that were processed.
        time_to_first_token: seconds from arrival to the first token sent, at the server.
    """

    reason: FinishReason
    matched: str | int | None
    usage: Usage
    time_to_first_token: float


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an answer.

    Attributes:
        request_id: the request.
        first_token_index: index of token_ids[0] among the output tokens.
        token_ids: output tokens, stop and end tokens included.
        text: the text they add; it can lag behind the tokens by half a character or half a stop string.
        logprobs: one per token, when asked for.
        prompt_logprobs: with the first chunk of choice 0, when asked for: one per prompt token but the first.
        info: with the first chunk.
        finish: with the last chunk of each choice; its usage is of the whole request as far as it has come.
        choice: which of several answers it belongs to.
    """

    request_id: str
    first_token_index: int
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[PositionLogprobs, ...] = ()
    prompt_logprobs: tuple[PositionLogprobs, ...] = ()
    info: RequestInfo | None = None
    finish: Finish | None = None
    choice: int = 0


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer; fields as in `Chunk`, and usage is that of the whole request."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    info: RequestInfo
    finish: Finish
    logprobs: tuple[PositionLogprobs, ...] = ()
    prompt_logprobs: tuple[PositionLogprobs, ...] = ()
    choice: int = 0


@dataclass(frozen=True, slots=True)
class Tokenized:
    """A prompt as token ids.

    Attributes:
        token_ids: what Generate would run.
        text: what was tokenised; for a chat, what the template wrote.
        context_length: most tokens of prompt and answer together.
    """

    token_ids: tuple[int, ...]
    text: str
    context_length: int


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A variant as callers see it."""

    name: str
    version: int
    chain_digest: str
    family: str
    context_length: int
    has_chat_template: bool
    loaded: bool
    num_layers: int
    provenance: Mapping[str, str] = field(default_factory=dict)
