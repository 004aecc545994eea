"""A checked call and a variant to an engine request: every value resolved. Pure.

What depends on the variant (its vocabulary, context and defaults) is checked here; `checks` did the rest.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass, replace

from blockserve.common.api.calls import CallField, GenerateCall, SamplingWishes
from blockserve.common.api.engine import EngineRequest, SamplingParams
from blockserve.common.errors import (
    EmptyPromptError,
    PromptError,
    PromptTooLongError,
    ResumeError,
    SamplingError,
)
from blockserve.router.intake.catalog import ServedVariant
from blockserve.router.limits import RouterConfig
from blockzoo.folders.generation import GenerationDefaults


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
        call: passed `blockserve.router.intake.checks.check_call`.
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
            raise SamplingError(CallField.STOP_TOKEN_IDS.at(i), _outside(token, vocab))
    sampling = _sampling(call.sampling, variant)
    max_tokens = _max_tokens(call.stopping.max_tokens, variant, len(prompt), limits)
    call = _with_default_stops(call, variant)
    min_tokens = _min_tokens(call.stopping.min_tokens, variant, len(prompt), max_tokens)
    _check_resolved(call, sampling, vocab=vocab, max_tokens=max_tokens)
    _check_resume(call, sampling, max_tokens)
    eos = frozenset() if call.stopping.ignore_eos else variant.defaults.eos_token_ids
    # End tokens that are ignored are held back all the same, as in vLLM: a longer answer is wanted.
    held = variant.defaults.eos_token_ids | frozenset(call.stopping.stop_token_ids)
    _check_held(held | _forbidden(sampling), min_tokens, vocab)
    request = EngineRequest(
        request_id=engine_id,
        chain=variant.record.chain,
        prompt=prompt,
        sampling=sampling,
        max_tokens=max_tokens,
        stop_token_ids=eos | frozenset(call.stopping.stop_token_ids),
        min_tokens=min_tokens,
        held_token_ids=held if min_tokens else frozenset(),
        logprobs=call.logprobs,
        prompt_logprobs=call.prompt_logprobs,
        deadline=deadline,
        priority=call.priority,
        cache_salt=call.cache_salt,
    )
    return Plan(call, variant, request)


def _check_prompt(call: GenerateCall, variant: ServedVariant, prompt: tuple[int, ...]) -> None:
    vocab, context = variant.chain.vocab_size, variant.chain.context_length
    if not prompt:
        raise EmptyPromptError("the prompt has no tokens", hint="Send at least one token or character.")
    if len(prompt) >= context:
        raise PromptTooLongError(
            f"the prompt has {len(prompt)} tokens; {variant.ref} has a context of {context} tokens for "
            f"prompt and answer together",
            hint=f"Shorten the prompt to at most {context - 1} tokens.",
            prompt_tokens=len(prompt),
            context_length=context,
        )
    if (largest := max(prompt)) >= vocab:
        index = prompt.index(largest)
        field = CallField.TOKEN_IDS.at(index) if isinstance(call.prompt, tuple) else CallField.PROMPT
        raise PromptError(
            f"{field}: {_outside(largest, vocab)}",
            hint="Tokenise with the variant's own tokenizer: the server tokenises when asked.",
            field=field,
        )


def _check_resolved(call: GenerateCall, sampling: SamplingParams, *, vocab: int, max_tokens: int) -> None:
    """Refuse what does not fit the variant's vocabulary, its defaults or the length of the answer.

    Raises:
        SamplingError: naming the field.
    """
    for token, _ in sampling.logit_bias:
        if token >= vocab:
            raise SamplingError(
                CallField.LOGIT_BIAS.at(token), f"token {token} is outside the vocabulary of {vocab}"
            )
    if call.stopping.min_tokens > max_tokens:
        raise SamplingError(
            CallField.MIN_TOKENS,
            f"{call.stopping.min_tokens} is more than the {max_tokens} tokens that the answer can have",
        )
    if call.num_choices > 1 and sampling.is_greedy:
        raise SamplingError(CallField.N, "greedy choices would all be the same; set a temperature above 0")


def _check_held(held: frozenset[int], min_tokens: int, vocab: int) -> None:
    """Refuse a least length that leaves no token to choose.

    Raises:
        SamplingError: every token of the vocabulary would be held back.
    """
    if min_tokens and len(held) >= vocab:
        raise SamplingError(
            CallField.MIN_TOKENS, f"end and stop tokens cover all {vocab} tokens of the vocabulary"
        )


def _sampling(wishes: SamplingWishes, variant: ServedVariant) -> SamplingParams:
    defaults, vocab = variant.defaults, variant.chain.vocab_size
    if wishes.top_k is not None and wishes.top_k > vocab:
        raise SamplingError(CallField.TOP_K, f"{wishes.top_k} is more than the vocabulary's {vocab}")

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
        logit_bias=_added(defaults.token_bias, wishes.logit_bias),
        sequence_bias=defaults.sequence_bias,
        begin_suppress=defaults.begin_suppress,
    )


def _added(
    first: tuple[tuple[int, float], ...], second: tuple[tuple[int, float], ...]
) -> tuple[tuple[int, float], ...]:
    if not first:
        return second
    total = dict(first)
    for token, bias in second:
        total[token] = total.get(token, 0.0) + bias
    return tuple(sorted(total.items()))


def _forbidden(sampling: SamplingParams) -> frozenset[int]:
    """Tokens that may be impossible at some position."""
    pairs = (*sampling.logit_bias, *((ids[-1], bias) for ids, bias in sampling.sequence_bias))
    return frozenset(token for token, bias in pairs if bias == -math.inf).union(sampling.begin_suppress)


def _with_default_stops(call: GenerateCall, variant: ServedVariant) -> GenerateCall:
    """The call with the variant's stop strings where it names none."""
    if call.stopping.stop or not variant.defaults.stop_strings:
        return call
    return replace(call, stopping=replace(call.stopping, stop=variant.defaults.stop_strings))


