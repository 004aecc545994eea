"""Keys and values in pages.

A page holds the keys and values of `page_tokens` consecutive tokens of one
request at one layer. A request holds pages for the tokens it has, and grows
page by page. What it may still need is set aside with them as long as nobody
else wants it: then the pages of a layer stay neighbours, and attention reads
them in place, without gathering. When pages run short, what was set aside is
taken back first, then pages that only the prefix cache keeps; after that the
scheduler pre-empts (`blockserve.worker.engine.scheduler`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from blockserve.worker.kv.pages import PageAllocator, Pages
from blockserve.worker.kv.prefix import CachedBlock, PrefixCache


@dataclass(frozen=True, slots=True)
class KvShape:
    """What one token's keys and values look like at one layer; layers of the same shape share a pool."""

    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        """Bytes of the key and the value of one token at one layer."""
        return 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize


@dataclass(slots=True, eq=False)
class KvTable:
    """The pages of one request.

    Attributes:
        index: page numbers, int64 [layers, pages]; token t lies in column t // page_tokens. A new
            array takes its place when pages come or go, never during a pass.
        num_used: columns that the request's tokens need; those behind are set aside and may be taken.
        cached: cached blocks the request holds: those it began with, then those it gave the cache.
    """

    index: Pages
    num_used: int
    cached: list[CachedBlock] = field(default_factory=list)

    @property
    def num_spare(self) -> int:
        """Pages set aside, of all layers together."""
        return int(self.index.shape[0]) * (int(self.index.shape[1]) - self.num_used)


class KvPool:
    """The memory of all pages of one shape, who has them, and the prefixes kept in them."""

    def __init__(self, shape: KvShape, num_bytes: int, page_tokens: int, device: torch.device) -> None:
        """Reserve at most `num_bytes`; on the CPU the system hands memory out as pages are first written."""
        self.shape = shape
        self.page_tokens = page_tokens
        num_pages = num_bytes // (shape.token_bytes * page_tokens)
        self.allocator = PageAllocator(num_pages)
        self.prefixes = PrefixCache(self.allocator)
        self._tables: list[KvTable] = []  # oldest first
        size = (num_pages * page_tokens, shape.num_kv_heads, shape.head_dim)
        self.keys = torch.empty(size, dtype=shape.dtype, device=device)  # [slots, kv_heads, head_dim]
        self.values = torch.empty(size, dtype=shape.dtype, device=device)

    @property
    def num_bytes(self) -> int:
        """Bytes reserved."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def num_spare(self) -> int:
        """Pages set aside for growth; whoever needs one takes it."""
        return sum(table.num_spare for table in list(self._tables))

    @property
    def num_used(self) -> int:
        """Pages that running requests need."""
        return (
            self.allocator.num_pages
            - self.allocator.num_free
            - self.num_spare
            - self.prefixes.num_evictable_pages
        )

    def pages_needed(self, num_layers: int, num_tokens: int) -> int:
        """Pages of a request with that many tokens."""
        return num_layers * self._columns(num_tokens)

    def try_allocate(
        self,
        num_layers: int,
        num_tokens: int,
        *,
        reserve_tokens: int = 0,
        cached: Sequence[CachedBlock] = (),
        headroom: int = 0,
    ) -> KvTable | None:
        """Pages for a request, or None when too few can be had now.

        Args:
            num_layers: layers of its chain.
            num_tokens: tokens it has.
            reserve_tokens: tokens it may soon have beyond them; pages for these only where free.
            cached: blocks of the prefix cache that hold its first tokens.
            headroom: pages that have to be left for others.
        """
        self.prefixes.hold(cached)
        for block in cached:
            self.allocator.hold(block.pages)
        columns = self._columns(num_tokens)
        new = columns - len(cached)
        if not self._make_room(num_layers * new, headroom):
            self.prefixes.let_go(cached)
            for block in cached:
                self.allocator.let_go(block.pages)
            return None
        spare = self._columns(num_tokens + reserve_tokens) - columns
        spare = max(0, min(spare, (self.allocator.num_free - headroom) // num_layers - new))
        own = self.allocator.try_allocate(num_layers, new + spare)
        assert own is not None
        index = np.concatenate([*(block.pages[:, None] for block in cached), own], axis=1)
        table = KvTable(index, columns, list(cached))
        self._tables.append(table)
        return table

    def try_grow(self, table: KvTable, num_tokens: int, *, reserve_tokens: int = 0) -> bool:
        """Have the table hold pages for `num_tokens`; False, and nothing changed, when they cannot be had."""
        columns = self._columns(num_tokens)
        layers, have = table.index.shape
        if columns > have:
            wanted = self._columns(num_tokens + reserve_tokens) - have
            if layers * wanted > self.allocator.num_free:
                wanted = columns - have
                if not self._make_room(layers * wanted):
                    return False
            pages = self.allocator.try_extend(table.index[:, -1], wanted)
            if pages is None:
                pages = self.allocator.try_allocate(layers, wanted)
            assert pages is not None
            table.index = np.concatenate([table.index, pages], axis=1)
        table.num_used = max(table.num_used, columns)
        return True

    def free(self, table: KvTable) -> None:
        """Take a request's pages back; those of cached blocks stay until somebody needs them."""
        self._tables.remove(table)
        self.prefixes.let_go(table.cached)
        self.allocator.let_go(table.index.reshape(-1))

    def _columns(self, num_tokens: int) -> int:
        """Pages of one layer for that many tokens."""
        return -(-num_tokens // self.page_tokens)

    def _make_room(self, count: int, headroom: int = 0) -> bool:
        """Have `count` pages free, if they and the headroom can be had; else change nothing."""
        free = self.allocator.num_free
        if count + headroom <= free:
            return True
        if count + headroom > free + self.num_spare + self.prefixes.num_evictable_pages:
            return False
        for table in reversed(self._tables):
            if count <= self.allocator.num_free:
                break
            if table.num_spare:
                self.allocator.let_go(table.index[:, table.num_used :].reshape(-1))
                table.index = table.index[:, : table.num_used].copy()
        self.prefixes.evict(count)
        return True
