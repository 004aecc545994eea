"""Checks that need no variant, made before one is looked up: a senseless call costs nothing. Pure.

What depends on the variant's vocabulary and context is checked by `plan`.
"""

from __future__ import annotations

import math

from blockserve.common.api.calls import CallField, Conversation, GenerateCall, SamplingWishes, StoppingWishes
from blockserve.common.errors import EmptyPromptError, PromptError, ResumeError, SamplingError
from blockserve.router.limits import RouterConfig

MIN_TEMPERATURE = 1e-3
"""Below it, logits over temperature leave float32's range; such a caller means greedy, which is 0."""


def check_call(call: GenerateCall, limits: RouterConfig) -> None:
    """Refuse values that no variant could take.

    Raises:
        SamplingError: naming the field, as `CallField` does.
        ResumeError: it is not said where each choice goes on.
        PromptError: a conversation with no or too many turns.
        EmptyPromptError: no text and no tokens.
    """
    _check_sampling(call.sampling, limits)
    _check_logit_edits(call.sampling, limits)
    _check_choices(call, limits)
    _check_stopping(call.stopping, limits)
    if call.logprobs is not None and call.logprobs > limits.max_logprobs:
        raise SamplingError(CallField.LOGPROBS, f"{call.logprobs} is more than {limits.max_logprobs}")
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
            field=CallField.MESSAGES,
        )


def _check_sampling(wishes: SamplingWishes, limits: RouterConfig) -> None:
    temperature = wishes.temperature
    if temperature is not None:
        if not math.isfinite(temperature) or not 0 <= temperature <= limits.max_temperature:
            raise SamplingError(
                CallField.TEMPERATURE, f"{temperature:g} is outside 0 to {limits.max_temperature:g}"
            )
        if 0 < temperature < MIN_TEMPERATURE:
            raise SamplingError(
                CallField.TEMPERATURE, f"{temperature:g} is too close to 0; send 0 for greedy"
            )
    # Written so that NaN is refused too.
    if wishes.top_p is not None and not 0 < wishes.top_p <= 1:
        raise SamplingError(CallField.TOP_P, f"{wishes.top_p:g} is not above 0 and at most 1")
    if wishes.min_p is not None and not 0 <= wishes.min_p <= 1:
        raise SamplingError(CallField.MIN_P, f"{wishes.min_p:g} is outside 0 to 1")


def _check_logit_edits(wishes: SamplingWishes, limits: RouterConfig) -> None:
    """Refuse penalties and biases that no variant could take; NaN is among them.

    Raises:
        SamplingError: naming the field.
    """
    most = limits.max_repetition_penalty
    penalty = wishes.repetition_penalty
    if penalty is not None and not 1 / most <= penalty <= most:
        raise SamplingError(CallField.REPETITION_PENALTY, f"{penalty:g} is outside {1 / most:g} to {most:g}")
    for field, value in (
        (CallField.PRESENCE_PENALTY, wishes.presence_penalty),
        (CallField.FREQUENCY_PENALTY, wishes.frequency_penalty),
    ):
        if not abs(value) <= limits.max_penalty:
            raise SamplingError(
                field, f"{value:g} is outside {-limits.max_penalty:g} to {limits.max_penalty:g}"
            )
    if len(wishes.logit_bias) > limits.max_logit_bias_tokens:
        raise SamplingError(
            CallField.LOGIT_BIAS,
            f"{len(wishes.logit_bias)} tokens, at most {limits.max_logit_bias_tokens}",
        )
    for token, bias in wishes.logit_bias:
        if not abs(bias) <= limits.max_logit_bias:
            raise SamplingError(
                CallField.LOGIT_BIAS.at(token),
                f"{bias:g} is outside {-limits.max_logit_bias:g} to {limits.max_logit_bias:g}",
            )


def _check_stopping(wishes: StoppingWishes, limits: RouterConfig) -> None:
    if wishes.max_tokens == 0:
        raise SamplingError(CallField.MAX_TOKENS, "must be at least 1; leave it unset for the default")
    if wishes.max_tokens is not None and wishes.max_tokens > limits.max_output_tokens:
        raise SamplingError(
            CallField.MAX_TOKENS,
            f"{wishes.max_tokens} is more than the server's limit of {limits.max_output_tokens}",
        )
    if len(wishes.stop) > limits.max_stop_strings:
        raise SamplingError(
            CallField.STOP, f"{len(wishes.stop)} stop strings, at most {limits.max_stop_strings}"
        )
    for i, stop in enumerate(wishes.stop):
        if not stop:
            raise SamplingError(CallField.STOP.at(i), "an empty string would end every answer at once")
        if len(stop) > limits.max_stop_chars:
            raise SamplingError(
                CallField.STOP.at(i), f"{len(stop)} characters, at most {limits.max_stop_chars}"
            )
    if len(wishes.stop_token_ids) > limits.max_stop_token_ids:
        raise SamplingError(
            CallField.STOP_TOKEN_IDS,
            f"{len(wishes.stop_token_ids)} ids, at most {limits.max_stop_token_ids}",
        )


def _check_choices(call: GenerateCall, limits: RouterConfig) -> None:
    """Refuse no choices, too many, and resuming that does not say where each goes on.

    Raises:
        SamplingError: the number of choices is out of range.
        ResumeError: `resume_from` for several choices, or not one of `resume_choices` for each.
    """
    count = call.num_choices
    if not 1 <= count <= limits.max_choices:
        raise SamplingError(CallField.N, f"{count} is outside 1 to {limits.max_choices}")
    if call.resume_from and (count > 1 or call.resume_choices):
        raise ResumeError(
            "resume_from is only for a request with one choice",
            hint="Send resume_choices alone: for each choice, the number of tokens already received.",
            field=CallField.RESUME_FROM,
        )
    if call.resume_choices and len(call.resume_choices) != count:
        raise ResumeError(
            f"resume_choices has {len(call.resume_choices)} entries for {count} choices",
            hint="Send for each choice the number of tokens already received.",
            field=CallField.RESUME_CHOICES,
        )