def _max_tokens(asked: int | None, variant: ServedVariant, prompt_tokens: int, limits: RouterConfig) -> int:
    """Output tokens to allow: what was asked, ended earlier by the context, as `FinishReason.LENGTH` says."""
    context = variant.chain.context_length
    if asked is not None and asked > context:
        raise SamplingError(
            CallField.MAX_TOKENS,
            f"{asked} is more than the {context} tokens of context that {variant.ref} has",
        )
    if asked is None:
        asked = int(min(limits.max_output_tokens, _default_length(variant.defaults, prompt_tokens)))
    return min(context - prompt_tokens, asked)


def _default_length(defaults: GenerationDefaults, prompt_tokens: int) -> float:
    """Most output tokens by the variant's own defaults; an answer has at least one."""
    if defaults.max_new_tokens is not None:
        return defaults.max_new_tokens
    return math.inf if defaults.max_length is None else max(1, defaults.max_length - prompt_tokens)


def _min_tokens(asked: int, variant: ServedVariant, prompt_tokens: int, max_tokens: int) -> int:
    """Least output tokens: what was asked, else what the variant wants and the answer can have."""
    if asked:
        return asked
    defaults = variant.defaults
    wanted = defaults.min_new_tokens
    if wanted is None:
        wanted = max(0, (defaults.min_length or 0) - prompt_tokens)
    return min(wanted, max_tokens)


def _check_resume(call: GenerateCall, sampling: SamplingParams, max_tokens: int) -> None:
    furthest = max(call.resume_from, *call.resume_choices, 0)
    if not furthest:
        return
    if call.sampling.seed is None and not sampling.is_greedy:
        raise ResumeError(
            "resume_from needs the seed of the answer that it resumes",
            hint="Send `info.seed` of the first answer as the seed.",
            field=CallField.SEED,
        )
    if furthest > max_tokens:
        field = CallField.RESUME_CHOICES if call.resume_choices else CallField.RESUME_FROM
        raise ResumeError(
            f"{field} is {furthest}, but the answer has at most {max_tokens} tokens",
            hint="Send the number of tokens already received.",
            field=field,
        )


def _outside(token: int, vocab: int) -> str:
    return f"token {token} is outside the vocabulary of {vocab}"
