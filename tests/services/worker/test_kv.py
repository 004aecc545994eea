"""Pages: nothing lost, nothing given twice, reads see what was written."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockserve.worker.kv import KvPool, KvShape, PageAllocator


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 60), st.lists(st.integers(-8, 25), max_size=60))
def test_allocator_never_gives_a_page_twice(num_pages: int, steps: list[int]) -> None:
    """Non-negative: allocate that many. Negative: free one of the allocations."""
    allocator = PageAllocator(num_pages)
    held: list[list[int]] = []
    for step in steps:
        if step > 0:
            free = num_pages - sum(map(len, held))
            pages = allocator.try_allocate(step)
            assert (pages is None) == (step > free)
            if pages is not None:
                assert len(pages) == step
                held.append(pages)
        elif held and step:
            allocator.free(held.pop(step % len(held)))
        everything = [page for pages in held for page in pages]
        assert len(set(everything)) == len(everything)
        assert set(everything) <= set(range(num_pages))
        assert allocator.num_free == num_pages - len(everything)
    for pages in held:
        allocator.free(pages)
    assert allocator.try_allocate(num_pages) == list(range(num_pages))


def test_allocator_prefers_the_smallest_gap_that_holds_all() -> None:
    allocator = PageAllocator(20)
    parts = [allocator.try_allocate(5) for _ in range(4)]
    allocator.free(parts[1] or [])
    allocator.free(parts[3] or [])
    assert allocator.try_allocate(5) == [5, 6, 7, 8, 9]


def _pool(num_pages: int = 12, page_tokens: int = 4) -> KvPool:
    shape = KvShape(2, 3, torch.float32)
    pool = KvPool(shape, num_pages * page_tokens * shape.token_bytes, page_tokens, torch.device("cpu"))
    pool.keys.fill_(float("nan"))
    pool.values.fill_(float("nan"))
    return pool


def _fill(pool: KvPool, table: object, layers: int, tokens: int, offset: float) -> None:
    for layer in range(layers):
        slots = torch.from_numpy(pool.slots(table, 0, tokens)[layer])  # type: ignore[arg-type]
        content = torch.arange(tokens).float()[:, None, None].expand(tokens, 2, 3) + offset + 100 * layer
        pool.keys.index_copy_(0, slots, content.contiguous())
        pool.values.index_copy_(0, slots, -content)


@pytest.mark.parametrize("scattered", [False, True])
def test_read_returns_what_was_written(scattered: bool) -> None:
    pool = _pool()
    if scattered:
        # Leave only every second page, so that no layer's pages are neighbours.
        pages = pool.allocator.try_allocate(12) or []
        pool.allocator.free(pages[::2])
    first = pool.try_allocate(2, 9)
    assert first is not None
    assert (first.first_slots == (None, None)) == scattered
    _fill(pool, first, 2, 9, 1000.0)
    for layer in range(2):
        for length in (1, 4, 5, 9):
            keys, values = pool.read(first, layer, length)
            assert keys[:, 0, 0].tolist() == [1000.0 + 100 * layer + token for token in range(length)]
            assert torch.equal(values, -keys)


def test_neighbouring_pages_are_read_without_a_copy() -> None:
    pool = _pool()
    table = pool.try_allocate(2, 9)
    assert table is not None
    keys, _ = pool.read(table, 1, 9)
    assert keys.untyped_storage().data_ptr() == pool.keys.untyped_storage().data_ptr()


def test_pool_refuses_politely_and_recovers() -> None:
    pool = _pool(num_pages=6)
    table = pool.try_allocate(2, 12)
    assert table is not None
    assert pool.try_allocate(1, 1) is None
    pool.free(table)
    assert pool.allocator.num_free == 6


def test_page_arithmetic() -> None:
    pool = _pool()
    assert pool.pages_needed(3, 1) == 3
    assert pool.pages_needed(3, 4) == 3
    assert pool.pages_needed(3, 5) == 6
    assert pool.num_bytes == 12 * 4 * pool.shape.token_bytes
