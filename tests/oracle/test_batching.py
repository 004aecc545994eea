"""The same float32 request gives the same tokens alone, in company, and after its blocks were away."""

import random
from dataclasses import replace

import pytest

from blockserve.common.api.engine import EngineRequest, SamplingParams
from support.engine import GREEDY, Ask

SAMPLED = SamplingParams(temperature=0.9, top_k=50, top_p=0.95, min_p=0.01, seed=7)


@pytest.fixture(scope="module")
def family(engine, variants):
    """Variants that share blocks in every way, and one stranger; all loaded: variant -> chain."""
    base = variants.checkpoint("llama-gqa")
    tuned = variants.top_quarter(base)
    members = [
        base,
        *(
            variants.adapter(base, name)
            for name in ("all-linear", "q-v", "patterns", "lm-head", "saved-lm-head")
        ),
        variants.adapter(base, "all-linear", seed=2),
        tuned,
        variants.top_quarter(base, seed=2),
        variants.adapter(tuned, "q-v"),
        variants.checkpoint("qwen3"),
        variants.checkpoint("mistral"),
    ]
    return {variant: engine.load(variant) for variant in members}


def make_asks(family, count=33, seed=0):
    """Requests of all variants, of odd lengths, greedy and sampled in turn."""
    rng = random.Random(seed)
    chains = list(family.values())
    return [
        Ask(
            chain=chains[index % len(chains)],
            prompt=tuple(rng.randrange(501) for _ in range(rng.choice([1, 2, 9, 33, 70, 130]))),
            num_tokens=rng.choice([7, 13, 24]),
            sampling=GREEDY if index % 3 else replace(SAMPLED, seed=index),
        )
        for index in range(count)
    ]


# Twelve are one of each variant, a third of them sampled; the others say the same of them, in ten seconds.
@pytest.mark.parametrize("count", [12, pytest.param(33, marks=pytest.mark.long)])
def test_alone_and_among_32_others(engine, family, count):
    asks = make_asks(family)
    together = engine.run(asks)
    alone = [engine.run([ask])[0] for ask in asks[:count]]
    assert together[:count] == alone


def test_order_of_arrival_changes_nothing(engine, family):
    asks = make_asks(family, seed=1)
    answers = engine.run(asks)
    order = list(range(len(asks)))
    random.Random(2).shuffle(order)
    shuffled = engine.run([asks[place] for place in order])
    assert [answers[place] for place in order] == shuffled


def test_in_company_equals_the_oracle(engine, variants, family):
    """Sixteen questions to every variant at once, each answered as transformers and PEFT answer it alone."""
    asks, expected = [], []
    for variant, chain in family.items():
        for case in variants.cases(variant, 4):
            asks.append(Ask(chain, case.prompt, len(case.tokens)))
            expected.append(case.tokens)
    assert engine.run(asks) == expected


def test_variants_really_met_in_one_batch(engine, family):
    engine.run(make_asks(family))
    shared = [one for one in engine.report().segments if one.num_chains > 5]
    assert shared
    assert max(one.largest_batch_chains for one in shared) > 5
    assert all(one.mixed_calls > 0 for one in shared)


def test_after_unload_and_load(engine, variants, family):
    asks = make_asks(family, seed=3)
    before = engine.run(asks)
    for chain in family.values():
        engine.unload(chain)
    report = engine.report()
    assert (report.chains, report.block_bytes, report.kv_pages_used) == ((), 0, 0)
    for variant in reversed(list(family)):
        engine.load(variant)
    assert engine.run(asks) == before


# Each of 24 runs begins with the prompt, in every segment; more tokens take ten seconds and add nothing.
@pytest.mark.parametrize("num_tokens", [10, pytest.param(40, marks=pytest.mark.long)])
def test_while_a_sibling_comes_and_goes(engine, variants, family, num_tokens):
    """Loading and unloading others between runs (segments split and join) leaves a request's tokens alone."""
    base = variants.checkpoint("llama-gqa")
    ask = Ask(family[base], (3, 1, 4, 1, 5), num_tokens, SAMPLED)
    before = engine.run([ask])
    for variant in [one for one in family if one != base]:
        engine.unload(family[variant])
        assert engine.run([ask]) == before
    for variant in family:
        engine.load(variant)
        assert engine.run([ask]) == before


def test_cancelled_neighbours_change_nothing(engine, family):
    asks = make_asks(family, count=12, seed=4)
    before = engine.run(asks)
    kept = asks[::2]

    async def run_with_deserters():
        import asyncio

        async def desert(index, ask):
            request = EngineRequest(f"leaves-{index}", ask.chain, ask.prompt, ask.sampling, ask.num_tokens)
            stream = engine.engine.generate(request)
            async for _ in stream:
                break
            await stream.aclose()

        others = [asyncio.create_task(desert(i, ask)) for i, ask in enumerate(asks[1::2])]
        answers = await engine._run(kept)
        await asyncio.gather(*others)
        return answers

    assert engine._loop.run_until_complete(run_with_deserters()) == before[::2]
    assert engine.report().kv_pages_used == 0
