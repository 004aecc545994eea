"""Tables of pages: reads see what was written, growth keeps it, what is set aside can be taken."""

import pytest
import torch

from blockserve.worker.kv.pool import KvPool, KvShape, KvTable


def _pool(num_pages: int = 12, page_tokens: int = 4) -> KvPool:
    shape = KvShape(2, 3, torch.float32)
    pool = KvPool(shape, num_pages * page_tokens * shape.token_bytes, page_tokens, torch.device("cpu"))
    pool.keys.fill_(float("nan"))
    pool.values.fill_(float("nan"))
    return pool


def _slots(pool: KvPool, table: KvTable, layer: int, tokens: int) -> torch.Tensor:
    """Where the first tokens lie at a layer, int64 [tokens]."""
    at = torch.arange(tokens)
    pages = torch.from_numpy(table.index[layer])
    return pages[at // pool.page_tokens] * pool.page_tokens + at % pool.page_tokens


def _read(pool: KvPool, table: KvTable, layer: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of the first tokens at a layer, each [length, kv_heads, head_dim]."""
    slots = _slots(pool, table, layer, length)
    return pool.keys[slots], pool.values[slots]


def _num_runs(table: KvTable, layer: int = 0) -> int:
    """Runs of neighbouring pages that a layer lies in."""
    return 1 + int((table.index[layer, 1:] - table.index[layer, :-1] != 1).sum())


def _fill(pool: KvPool, table: KvTable, layers: int, tokens: int, offset: float) -> None:
    for layer in range(layers):
        slots = _slots(pool, table, layer, tokens)
        content = torch.arange(tokens).float()[:, None, None].expand(tokens, 2, 3) + offset + 100 * layer
        pool.keys.index_copy_(0, slots, content.contiguous())
        pool.values.index_copy_(0, slots, -content)


@pytest.mark.parametrize("scattered", [False, True])
def test_read_returns_what_was_written(scattered: bool) -> None:
    pool = _pool()
    if scattered:
        # Leave only every second page, so that no layer's pages are neighbours.
        pages = pool.allocator.try_allocate(1, 12)
        assert pages is not None
        pool.allocator.let_go(pages[0, ::2])
    first = pool.try_allocate(2, 9)
    assert first is not None
    assert [_num_runs(first, layer) for layer in range(2)] == ([3, 3] if scattered else [1, 1])
    _fill(pool, first, 2, 9, 1000.0)
    for layer in range(2):
        for length in (1, 4, 5, 9):
            keys, values = _read(pool, first, layer, length)
            assert keys[:, 0, 0].tolist() == [1000.0 + 100 * layer + token for token in range(length)]
            assert torch.equal(values, -keys)


def _values(pool: KvPool, table: KvTable, layer: int, length: int) -> list[float]:
    keys, values = _read(pool, table, layer, length)
    assert torch.equal(values, -keys)
    column: list[float] = keys[:, 0, 0].tolist()
    return column


def test_growth_keeps_what_was_written() -> None:
    """A table alone in the pool grows in place; beside another it goes on elsewhere."""
    pool = _pool()
    first = pool.try_allocate(1, 4)
    assert first is not None
    _fill(pool, first, 1, 4, 0.0)
    assert pool.try_grow(first, 5)
    assert _num_runs(first) == 1
    second = pool.try_allocate(1, 8)
    assert second is not None
    _fill(pool, second, 1, 8, 500.0)
    assert pool.try_grow(first, 12)
    assert _num_runs(first) == 2
    assert _values(pool, first, 0, 4) == [0.0, 1.0, 2.0, 3.0]
    _fill(pool, first, 1, 12, 0.0)
    for length in (3, 4, 5, 8, 9, 12):
        assert _values(pool, first, 0, length) == list(map(float, range(length)))
    assert _values(pool, second, 0, 8) == [500.0 + token for token in range(8)]


def test_pages_set_aside_are_taken_when_needed() -> None:
    pool = _pool()
    roomy = pool.try_allocate(2, 5, reserve_tokens=100)
    assert roomy is not None
    assert (roomy.index.shape, roomy.num_used, pool.num_used) == ((2, 6), 2, 4)
    _fill(pool, roomy, 2, 8, 0.0)
    other = pool.try_allocate(2, 13)
    assert other is not None
    _fill(pool, other, 2, 13, 500.0)
    assert (roomy.index.shape, other.index.shape) == ((2, 2), (2, 4))
    assert _values(pool, roomy, 1, 8) == [100.0 + token for token in range(8)]
    assert not pool.try_grow(roomy, 9)
    assert roomy.index.shape == (2, 2)
    pool.free(other)
    assert pool.try_grow(roomy, 9)
    pool.free(roomy)
    assert (pool.num_used, pool.allocator.num_free) == (0, 12)


def test_headroom_is_left_to_others() -> None:
    pool = _pool()
    assert pool.try_allocate(2, 20, headroom=3) is None
    table = pool.try_allocate(2, 20, reserve_tokens=8, headroom=2)
    assert table is not None
    assert pool.allocator.num_free == 2


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
