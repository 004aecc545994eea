"""Bias, penalties, least lengths and choices: resolved in the right order, absurd values named."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from blockserve.common.api.calls import GenerateCall, SamplingWishes, StoppingWishes
from blockserve.common.errors import ResumeError, SamplingError
from blockserve.router.intake.catalog import VariantCatalog
from blockserve.router.intake.checks import check_call
from blockserve.router.intake.plan import Plan, plan
from blockserve.router.limits import RouterConfig
from support.edge import FakeZoo, byte_level_tokenizer, variant_files

LIMITS = RouterConfig()
VOCAB = byte_level_tokenizer().get_vocab_size()
EOS = byte_level_tokenizer().token_to_id("</s>")
CALL = GenerateCall("id", "tale", "hello")


def planned(call: GenerateCall, limits: RouterConfig = LIMITS, **generation: Any) -> Plan:
    zoo = FakeZoo(context_length=100)
    config = json.dumps({"eos_token_id": EOS, **generation}).encode()
    zoo.add("tale", files=variant_files(generation_config_json=config))
    check_call(call, limits)
    return plan(call, VariantCatalog(zoo).get_blocking("tale"), (1, 2, 3), limits, engine_id="id#1")


def sampling(**values: Any) -> GenerateCall:
    return replace(CALL, sampling=SamplingWishes(**values))


def stopping(**values: Any) -> GenerateCall:
    return replace(CALL, stopping=StoppingWishes(**values))


def test_a_call_that_says_nothing_edits_nothing() -> None:
    request = planned(CALL).request
    assert not request.sampling.has_penalties
    assert (request.sampling.logit_bias, request.min_tokens, request.held_token_ids) == ((), 0, frozenset())


def test_values_reach_the_engine() -> None:
    bias = ((3, -1.5), (VOCAB - 1, 100.0))
    params = planned(
        sampling(repetition_penalty=1.2, presence_penalty=-2.0, frequency_penalty=0.5, logit_bias=bias)
    ).request.sampling
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.2, -2.0, 0.5)
    assert params.logit_bias == bias


@pytest.mark.parametrize("mode", [{}, {"do_sample": True}, {"do_sample": False}])
def test_the_variants_repetition_penalty_is_a_default_for_greedy_too(mode: dict[str, bool]) -> None:
    generation = {"repetition_penalty": 1.05, **mode}
    assert planned(CALL, **generation).request.sampling.repetition_penalty == 1.05
    asked = planned(sampling(repetition_penalty=1.0), **generation)
    assert asked.request.sampling.repetition_penalty == 1.0


@pytest.mark.parametrize("value", [0, -1.0, 1e-9, 1e9, "much", True])
def test_a_senseless_penalty_in_the_file_is_ignored(value: object) -> None:
    assert planned(CALL, repetition_penalty=value).request.sampling.repetition_penalty == 1.0


@pytest.mark.parametrize(
    ("call", "field"),
    [
        *((sampling(repetition_penalty=value), "sampling.repetition_penalty") for value in
          (0.0, -1.0, 0.09, 10.1, 1e38, math.inf, math.nan)),
        *((sampling(presence_penalty=value), "sampling.presence_penalty") for value in
          (-2.1, 2.1, math.inf, -math.inf, math.nan)),
        *((sampling(frequency_penalty=value), "sampling.frequency_penalty") for value in
          (-2.1, 2.1, math.inf, math.nan)),
        *((sampling(logit_bias=((1, 0.0), (5, value))), "sampling.logit_bias[5]") for value in
          (100.1, -100.1, -math.inf, math.nan)),
        (sampling(logit_bias=((VOCAB, 1.0),)), f"sampling.logit_bias[{VOCAB}]"),
        (sampling(logit_bias=tuple((token, 1.0) for token in range(301))), "sampling.logit_bias"),
        (sampling(n=0), "sampling.n"),
        (sampling(n=17), "sampling.n"),
        (sampling(n=2**32 - 1), "sampling.n"),
        (sampling(n=2, temperature=0.0), "sampling.n"),
        (stopping(min_tokens=8, max_tokens=7), "stopping.min_tokens"),
        (stopping(min_tokens=98), "stopping.min_tokens"),
        (stopping(min_tokens=2**32 - 1), "stopping.min_tokens"),
    ],
)  # fmt: skip
def test_absurd_values_are_refused_by_name(call: GenerateCall, field: str) -> None:
    with pytest.raises(SamplingError) as caught:
        planned(call)
    assert caught.value.field == field


@pytest.mark.parametrize(
    "call",
    [
        sampling(repetition_penalty=0.1, presence_penalty=2.0, frequency_penalty=-2.0),
        sampling(repetition_penalty=10.0, logit_bias=((0, 100.0), (1, -100.0))),
        sampling(n=16),
        sampling(n=1, temperature=0.0),
        stopping(min_tokens=97),
        stopping(min_tokens=7, max_tokens=7),
    ],
)
def test_values_at_the_limits_are_taken(call: GenerateCall) -> None:
    planned(call)


def test_the_limits_are_settings() -> None:
    for call, limits in (
        (sampling(repetition_penalty=1.5), RouterConfig(max_repetition_penalty=1.4)),
        (sampling(presence_penalty=0.5), RouterConfig(max_penalty=0.4)),
        (sampling(logit_bias=((1, 3.0),)), RouterConfig(max_logit_bias=2.0)),
        (sampling(logit_bias=((1, 3.0),)), RouterConfig(max_logit_bias_tokens=0)),
        (sampling(n=2), RouterConfig(max_choices=1)),
    ):
        planned(call)
        with pytest.raises(SamplingError):
            planned(call, limits)


def test_end_and_stop_tokens_are_held_back_while_the_answer_is_short() -> None:
    request = planned(stopping(min_tokens=5, stop_token_ids=(4,))).request
    assert (request.min_tokens, request.held_token_ids) == (5, {4, EOS})
    request = planned(stopping(min_tokens=5, stop_token_ids=(4,), ignore_eos=True)).request
    assert request.held_token_ids == {4, EOS}
    assert request.stop_token_ids == {4}


def test_a_least_length_has_to_leave_a_token_to_choose() -> None:
    limits = RouterConfig(max_stop_token_ids=VOCAB)
    every = tuple(range(VOCAB))
    planned(stopping(stop_token_ids=every), limits)
    with pytest.raises(SamplingError) as caught:
        planned(stopping(stop_token_ids=every, min_tokens=1), limits)
    assert caught.value.field == "stopping.min_tokens"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"resume_from": 1}, "resume_from"),
        ({"resume_from": 1, "resume_choices": (1, 1)}, "resume_from"),
        ({"resume_choices": (1,)}, "resume_choices"),
        ({"resume_choices": (1, 1, 1)}, "resume_choices"),
        ({"resume_choices": (1, 98)}, "resume_choices"),
    ],
)
def test_resuming_has_to_say_where_each_choice_goes_on(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ResumeError) as caught:
        planned(replace(sampling(n=2, seed=1), **changes))
    assert caught.value.metadata["field"] == field


def test_resuming_choices_needs_the_seed() -> None:
    planned(replace(sampling(n=2, seed=1), resume_choices=(0, 97)))
    planned(replace(sampling(n=2), resume_choices=(0, 0)))
    with pytest.raises(ResumeError, match="seed"):
        planned(replace(sampling(n=2), resume_choices=(0, 1)))
