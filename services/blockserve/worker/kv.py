"""Pages of keys and values.

A page holds the keys and values of `page_tokens` consecutive tokens of one
request at one layer. A request gets all pages it can ever need when it is
admitted, so no running request can be stopped by a full pool. The allocator
prefers one run of neighbouring pages, because attention reads such a run in
place, without gathering.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class PageAllocator:
    """Hands out page numbers 0 .. num_pages - 1; pure bookkeeping."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.num_free = num_pages
        self._gaps: list[tuple[int, int]] = [(0, num_pages)] if num_pages else []  # (start, length), sorted

    def try_allocate(self, count: int) -> list[int] | None:
        """`count` pages in order, neighbours where possible; None when fewer are free."""
        if count > self.num_free:
            return None
        fitting = [gap for gap in self._gaps if gap[1] >= count]
        if fitting:
            taken = [min(fitting, key=lambda gap: gap[1])]
        else:
            taken, have = [], 0
            for gap in sorted(self._gaps, key=lambda gap: -gap[1]):
                taken.append(gap)
                have += gap[1]
                if have >= count:
                    break
        pages: list[int] = []
        for start, length in taken:
            self._gaps.remove((start, length))
            part = min(length, count - len(pages))
            pages.extend(range(start, start + part))
            if part < length:
                insort(self._gaps, (start + part, length - part))
        self.num_free -= count
        return pages

    def free(self, pages: Sequence[int]) -> None:
        """Take pages back."""
        for start, length in _runs(pages):
            insort(self._gaps, (start, length))
        self.num_free += len(pages)
        merged: list[tuple[int, int]] = []
        for start, length in self._gaps:
            if merged and merged[-1][0] + merged[-1][1] == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + length)
            else:
                merged.append((start, length))
        self._gaps = merged


def _runs(pages: Sequence[int]) -> list[tuple[int, int]]:
    """Neighbouring pages as (start, length)."""
    runs: list[tuple[int, int]] = []
    for page in sorted(pages):
        if runs and sum(runs[-1]) == page:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((page, 1))
    return runs


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


@dataclass(frozen=True, slots=True)
class KvTable:
    """The pages of one request.

    Attributes:
        pages: page numbers, layer by layer, `pages_per_layer` for each.
        pages_per_layer: pages of one layer.
        index: the same as an array int64 [layers, pages_per_layer].
        first_slots: for each layer the first token slot when its pages are neighbours, else None.
    """

    pages: tuple[int, ...]
    pages_per_layer: int
    index: npt.NDArray[np.int64]
    first_slots: tuple[int | None, ...]


class KvPool:
    """The memory of all pages of one shape, and who has them."""

    def __init__(self, shape: KvShape, num_bytes: int, page_tokens: int, device: torch.device) -> None:
        """Reserve at most `num_bytes`; on the CPU the system hands memory out as pages are first written."""
        self.shape = shape
        self.page_tokens = page_tokens
        num_pages = num_bytes // (shape.token_bytes * page_tokens)
        self.allocator = PageAllocator(num_pages)
        size = (num_pages * page_tokens, shape.num_kv_heads, shape.head_dim)
        self.keys = torch.empty(size, dtype=shape.dtype, device=device)  # [slots, kv_heads, head_dim]
        self.values = torch.empty(size, dtype=shape.dtype, device=device)

    @property
    def num_bytes(self) -> int:
        """Bytes reserved."""
        return self.keys.nbytes + self.values.nbytes

    def pages_needed(self, num_layers: int, num_tokens: int) -> int:
        """Pages of a request with that many tokens."""
        return num_layers * -(-num_tokens // self.page_tokens)

    def try_allocate(self, num_layers: int, num_tokens: int) -> KvTable | None:
        """Pages for a request, or None when too few are free now."""
        pages = self.allocator.try_allocate(self.pages_needed(num_layers, num_tokens))
        if pages is None:
            return None
        per_layer = len(pages) // num_layers
        rows = [pages[layer * per_layer : (layer + 1) * per_layer] for layer in range(num_layers)]
        firsts = tuple(
            row[0] * self.page_tokens if row[-1] - row[0] == per_layer - 1 and row == sorted(row) else None
            for row in rows
        )
        return KvTable(tuple(pages), per_layer, np.array(rows, dtype=np.int64), firsts)

    def free(self, table: KvTable) -> None:
        """Take a request's pages back."""
        self.allocator.free(table.pages)

    def slots(self, table: KvTable, start: int, end: int) -> npt.NDArray[np.int64]:
        """Slots of tokens start .. end - 1 at every layer, int64 [layers, end - start]."""
        positions = np.arange(start, end)
        return table.index[:, positions // self.page_tokens] * self.page_tokens + positions % self.page_tokens

    def read(self, table: KvTable, layer: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first `length` tokens at a layer, each [length, kv_heads, head_dim].

        A view where the pages are neighbours, else a gathered copy.
        """
        first = table.first_slots[layer]
        if first is not None:
            return self.keys[first : first + length], self.values[first : first + length]
        slots = torch.from_numpy(self.slots(table, 0, length)[layer]).to(self.keys.device)
        return self.keys[slots], self.values[slots]
