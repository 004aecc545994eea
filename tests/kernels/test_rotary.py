"""Rotary tables against transformers' for every kind, and the rotation against complex arithmetic."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from blockkernels.rotary import (
    RopeParameters,
    RotaryTable,
    inverse_frequencies,
    rotary,
    rotary_reference,
    rotary_table,
)

_KINDS = [
    (RopeParameters(64, 100000.0), {"rope_type": "default", "rope_theta": 100000.0}),
    (
        RopeParameters(32, 10000.0, "linear", factor=4.0),
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    ),
    (
        RopeParameters(
            16,
            500000.0,
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_context=256,
        ),
        {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        },
    ),
]


@pytest.mark.parametrize(("rope", "parameters"), _KINDS, ids=["default", "linear", "llama3"])
def test_rotation_is_the_models(rope: RopeParameters, parameters: dict[str, object]) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=rope.head_dim * 3,
        num_attention_heads=3,
        head_dim=rope.head_dim,
        max_position_embeddings=2048,
        rope_parameters=parameters,
    )
    positions = torch.tensor([0, 1, 5, 63, 500, 1999])
    x = torch.randn(len(positions), 3, rope.head_dim)
    cos, sin = LlamaRotaryEmbedding(config)(x, positions[None])
    want, _ = apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos, sin)
    got = rotary_reference(x, *rotary_table(positions, inverse_frequencies(rope), torch.float32))
    torch.testing.assert_close(got, want[0].transpose(0, 1), rtol=1e-5, atol=1e-5)


def test_rotation_is_complex_multiplication() -> None:
    torch.manual_seed(1)
    rope = RopeParameters(10, 77.0)
    positions = torch.tensor([3, 14])
    x = torch.randn(2, 1, 10, dtype=torch.float64)
    freqs = inverse_frequencies(rope)
    got = rotary_reference(x, *rotary_table(positions, freqs, torch.float64))
    turned = torch.complex(x[..., :5], x[..., 5:]) * torch.polar(
        torch.ones(2, 1, 5, dtype=torch.float64), (positions[:, None, None] * freqs).double()
    )
    torch.testing.assert_close(got, torch.cat((turned.real, turned.imag), -1), rtol=1e-5, atol=1e-6)


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="yarn"):
        inverse_frequencies(RopeParameters(8, 1.0, "yarn"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("tokens", "heads", "dim"), [(1, 12, 64), (33, 3, 10), (200, 12, 64)])
def test_rotary_is_the_reference_bit_for_bit(tokens: int, heads: int, dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    x = torch.randn(tokens, heads + 2, dim).to(dtype)[:, :heads]
    positions = torch.randint(0, 3000, (tokens,))
    angles = rotary_table(positions, inverse_frequencies(RopeParameters(dim, 1e4)), dtype)
    assert torch.equal(rotary(x, *angles), rotary_reference(x, *angles))


def test_a_table_grows_and_never_changes() -> None:
    freqs = inverse_frequencies(RopeParameters(10, 1e4))
    table, positions = RotaryTable(freqs, torch.bfloat16), torch.tensor([7, 0, 999])
    before = table.at(positions, 1000)
    far = torch.tensor([5000])
    for got, want in zip(table.at(far, 5001), rotary_table(far, freqs, torch.bfloat16), strict=True):
        torch.testing.assert_close(got, want)
    for got, was in zip(table.at(positions, 1000), before, strict=True):
        assert torch.equal(got, was)
    for got, want in zip(before, rotary_table(positions, freqs, torch.bfloat16), strict=True):
        torch.testing.assert_close(got, want)
