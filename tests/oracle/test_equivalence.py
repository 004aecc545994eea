"""Evaluations of equivalence against transformers and PEFT: the outputs, and the numbers made of them."""

import pytest
import torch
from torch.nn import functional

from blockzoo import families
from blockzoo.evaluation.evaluate import evaluate
from blockzoo.evaluation.forward import LinkLoader, Windows
from blockzoo.evaluation.tokens import windows
from blockzoo.zoo import Zoo
from support.adapters import FURTHER_METHODS, load_adapted
from support.models import SENTENCES, checkpoint_tensors, edit_checkpoint, make_tokenizer, tune_layers
from support.oracle import LOGITS_TOLERANCE, Oracle, logits_error

TEXT = " ".join(SENTENCES)
IDS = make_tokenizer()(TEXT, add_special_tokens=False)["input_ids"]
WINDOW = 45
CHECKPOINTS = (
    "llama-gqa",
    "llama-biases",
    "llama-rope-llama3",
    "llama-gelu",
    "llama-fp16",
    "mistral-window",
    "qwen2-tied",
    "qwen3",
    "qwen3-tied-bf16",
    "qwen3-even",
    "smollm3",
    "phi3-partial",
    "gemma2",
)


@pytest.fixture
def zoo(tmp_path):
    return Zoo.open(tmp_path / "zoo", create=True)


def expected(original, substituted):
    """Mean and largest KL and the agreement, made of the oracles' logits by torch's own loss."""
    cut = windows(IDS, WINDOW)
    p, q = (torch.cat(oracle.logits(list(map(tuple, cut)))).double() for oracle in (original, substituted))
    kl = functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    return float(kl.mean()), float(kl.max()), float((p.argmax(-1) == q.argmax(-1)).double().mean())


def check(record, original, substituted):
    mean, worst, agreement = expected(original, substituted)
    assert record.num_tokens == len(IDS)
    assert record.mean_kl == pytest.approx(mean, rel=1e-3)
    assert record.worst_kl == pytest.approx(worst, rel=1e-3)
    assert record.top1_agreement == pytest.approx(agreement, abs=1.5 / len(IDS))
    assert mean > 1e-4


def logits_of(zoo, name):
    """Logits of the plain forward pass, window by window."""
    loader = LinkLoader(zoo, torch.float32, torch.device("cpu"))
    links = loader.load(zoo.chain(zoo.resolve(name).chain).links)
    with torch.inference_mode():
        for window in windows(IDS, WINDOW):
            context = Windows([window], loader)
            yield context.logits(links[-1], context.run(links[:-1], context.token_ids))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_plain_forward_is_transformers(zoo, variants, name):
    checkpoint = variants.checkpoint(name)
    zoo.register(checkpoint.path, name="base")
    oracle = variants.oracle(checkpoint).logits([tuple(window) for window in windows(IDS, WINDOW)])
    for ours, theirs in zip(logits_of(zoo, "base"), oracle, strict=True):
        assert logits_error(ours, theirs) <= LOGITS_TOLERANCE


@pytest.mark.parametrize("adapter", ["all-linear", "patterns", "lm-head", "saved-embedding", "saved-lm-head"])
def test_the_plain_forward_with_adapters_is_peft(zoo, variants, adapter):
    checkpoint = variants.checkpoint("llama-gqa")
    variant = variants.adapter(checkpoint, adapter)
    zoo.register(checkpoint.path, name="base")
    zoo.register(variant.path, name="adapted", base="base")
    oracle = variants.oracle(variant).logits([tuple(window) for window in windows(IDS, WINDOW)])
    for ours, theirs in zip(logits_of(zoo, "adapted"), oracle, strict=True):
        assert logits_error(ours, theirs) <= LOGITS_TOLERANCE
    record = evaluate(zoo, "base", "adapted", TEXT, window_tokens=WINDOW)[-1]
    check(record, variants.oracle(checkpoint), variants.oracle(variant))
    assert record.result == zoo.resolve("adapted").chain


@pytest.mark.parametrize("name", FURTHER_METHODS)
def test_the_plain_forward_with_further_methods_is_peft(zoo, variants, name):
    checkpoint = variants.checkpoint("llama-gqa-tied")
    variant = variants.adapter(checkpoint, name, spec=FURTHER_METHODS[name])
    zoo.register(checkpoint.path, name="base")
    zoo.register(variant.path, name="adapted", base="base")
    oracle = variants.oracle(variant).logits([tuple(window) for window in windows(IDS, WINDOW)])
    for ours, theirs in zip(logits_of(zoo, "adapted"), oracle, strict=True):
        assert logits_error(ours, theirs) <= LOGITS_TOLERANCE


