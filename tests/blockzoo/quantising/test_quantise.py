"""What a quantised variant shares, what is measured and kept, and what is refused."""

from __future__ import annotations

import pytest
import torch

from blockzoo.compute.stored import read_weight, weight_names
from blockzoo.errors import (
    EvaluationError,
    InvalidConfigError,
    InvalidInputError,
    InvalidNameError,
    UnsupportedAdapterError,
    VariantNotFoundError,
)
from blockzoo.evaluation.evaluate import evaluate
from blockzoo.evaluation.forward import LinkLoader
from blockzoo.manifest import INT8, INT8_SCALE, QUANTISED_FROM
from blockzoo.quantising.quantise import QUALITY, QUANTISED, quantise
from blockzoo.registering.batch import read_batch
from blockzoo.zoo import Zoo
from support.adapters import ADAPTERS, make_adapter
from support.models import SENTENCES, SPECS, make_checkpoint, tune_layers
from support.quantised import INT8_SPECS

TEXT = " ".join(SENTENCES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("checkpoints")
    make_checkpoint(INT8_SPECS["int8-llama-tied"], place / "base")
    tune_layers(place / "base", place / "tuned", [1, 2])
    make_adapter(ADAPTERS["q-v"], place / "base", place / "adapted")
    make_checkpoint(SPECS["llama-gqa"], place / "odd")
    return place


@pytest.fixture
def zoo(folder, tmp_path):
    zoo = Zoo.open(tmp_path / "zoo", create=True)
    for entry in read_batch(folder, "base"):
        zoo.register(entry.source, name=entry.name, base=None if entry.name == "odd" else entry.base)
    return zoo


def bases(zoo, name):
    return [link.base for link in zoo.chain(zoo.resolve(name).chain).links]


def test_layers_and_head_are_new_and_shared_like_those_they_came_from(zoo):
    for name in ("base", "tuned", "adapted"):
        quantise(zoo, name)
    plain, made = bases(zoo, "base"), bases(zoo, "base-int8")
    assert made[0] == plain[0]  # the embedding
    assert not set(made[1:]) & set(plain)
    for name in ("tuned", "adapted"):
        before = [a == b for a, b in zip(bases(zoo, name), plain, strict=True)]
        assert before == [a == b for a, b in zip(bases(zoo, f"{name}-int8"), made, strict=True)]
    applied = [link.applied for link in zoo.chain(zoo.resolve("adapted").chain).links]
    assert applied == [link.applied for link in zoo.chain(zoo.resolve("adapted-int8").chain).links]
    assert any(applied)
    assert not zoo.verify().problems


def test_what_was_made_is_said_and_kept(zoo):
    result = quantise(zoo, "base@1", name="fast", text=TEXT, max_tokens=100)
    assert (result.record.name, result.record.version, result.source) == ("fast", 1, "base@1")
    assert result.new_bytes < 0.35 * result.num_bytes  # of float32
    assert set(result.errors) == set(range(1, len(bases(zoo, "base"))))
    assert all(0.002 < error < 0.02 for error in result.errors.values())
    assert result.quality is not None
    assert result.quality.num_tokens == 100
    assert 0 < result.quality.mean_kl < 0.05
    before, after = result.quality.perplexities
    assert after == pytest.approx(before, rel=0.1)
    kept = zoo.resolve("fast").provenance
    assert (kept[QUANTISED], kept[QUANTISED_FROM]) == ("int8", "base@1")
    assert kept[QUALITY].startswith(f"perplexity {after:.4g}")
    again = quantise(zoo, "base", name="fast")
    assert again.unchanged
    assert again.quality is None
    assert zoo.resolve("fast").provenance == kept


def test_perplexity_is_that_of_the_next_tokens(zoo):
    result = quantise(zoo, "base", text=TEXT, max_tokens=64)
    loader = LinkLoader(zoo, torch.float32, torch.device("cpu"))
    from blockzoo.evaluation.forward import Windows
    from blockzoo.evaluation.tokens import tokens_of

    record = zoo.resolve("base")
    chain = zoo.chain(record.chain)
    ids = tokens_of(zoo, record, TEXT, chain.vocab_size)[1][:64]
    links = loader.load(chain.links)
    context = Windows([ids], loader)
    logits = context.logits(links[-1], context.run(links[:-1], context.token_ids))
    loss = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]))
    assert result.quality is not None
    assert result.quality.perplexities[0] == pytest.approx(float(loss.exp()), rel=1e-5)


