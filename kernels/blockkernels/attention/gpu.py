"""Attention of a whole batch over pages by Triton: prompts and single tokens in one batch, grouped heads.

The keys of a single token are cut into stretches of `SPLIT_KEYS`, which are computed side by side and added
in their order: a token's sum depends on its position alone. The queries of a prompt share the keys they read.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from blockkernels.attention.device import attend_kernel, combine_kernel
from blockkernels.launching import launch, parts_of, power_of_two

SPLIT_KEYS = 512
"""Keys of a stretch."""


class TritonAttention:
    """See `BatchAttention`; any float type.

    Attributes:
        num_tokens: rows of the batch.
        pool_keys, pool_values: the pages.
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
        """Prepare a batch; see `GatheredAttention`."""
        assert pool_keys.is_contiguous()
        assert pool_values.is_contiguous()
        self.pool_keys, self.pool_values = pool_keys, pool_values
        self.num_tokens = sum(counts)
        self._page_tokens = page_tokens
        self._lengths, self._counts = lengths, counts
        num_layers = min(len(table) for table in tables)
        widest = max(parts_of(length, page_tokens) for length in lengths)
        pages = np.zeros((num_layers, len(tables), widest), dtype=np.int32)
        slots = np.empty((num_layers, self.num_tokens), dtype=np.int64)
        row = 0
        for number, (table, length, count) in enumerate(zip(tables, lengths, counts, strict=True)):
            used = table[:num_layers, : parts_of(length, page_tokens)]
            pages[:, number, : used.shape[1]] = used
            at = np.arange(length - count, length)
            slots[:, row : row + count] = used[:, at // page_tokens] * page_tokens + at % page_tokens
            row += count
        self._pages = torch.from_numpy(pages).to(pool_keys.device, non_blocking=True)
        self._slots = torch.from_numpy(slots).to(pool_keys.device, non_blocking=True)
        self._plans: dict[tuple[int | None, int], _Plan] = {}

    def slots(self, layer: int) -> Tensor:
        """Where the new keys and values of a layer belong, int64 [tokens]."""
        return self._slots[layer]

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
        self.pool_keys.index_copy_(0, self._slots[layer], key)
        self.pool_values.index_copy_(0, self._slots[layer], value)
        return self.attend(query.contiguous(), layer=layer, scale=scale, window=window, softcap=softcap)

    def attend(
        self, query: Tensor, *, layer: int, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        """The same over keys and values that are stored already.

        Shape: query [tokens, heads, head_dim], contiguous, result likewise.
        """
        tokens, heads, dim = query.shape
        kv_heads = self.pool_keys.shape[1]
        plan = self._plan(window, heads // kv_heads)
        part = torch.empty(plan.num_parts, heads, dim, dtype=torch.float32, device=query.device)
        sums = torch.empty(plan.num_parts, heads, 2, dtype=torch.float32, device=query.device)
        table = self._pages[layer]
        width = max(16, power_of_two(dim))
        for items, rows in plan.tiles:
            launch(
                attend_kernel, (len(items), kv_heads), query, self.pool_keys, self.pool_values, table, items,
                part, sums, scale, softcap or 0.0, table.stride(0), warps=4, GROUP=heads // kv_heads,
                KV_HEADS=kv_heads, DIM=dim, WIDTH=width, PAGE=self._page_tokens, WINDOW=window or 0,
                CAPPED=softcap is not None, BLOCK_M=rows,
                BLOCK_N=64 if rows < 64 and width <= 128 else 32, STAGES=2,
            )  # fmt: skip
        out = torch.empty_like(query)
        launch(
            combine_kernel, (tokens, parts_of(heads, 4)), part, sums, plan.rows, out, HEADS=heads, BLOCK=4,
            DIM=dim, WIDTH=power_of_two(dim),
        )  # fmt: skip
        return out

    def _plan(self, window: int | None, group: int) -> _Plan:
        key = (window, group)
        if key not in self._plans:
            self._plans[key] = _Plan(self._lengths, self._counts, window, group, self._pages.device)
        return self._plans[key]


class _Plan:
    """Which programs compute what; the same for all layers with one window.

    Attributes:
        tiles: items of `attend_kernel` [items, 8], and rows of a tile: of single tokens, then of prompts.
        rows: int32 [tokens + 1]: the first part of each token, and their number.
        num_parts: of all tokens.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        counts: Sequence[int],
        window: int | None,
        group: int,
        device: torch.device,
    ) -> None:
        few, many = max(16, power_of_two(group)), max(64, power_of_two(group))
        singles: list[tuple[int, ...]] = []
        prompts: list[tuple[int, ...]] = []
        self.num_parts, rows = 0, [0]
        row = 0
        for request, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            position = length - count
            if count == 1:
                start = 0 if window is None else max(0, length - window)
                for first in range(start, length, SPLIT_KEYS):
                    end = min(first + SPLIT_KEYS, length)
                    singles.append((request, row, 1, position, first, end, self.num_parts, 0))
                    self.num_parts += 1
                rows.append(self.num_parts)
            else:
                step = many // group
                for offset in range(0, count, step):
                    queries = min(step, count - offset)
                    start = 0 if window is None else max(0, position + offset - window + 1)
                    end = position + offset + queries
                    place = self.num_parts + offset
                    prompts.append((request, row + offset, queries, position + offset, start, end, place, 0))
                rows += range(self.num_parts + 1, self.num_parts + count + 1)
                self.num_parts += count
            row += count
        self.tiles = [
            (torch.tensor(items, dtype=torch.int32, device=device), size)
            for items, size in ((singles, few), (prompts, many))
            if items
        ]
        self.rows = torch.tensor(rows, dtype=torch.int32, device=device)