@pytest.mark.parametrize("name", ["embedding-and-head", "dora-ends", "tokens-of-both"])
def test_merged_weights_are_those_that_peft_merges(zoo, variants, name):
    checkpoint = variants.checkpoint("llama-biases")
    variant = variants.adapter(checkpoint, name, spec=FURTHER_METHODS[name])
    zoo.register(checkpoint.path, name="base")
    zoo.register(variant.path, name="adapted", base="base")
    merged = load_adapted(checkpoint.path, variant.path).merge_and_unload().state_dict()
    loader = LinkLoader(zoo, torch.float32, torch.device("cpu"))
    links = zoo.chain(zoo.resolve("adapted").chain).links
    family, changed = families.get("llama"), 0
    for position, link in enumerate(links):
        for tensor, ref in zoo.block(link.base).tensors.items():
            ours = before = loader.tensor(ref)
            for adapter in loader.adapters(link):
                ours = adapter.merged(tensor, ours)
            theirs = merged[family.source_name(position, len(links) - 2, tensor)]
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
            changed += not torch.equal(ours, before)
    assert changed >= 2


@pytest.mark.parametrize("name", ["llama-gqa", "mistral-window", "qwen3"])
def test_each_run_against_a_checkpoint_put_together_by_hand(zoo, variants, tmp_path, name):
    """Layers 0 and 2 of a fine-tune in the place of the base's: one, the other, both."""
    base = variants.checkpoint(name)
    tune_layers(base.path, tmp_path / "tuned", [0, 2])
    zoo.register(base.path, name="base")
    zoo.register(tmp_path / "tuned", name="tuned", base="base")
    found = evaluate(zoo, "base", "tuned", TEXT, window_tokens=WINDOW)
    assert [record.original.positions for record in found] == [(1, 2), (3, 4), (1, 4)]
    other = checkpoint_tensors(tmp_path / "tuned")
    for number, (record, layers) in enumerate(zip(found, ((0,), (2,), (0, 1, 2)), strict=True)):
        prefixes = tuple(f"model.layers.{layer}." for layer in layers)
        mixed = edit_checkpoint(
            base.path,
            tmp_path / f"mixed-{number}",
            tensors=lambda key, value, prefixes=prefixes: other[key] if key.startswith(prefixes) else value,
        )
        check(record, variants.oracle(base), Oracle(mixed))


def test_a_layer_at_another_depth(zoo, variants, tmp_path):
    """Layer 3 where layer 1 was."""
    base = variants.checkpoint("llama-gqa")
    zoo.register(base.path, name="base")
    (record,) = evaluate(zoo, "base:2", "base:4", TEXT, window_tokens=WINDOW)
    tensors = checkpoint_tensors(base.path)
    moved = edit_checkpoint(
        base.path,
        tmp_path / "moved",
        tensors=lambda key, value: tensors[key.replace(".layers.1.", ".layers.3.")].clone(),
    )
    check(record, variants.oracle(base), Oracle(moved))


def test_a_head_and_an_embedding(zoo, variants, tmp_path):
    base = variants.checkpoint("llama-gqa")
    zoo.register(base.path, name="base")
    for position, module in ((0, "embed_tokens"), (5, "lm_head")):
        noisy = edit_checkpoint(
            base.path,
            tmp_path / module,
            tensors=lambda key, value, module=module: value * 0.9 + 0.02 if module in key else value,
        )
        zoo.register(noisy, name=f"other-{position}")
        (record,) = evaluate(zoo, "base", f"other-{position}", TEXT, window_tokens=WINDOW)
        assert record.original.positions == (position, position + 1)
        check(record, variants.oracle(base), Oracle(noisy))


@pytest.mark.model
@pytest.mark.timeout(1800)
@pytest.mark.long  # tiny models of several families say the same above
def test_smollm2_with_its_top_quarter_tuned(zoo, variants, smollm2):
    from transformers import AutoTokenizer

    text = " ".join(SENTENCES) * 2
    base = variants.existing("smollm2", smollm2)
    tuned = variants.top_quarter(base, num_layers=30)
    zoo.register(base.path, name="base")
    zoo.register(tuned.path, name="tuned", base="base")
    (record,) = evaluate(zoo, "base", "tuned", text, window_tokens=100)
    assert record.original.positions == (24, 31)
    ids = AutoTokenizer.from_pretrained(smollm2)(text, add_special_tokens=False)["input_ids"]
    cut = [tuple(window) for window in windows(ids, 100)]
    logits = []
    for variant in (base, tuned):
        logits.append(torch.cat(variants.oracle(variant).logits(cut)).double().log_softmax(-1))
        variants.forget(variant)
    kl = functional.kl_div(logits[1], logits[0], reduction="none", log_target=True).sum(-1)
    assert record.num_tokens == len(ids)
    assert record.mean_kl == pytest.approx(float(kl.mean()), rel=1e-3)
    assert record.worst_kl == pytest.approx(float(kl.max()), rel=1e-2)
    agreement = float((logits[0].argmax(-1) == logits[1].argmax(-1)).double().mean())
    assert record.top1_agreement == pytest.approx(agreement, abs=1.5 / len(ids))
