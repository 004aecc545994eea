"""Values that no variant could take are refused by name, before a variant is looked up."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest

from blockserve.common.api.calls import Conversation, GenerateCall, SamplingWishes, StoppingWishes
from blockserve.common.errors import EmptyPromptError, PromptError, ResumeError, SamplingError
from blockserve.router.intake.checks import check_call
from blockserve.router.limits import RouterConfig

LIMITS = RouterConfig()
CALL = GenerateCall("id", "tale", "hello")


def sampling(**values: Any) -> GenerateCall:
    return replace(CALL, sampling=SamplingWishes(**values))


def stopping(**values: Any) -> GenerateCall:
    return replace(CALL, stopping=StoppingWishes(**values))


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (sampling(temperature=math.nan), "temperature"),
        (sampling(temperature=-0.1), "temperature"),
        (sampling(temperature=math.inf), "temperature"),
        (sampling(temperature=2.1), "temperature"),
        (sampling(temperature=1e-9), "temperature"),
        (sampling(top_p=0.0), "top_p"),
        (sampling(top_p=1.1), "top_p"),
        (sampling(top_p=-1.0), "top_p"),
        (sampling(top_p=math.nan), "top_p"),
        (sampling(min_p=-0.1), "min_p"),
        (sampling(min_p=1.1), "min_p"),
        (sampling(min_p=math.nan), "min_p"),
        *((sampling(repetition_penalty=value), "repetition_penalty") for value in
          (0.0, -1.0, 0.09, 10.1, 1e38, math.inf, math.nan)),
        *((sampling(presence_penalty=value), "presence_penalty") for value in
          (-2.1, 2.1, math.inf, -math.inf, math.nan)),
        *((sampling(frequency_penalty=value), "frequency_penalty") for value in
          (-2.1, 2.1, math.inf, math.nan)),
        *((sampling(logit_bias=((1, 0.0), (5, value))), "logit_bias[5]") for value in
          (100.1, -100.1, -math.inf, math.nan)),
        (sampling(logit_bias=tuple((token, 1.0) for token in range(301))), "logit_bias"),
        (sampling(n=0), "n"),
        (sampling(n=17), "n"),
        (sampling(n=2**32 - 1), "n"),
        (stopping(max_tokens=0), "max_tokens"),
        (stopping(max_tokens=2**32 - 1), "max_tokens"),
        (stopping(stop=("",)), "stop[0]"),
        (stopping(stop=("ok", "x" * 257)), "stop[1]"),
        (stopping(stop=("x",) * 17), "stop"),
        (stopping(stop_token_ids=(1,) * 257), "stop_token_ids"),
        (replace(CALL, logprobs=21), "logprobs"),
    ],
)  # fmt: skip
def test_absurd_values_are_refused_by_name(call: GenerateCall, field: str) -> None:
    with pytest.raises(SamplingError, match="^" + re.escape(f"{field}: ")) as caught:
        check_call(call, LIMITS)
    assert caught.value.field == caught.value.metadata["field"] == field


@pytest.mark.parametrize(
    "call",
    [
        sampling(temperature=2.0),
        sampling(temperature=0.001),
        sampling(top_p=1e-6),
        sampling(min_p=1.0),
        sampling(repetition_penalty=0.1, presence_penalty=2.0, frequency_penalty=-2.0),
        sampling(repetition_penalty=10.0, logit_bias=((0, 100.0), (1, -100.0))),
        sampling(n=16),
        stopping(max_tokens=1, stop=("x" * 256,) * 16, stop_token_ids=(1,) * 256),
        replace(CALL, logprobs=20),
    ],
)
def test_values_at_the_limits_are_taken(call: GenerateCall) -> None:
    check_call(call, LIMITS)


def test_the_limits_are_settings() -> None:
    for call, limits in (
        (sampling(repetition_penalty=1.5), RouterConfig(max_repetition_penalty=1.4)),
        (sampling(presence_penalty=0.5), RouterConfig(max_penalty=0.4)),
        (sampling(logit_bias=((1, 3.0),)), RouterConfig(max_logit_bias=2.0)),
        (sampling(logit_bias=((1, 3.0),)), RouterConfig(max_logit_bias_tokens=0)),
        (sampling(n=2), RouterConfig(max_choices=1)),
    ):
        check_call(call, LIMITS)
        with pytest.raises(SamplingError):
            check_call(call, limits)


def test_a_prompt_needs_something_in_it() -> None:
    for empty in ("", (), Conversation([])):
        with pytest.raises(EmptyPromptError):
            check_call(replace(CALL, prompt=empty), LIMITS)


def test_too_many_messages_are_refused() -> None:
    turns = [{"role": "user", "content": "x"}] * 4097
    with pytest.raises(PromptError, match="4097") as caught:
        check_call(replace(CALL, prompt=Conversation(turns)), LIMITS)
    assert caught.value.metadata["field"] == "messages"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"resume_from": 1}, "resume_from"),
        ({"resume_from": 1, "resume_choices": (1, 1)}, "resume_from"),
        ({"resume_choices": (1,)}, "resume_choices"),
        ({"resume_choices": (1, 1, 1)}, "resume_choices"),
    ],
)
def test_resuming_has_to_say_where_each_choice_goes_on(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ResumeError) as caught:
        check_call(replace(sampling(n=2, seed=1), **changes), LIMITS)
    assert caught.value.metadata["field"] == field
