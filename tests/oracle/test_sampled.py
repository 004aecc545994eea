"""Sampled answers and log-probabilities of the engine against transformers' distributions."""

import math

import pytest
import torch

from blockkernels.sampling import SamplingBatch, uniform
from blockkernels.sampling.reference import draw
from blockserve.common.api.engine import EngineRequest, SamplingParams
from support.engine import GREEDY, Ask

PARAMS = [
    SamplingParams(temperature=1.0, seed=1),
    SamplingParams(temperature=0.6, top_k=20, seed=2**64 - 1),
    SamplingParams(temperature=1.4, top_p=0.8, seed=3),
    SamplingParams(temperature=1.2, min_p=0.1, seed=4),
    SamplingParams(temperature=0.9, top_k=100, top_p=0.9, min_p=0.02, seed=5),
]


def filters(params):
    return {name: getattr(params, name) for name in ("temperature", "top_k", "top_p", "min_p")}


@pytest.mark.parametrize("name", ["llama-gqa", "qwen3-tied-bf16"])
@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_every_token_is_the_draw_from_transformers_distribution(engine, variants, name, params):
    """Noise is known from (seed, choice, position), so each sampled token can be told in advance."""
    variant = variants.checkpoint(name)
    oracle, chain = variants.oracle(variant), engine.load(variant)
    prompts = [case.prompt for case in variants.cases(variant, 4)]
    answers = engine.run([Ask(chain, prompt, 24, params) for prompt in prompts])
    for prompt, answer in zip(prompts, answers, strict=True):
        shares = oracle.distributions(prompt, answer, **filters(params)).tolist()
        for position, (token, probability) in enumerate(zip(answer, shares, strict=True)):
            noise = uniform(params.seed, 0, position)
            # Logits differ by rounding, so a draw at the very border of two tokens may fall on either side.
            assert token in {draw(probability, noise + shift) for shift in (-1e-4, 0.0, 1e-4)}
            assert probability[token] > 0


def test_many_seeds_follow_transformers_distribution(engine, variants):
    """Chi-square over 1500 requests that differ in their seed only."""
    variant, count = variants.checkpoint("llama-gqa"), 1500
    chain, prompt = engine.load(variant), (11, 22, 33)
    params = SamplingParams(temperature=0.8, top_k=12, top_p=0.98)
    asks = [
        Ask(chain, prompt, 1, SamplingParams(**{**filters(params), "seed": seed}))
        for seed in range(1000, 1000 + count)
    ]
    answers = [token for batch in range(0, count, 500) for (token,) in engine.run(asks[batch : batch + 500])]
    expected = variants.oracle(variant).distribution(prompt, **filters(params)) * count
    drawn = torch.bincount(torch.tensor(answers), minlength=501).to(torch.float64)
    support = expected > 0
    assert (drawn[~support] == 0).all()
    assert 4 <= int(support.sum()) <= 12
    cells = expected >= 5
    statistic = ((drawn[cells] - expected[cells]) ** 2 / expected[cells]).sum().item()
    freedom = int(cells.sum())
    # Wilson and Hilferty's approximation of the value exceeded with probability 1e-6.
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 4.753 * math.sqrt(2 / (9 * freedom))) ** 3


def test_logprobs_equal_transformers(engine, variants):
    variant = variants.checkpoint("llama-gqa")
    oracle, chain = variants.oracle(variant), engine.load(variant)
    prompt = tuple(range(2, 72))
    request = EngineRequest("logprobs", chain, prompt, PARAMS[1], 30, logprobs=5, prompt_logprobs=True)
    events = engine.events(request)
    answer = tuple(event.token_id for event in events)
    expected = oracle.logits([prompt + answer])[0].to(torch.float64).log_softmax(-1)
    told = [*events[0].prompt_logprobs, *(event.logprobs for event in events)]
    assert [one.token_id for one in told] == [*prompt[1:], *answer]
    for row, one in enumerate(told):
        assert one.logprob == pytest.approx(expected[row, one.token_id].item(), abs=1e-4)
        best = expected[row].topk(5)
        assert [token for token, _ in one.top] == best.indices.tolist()
        assert [value for _, value in one.top] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert all(event.prompt_logprobs is None for event in events[1:])


def test_logprobs_of_the_answer_alone_need_no_prompt_logprobs(engine, variants):
    chain = engine.load(variants.checkpoint("llama-gqa"))
    events = engine.events(EngineRequest("few", chain, (1, 2, 3), GREEDY, 4, logprobs=0))
    assert [event.logprobs.token_id for event in events] == [event.token_id for event in events]
    assert all(event.logprobs.top == () and event.prompt_logprobs is None for event in events)


def test_stop_token_is_reported_and_ends_the_request(engine, variants):
    variant = variants.checkpoint("llama-gqa")
    case = variants.cases(variant, 4)[1]
    stop = case.tokens[20]
    first = case.tokens.index(stop)
    request = EngineRequest(
        "stops", engine.load(variant), case.prompt, GREEDY, len(case.tokens), frozenset({stop, 600})
    )
    events = engine.events(request)
    assert tuple(event.token_id for event in events) == case.tokens[: first + 1]
    assert [event.finish for event in events] == [None] * first + ["stop"]


def test_positions_of_the_noise_are_output_indices(engine, variants):
    """Going on from a part of the answer with the same seed needs the noise of the right positions."""
    chain = engine.load(variants.checkpoint("llama-gqa"))
    (answer,) = engine.run([Ask(chain, (9, 8, 7), 12, PARAMS[0])])
    batch = SamplingBatch([1.0], [0], [1.0], [0.0], [PARAMS[0].seed], [0], [5])
    row = engine.logits(chain, [(9, 8, 7, *answer[:5])])[0][-1:]
    from blockkernels.sampling import sample

    assert sample(row, batch).tolist() == [answer[5]]
