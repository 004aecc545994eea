"""The engine against PEFT: every form of LoRA, on tied and untied, biased and normed checkpoints."""

import pytest

from support.adapters import ADAPTERS, FURTHER_METHODS, FUSED, MATTER_UNTIED, AdapterSpec
from support.engine import Ask
from support.models import FURTHER
from support.oracle import LOGITS_TOLERANCE, MANY_TOKENS, NUM_PROMPTS, NUM_TOKENS, logits_error

BASES = ["llama-gqa", "llama-gqa-tied"]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize(
    ("count", "num_tokens"),
    [
        (8, NUM_TOKENS),
        pytest.param(NUM_PROMPTS, MANY_TOKENS, marks=pytest.mark.long),
    ],  # more of the same, 40 s
)
def test_adapter_equals_peft(engine, variants, base, name, count, num_tokens):
    adapter = variants.adapter(variants.checkpoint(base), name)
    report = engine.check(variants, adapter, count, num_tokens=num_tokens)
    engine.unload(engine.register(adapter))
    assert report.is_equal, report


OTHER_BASES = ["llama-biases", "llama-bf16-sharded", "mistral-window", "qwen2-tied", "qwen3"]
FORMS = ["all-linear", "patterns", "lm-head"]


@pytest.mark.parametrize(
    ("base", "name"),
    [
        # Each base and each form once or twice; the other cells say the same of them, which takes 20 s.
        pytest.param(base, name, marks=[] if row % len(FORMS) == column else [pytest.mark.long])
        for row, base in enumerate(OTHER_BASES)
        for column, name in enumerate(FORMS)
    ],
)
def test_adapter_on_other_architectures_equals_peft(engine, variants, base, name):
    adapter = variants.adapter(variants.checkpoint(base), name)
    report = engine.check(variants, adapter, 8)
    engine.unload(engine.register(adapter))
    assert report.is_equal, report


@pytest.mark.parametrize("base", FURTHER)
def test_adapter_on_every_linear_module_equals_peft(engine, variants, base):
    adapter = variants.adapter(variants.checkpoint(base), "every-linear")
    report = engine.check(variants, adapter, 8)
    engine.unload(engine.register(adapter))
    assert report.is_equal, report


def test_adapter_on_fused_matrices_equals_peft(engine, variants):
    adapter = variants.adapter(variants.checkpoint("phi3-window"), "fused", spec=FUSED)
    report = engine.check(variants, adapter, 8)
    engine.unload(engine.register(adapter))
    assert report.is_equal, report


@pytest.mark.parametrize("name", ["patterns", "some-layers", "lm-head"])
def test_names_of_parts_of_fused_matrices_match_nothing_as_in_peft(engine, variants, name):
    """Lists of targets are copied from one model to the next; PEFT adapts what it finds."""
    adapter = variants.adapter(variants.checkpoint("phi3-window"), name)
    if name == "lm-head":  # all but the head is a part of something
        plan = engine.zoo.chain(engine.register(adapter))
        assert [len(link.applied) for link in plan.links] == [0, 0, 0, 0, 0, 1]
    report = engine.check(variants, adapter, 8)
    engine.unload(engine.register(adapter))
    assert report.is_equal, report


@pytest.mark.parametrize("name", ["saved-embedding", "saved-lm-head"])
@pytest.mark.parametrize("base", ["granite", "gemma2"])
def test_saved_matrices_are_scaled_and_capped_as_the_bases_own(engine, variants, base, name):
    adapter = variants.adapter(variants.checkpoint(base), name)
    report = engine.check(variants, adapter, 4)
    engine.unload(engine.register(adapter))
    assert report.is_equal, report


def _cases(engine, variants, one, chain):
    """Four of the oracle's answers, which the engine proposes."""

    def propose(asked, num_tokens):
        return engine.greedy(chain, asked, num_tokens)

    return variants.cases(one, 4, propose=propose)