def test_the_weights_that_stand_for_others_are_near_them(zoo):
    quantise(zoo, "base")
    loader = LinkLoader(zoo, torch.float32, torch.device("cpu"))
    for plain, made in zip(bases(zoo, "base"), bases(zoo, "base-int8"), strict=True):
        a, b = zoo.block(plain), zoo.block(made)
        assert sorted(weight_names(b)) == sorted(weight_names(a))
        for name, ref in b.tensors.items():
            if name.endswith(f".{INT8}"):
                module = name.removesuffix(f".{INT8}")
                assert f"{module}.{INT8_SCALE}" in b.tensors
                near = read_weight(b, module, torch.float32, loader.tensor)
                want = read_weight(a, module, torch.float32, loader.tensor)
                assert ref.shape == tuple(want.shape)
                assert (near - want).norm() < 0.01 * want.norm()


def test_a_quantised_variant_can_be_measured_as_a_substitute(zoo):
    quantise(zoo, "base")
    records = evaluate(zoo, "base", "base-int8", TEXT, max_tokens=80)
    assert all(record.weight_distance is not None and record.weight_distance < 0.02 for record in records)
    assert all(record.mean_kl < 0.05 for record in records)


@pytest.mark.parametrize(
    ("ref", "options", "error", "message"),
    [
        ("base", {"fmt": "int3"}, InvalidInputError, "is no known format"),
        ("base", {"name": "base"}, InvalidInputError, "take the place of the variant"),
        ("base", {"name": "../x"}, InvalidNameError, "x"),
        ("bass", {}, VariantNotFoundError, "bass"),
        ("odd", {}, InvalidInputError, "needs a multiple of 64"),
        ("base", {"text": "too short"}, EvaluationError, "tokens; at least"),
    ],
)
def test_what_cannot_be_quantised_changes_nothing(zoo, ref, options, error, message):
    before = zoo.variants()
    with pytest.raises(error, match=message):
        quantise(zoo, ref, **options)
    assert zoo.variants() == before
    assert not list(zoo.store.storage.list("leases"))


def test_a_quantised_variant_is_not_quantised_adapted_or_exported(zoo, folder, tmp_path):
    quantise(zoo, "base")
    with pytest.raises(InvalidInputError, match="quantised already") as caught:
        quantise(zoo, "base-int8")
    assert "base@1" in caught.value.hint
    with pytest.raises(InvalidInputError, match="cannot be exported"):
        zoo.export("base-int8", tmp_path / "out")
    with pytest.raises(UnsupportedAdapterError, match="is quantised") as caught:
        zoo.register(folder / "adapted", name="bot", base="base-int8")
    assert "base@1" in caught.value.hint


def test_a_half_quantised_block_is_refused(zoo):
    """As another program may have made it."""
    from dataclasses import replace

    from blockkernels.backends import backend_for
    from blockzoo.compute.build import build_block

    quantise(zoo, "base")
    block = zoo.block(bases(zoo, "base-int8")[1])
    loader = LinkLoader(zoo, torch.float32, torch.device("cpu"))
    tensors = {
        name: loader.tensor(ref, torch.int8 if "int8" in name else None)
        for name, ref in block.tensors.items()
    }
    del tensors[f"self_attn.k_proj.{INT8}"]
    with pytest.raises(InvalidConfigError, match="lacks"):
        build_block(replace(block), tensors, backend_for("cpu"))
