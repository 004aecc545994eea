"""What a caller asked for, out of the wire format, before the variant is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum, auto
from typing import Any


class CallField(StrEnum):
    """A value of a call that an error can be about, by the name that it has in Python.

    Protocols spell it in their own way; each front of the router translates.
    """

    PROMPT = auto()
    TOKEN_IDS = auto()
    MESSAGES = auto()
    TEMPERATURE = auto()
    TOP_K = auto()
    TOP_P = auto()
    MIN_P = auto()
    SEED = auto()
    REPETITION_PENALTY = auto()
    PRESENCE_PENALTY = auto()
    FREQUENCY_PENALTY = auto()
    LOGIT_BIAS = auto()
    N = auto()
    MAX_TOKENS = auto()
    MIN_TOKENS = auto()
    STOP = auto()
    STOP_TOKEN_IDS = auto()
    LOGPROBS = auto()
    RESUME_FROM = auto()
    RESUME_CHOICES = auto()
    RESUME_CHAIN = auto()

    def at(self, key: int) -> str:
        """One entry of a list or a mapping, for example `stop[2]`."""
        return f"{self}[{key}]"


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a template is given, as `apply_chat_template` of transformers takes it.

    Attributes:
        messages: turns as `{"role": …, "content": …, "tool_calls": …, …}`.
        add_generation_prompt: open the assistant's turn at the end.
        tools: tool definitions, or None when the caller sent none.
        variables: further variables for the template.
        continue_final_message: the field of the last turn that the answer continues; empty for a new turn.
        documents: texts for the template to quote, or None.
        template: name of the template; empty to choose by the tools.
    """

    messages: Sequence[Mapping[str, Any]]
    add_generation_prompt: bool = True
    tools: Sequence[Any] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    continue_final_message: str = ""
    documents: Sequence[Any] | None = None
    template: str = ""


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
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    n: int | None = None


@dataclass(frozen=True, slots=True)
class StoppingWishes:
    """When the caller wants the answer to end."""

    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop: bool = False
    min_tokens: int = 0


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
        resume_choices: the same for each of several choices.
        priority: smaller runs first.
        allow_equivalents: approved equivalents may answer.
        resume_chain: the chain that the answer to be resumed began on; empty for the variant's own.
        cache_salt: separates this caller's cached prefixes from those of others.
        add_special_tokens: put the tokenizer's special tokens around a prompt that is text.
        skip_special_tokens: leave special tokens out of the text of the answer.
    """

    request_id: str
    model: str
    prompt: Prompt
    sampling: SamplingWishes = field(default_factory=SamplingWishes)
    stopping: StoppingWishes = field(default_factory=StoppingWishes)
    logprobs: int | None = None
    prompt_logprobs: bool = False
    resume_from: int = 0
    resume_choices: tuple[int, ...] = ()
    priority: int = 0
    allow_equivalents: bool = False
    resume_chain: str = ""
    cache_salt: str = ""
    add_special_tokens: bool = True
    skip_special_tokens: bool = True

    @property
    def num_choices(self) -> int:
        """How many answers are wanted."""
        return 1 if self.sampling.n is None else self.sampling.n

    @property
    def is_resumed(self) -> bool:
        """Whether some of the answer is there already."""
        return bool(self.resume_from or any(self.resume_choices))

    def resume_point(self, choice: int) -> int:
        """First output token wanted of a choice."""
        return self.resume_choices[choice] if self.resume_choices else self.resume_from

    def advanced(self, choice: int, num_tokens: int) -> GenerateCall:
        """The call for what follows that many more tokens of a choice."""
        if self.num_choices == 1 and not self.resume_choices:
            return replace(self, resume_from=self.resume_from + num_tokens)
        points = list(self.resume_choices or (0,) * self.num_choices)
        points[choice] += num_tokens
        return replace(self, resume_choices=tuple(points))
