"""attend against its reference: odd sizes, grouped heads, chunks, windows, strided pages."""

from types import SimpleNamespace

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from blockkernels.attention import attend, attend_reference


def _inputs(queries: int, length: int, heads: int, kv_heads: int, dim: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(queries * 1000 + length)
    return (
        torch.randn(queries, heads, dim),
        torch.randn(length, kv_heads, dim),
        torch.randn(length, kv_heads, dim),
    )


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (4, 4, 15), (8, 1, 32)])
@pytest.mark.parametrize(("queries", "length"), [(1, 1), (1, 63), (1, 500), (5, 5), (63, 64), (17, 130)])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("window", [None, 1, 40])
def test_attend_is_the_reference(
    queries: int, length: int, heads: int, kv_heads: int, dim: int, window: int | None, softcap: float | None
) -> None:
    query, keys, values = _inputs(queries, length, heads, kv_heads, dim)
    want = attend_reference(query, keys, values, scale=0.3, window=window, softcap=softcap)
    got = attend(query, keys, values, scale=0.3, window=window, softcap=softcap)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_soft_cap_is_the_models() -> None:
    query, keys, values = _inputs(7, 30, 6, 2, 8)
    module = SimpleNamespace(num_key_value_groups=3, training=False)
    mask = torch.full((7, 30), float("-inf")).triu(30 - 7 + 1)[None, None]
    states = (part.transpose(0, 1)[None] for part in (query, keys, values))
    want, _ = eager_attention_forward(module, *states, mask, scaling=0.8, softcap=1.3)
    got = attend_reference(query, keys, values, scale=0.8, softcap=1.3)
    torch.testing.assert_close(got, want[0], rtol=1e-5, atol=1e-6)


def test_attend_reads_views_in_place() -> None:
    query, keys, values = _inputs(1, 20, 4, 2, 16)
    pages = torch.full((64, 2, 16), float("nan"))
    pages[10:30] = keys
    wide = torch.full((1, 8, 16), float("nan"))
    wide[:, :4] = query
    got = attend(wide[:, :4], pages[10:30], values, scale=1.0)
    torch.testing.assert_close(got, attend_reference(query, keys, values, scale=1.0), rtol=1e-4, atol=1e-5)


def test_a_chunk_equals_its_tokens_one_by_one() -> None:
    query, keys, values = _inputs(12, 30, 6, 2, 8)
    together = attend(query, keys, values, scale=0.5)
    for index in range(12):
        end = 30 - 12 + index + 1
        alone = attend(query[index : index + 1], keys[:end], values[:end], scale=0.5)
        torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-4, atol=1e-5)


def test_heads_are_mapped_in_groups() -> None:
    """Exchanging the key heads changes the answer: the mapping is not symmetric."""
    query, keys, values = _inputs(1, 9, 4, 2, 8)
    swapped = attend(query, keys.flip(1), values.flip(1), scale=1.0)
    assert not torch.allclose(attend(query, keys, values, scale=1.0), swapped, atol=1e-3)
