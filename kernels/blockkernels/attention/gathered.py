"""Attention of a whole batch over keys and values in pages, request by request, on any device of torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from blockkernels.attention.kernel import attend


class GatheredAttention:
    """See `BatchAttention`. Nothing is padded or mixed; pages that are neighbours are read in place.

    Attributes:
        num_tokens: rows of the batch.
    """

    def __init__(
        self,
        pool_keys: Tensor,
        pool_values: Tensor,
        page_tokens: int,
        tables: Sequence[npt.NDArray[np.int64]],
        lengths: Sequence[int],
        counts: Sequence[int],
    ) -> None:
        """Prepare a batch.

        Shape: pool_keys and pool_values [slots, kv_heads, head_dim], contiguous; tables [layers, pages] of
        page numbers for each request. `lengths` are the keys of a request with those of its new tokens,
        `counts` its new tokens, in the order of the rows.
        """
        self._keys, self._values = pool_keys, pool_values
        self._page_tokens = page_tokens
        self._lengths = lengths
        self._tables = [
            table[:, : -(-length // page_tokens)] for table, length in zip(tables, lengths, strict=True)
        ]
        self._is_run = [(np.diff(table, axis=1) == 1).all(axis=1) for table in self._tables]  # [layers] each
        self._rows = list(pairwise(np.cumsum([0, *counts]).tolist()))
        self.num_tokens = sum(counts)
        num_layers = min(table.shape[0] for table in tables)
        slots = [
            self._slots_of(table[:num_layers], length - count, length)
            for table, length, count in zip(self._tables, lengths, counts, strict=True)
        ]
        self._new = torch.from_numpy(np.concatenate(slots, axis=1)).to(pool_keys.device)  # [layers, tokens]

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        layer: int,
        scale: float,
        window: int | None,
        softcap: float | None = None,
    ) -> Tensor:
        """See `BatchAttention`."""
        self._keys.index_copy_(0, self._new[layer], key)
        self._values.index_copy_(0, self._new[layer], value)
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        for request, (row, end) in enumerate(self._rows):
            keys, values = self._read(request, layer)
            out[row:end] = attend(query[row:end], keys, values, scale=scale, window=window, softcap=softcap)
        return out

    def _read(self, request: int, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a request at a layer, [length, kv_heads, head_dim]: a view, or a copy."""
        length, pages = self._lengths[request], self._tables[request][layer]
        if self._is_run[request][layer]:
            first = int(pages[0]) * self._page_tokens
            return self._keys[first : first + length], self._values[first : first + length]
        index = torch.from_numpy(pages).to(self._keys.device)
        return self._gather(self._keys, index, length), self._gather(self._values, index, length)

    def _gather(self, memory: Tensor, pages: Tensor, length: int) -> Tensor:
        paged = memory.view(-1, self._page_tokens, *memory.shape[1:])
        return paged[pages].flatten(0, 1)[:length]

    def _slots_of(self, table: npt.NDArray[np.int64], start: int, end: int) -> npt.NDArray[np.int64]:
        """Slots of tokens start .. end - 1 at every layer, [layers, end - start]."""
        positions = np.arange(start, end)
        return table[:, positions // self._page_tokens] * self._page_tokens + positions % self._page_tokens
