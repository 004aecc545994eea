"""Greedy float32 tokens equal the oracle's with a cached prefix and after pre-emption."""

from dataclasses import replace

import pytest

from support.engine import EXACT_CONFIG, Ask, EngineHarness


@pytest.fixture(scope="module")
def members(variants):
    base = variants.checkpoint("llama-gqa")
    return [
        base,
        variants.adapter(base, "all-linear"),
        variants.top_quarter(base),
        variants.checkpoint("mistral-window"),
    ]


@pytest.mark.parametrize("sharing", ["variant", "identical_chain"])
def test_with_a_cached_prefix(tmp_path, variants, members, sharing):
    with EngineHarness(tmp_path / "zoo", replace(EXACT_CONFIG, prefix_sharing=sharing)) as engine:
        for variant in members:
            chain = engine.load(variant)
            cases = variants.cases(variant, 8)
            for turn in range(2):
                before = engine.report().prefix_hit_tokens
                answers = engine.greedy(chain, [case.prompt for case in cases], len(cases[0].tokens))
                assert answers == [case.tokens for case in cases]
                hits = engine.report().prefix_hit_tokens - before
                assert (hits > 0) == (turn > 0)


def test_after_pre_emption(tmp_path, variants, members):
    """The pool holds some 300 tokens of the 8 requests' 700; everybody is pre-empted sooner or later."""
    shape_bytes = 2 * 3 * 14 * 4
    tight = replace(EXACT_CONFIG, kv_cache_bytes=4 * 300 * shape_bytes)
    with EngineHarness(tmp_path / "zoo", tight) as engine:
        asks, expected = [], []
        for variant in members:
            chain = engine.load(variant)
            for case in variants.cases(variant, 4):
                asks.append(Ask(chain, case.prompt, len(case.tokens)))
                expected.append(case.tokens)
        assert engine.run(asks) == expected
        report = engine.report()
        assert report.preemptions > 3
        assert report.kv_pages_used == 0
