"""The engine on the Triton kernels, interpreted, against transformers and PEFT; and what its steps launch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

import support.triton_interpreter  # noqa: F401  (before the kernels)
from blockkernels.backends.gpu import TritonBackend
from blockkernels.launching import Launch, watched
from blockzoo.quantising.quantise import quantise
from support.adapters import ADAPTERS, FURTHER_METHODS
from support.engine import Ask, EngineHarness
from support.models import SPECS, VOCAB_SIZE, make_checkpoint
from support.oracle import LOGITS_TOLERANCE, logits_error
from support.quantised import INT8_SPECS, Int8Oracle
from support.variants import Variant

BRIEF = ("llama-gqa", "gemma2", "all-linear", "dora")
"""Outside test-long, where each of the others takes a quarter of a minute."""
SHORT: dict[str, Any] = {"lengths": (2, 7), "num_tokens": 2}


def named(*names: str) -> list[Any]:
    """Parameters, of which most are long."""
    return [pytest.param(name, marks=[] if name in BRIEF else [pytest.mark.long]) for name in names]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineHarness]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLOCKZOO_KERNELS", "triton")
        harness = EngineHarness(tmp_path_factory.mktemp("zoo"))
    assert isinstance(harness.engine._backend, TritonBackend)
    with harness:
        yield harness


@pytest.mark.parametrize("name", named(*SPECS))
def test_checkpoint_equals_transformers(engine, variants, name):
    variant = variants.checkpoint(name)
    report = engine.check(variants, variant, 2, **SHORT)
    engine.unload(engine.register(variant))
    assert report.is_equal, report


@pytest.mark.parametrize("name", named("all-linear", "patterns", "dora", "biases", "tokens"))
def test_adapter_equals_peft(engine, variants, name):
    """DoRA is computed part by part, the others in whole layers."""
    spec = (ADAPTERS | FURTHER_METHODS)[name]
    adapter = variants.adapter(variants.checkpoint("llama-gqa"), name, spec=spec)
    report = engine.check(variants, adapter, 2, **SHORT)
    engine.unload(engine.register(adapter))
    assert report.is_equal, report


def test_int8_is_near_the_oracle(engine, tmp_path):
    """Products have the bits of their reference (tests/kernels); what comes before may round otherwise."""
    variant = Variant("int8-llama", make_checkpoint(INT8_SPECS["int8-llama"], tmp_path / "int8"))
    engine.register(variant)
    chain = quantise(engine.zoo, variant.name).record.chain
    engine.load_chain(chain)
    prompts = [(7,), (5, 6), (9, 10, 11)]
    expected = Int8Oracle(variant.path).logits(prompts)
    errors = [logits_error(*pair) for pair in zip(engine.logits(chain, prompts), expected, strict=True)]
    engine.unload(chain)
    assert min(errors) <= LOGITS_TOLERANCE
    assert max(errors) <= 0.1


def test_a_batch_of_variants_launches_what_one_adapter_does(engine, variants):
    """Decode steps, by kernel: with adapters two more an input of a layer, whatever their number."""
    base = variants.checkpoint("llama-gqa")
    adapters = [variants.adapter(base, "all-linear", seed=seed) for seed in (1, 2, 3)]
    chains = [engine.load(variant) for variant in (base, *adapters)]
    prompt = tuple(range(5, 10))

    def step(*asked: int) -> Counter[str]:
        """Launches of a step that computes one token of each: those of four steps without those of three."""
        counts = []
        for tokens in (4, 3):
            seen: Counter[str] = Counter()
            with watched(lambda launch, seen=seen: _note(seen, launch)):
                answers = engine.run([Ask(chains[number], prompt, tokens) for number in asked])
            assert [len(answer) for answer in answers] == [tokens] * len(asked)
            counts.append(seen)
        assert not counts[1] - counts[0]
        return counts[0] - counts[1]

    layers = 4
    plain = step(0)
    assert plain["place"] == plain["attend"] == plain["combine"] == plain["gated"] == layers
    assert plain["add_norm"] == 2 * layers + 1
    assert step(0, 0, 0) == plain
    one = step(1)
    assert one - plain == Counter(shrink=4 * layers, expand=4 * layers)
    assert step(1, 2, 3) == step(0, 1, 2) == one
    for chain in chains:
        engine.unload(chain)


def _note(seen: Counter[str], launch: Launch) -> bool:
    """Count a launch. Only the head computes: what layers compute does not change what is launched."""
    seen[launch.kernel.__name__.removesuffix("_kernel")] += 1
    return launch.constants.get("OUT") == VOCAB_SIZE
