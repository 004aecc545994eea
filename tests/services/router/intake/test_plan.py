"""Checked and resolved requests: defaults in the right order, and every absurd value named."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from typing import Any

import pytest

from blockserve.common.api.calls import GenerateCall, SamplingWishes, StoppingWishes
from blockserve.common.errors import (
    EmptyPromptError,
    PromptError,
    PromptTooLongError,
    ResumeError,
    SamplingError,
)
from blockserve.router.intake.catalog import ServedVariant, VariantCatalog
from blockserve.router.intake.checks import check_call
from blockserve.router.intake.plan import Plan, plan
from blockserve.router.limits import RouterConfig
from support.edge import FakeZoo, byte_level_tokenizer, variant_files

LIMITS = RouterConfig()
VOCAB = byte_level_tokenizer().get_vocab_size()
EOS = byte_level_tokenizer().token_to_id("</s>")
CALL = GenerateCall("id", "tale", "hello")


def variant(**generation: Any) -> ServedVariant:
    zoo = FakeZoo(context_length=100)
    config = json.dumps({"eos_token_id": EOS, **generation}).encode()
    zoo.add("tale", files=variant_files(generation_config_json=config))
    return VariantCatalog(zoo).get_blocking("tale")


def planned(
    call: GenerateCall = CALL,
    prompt: tuple[int, ...] = (1, 2, 3),
    limits: RouterConfig = LIMITS,
    **generation: Any,
) -> Plan:
    check_call(call, limits)
    return plan(call, variant(**generation), prompt, limits, engine_id="id#1", deadline=5.0)


def sampling(**values: Any) -> GenerateCall:
    return replace(CALL, sampling=SamplingWishes(**values))


def stopping(**values: Any) -> GenerateCall:
    return replace(CALL, stopping=StoppingWishes(**values))


def test_a_call_that_says_nothing_gets_the_documented_values() -> None:
    request = planned().request
    params = request.sampling
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (1.0, 0, 1.0, 0.0)
    assert request.max_tokens == 97
    assert request.stop_token_ids == {EOS}
    assert (request.logprobs, request.prompt_logprobs, request.deadline) == (None, False, 5.0)
    assert (request.request_id, request.prompt) == ("id#1", (1, 2, 3))


def test_the_variants_defaults_come_before_ours_and_after_the_callers() -> None:
    generation = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.9, "min_p": 0.1}
    params = planned(**generation).request.sampling
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (0.6, 20, 0.9, 0.1)
    params = planned(sampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0), **generation).request.sampling
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (0.0, 0, 1.0, 0.0)
    assert params.is_greedy


def test_unset_seeds_differ_and_a_set_one_is_kept() -> None:
    drawn = {planned().request.sampling.seed for _ in range(20)}
    assert len(drawn) == 20
    assert all(0 <= seed < 2**64 for seed in drawn)
    assert planned(sampling(seed=2**64 - 1)).request.sampling.seed == 2**64 - 1


def test_stop_tokens_are_the_callers_and_the_variants() -> None:
    assert planned(stopping(stop_token_ids=(5, 6))).request.stop_token_ids == {5, 6, EOS}
    assert planned(stopping(stop_token_ids=(5,), ignore_eos=True)).request.stop_token_ids == {5}


def test_max_tokens_ends_at_the_context() -> None:
    assert planned(stopping(max_tokens=7)).request.max_tokens == 7
    assert planned(stopping(max_tokens=100)).request.max_tokens == 97
    limits = RouterConfig(max_output_tokens=10)
    assert plan(CALL, variant(), (1,), limits, engine_id="x").request.max_tokens == 10


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (sampling(top_k=VOCAB + 1), "top_k"),
        (sampling(logit_bias=((VOCAB, 1.0),)), f"logit_bias[{VOCAB}]"),
        (sampling(n=2, temperature=0.0), "n"),
        (stopping(max_tokens=101), "max_tokens"),
        (stopping(stop_token_ids=(1, VOCAB)), "stop_token_ids[1]"),
        (stopping(min_tokens=8, max_tokens=7), "min_tokens"),
        (stopping(min_tokens=98), "min_tokens"),
        (stopping(min_tokens=2**32 - 1), "min_tokens"),
    ],
)
def test_values_that_do_not_fit_the_variant_are_refused_by_name(call: GenerateCall, field: str) -> None:
    with pytest.raises(SamplingError, match="^" + re.escape(f"{field}: ")) as caught:
        planned(call)
    assert caught.value.field == caught.value.metadata["field"] == field


@pytest.mark.parametrize(
    "call",
    [
        sampling(temperature=2.0),
        sampling(temperature=0.001),
        sampling(top_k=VOCAB),
        sampling(top_p=1e-6),
        sampling(min_p=1.0),
        stopping(max_tokens=1, stop=("x" * 256,) * 16, stop_token_ids=(VOCAB - 1,)),
        replace(CALL, logprobs=20),
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


def test_a_prompt_needs_tokens() -> None:
    with pytest.raises(EmptyPromptError):
        planned(prompt=())


def test_a_prompt_has_to_leave_room_for_one_token() -> None:
    assert planned(prompt=(1,) * 99).request.max_tokens == 1
    with pytest.raises(PromptTooLongError) as caught:
        planned(prompt=(1,) * 100)
    assert caught.value.metadata["prompt_tokens"] == "100"
    assert caught.value.metadata["context_length"] == "100"
    assert "99" in caught.value.hint


def test_prompt_tokens_outside_the_vocabulary_are_found() -> None:
    call = replace(CALL, prompt=(1, VOCAB, 3))
    with pytest.raises(PromptError, match=r"^token_ids\[1\]: "):
        planned(call, prompt=(1, VOCAB, 3))
    assert planned(call, prompt=(1, VOCAB - 1)).request.prompt == (1, VOCAB - 1)


def test_resuming_needs_the_seed_unless_greedy() -> None:
    resumed = replace(CALL, resume_from=3)
    with pytest.raises(ResumeError) as caught:
        planned(resumed)
    assert caught.value.metadata["field"] == "seed"
    planned(replace(resumed, sampling=SamplingWishes(seed=1)))
    planned(replace(resumed, sampling=SamplingWishes(temperature=0.0)))
    planned(resumed, do_sample=False)


def test_resuming_behind_the_end_is_refused() -> None:
    call = replace(stopping(max_tokens=5), sampling=SamplingWishes(seed=1))
    planned(replace(call, resume_from=5))
    with pytest.raises(ResumeError):
        planned(replace(call, resume_from=6))


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


def test_end_and_stop_tokens_are_held_back_while_the_answer_is_short() -> None:
    request = planned(stopping(min_tokens=5, stop_token_ids=(4,))).request
    assert (request.min_tokens, request.held_token_ids) == (5, {4, EOS})
    request = planned(stopping(min_tokens=5, stop_token_ids=(4,), ignore_eos=True)).request
    assert request.held_token_ids == {4, EOS}
    assert request.stop_token_ids == {4}


def test_a_least_length_has_to_leave_a_token_to_choose() -> None:
    limits = RouterConfig(max_stop_token_ids=VOCAB)
    every = tuple(range(VOCAB))
    planned(stopping(stop_token_ids=every), limits=limits)
    with pytest.raises(SamplingError) as caught:
        planned(stopping(stop_token_ids=every, min_tokens=1), limits=limits)
    assert caught.value.field == "min_tokens"


def test_no_choice_is_resumed_behind_its_end() -> None:
    with pytest.raises(ResumeError) as caught:
        planned(replace(sampling(n=2, seed=1), resume_choices=(1, 98)))
    assert caught.value.metadata["field"] == "resume_choices"


def test_resuming_choices_needs_the_seed() -> None:
    planned(replace(sampling(n=2, seed=1), resume_choices=(0, 97)))
    planned(replace(sampling(n=2), resume_choices=(0, 0)))
    with pytest.raises(ResumeError, match="seed"):
        planned(replace(sampling(n=2), resume_choices=(0, 1)))


def test_lengths_of_the_variant_are_for_callers_who_say_nothing() -> None:
    assert planned(max_new_tokens=7).request.max_tokens == 7
    assert planned(max_length=7).request.max_tokens == 4
    assert planned(max_length=2).request.max_tokens == 1
    assert planned(max_length=50, max_new_tokens=60).request.max_tokens == 60
    assert planned(max_new_tokens=1000).request.max_tokens == 97
    assert planned(stopping(max_tokens=9), max_new_tokens=7).request.max_tokens == 9
    assert planned(limits=RouterConfig(max_output_tokens=5), max_new_tokens=7).request.max_tokens == 5


def test_least_lengths_of_the_variant_hold_its_end_tokens_back() -> None:
    request = planned(min_new_tokens=3).request
    assert (request.min_tokens, request.held_token_ids) == (3, {EOS})
    assert planned(min_length=5).request.min_tokens == 2
    assert planned(min_length=2).request.min_tokens == 0
    assert planned(stopping(min_tokens=1), min_new_tokens=3).request.min_tokens == 1
    assert planned(stopping(max_tokens=2), min_new_tokens=3).request.min_tokens == 2


def test_stop_strings_of_the_variant_give_way_to_the_callers() -> None:
    assert planned(stop_strings=["###"]).call.stopping.stop == ("###",)
    assert planned(stop_strings="###").call.stopping.stop == ("###",)
    assert planned(stopping(stop=("x",)), stop_strings=["###"]).call.stopping.stop == ("x",)


def test_tokens_that_the_variant_forbids_stay_forbidden() -> None:
    params = planned(
        sampling(logit_bias=((4, 100.0), (5, 1.0))), suppress_tokens=[4], sequence_bias=[[[5], 2.0]]
    ).request.sampling
    assert params.logit_bias == ((4, -math.inf), (5, 3.0))
    params = planned(bad_words_ids=[[4, 5], [6], [EOS]], begin_suppress_tokens=[7, 7]).request.sampling
    assert params.logit_bias == ((6, -math.inf),)
    assert params.sequence_bias == (((4, 5), -math.inf),)
    assert params.begin_suppress == (7,)


def test_something_must_be_left_to_choose_while_end_tokens_are_held_back() -> None:
    others = [token for token in range(VOCAB) if token != EOS]
    with pytest.raises(SamplingError, match="vocabulary"):
        planned(suppress_tokens=others, min_new_tokens=2)
