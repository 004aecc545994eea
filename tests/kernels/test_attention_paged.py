"""The C kernel for attention in pages against the reference, and what it promises about bits."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockkernels.attention import PagedAttention, attend_reference, can_attend_paged
from blockkernels.native import library

pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler")

LAYERS, LAYER = 3, 1


@dataclass(frozen=True)
class Shape:
    """What a batch looks like: for each request (keys with the new ones, queries)."""

    requests: tuple[tuple[int, int], ...]
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 16
    page_tokens: int = 7
    window: int | None = None
    softcap: float | None = None
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Sequence:
    """One request's tokens at one layer."""

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


def make_sequences(shape: Shape, seed: int = 0) -> list[Sequence]:
    torch.manual_seed(seed)
    return [
        Sequence(
            torch.randn(length, shape.heads, shape.head_dim).to(shape.dtype),
            *torch.randn(2, length, shape.kv_heads, shape.head_dim).to(shape.dtype),
        )
        for length, _ in shape.requests
    ]


def attend_in_pages(shape: Shape, sequences: list[Sequence], seed: int = 0) -> list[torch.Tensor]:
    """The last queries of each sequence, in scattered pages of a pool; other memory is NaN."""
    widths = [-(-length // shape.page_tokens) for length, _ in shape.requests]
    pages = np.random.default_rng(seed).permutation(LAYERS * sum(widths) + 5)
    slots = len(pages) * shape.page_tokens
    pool = torch.full((2, slots, shape.kv_heads, shape.head_dim), float("nan"), dtype=shape.dtype)
    tables = []
    for width in widths:
        tables.append(pages[: LAYERS * width].reshape(LAYERS, width))
        pages = pages[LAYERS * width :]
    new = []
    for (length, count), one, table in zip(shape.requests, sequences, tables, strict=True):
        old = np.arange(length - count)
        at = torch.from_numpy(
            table[LAYER, old // shape.page_tokens] * shape.page_tokens + old % shape.page_tokens
        )
        pool[0][at], pool[1][at] = one.keys[: len(old)], one.values[: len(old)]
        states = (one.query, one.keys, one.values)
        new.append(torch.cat([part[length - count : length] for part in states], dim=1))
    # As the layers have them: strided views of one matrix.
    query, key, value = torch.cat(new).split((shape.heads, shape.kv_heads, shape.kv_heads), dim=1)
    lengths, counts = zip(*shape.requests, strict=True)
    batch = PagedAttention(pool[0], pool[1], shape.page_tokens, tables, lengths, counts)
    out = batch(query, key, value, layer=LAYER, scale=0.3, window=shape.window, softcap=shape.softcap)
    return list(out.split(counts))


def assert_reference(shape: Shape) -> None:
    sequences = make_sequences(shape)
    tolerance = 2e-5 if shape.dtype == torch.float32 else 1e-2
    for got, one, (length, count) in zip(
        attend_in_pages(shape, sequences), sequences, shape.requests, strict=True
    ):
        inputs = (one.query[length - count :].double(), one.keys.double(), one.values.double())
        want = attend_reference(*inputs, scale=0.3, window=shape.window, softcap=shape.softcap)
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 1, 40, 70])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(9, 3, 64), (4, 4, 15), (8, 1, 32), (2, 2, 80), (4, 1, 128), (2, 1, 256), (60, 1, 8)],
)
def test_mixed_batch_is_the_reference(
    heads: int, kv_heads: int, head_dim: int, window: int | None, dtype: torch.dtype
) -> None:
    requests = ((1, 1), (5, 5), (64, 63), (65, 1), (500, 1), (200, 130), (67, 2))
    assert_reference(Shape(requests, heads, kv_heads, head_dim, 7, window, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_contexts_are_the_reference(dtype: torch.dtype) -> None:
    requests = ((16384, 1), (5001, 3), (4097, 70))
    assert_reference(Shape(requests, 4, 2, 32, 32, None, dtype=dtype))
    assert_reference(Shape(requests, 4, 2, 32, 32, 4000, dtype=dtype))


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 150), st.integers(1, 150)), min_size=1, max_size=6),
    group=st.integers(1, 7),
    kv_heads=st.integers(1, 3),
    head_dim=st.sampled_from([2, 6, 31, 32, 33, 64]),
    page_tokens=st.sampled_from([1, 3, 16, 32, 200]),
    window=st.one_of(st.none(), st.integers(1, 160)),
    softcap=st.sampled_from([None, 0.5, 50.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_shape_is_the_reference(
    lengths, group, kv_heads, head_dim, page_tokens, window, softcap, dtype
) -> None:
    requests = tuple((length, min(count, length)) for length, count in lengths)
    assert_reference(
        Shape(requests, group * kv_heads, kv_heads, head_dim, page_tokens, window, softcap, dtype)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (50, None), (50, 2.0)])
@pytest.mark.parametrize("threads", [1, 2])
def test_no_bit_depends_on_the_batch(
    threads: int, window: int | None, softcap: float | None, dtype: torch.dtype
) -> None:
    """Alone, in company, in other pages, as one chunk or token by token: the same bits for every query."""
    shape = Shape(((300, 300), (33, 1), (190, 77), (129, 129)), 9, 3, 64, 7, window, softcap, dtype)
    sequences = make_sequences(shape)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = attend_in_pages(shape, sequences)
        for place, (length, count) in enumerate(shape.requests):
            one = [sequences[place]]
            alone = replace(shape, requests=((length, count),), page_tokens=32)
            assert torch.equal(attend_in_pages(alone, one, seed=5)[0], together[place])
        whole = together[0]
        for end in (1, 2, 17, 63, 64, 65, 128, 299, 300):
            for count in (1, min(16, end), min(55, end)):
                part = attend_in_pages(replace(shape, requests=((end, count),)), cut(sequences[:1], end))
                assert torch.equal(part[0], whole[end - count : end])
    finally:
        torch.set_num_threads(before)


def cut(sequences: list[Sequence], end: int) -> list[Sequence]:
    return [Sequence(one.query[:end], one.keys[:end], one.values[:end]) for one in sequences]


def test_large_scores_do_not_overflow() -> None:
    shape = Shape(((70, 3),), heads=2, kv_heads=1)
    sequences = [replace(one, query=one.query * 1e4) for one in make_sequences(shape)]
    got = attend_in_pages(shape, sequences)[0]
    want = attend_reference(sequences[0].query[67:], sequences[0].keys, sequences[0].values, scale=0.3)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_other_types_are_left_to_torch() -> None:
    assert can_attend_paged(torch.empty(1, 1, 2))
    assert can_attend_paged(torch.empty(1, 1, 2, dtype=torch.bfloat16))
    assert not can_attend_paged(torch.empty(1, 1, 2, dtype=torch.float16))
    assert not can_attend_paged(torch.empty(1, 1, 2, device="meta"))