# What is special about adapters of a tied base shows in each alone, above.
@pytest.mark.parametrize("base", [BASES[0], pytest.param(BASES[1], marks=pytest.mark.long)])
def test_all_adapters_loaded_together_equal_peft(engine, variants, base):
    """All adapters of one base at work at once; banks then hold rows of all of them."""
    checkpoint = variants.checkpoint(base)
    adapters = [variants.adapter(checkpoint, name) for name in ADAPTERS]
    adapters += [variants.adapter(checkpoint, name, spec=spec) for name, spec in FURTHER_METHODS.items()]
    chains = {one: engine.load(one) for one in [checkpoint, *adapters]}
    cases = [(one, case) for one in chains for case in _cases(engine, variants, one, chains[one])]
    answers = engine.run([Ask(chains[one], case.prompt, len(case.tokens)) for one, case in cases])
    logits = [engine.logits(chains[one], [case.prompt + case.tokens])[0] for one, case in cases]
    for chain in chains.values():
        engine.unload(chain)
    assert answers == [case.tokens for _, case in cases]
    for ours, (one, case) in zip(logits, cases, strict=True):
        assert logits_error(ours, case.logits) <= LOGITS_TOLERANCE, one.name


def test_adapter_on_a_top_quarter_tuned_checkpoint_equals_peft(engine, variants):
    tuned = variants.top_quarter(variants.checkpoint("llama-gqa"))
    adapter = variants.adapter(tuned, "all-linear")
    report = engine.check(variants, adapter, 8)
    engine.unload(engine.register(adapter))
    assert report.is_equal, report


@pytest.mark.parametrize("base", BASES)
def test_adapter_shares_every_base_block(engine, variants, base):
    checkpoint = variants.checkpoint(base)
    chains = [engine.register(one) for one in (checkpoint, variants.adapter(checkpoint, "some-layers"))]
    plain, adapted = (engine.zoo.chain(chain).links for chain in chains)
    assert [link.base for link in plain] == [link.base for link in adapted]
    assert [len(link.applied) for link in adapted] == [0, 0, 1, 0, 1, 0]  # layers 1 and 3


@pytest.mark.parametrize(
    ("base", "name"),
    [
        *(("llama-gqa-tied", name) for name in FURTHER_METHODS),
        *(("llama-gqa", name) for name in MATTER_UNTIED),
    ],
)
def test_further_methods_equal_peft(engine, variants, base, name):
    adapter = variants.adapter(variants.checkpoint(base), name, spec=FURTHER_METHODS[name])
    report = engine.check(variants, adapter, 4)
    engine.unload(engine.register(adapter))
    assert report.is_equal, report


@pytest.mark.parametrize(
    ("base", "name"),
    [
        ("qwen2-tied", "dora"),
        ("llama-biases", "dora-ends"),
        ("llama-biases", "biases"),
        ("llama-bf16-sharded", "dora-ends"),
        ("gemma2", "dora-ends"),
        ("gemma2", "tokens"),
        ("granite", "embedding-and-head"),
        ("granite", "tokens-and-head"),
        ("qwen3", "dora-tokens"),
    ],
)
def test_further_methods_on_other_architectures_equal_peft(engine, variants, base, name):
    adapter = variants.adapter(variants.checkpoint(base), name, spec=FURTHER_METHODS[name])
    report = engine.check(variants, adapter, 4)
    engine.unload(engine.register(adapter))
    assert report.is_equal, report


@pytest.mark.parametrize("method", ["use_dora", "lora_bias"])
def test_further_methods_on_fused_matrices_equal_peft(engine, variants, method):
    spec = AdapterSpec({**FUSED.options, method: True})
    adapter = variants.adapter(variants.checkpoint("phi3-window"), f"fused-{method}", spec=spec)
    report = engine.check(variants, adapter, 4)
    engine.unload(engine.register(adapter))
    assert report.is_equal, report
