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
_ITEM = 8
"""Columns of an item."""


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
        out = torch.empty_like(query)
        for items, rows, direct in plan.tiles:
            launch(
                attend_kernel, (len(items), kv_heads), query, self.pool_keys, self.pool_values, table, items,
                part, sums, out, scale, softcap or 0.0, table.stride(0),
                warps=8 if rows >= 64 and width > 128 else 4, GROUP=heads // kv_heads,
                KV_HEADS=kv_heads, DIM=dim, WIDTH=width, PAGE=self._page_tokens, WINDOW=window or 0,
                CAPPED=bool(softcap), DIRECT=direct, BLOCK_M=rows,
                BLOCK_N=64 if rows < 64 and width <= 128 else 32, STAGES=2,
            )  # fmt: skip
        if plan.num_parts:
            launch(
                combine_kernel, (tokens, parts_of(heads, 4)), part, sums, plan.rows, out, HEADS=heads,
                BLOCK=4, DIM=dim, WIDTH=power_of_two(dim),
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
        tiles: items of `attend_kernel` [items, 8], rows of a tile, and whether an item has all keys of its
            queries: of single tokens, then of prompts.
        rows: int32 [tokens + 1]: the first part of each token, and their number; prompts have none.
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
        length, count = np.array(lengths, dtype=np.int64), np.array(counts, dtype=np.int64)
        requests = np.stack([np.arange(len(count)), np.cumsum(count) - count, length, count])
        is_single = count == 1
        few, many = max(16, power_of_two(group)), max(64, power_of_two(group))
        singles = _single_items(requests[:, is_single], window)
        prompts = _prompt_items(requests[:, ~is_single], window, many // group)
        self.num_parts = len(singles)
        per_token = np.bincount(singles[:, 1], minlength=int(count.sum()))
        rows = np.concatenate([[0], np.cumsum(per_token)])
        # One copy for all.
        whole = np.concatenate([singles.ravel(), prompts.ravel(), rows]).astype(np.int32)
        parts = torch.from_numpy(whole).to(device, non_blocking=True)
        one, two, self.rows = parts.split([singles.size, prompts.size, rows.size])
        kinds = ((one.view(-1, _ITEM), few, False), (two.view(-1, _ITEM), many, True))
        self.tiles = [kind for kind in kinds if len(kind[0])]


def _spread(counts: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """For `counts[i]` things of each i: which i a thing is of, and its number among those of i."""
    of = np.repeat(np.arange(len(counts)), counts)
    return of, np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)


def _single_items(requests: npt.NDArray[np.int64], window: int | None) -> npt.NDArray[np.int64]:
    """A stretch of keys each; requests [4, requests]: number, row, length, tokens."""
    start = np.zeros_like(requests[2]) if window is None else np.maximum(0, requests[2] - window)
    of, number = _spread(-(-(requests[2] - start) // SPLIT_KEYS))
    request, row, length, count = requests[:, of]
    first = start[of] + number * SPLIT_KEYS
    end = np.minimum(first + SPLIT_KEYS, length)
    place = np.arange(len(of))
    return np.stack([request, row, count, length - 1, first, end, place, np.zeros_like(of)], axis=1)


def _prompt_items(requests: npt.NDArray[np.int64], window: int | None, queries: int) -> npt.NDArray[np.int64]:
    """At most so many queries each; requests as above."""
    of, number = _spread(-(-requests[3] // queries))
    request, row, length, count = requests[:, of]
    offset = number * queries
    some = np.minimum(queries, count - offset)
    position = length - count + offset
    first = np.zeros_like(of) if window is None else np.maximum(0, position - window + 1)
    none = np.zeros_like(of)
    return np.stack([request, row + offset, some, position, first, position + some, none, none], axis=1)
