"""What a caller asked for, out of the wire format, before the variant is known."""

from __future__ import annotations

from dataclasses import dataclass, field

from blockserve.router.chat import Conversation

Prompt = str | tuple[int, ...] | Conversation
"""Text, token ids, or a conversation for the variant's chat template."""


@dataclass(frozen=True, slots=True)
class SamplingWishes:
    """Sampling values the caller gave; None takes the variant's default."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class StoppingWishes:
    """When the caller wants the answer to end."""

    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop: bool = False


@dataclass(frozen=True, slots=True)
class GenerateCall:
    """One Generate request.

    Attributes:
        request_id: the caller's name for it, or one made by the server.
        model: `name` or `name@version`.
        prompt: what to continue.
        sampling: how to draw.
        stopping: when to end.
        logprobs: None for none, else how many alternatives.
        prompt_logprobs: report the prompt's log-probabilities too.
        resume_from: first output token wanted.
        priority: smaller runs first.
        cache_salt: separates this caller's cached prefixes from those of others.
    """

    request_id: str
    model: str
    prompt: Prompt
    sampling: SamplingWishes = field(default_factory=SamplingWishes)
    stopping: StoppingWishes = field(default_factory=StoppingWishes)
    logprobs: int | None = None
    prompt_logprobs: bool = False
    resume_from: int = 0
    priority: int = 0
    cache_salt: str = ""
