"""Attention over pages by Triton, interpreted, against torch's in float32; what must not be read is NaN."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

import support.triton_interpreter  # noqa: F401  (before the kernels)
from blockkernels.attention import GatheredAttention
from blockkernels.attention.gpu import SPLIT_KEYS, TritonAttention
from blockkernels.launching import Launch, watched

PAGE, LAYERS = 16, 2
MIXED = ((1, 1), (63, 1), (500, 1), (13, 13), (40, 25), (SPLIT_KEYS + 1, 1))
"""Keys and new tokens of each request: single tokens, prompts, a chunk of a prompt."""


class Batch:
    """Requests with pages in random places, whose slots behind their keys hold NaN."""

    def __init__(
        self, requests: Sequence[tuple[int, int]], kv_heads: int, dim: int, dtype: torch.dtype
    ) -> None:
        torch.manual_seed(1)
        self.lengths, self.counts = zip(*requests, strict=True)
        widths = [-(-length // PAGE) for length in self.lengths]
        pages = np.random.default_rng(0).permutation(LAYERS * sum(widths))
        ends = np.cumsum([LAYERS * width for width in widths])
        self.tables = [part.reshape(LAYERS, -1) for part in np.split(pages, ends[:-1])]
        self.pool = torch.full((2, len(pages) * PAGE, kv_heads, dim), float("nan")).to(dtype)
        for table, length, count in zip(self.tables, self.lengths, self.counts, strict=True):
            at = np.arange(length - count)
            for layer in table:
                slots = torch.from_numpy(layer[at // PAGE] * PAGE + at % PAGE)
                self.pool[:, slots] = torch.randn(2, len(at), kv_heads, dim).to(dtype)
        self.num_tokens = sum(self.counts)

    def ours(self, *states: Tensor, **options: object) -> Tensor:
        pool = self.pool.clone()
        attention = TritonAttention(pool[0], pool[1], PAGE, self.tables, self.lengths, self.counts)
        assert attention.num_tokens == self.num_tokens
        return attention(*states, layer=1, **options)  # type: ignore[arg-type]

    def reference(self, *states: Tensor, **options: object) -> Tensor:
        pool = self.pool.float()
        attention = GatheredAttention(pool[0], pool[1], PAGE, self.tables, self.lengths, self.counts)
        return attention(*(state.float() for state in states), layer=1, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "window", "softcap"),
    [(9, 3, 64, None, None), (4, 4, 20, 50, None), (6, 1, 32, None, 2.0), (16, 2, 8, 300, 5.0)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_reference(
    heads: int, kv_heads: int, dim: int, window: int | None, softcap: float | None, dtype: torch.dtype
) -> None:
    batch = Batch(MIXED, kv_heads, dim, dtype)
    states = torch.randn(batch.num_tokens, heads + 2 * kv_heads, dim).to(dtype)
    states = states.split((heads, kv_heads, kv_heads), dim=1)
    options = {"scale": dim**-0.5, "window": window, "softcap": softcap}
    got, want = batch.ours(*states, **options), batch.reference(*states, **options)
    # Shares of values are rounded to the type of the values.
    assert (got.double() - want.double()).abs().max() <= 4 * torch.finfo(dtype).eps * want.abs().max()


def test_a_soft_cap_of_zero_is_none() -> None:
    batch = Batch(((20, 1), (9, 9)), 1, 16, torch.float32)
    states = torch.randn(batch.num_tokens, 5, 16).split((3, 1, 1), dim=1)
    got = batch.ours(*states, scale=0.25, window=None, softcap=0.0)
    assert torch.equal(got, batch.ours(*states, scale=0.25, window=None, softcap=None))


@pytest.mark.parametrize(("requests", "launches"), [(((20, 1),), 2), (((9, 9),), 1), (((20, 1), (9, 9)), 3)])
def test_launches(requests: Sequence[tuple[int, int]], launches: int) -> None:
    """Prompts need no sum of parts."""
    batch, seen = Batch(requests, 1, 16, torch.float32), list[Launch]()
    states = torch.randn(batch.num_tokens, 5, 16).split((3, 1, 1), dim=1)
    with watched(lambda launch: seen.append(launch) is None):
        batch.ours(*states, scale=0.25, window=None)
    assert len(seen) == launches


def test_what_single_tokens_get_does_not_depend_on_the_batch() -> None:
    batch = Batch(MIXED, 1, 16, torch.float32)
    states = torch.randn(batch.num_tokens, 5, 16).split((3, 1, 1), dim=1)
    whole = batch.ours(*states, scale=0.25, window=None)
    last = [part[-1:] for part in states]
    pool = batch.pool.clone()
    alone = TritonAttention(pool[0], pool[1], PAGE, batch.tables[-1:], batch.lengths[-1:], (1,))
    assert torch.equal(alone(*last, layer=1, scale=0.25, window=None), whole[-1:])
