"""The comparison with the oracle fails when our computation is altered: it could not hide such a mistake.

Each alteration is small and sits in our code or in what the zoo tells our code; the comparison
is the one the other tests use.
"""

import pytest
import torch

from blockkernels.attention import gathered
from blockkernels.backends import cpu as cpu_backend
from blockkernels.lora import LoraBank
from blockserve.worker.compute import executor
from support.engine import EngineHarness
from support.models import edit_checkpoint
from support.variants import Variant


@pytest.fixture
def report_on(variants, tmp_path):
    """Compares a variant with its oracle in a fresh engine."""

    def run(variant, *, registered=None):
        with EngineHarness(tmp_path / "zoo") as engine:
            return engine.compare(engine.load(registered or variant), variants.cases(variant, 4))

    return run


def assert_all_different(report):
    """Every prompt is out of tolerance, by far, and greedy tokens betray it too."""
    assert not report.is_equal
    assert report.num_different_logits == report.num_prompts == 4
    assert report.num_different_tokens >= 1


ROPES = ["llama-gqa", "llama-rope-linear", "llama-rope-llama3", "mistral", "qwen2", "qwen3"]


@pytest.mark.parametrize("name", ROPES)
def test_rope_theta_in_our_code(variants, report_on, monkeypatch, name):
    original = executor.inverse_frequencies

    def altered(rope, device):
        frequencies = original(rope, device)
        exponents = torch.arange(len(frequencies), dtype=frequencies.dtype) / len(frequencies)
        return frequencies * 1.02**-exponents  # theta is 2 % larger

    monkeypatch.setattr(executor, "inverse_frequencies", altered)
    assert_all_different(report_on(variants.checkpoint(name)))


@pytest.mark.parametrize("name", ["llama-gqa", "qwen2", "qwen3-tied-bf16"])
def test_grouped_query_mapping_in_our_code(variants, report_on, monkeypatch, name):
    """Query head h uses key head h % kv_heads where h // group is right."""

    def altered(attend):
        def with_wrong_heads(query, keys, values, **options):
            heads, kv_heads = query.shape[1], keys.shape[1]
            order = sorted(range(heads), key=lambda head: (head % kv_heads, head))
            out = torch.empty_like(query)
            out[:, order] = attend(query[:, order].contiguous(), keys, values, **options)
            return out

        return with_wrong_heads

    class AlteredPagedAttention(cpu_backend.PagedAttention):
        def __call__(self, query, key, value, **options):
            return altered(super().__call__)(query, key, value, **options)

    monkeypatch.setattr(gathered, "attend", altered(gathered.attend))  # where no C compiler is
    monkeypatch.setattr(cpu_backend, "PagedAttention", AlteredPagedAttention)
    assert_all_different(report_on(variants.checkpoint(name)))


@pytest.mark.parametrize("name", ["all-linear", "q-v", "rslora", "patterns", "lm-head"])
def test_lora_scale_in_our_code(variants, report_on, monkeypatch, name):
    original = LoraBank.add
    monkeypatch.setattr(LoraBank, "add", lambda bank, down, up, scale: original(bank, down, up, scale * 1.05))
    report = report_on(variants.adapter(variants.checkpoint("llama-gqa"), name))
    assert not report.is_equal
    assert report.num_different_logits == 4
    assert report.num_different_tokens >= 1


def test_adapters_swapped_between_requests(variants, report_on, monkeypatch, tmp_path):
    """The rows of another adapter of the same shape."""
    base = variants.checkpoint("llama-gqa")
    right, wrong = variants.adapter(base, "q-v"), variants.adapter(base, "q-v", seed=2)
    assert_all_different(report_on(right, registered=wrong))


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("llama-gqa", {"rope_parameters": {"rope_type": "default", "rope_theta": 10300.0}}),
        (
            "llama-rope-linear",
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.6}},
        ),
        (
            "llama-rope-llama3",
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 10000.0,
                    "factor": 4.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 80,
                }
            },
        ),
        ("mistral-window", {"sliding_window": 20}),
        ("llama-gelu", {"hidden_act": "silu"}),
        ("llama-gelu", {"rms_norm_eps": 1.5e-3}),
    ],
    ids=["theta", "linear factor", "llama3 original context", "window", "activation", "norm eps"],
)
def test_what_the_zoo_tells_our_code(variants, report_on, tmp_path, name, config):
    """A checkpoint registered with one altered setting against the oracle with the right one."""
    variant = variants.checkpoint(name)
    path = edit_checkpoint(variant.path, tmp_path / "altered", config=config)
    assert_all_different(report_on(variant, registered=Variant("altered", path)))


def test_the_same_engine_unaltered_agrees(variants, report_on):
    """The counterpart: without an alteration the same comparison is green."""
    report = report_on(variants.adapter(variants.checkpoint("llama-gqa"), "all-linear"))
    assert report.is_equal, report
