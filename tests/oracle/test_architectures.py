"""The engine against transformers: every architecture and shape, chunked prompts, long contexts."""

import pytest
import torch

from blockserve.worker.limits import EngineConfig
from support.engine import Ask, EngineHarness
from support.memory import poisoned_memory
from support.models import CONTEXT_LENGTH, FURTHER, SPECS, load_model
from support.oracle import MANY_TOKENS, NUM_TOKENS, logits_error


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(
    "num_tokens",
    [NUM_TOKENS, pytest.param(MANY_TOKENS, marks=pytest.mark.long)],  # more of the same, half a minute
)
def test_checkpoint_equals_transformers(engine, variants, name, num_tokens):
    variant = variants.checkpoint(name)
    report = engine.check(variants, variant, num_tokens=num_tokens)
    engine.unload(engine.register(variant))
    assert report.is_equal, report
    assert report.num_prompts == 20


LONG_QUARTERS = {"phi3-partial", "gemma2-uncapped", *FURTHER} - {"gemma2", "phi3-window"}
"""What families share is for the zoo to say, not for them."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.long] if name in LONG_QUARTERS else []) for name in SPECS],
)
def test_top_quarter_tuned_equals_transformers(engine, variants, name):
    """A partly tuned copy runs beside its base, which it shares three quarters of the layers with."""
    base = variants.checkpoint(name)
    tuned = variants.top_quarter(base)
    chains = engine.load(base), engine.load(tuned)
    links = [engine.zoo.chain(chain).links for chain in chains]
    differing = [place for place, (old, new) in enumerate(zip(*links, strict=True)) if old != new]
    assert differing == [4]  # embedding, layers 0 to 3, head
    reports = [engine.check(variants, one, 4) for one in (base, tuned)]
    for chain in chains:
        engine.unload(chain)
    assert all(report.is_equal for report in reports), reports
    pairs = zip(variants.cases(base, 4), variants.cases(tuned, 4), strict=True)
    assert sum(a.tokens != b.tokens for a, b in pairs) >= 2


# max_running_requests, max_tokens_per_pass, kv_page_tokens
BATCHING = [(1, 1, 1), (3, 5, 3), (2, 63, 500), (36, 47, 7), (64, 512, 32), (8, 4096, 16)]
CHUNKED = ["llama-rope-llama3", "mistral-window", "qwen2", "qwen3", *FURTHER]
FULL = (63, 129, 300, CONTEXT_LENGTH - 16)
"""Long prompts, up to a context that is exactly full."""
BRIEF = {(1 + column % 5, column) for column in range(len(CHUNKED))}
"""Every size and every architecture outside test-long, where the other cells take two minutes."""
CASES = [
    # Single tokens up to a full context take a quarter of a minute.
    pytest.param(1, 1, 1, CHUNKED[1], (33, 70), id="single tokens"),
    *(
        pytest.param(*sizes, name, FULL, marks=[] if (row, column) in BRIEF else [pytest.mark.long])
        for row, sizes in enumerate(BATCHING)
        for column, name in enumerate(CHUNKED)
    ),
]


@pytest.mark.parametrize(("running", "tokens", "page", "name", "lengths"), CASES)
def test_chunks_and_pages_of_any_size_give_the_same(variants, tmp_path, name, running, tokens, page, lengths):
    """Prompts cut into chunks and pages at odd places."""
    variant = variants.checkpoint(name)
    asked = {"lengths": lengths, "num_tokens": 16, "seed": 3}
    config = EngineConfig(
        dtype="float32",
        num_threads=1,
        max_running_requests=running,
        max_tokens_per_pass=tokens,
        kv_page_tokens=page,
        kv_cache_bytes=8 << 20,
    )
    with poisoned_memory(), EngineHarness(tmp_path / "zoo", config) as engine:
        report = engine.check(variants, variant, 4, **asked)
    assert report.is_equal, report


@pytest.mark.parametrize("name", FURTHER)
def test_cached_prefixes_give_the_same(engine, variants, name):
    """Long prompts are answered as by transformers at first, and again over the pages that were kept."""
    variant = variants.checkpoint(name)
    chain, cases = engine.load(variant), variants.cases(variant, 4, lengths=(63, 129), num_tokens=16, seed=4)
    asks = [Ask(chain, case.prompt, len(case.tokens)) for case in cases]
    for _ in range(2):
        before = engine.report().prefix_hit_tokens
        assert engine.run(asks) == [case.tokens for case in cases]
    assert engine.report().prefix_hit_tokens >= before + 2 * (63 + 129 - 2 * 7)
    engine.unload(chain)


def test_a_pool_too_small_for_all_requests_gives_the_same(variants, tmp_path):
    """Requests wait for pages; pages that others left behind are used again."""
    variant = variants.checkpoint("llama-gqa")
    page_bytes = 2 * 8 * 3 * 14 * 4
    config = EngineConfig(
        dtype="float32", num_threads=1, kv_page_tokens=8, kv_cache_bytes=page_bytes * 4 * 40
    )
    with poisoned_memory(), EngineHarness(tmp_path / "zoo", config) as engine:
        chain = engine.load(variant)
        assert engine.report().kv_pages_total <= 4 * 40
        report = engine.compare(chain, variants.cases(variant))
        assert engine.report().kv_pages_used == 0
    assert report.is_equal, report


def test_half_precision_checkpoints_are_exact_by_default_on_the_cpu(variants, tmp_path):
    """With dtype "auto" float16 weights are computed in float32 there."""
    variant = variants.checkpoint("llama-fp16")
    with poisoned_memory(), EngineHarness(tmp_path / "zoo", EngineConfig(num_threads=1)) as engine:
        report = engine.compare(engine.load(variant), variants.cases(variant, 8))
    assert report.is_equal, report


@pytest.mark.parametrize(
    "name",
    [
        *("llama-bf16-sharded", "qwen3-tied-bf16"),
        *(one for one in FURTHER if SPECS[one].dtype == torch.bfloat16),
    ],
)
def test_bfloat16_stays_near_transformers(variants, tmp_path, name):
    """With dtype "auto" bfloat16 weights are computed in bfloat16: near the float32 oracle, not equal to it.

    The bar is what transformers itself loses to bfloat16 on the same prompts, doubled for other rounding.
    """
    variant = variants.checkpoint(name)
    cases = variants.cases(variant, 8)
    model = load_model(variant.path).to(torch.bfloat16)
    with torch.inference_mode():
        theirs = [model(input_ids=torch.tensor([one.prompt + one.tokens])).logits[0].float() for one in cases]
    bar = 2 * max(logits_error(rows, one.logits) for rows, one in zip(theirs, cases, strict=True))
    with poisoned_memory(), EngineHarness(tmp_path / "zoo", EngineConfig(num_threads=1)) as engine:
        chain = engine.load(variant)
        ours = engine.logits(chain, [one.prompt + one.tokens for one in cases])
    errors = [logits_error(rows, one.logits) for rows, one in zip(ours, cases, strict=True)]
    assert 1e-4 < max(errors) < bar < 0.5
