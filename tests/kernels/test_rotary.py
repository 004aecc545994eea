"""Rotary tables against transformers' for every kind, and the rotation against complex arithmetic."""

from itertools import pairwise

import pytest
import torch
from transformers import Glm4Config, LlamaConfig, Olmo2Config, Phi3Config
from transformers.models.glm4 import modeling_glm4
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.olmo2 import modeling_olmo2
from transformers.models.phi3 import modeling_phi3

from blockkernels.rotary import (
    RopeParameters,
    RotaryTable,
    RotaryTables,
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
    (
        RopeParameters(16, 5000.0, "yarn", factor=4.0, ramp=(0.0, 5.0), scale=1.1386294361119891),
        {
            "rope_type": "yarn",
            "rope_theta": 5000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 512,
        },
    ),
    (
        RopeParameters(8, 5000.0, "longrope", factors=(1.0, 1.5, 2.0, 4.0), scale=1.25),
        {
            "rope_type": "longrope",
            "rope_theta": 5000.0,
            "short_factor": [1.0, 1.5, 2.0, 4.0],
            "long_factor": [9.0] * 4,
            "attention_factor": 1.25,
            "original_max_position_embeddings": 2048,
        },
    ),
]


@pytest.mark.parametrize(("rope", "parameters"), _KINDS, ids=lambda value: getattr(value, "kind", ""))
def test_rotation_is_the_models(rope: RopeParameters, parameters: dict[str, object]) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=rope.rotary_dim * 3,
        num_attention_heads=3,
        head_dim=rope.rotary_dim,
        max_position_embeddings=2048,
        rope_parameters=parameters,
    )
    positions = torch.tensor([0, 1, 5, 63, 500, 1999])
    x = torch.randn(len(positions), 3, rope.rotary_dim)
    cos, sin = LlamaRotaryEmbedding(config)(x, positions[None])
    want, _ = apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos, sin)
    table = rotary_table(positions, inverse_frequencies(rope), torch.float32, rope.scale)
    got = rotary_reference(x, *table)
    torch.testing.assert_close(got, want[0].transpose(0, 1), rtol=1e-5, atol=1e-5)


_FORMS = {
    "neighbours in a part": (
        RopeParameters(12, 10000.0, neighbours=True),
        Glm4Config(head_dim=24, rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        modeling_glm4.Glm4RotaryEmbedding, modeling_glm4.apply_rotary_pos_emb,
    ),
    "many neighbours": (
        RopeParameters(46, 10000.0, neighbours=True),
        Glm4Config(head_dim=46, rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 1.0}),
        modeling_glm4.Glm4RotaryEmbedding, modeling_glm4.apply_rotary_pos_emb,
    ),
    "a part": (
        RopeParameters(18, 10000.0),
        Phi3Config(head_dim=24, rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.75}),
        modeling_phi3.Phi3RotaryEmbedding, modeling_phi3.apply_rotary_pos_emb,
    ),
    "wide": (
        RopeParameters(24, 10000.0, wide=True),
        Olmo2Config(head_dim=24, rope_parameters={"rope_theta": 1e4, "rope_type": "default"}),
        modeling_olmo2.Olmo2RotaryEmbedding, modeling_olmo2.apply_rotary_pos_emb,
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", _FORMS)
def test_other_forms_are_the_models_bit_for_bit(form: str, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    rope, config, embedding, apply = _FORMS[form]
    positions = torch.tensor([0, 1, 5, 63, 500, 1999])
    x = torch.randn(len(positions), 3, config.head_dim).to(dtype)
    cos, sin = embedding(config)(x, positions[None])
    want, _ = apply(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos, sin)
    angles = rotary_table(positions, inverse_frequencies(rope), rope.table_dtype(dtype))
    for ours in (rotary, rotary_reference):
        assert torch.equal(ours(x, *angles, neighbours=rope.neighbours), want[0].transpose(0, 1))


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
    with pytest.raises(ValueError, match="other"):
        inverse_frequencies(RopeParameters(8, 1.0, "other"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize(("tokens", "heads", "dim"), [(1, 12, 64), (33, 3, 10), (200, 12, 64)])
def test_rotary_is_the_reference_bit_for_bit(
    tokens: int, heads: int, dim: int, neighbours: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(2)
    x = torch.randn(tokens, heads + 2, dim).to(dtype)[:, :heads]
    positions = torch.randint(0, 3000, (tokens,))
    for rotated, wide in ((dim, False), (dim - 4, False), (dim - 4, True)):
        rope = RopeParameters(rotated, 1e4, wide=wide)
        angles = rotary_table(positions, inverse_frequencies(rope), rope.table_dtype(dtype))
        want = rotary_reference(x, *angles, neighbours=neighbours)
        assert torch.equal(rotary(x, *angles, neighbours=neighbours), want)
        assert torch.equal(want[..., rotated:], x[..., rotated:])


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


_GROWING = {
    "dynamic": (
        RopeParameters(12, 500.0, "dynamic", factor=3.0, original_context=1500),
        {"rope_type": "dynamic", "factor": 3.0},
        1500,
    ),
    "longrope": (
        RopeParameters(
            12, 500.0, "longrope", factors=(1.0, 1.1, 1.2, 1.5, 2.0, 3.0),
            long_factors=(2.0, 3.0, 5.0, 7.0, 9.0, 11.0), original_context=1500, scale=1.25,
        ),
        {
            "rope_type": "longrope",
            "short_factor": [1.0, 1.1, 1.2, 1.5, 2.0, 3.0],
            "long_factor": [2.0, 3.0, 5.0, 7.0, 9.0, 11.0],
            "attention_factor": 1.25,
            "original_max_position_embeddings": 1500,
        },
        4500,
    ),
}  # fmt: skip


@pytest.mark.parametrize("together", [1, 1400, 1500, 1501, 2100])
@pytest.mark.parametrize("kind", _GROWING)
def test_angles_of_a_growing_sequence_are_the_models(kind: str, together: int) -> None:
    """A prompt, and one token after the other behind it; in one piece or in many the same bits."""
    rope, parameters, context = _GROWING[kind]
    config = LlamaConfig(
        hidden_size=36, num_attention_heads=3, head_dim=12, max_position_embeddings=context,
        rope_parameters={**parameters, "rope_theta": 500.0},
    )  # fmt: skip
    theirs, x, end = LlamaRotaryEmbedding(config), torch.zeros(1), 2200
    parts = [theirs(x, torch.arange(together)[None])]
    parts += [theirs(x, torch.tensor([[position]])) for position in range(together, end)]
    tables = RotaryTables(rope, torch.float32, torch.device("cpu"))
    for place, got in enumerate(tables.run(0, end, together)):
        want = torch.cat([part[place][0, :, :6] for part in parts])
        torch.testing.assert_close(got[:, 0], want, rtol=0, atol=3e-4)  # angles of 2000 are rounded to 1e-4
        cuts = [0, 1, 700, 1499, 1500, 1501, 2099, 2100, 2101, end]
        pieces = [tables.run(*piece, together)[place] for piece in pairwise(cuts)]
        assert torch.equal(torch.cat(pieces), got)


def test_few_lengths_have_tables_at_a_time() -> None:
    rope, _, _ = _GROWING["dynamic"]
    tables = RotaryTables(rope, torch.bfloat16, torch.device("cpu"))
    before = tables.run(0, 1501, 1501)
    for length in range(1502, 1530):
        tables.run(0, 8, length)
    assert len(tables._tables) == 8
    assert all(map(torch.equal, tables.run(0, 1501, 1501), before))
