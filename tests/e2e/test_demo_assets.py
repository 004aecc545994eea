"""The variants that are committed for the demo: small, readable, and better on their own domain."""

import gzip
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "demo"
ADAPTERS = sorted(path.name for path in (DEMO / "adapters").iterdir())
MARGIN = 0.1  # nats per token by which an adapter has to beat its base


@pytest.fixture(scope="module")
def training():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import training
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    return training


def heldout(name):
    return (DEMO / "heldout" / f"{name}.txt").read_text(encoding="utf-8")


def train_texts():
    entries = json.loads(gzip.decompress((DEMO / "train" / "hacker.json.gz").read_bytes()))
    return [entry["text"] for entry in entries]


def test_there_are_three_adapters():
    assert len(ADAPTERS) == 3


def test_together_they_stay_below_two_megabytes():
    assert sum(path.stat().st_size for path in DEMO.rglob("*") if path.is_file()) < 2_000_000


@pytest.mark.parametrize("name", ADAPTERS)
def test_noted_losses_beat_the_base(name):
    losses = json.loads((DEMO / "losses.json").read_text())[name]
    assert losses["adapter"] < losses["base"] - MARGIN


@pytest.mark.parametrize("name", [*ADAPTERS, "hacker"])
def test_heldout_texts_are_a_few_kilobytes(name):
    assert 2_000 < len(heldout(name)) < 8_000


def test_training_text_holds_nothing_that_is_held_out():
    texts = train_texts()
    assert len(texts) >= 100
    for passage in heldout("hacker").split("\n\n"):
        assert passage.strip()
        assert passage.strip() not in texts


def test_held_out_passages_are_told_from_their_text_alone(training):
    from train_texts import Document

    passages = heldout("kjv").strip().split("\n\n")
    assert all(Document("any subject", passage).is_heldout for passage in passages)
    assert not any(Document("any subject", text).is_heldout for text in train_texts())


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_are_finite_bf16_and_differ_from_zero(name):
    import torch
    from safetensors.torch import load_file

    tensors = load_file(DEMO / "adapters" / name / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    assert all(tensor.any() for tensor in tensors.values())


@pytest.mark.model
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "bierce" else [pytest.mark.long]) for name in ADAPTERS]
)
def test_peft_finds_the_noted_losses(name, training, smollm2):
    """The independent implementation agrees with what is printed beside the demo."""
    import torch
    from peft import PeftModel

    model, tokenizer = training.load_model(smollm2)
    model.float().eval()
    noted = json.loads((DEMO / "losses.json").read_text())[name]
    with torch.inference_mode():
        base = training.heldout_loss(model, tokenizer, heldout(name))
        assert base == pytest.approx(noted["base"], abs=2e-3)
        adapted = PeftModel.from_pretrained(model, str(DEMO / "adapters" / name)).eval()
        with_adapter = training.heldout_loss(adapted, tokenizer, heldout(name))
        assert with_adapter == pytest.approx(noted["adapter"], abs=2e-3)
