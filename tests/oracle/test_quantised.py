"""Quantised variants against transformers and PEFT around the reference of int8 products."""

import pytest

from blockzoo.quantising.quantise import quantise
from support.adapters import ADAPTERS, FURTHER_METHODS, FUSED
from support.models import make_checkpoint
from support.oracle import LOGITS_TOLERANCE, Oracle, logits_error
from support.quantised import INT8_SPECS, Int8Oracle
from support.variants import Variant

FAR = 0.1
"""An activation that rounding moves across a border between two steps moves by one of 127 steps, and so does
what depends on it. Short prompts have few."""

SHORT = [tuple(range(start, start + length)) for start, length in enumerate((1, 2, 3, 5, 7, 8) * 2, 5)]
PROMPTS = [*SHORT, tuple(range(5, 38)), tuple(range(7, 97))]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("int8")
    return {name: Variant(name, make_checkpoint(spec, folder / name)) for name, spec in INT8_SPECS.items()}


def check(engine, variant):
    """Equal to the oracle of int8 for most short prompts, near for longer ones, and not as unquantised."""
    engine.register(variant)
    record = quantise(engine.zoo, variant.name).record
    chain = record.chain
    engine.load_chain(chain)
    paths = (variant.base.path, variant.path) if variant.is_adapter else (variant.path,)
    expected, unquantised = Int8Oracle(*paths).logits(PROMPTS), Oracle(*paths).logits(PROMPTS)
    ours = engine.logits(chain, PROMPTS)
    errors = [logits_error(*pair) for pair in zip(ours, expected, strict=True)]
    equal = sum(error <= LOGITS_TOLERANCE for error in errors[: len(SHORT)])
    assert equal >= len(SHORT) // 2, errors
    assert max(errors) <= FAR, errors
    effects = [logits_error(*pair) for pair in zip(unquantised, expected, strict=True)]
    assert min(effects) > 100 * LOGITS_TOLERANCE, effects
    engine.unload(chain)


@pytest.mark.parametrize("name", INT8_SPECS)
def test_checkpoint_is_near_the_oracle(engine, made, name):
    check(engine, made[name])


@pytest.mark.parametrize("form", ["all-linear", "saved-lm-head", "lm-head"])
@pytest.mark.parametrize("name", ["int8-llama", "int8-qwen2"])
def test_lora_reads_inputs_that_are_not_quantised(engine, made, variants, name, form):
    check(engine, variants.adapter(made[name], form, spec=ADAPTERS[form]))


@pytest.mark.parametrize("form", ["dora", "biases", "tokens"])
def test_further_methods(engine, made, variants, form):
    check(engine, variants.adapter(made["int8-llama"], form, spec=FURTHER_METHODS[form]))


def test_lora_on_matrices_in_one(engine, made, variants):
    check(engine, variants.adapter(made["int8-phi3"], "fused", spec=FUSED))
