"""A call and a variant to an engine request: every value checked and resolved. Pure.

Checks that need no variant come first (`check_call`), so a senseless request costs no look-up; `plan`
checks what depends on the variant's vocabulary and context.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass

from blockserve.common.api.calls import Conversation, GenerateCall, SamplingWishes, StoppingWishes
from blockserve.common.api.engine import EngineRequest, SamplingParams
from blockserve.common.errors import (
    EmptyPromptError,
    PromptError,
    PromptTooLongError,
    ResumeError,
    SamplingError,
)
from blockserve.router.intake.catalog import ServedVariant
from blockserve.router.intake.checks import (
    check_choices,
    check_held,
    check_logit_edits,
    check_resolved,
)
from blockserve.router.limits import RouterConfig

MIN_TEMPERATURE = 1e-3
"""Below it, logits over temperature leave float32's range; such a caller means greedy, which is 0."""

MAX_SEED = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Plan:
    """What will run.

    Attributes:
        call: what was asked.
        variant: the version that answers.
        request: for the engine.
        approximations: what makes the answer another than the variant's own; empty for nothing.
    """

    call: GenerateCall
    variant: ServedVariant
    request: EngineRequest
    approximations: tuple[str, ...] = ()


def check_call(call: GenerateCall, limits: RouterConfig) -> None:
    """Refuse values that no variant could take.

    Raises:
        SamplingError: naming the field.
        ResumeError: it is not said where each choice goes on.
        PromptError: a conversation with no or too many turns.
        EmptyPromptError: no text and no tokens.
    """
    _check_sampling(call.sampling, limits)
    check_logit_edits(call.sampling, limits)
    check_choices(call, limits)
    _check_stopping(call.stopping, limits)
    if call.logprobs is not None and call.logprobs > limits.max_logprobs:
        raise SamplingError("response.logprobs", f"{call.logprobs} is more than {limits.max_logprobs}")
    if isinstance(call.prompt, Conversation):
        check_conversation(call.prompt, limits)
    elif not call.prompt:
        raise EmptyPromptError("the prompt is empty", hint="Send at least one token or character.")


def check_conversation(conversation: Conversation, limits: RouterConfig) -> None:
    """Refuse a conversation of no or too many turns.

    Raises:
        EmptyPromptError: no turns.
        PromptError: too many turns.
    """
    turns = len(conversation.messages)
    if not turns:
        raise EmptyPromptError("the conversation has no messages", hint="Send at least one message.")
    if turns > limits.max_messages:
        raise PromptError(
            f"the conversation has {turns} messages, at most {limits.max_messages} are taken",
            field="chat.messages",
        )


def plan(
    call: GenerateCall,
    variant: ServedVariant,
    prompt: tuple[int, ...],
    limits: RouterConfig,
    *,
    engine_id: str,
    deadline: float | None = None,
) -> Plan:
    """Resolve a checked call against the variant that answers it.

    Args:
        call: passed `check_call`.
        variant: resolved from `call.model`.
        prompt: the call's prompt as token ids.
        limits: the server's.
        engine_id: unique among the requests in flight (callers may reuse theirs).
        deadline: `time.monotonic()` value, or None.

    Raises:
        EmptyPromptError, PromptTooLongError, PromptError: the prompt does not fit the variant.
        SamplingError: a value does not fit the variant.
        ResumeError: resuming would not repeat the same tokens.
    """
    _check_prompt(call, variant, prompt)
    vocab = variant.chain.vocab_size
    for i, token in enumerate(call.stopping.stop_token_ids):
        if token >= vocab:
            raise SamplingError(f"stopping.stop_token_ids[{i}]", _outside(token, vocab))
    sampling = _sampling(call.sampling, variant)
    max_tokens = _max_tokens(call.stopping.max_tokens, variant, len(prompt), limits)
    check_resolved(call, sampling, vocab=vocab, max_tokens=max_tokens)
    _check_resume(call, sampling, max_tokens)
    eos = frozenset() if call.stopping.ignore_eos else variant.defaults.eos_token_ids
    # End tokens that are ignored are held back all the same, as in vLLM: a longer answer is wanted.
    held = variant.defaults.eos_token_ids | frozenset(call.stopping.stop_token_ids)
    check_held(held, call.stopping.min_tokens, vocab)
    request = EngineRequest(
        request_id=engine_id,
        chain=variant.record.chain,
        prompt=prompt,
        sampling=sampling,
        max_tokens=max_tokens,
        stop_token_ids=eos | frozenset(call.stopping.stop_token_ids),
        min_tokens=call.stopping.min_tokens,
        held_token_ids=held if call.stopping.min_tokens else frozenset(),
        logprobs=call.logprobs,
        prompt_logprobs=call.prompt_logprobs,
        deadline=deadline,
        priority=call.priority,
        cache_salt=call.cache_salt,
    )
    return Plan(call, variant, request)


