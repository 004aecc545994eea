"""Penalties, bias, least lengths and choices of the engine against transformers and plain Python."""

import math
from dataclasses import replace

import pytest
import torch

from blockkernels.sampling import uniform
from blockkernels.sampling.reference import draw, probabilities
from blockserve.common.api.engine import EngineRequest, SamplingParams
from support.engine import GREEDY, Ask

NUM_TOKENS = 24
TOLERANCE = 1e-4


def plain_edit(row, prompt, output, params):
    """The definition, a token of the vocabulary at a time: vLLM's words in plain Python."""
    edited = []
    bias = dict(params.logit_bias)
    for token, value in enumerate(row):
        value += bias.get(token, 0.0)
        if token in prompt or token in output:
            value = value * params.repetition_penalty if value < 0 else value / params.repetition_penalty
        value -= params.frequency_penalty * output.count(token)
        value -= params.presence_penalty * (token in output)
        edited.append(value)
    return edited


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_greedy_with_repetition_penalty_equals_transformers_generate(engine, variants, penalty):
    variant = variants.checkpoint("llama-gqa")
    oracle, chain = variants.oracle(variant), engine.load(variant)
    prompts = [case.prompt for case in variants.cases(variant, 4)]
    params = replace(GREEDY, repetition_penalty=penalty)
    answers = engine.run([Ask(chain, prompt, NUM_TOKENS, params) for prompt in prompts])
    expected = [
        oracle.generate(prompt, NUM_TOKENS, repetition_penalty=penalty, eos_token_id=None)
        for prompt in prompts
    ]
    assert answers == expected
    assert answers != engine.greedy(chain, prompts, NUM_TOKENS)


def test_least_length_equals_transformers_generate(engine, variants):
    """The end token is one that the model would choose early."""
    variant = variants.checkpoint("llama-gqa")
    oracle, chain = variants.oracle(variant), engine.load(variant)
    for case in variants.cases(variant, 4):
        end = case.tokens[1]
        request = EngineRequest(
            "long", chain, case.prompt, GREEDY, NUM_TOKENS, frozenset({end}),
            min_tokens=12, held_token_ids=frozenset({end}),
        )  # fmt: skip
        answer = tuple(event.token_id for event in engine.events(request))
        assert answer == oracle.generate(case.prompt, NUM_TOKENS, min_new_tokens=12, eos_token_id=end)
        assert len(answer) >= 12
        assert end not in answer[:12]


EDITED = [
    SamplingParams(temperature=0.0, presence_penalty=1.5),
    SamplingParams(temperature=0.0, frequency_penalty=0.7),
    SamplingParams(temperature=0.0, frequency_penalty=-0.4, presence_penalty=-1.0),
    SamplingParams(
        temperature=0.0,
        repetition_penalty=1.2,
        presence_penalty=0.3,
        frequency_penalty=0.2,
        logit_bias=((7, 3.0), (40, -100.0)),
    ),
]


@pytest.mark.parametrize("params", EDITED, ids=str)
def test_greedy_with_penalties_is_the_best_of_the_edited_logits(engine, variants, params):
    variant = variants.checkpoint("qwen3-tied-bf16")
    oracle, chain = variants.oracle(variant), engine.load(variant)
    prompts = [case.prompt for case in variants.cases(variant, 4)]
    answers = engine.run([Ask(chain, prompt, NUM_TOKENS, params) for prompt in prompts])
    for prompt, answer in zip(prompts, answers, strict=True):
        (logits,) = oracle.logits([prompt + answer])
        scale = float(logits.abs().max())
        for place, token in enumerate(answer):
            edited = plain_edit(logits[len(prompt) - 1 + place].tolist(), prompt, answer[:place], params)
            assert edited[token] >= max(edited) - TOLERANCE * scale
    assert answers != engine.greedy(chain, prompts, NUM_TOKENS)


def test_sampling_with_everything_is_the_draw_from_the_edited_distribution(engine, variants):
    variant = variants.checkpoint("llama-gqa")
    oracle, chain = variants.oracle(variant), engine.load(variant)
    params = SamplingParams(
        0.9, 100, 0.9, 0.02, seed=5, choice=3, repetition_penalty=1.1, presence_penalty=0.4,
        frequency_penalty=0.3, logit_bias=((11, 4.0),),
    )  # fmt: skip
    prompts = [case.prompt for case in variants.cases(variant, 4)]
    for prompt, answer in zip(prompts, engine.run([Ask(chain, p, 24, params) for p in prompts]), strict=True):
        (logits,) = oracle.logits([prompt + answer])
        for place, token in enumerate(answer):
            edited = plain_edit(logits[len(prompt) - 1 + place].tolist(), prompt, answer[:place], params)
            share = probabilities(edited, temperature=0.9, top_k=100, top_p=0.9, min_p=0.02)
            noise = uniform(5, 3, place)
            assert token in {draw(share, noise + shift) for shift in (-1e-4, 0.0, 1e-4)}


def test_a_mixed_batch_gives_each_request_what_it_gets_alone(engine, variants):
    chain = engine.load(variants.checkpoint("llama-gqa"))
    kinds = [GREEDY, *EDITED, SamplingParams(seed=9), SamplingParams(seed=9, choice=1, frequency_penalty=1.0)]
    asks = [Ask(chain, (place + 3, 8, 8, 1), NUM_TOKENS, params) for place, params in enumerate(kinds * 3)]
    together = engine.run(asks)
    assert together == [engine.run([ask])[0] for ask in asks]


def test_choices_differ_and_each_can_be_had_again(engine, variants):
    chain = engine.load(variants.checkpoint("llama-gqa"))
    asks = [Ask(chain, (4, 5, 6), 16, SamplingParams(seed=77, choice=choice)) for choice in range(6)]
    answers = engine.run(asks)
    assert len(set(answers)) == 6
    assert engine.run(asks[3:4]) == answers[3:4]


def test_logprobs_are_those_of_the_unmodified_logits(engine, variants):
    variant = variants.checkpoint("llama-gqa")
    oracle, chain = variants.oracle(variant), engine.load(variant)
    prompt = tuple(range(2, 42))
    params = SamplingParams(
        0.7, 30, seed=1, repetition_penalty=1.4, frequency_penalty=1.0, logit_bias=((9, 6.0), (10, -100.0))
    )
    request = EngineRequest(
        "told", chain, prompt, params, 30, logprobs=6, prompt_logprobs=True,
        min_tokens=20, held_token_ids=frozenset(range(100, 200)),
    )  # fmt: skip
    events = engine.events(request)
    answer = tuple(event.token_id for event in events)
    assert not set(answer[:20]) & set(range(100, 200))
    expected = oracle.logits([prompt + answer])[0].to(torch.float64).log_softmax(-1)
    told = [*events[0].prompt_logprobs, *(event.logprobs for event in events)]
    assert [one.token_id for one in told] == [*prompt[1:], *answer]
    for row, one in enumerate(told):
        assert one.logprob == pytest.approx(expected[row, one.token_id].item(), abs=1e-4)
        best = expected[row].topk(6)
        assert [token for token, _ in one.top] == best.indices.tolist()
        assert [value for _, value in one.top] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert all(math.isfinite(value) for _, value in one.top)
