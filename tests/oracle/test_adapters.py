"""The engine against PEFT: every form of LoRA, on tied and untied, biased and normed checkpoints."""

import asyncio
from dataclasses import replace

import pytest
import torch

from blockkernels.backends import CpuBackend
from blockserve.common.api.engine import EngineRequest
from blockserve.worker.limits import EngineConfig
from blockzoo.zoo import Zoo
from support.adapters import ADAPTERS, FURTHER_METHODS, FUSED, MATTER_UNTIED, AdapterSpec, load_adapted
from support.engine import EXACT_CONFIG, GREEDY, Ask, EngineHarness
from support.memory import poisoned_memory
from support.models import FURTHER
from support.oracle import LOGITS_TOLERANCE, MANY_TOKENS, NUM_PROMPTS, NUM_TOKENS, logits_error
from support.spans import SpanCluster, span_cluster
from support.tiny import TinyZoo

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


FAMILIES = ("llama-gqa", "mistral-window", "qwen2-tied", "qwen3", *FURTHER)
"""A checkpoint of every family."""


def one_of_each(short):
    """Every family in test-long, where they take most of a minute; `short` in every run."""
    return [pytest.param(name, marks=[] if name == short else [pytest.mark.long]) for name in FAMILIES]


def deterministic(dtype: str) -> EngineConfig:
    return replace(EXACT_CONFIG, dtype=dtype, deterministic=True)


@pytest.mark.skipif(
    CpuBackend().why_inexact(torch.float32) is not None, reason="this machine has no compiler"
)
@pytest.mark.parametrize("base", one_of_each("phi3-window"))
def test_adapter_in_deterministic_mode_equals_peft(variants, tmp_path, base):
    adapter = variants.adapter(variants.checkpoint(base), "every-linear")
    with poisoned_memory(), EngineHarness(tmp_path / "zoo", deterministic("float32")) as engine:
        report = engine.check(variants, adapter, 4)
    assert report.is_equal, report


@pytest.mark.skipif(
    CpuBackend().why_inexact(torch.bfloat16) is not None,
    reason="this machine has no compiler, or no bfloat16 products",
)
@pytest.mark.parametrize("base", one_of_each("phi3-window"))
def test_adapter_in_deterministic_bfloat16_stays_near_peft(variants, tmp_path, base):
    """The bar is what PEFT itself loses to bfloat16 on the same prompts, doubled for other rounding."""
    checkpoint = variants.checkpoint(base)
    adapter = variants.adapter(checkpoint, "every-linear")
    cases = variants.cases(adapter, 4)
    sequences = [one.prompt + one.tokens for one in cases]
    model = load_adapted(checkpoint.path, adapter.path).to(torch.bfloat16)
    with torch.inference_mode():
        theirs = [model(input_ids=torch.tensor([one])).logits[0].float() for one in sequences]
    with poisoned_memory(), EngineHarness(tmp_path / "zoo", deterministic("bfloat16")) as engine:
        ours, plain = (engine.logits(engine.load(one), sequences) for one in (adapter, checkpoint))

    def worst(rows):
        return max(logits_error(one, case.logits) for one, case in zip(rows, cases, strict=True))

    assert 1e-4 < worst(ours) < 2 * worst(theirs) < 0.5
    assert worst(plain) > 1.0  # without the adapter


@pytest.mark.parametrize("base", one_of_each("glm4"))
def test_adapter_over_two_workers_equals_peft(variants, tmp_path, base):
    """Cut inside the layers, so that each worker applies a part of the adapter."""
    checkpoint = variants.checkpoint(base)
    adapter = variants.adapter(checkpoint, "every-linear")
    cases = variants.cases(adapter, 4)
    zoo = Zoo.open(tmp_path / "zoo", create=True)
    zoo.register(checkpoint.path, name="base")
    zoo.register(adapter.path, name="bot", base="base")
    chain = zoo.resolve("bot").chain

    async def answers(cluster: SpanCluster) -> list[tuple[int, ...]]:
        path = cluster.path(chain, a=3, b=0)
        await cluster.load(chain, path)

        async def answer(number: int) -> tuple[int, ...]:
            case = cases[number]
            request = EngineRequest(f"r{number}", chain, case.prompt, GREEDY, len(case.tokens), path=path)
            events = cluster.engine("a").generate(request)
            return tuple([event.token_id async for batch in events for event in batch])

        return await asyncio.gather(*map(answer, range(len(cases))))

    with poisoned_memory(), span_cluster(TinyZoo(zoo, tmp_path, {"bot": chain}), "a b") as cluster:
        assert asyncio.run(answers(cluster)) == [case.tokens for case in cases]