def _check_sampling(wishes: SamplingWishes, limits: RouterConfig) -> None:
    temperature = wishes.temperature
    if temperature is not None:
        if not math.isfinite(temperature) or not 0 <= temperature <= limits.max_temperature:
            raise SamplingError(
                "sampling.temperature", f"{temperature:g} is outside 0 to {limits.max_temperature:g}"
            )
        if 0 < temperature < MIN_TEMPERATURE:
            raise SamplingError(
                "sampling.temperature", f"{temperature:g} is too close to 0; send 0 for greedy"
            )
    # Written so that NaN is refused too.
    if wishes.top_p is not None and not 0 < wishes.top_p <= 1:
        raise SamplingError("sampling.top_p", f"{wishes.top_p:g} is not above 0 and at most 1")
    if wishes.min_p is not None and not 0 <= wishes.min_p <= 1:
        raise SamplingError("sampling.min_p", f"{wishes.min_p:g} is outside 0 to 1")


def _check_stopping(wishes: StoppingWishes, limits: RouterConfig) -> None:
    if wishes.max_tokens == 0:
        raise SamplingError("stopping.max_tokens", "0 asks for no answer; leave it unset for the default")
    if wishes.max_tokens is not None and wishes.max_tokens > limits.max_output_tokens:
        raise SamplingError(
            "stopping.max_tokens",
            f"{wishes.max_tokens} is more than the server's limit of {limits.max_output_tokens}",
        )
    if len(wishes.stop) > limits.max_stop_strings:
        raise SamplingError(
            "stopping.stop", f"{len(wishes.stop)} stop strings, at most {limits.max_stop_strings}"
        )
    for i, stop in enumerate(wishes.stop):
        if not stop:
            raise SamplingError(f"stopping.stop[{i}]", "an empty string would end every answer at once")
        if len(stop) > limits.max_stop_chars:
            raise SamplingError(
                f"stopping.stop[{i}]", f"{len(stop)} characters, at most {limits.max_stop_chars}"
            )
    if len(wishes.stop_token_ids) > limits.max_stop_token_ids:
        raise SamplingError(
            "stopping.stop_token_ids",
            f"{len(wishes.stop_token_ids)} ids, at most {limits.max_stop_token_ids}",
        )


def _check_prompt(call: GenerateCall, variant: ServedVariant, prompt: tuple[int, ...]) -> None:
    vocab, context = variant.chain.vocab_size, variant.chain.context_length
    if not prompt:
        raise EmptyPromptError("the prompt has no tokens", hint="Send at least one token or character.")
    if len(prompt) >= context:
        raise PromptTooLongError(
            f"the prompt has {len(prompt)} tokens; {variant.ref} holds {context}, prompt and answer together",
            hint=f"Shorten the prompt to at most {context - 1} tokens.",
            prompt_tokens=len(prompt),
            context_length=context,
        )
    if (largest := max(prompt)) >= vocab:
        index = prompt.index(largest)
        field = f"token_ids.ids[{index}]" if isinstance(call.prompt, tuple) else "prompt"
        raise PromptError(
            f"{field}: {_outside(largest, vocab)}",
            hint="Tokenise with the variant's own tokenizer (`Tokenize`).",
            field=field,
        )


def _sampling(wishes: SamplingWishes, variant: ServedVariant) -> SamplingParams:
    defaults, vocab = variant.defaults, variant.chain.vocab_size
    if wishes.top_k is not None and wishes.top_k > vocab:
        raise SamplingError("sampling.top_k", f"{wishes.top_k} is more than the vocabulary's {vocab}")

    def first(wish: float | None, default: float | None, otherwise: float) -> float:
        if wish is not None:
            return wish
        return otherwise if default is None else default

    return SamplingParams(
        temperature=first(wishes.temperature, defaults.temperature, 1.0),
        top_k=int(first(wishes.top_k, defaults.top_k, 0)),
        top_p=first(wishes.top_p, defaults.top_p, 1.0),
        min_p=first(wishes.min_p, defaults.min_p, 0.0),
        seed=secrets.randbits(64) if wishes.seed is None else wishes.seed,
        repetition_penalty=first(wishes.repetition_penalty, defaults.repetition_penalty, 1.0),
        presence_penalty=wishes.presence_penalty,
        frequency_penalty=wishes.frequency_penalty,
        logit_bias=wishes.logit_bias,
    )


def _max_tokens(asked: int | None, variant: ServedVariant, prompt_tokens: int, limits: RouterConfig) -> int:
    """Output tokens to allow: what was asked, ended earlier by the context, as FINISH_REASON_LENGTH says."""
    context = variant.chain.context_length
    if asked is not None and asked > context:
        raise SamplingError(
            "stopping.max_tokens", f"{asked} is more than the {context} tokens that {variant.ref} holds"
        )
    return min(context - prompt_tokens, limits.max_output_tokens if asked is None else asked)


def _check_resume(call: GenerateCall, sampling: SamplingParams, max_tokens: int) -> None:
    furthest = max(call.resume_from, *call.resume_choices, 0)
    if not furthest:
        return
    if call.sampling.seed is None and not sampling.is_greedy:
        raise ResumeError(
            "resume_from needs the seed of the answer it goes on with",
            hint="Send `info.seed` of the first answer as sampling.seed.",
            field="sampling.seed",
        )
    if furthest > max_tokens:
        field = "resume_choices" if call.resume_choices else "resume_from"
        raise ResumeError(
            f"{field} is {furthest}, but the answer has at most {max_tokens} tokens",
            hint="Send the number of tokens already received.",
            field=field,
        )


def _outside(token: int, vocab: int) -> str:
    return f"token {token} is outside the vocabulary of {vocab}"
