"""Times attention over pages: `python -m blockkernels.attention.bench`.

The C kernel for a whole batch against torch's fused attention, request by request,
and that against torch's own handling of grouped heads. The pool is larger than the
caches, as it is in serving.
"""

from __future__ import annotations

import sys
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from blockkernels.attention import PagedAttention, attend, attend_reference
from blockkernels.native import library
from blockkernels.timing import Case, close, main

_PAGE = 32
_LAYERS = 30
_BATCHES = ((1, 1, 160), (8, 1, 160), (32, 1, 160), (8, 1, 2048), (1, 64, 64), (1, 512, 512), (1, 512, 2048))
"""Requests, queries of each, keys of each."""


class PagedBatch:
    """Requests of one size at all layers of SmolLM2; every call computes the next layer."""

    def __init__(self, requests: int, queries: int, length: int) -> None:
        pages = -(-length // _PAGE)
        self.queries, self.length = queries, length
        slots = requests * _LAYERS * pages * _PAGE
        self.pool = torch.randn(2, slots, 3, 64, dtype=torch.bfloat16)
        numbers = np.arange(requests * _LAYERS * pages, dtype=np.int64)
        self.tables = list(numbers.reshape(requests, _LAYERS, pages))
        states = torch.randn(requests * queries, 15, 64, dtype=torch.bfloat16)
        self.query, self.key, self.value = states.split((9, 3, 3), dim=1)
        sizes = [length] * requests, [queries] * requests
        self.native = PagedAttention(self.pool[0], self.pool[1], _PAGE, self.tables, *sizes)
        self.layer = 0

    def paged(self) -> Tensor:
        """One call for the batch."""
        self.layer = (self.layer + 1) % _LAYERS
        return self.native(self.query, self.key, self.value, layer=self.layer, scale=0.125, window=None)

    def one_by_one(self) -> Tensor:
        """Stores keys and values, then attends request by request, on views of the pages."""
        self.layer = (self.layer + 1) % _LAYERS
        firsts = [int(table[self.layer, 0]) * _PAGE for table in self.tables]
        new = torch.arange(self.length - self.queries, self.length)
        slots = torch.cat([new + first for first in firsts])
        self.pool[0].index_copy_(0, slots, self.key)
        self.pool[1].index_copy_(0, slots, self.value)
        out = torch.empty_like(self.query, memory_format=torch.contiguous_format)
        for place, first in enumerate(firsts):
            rows = slice(place * self.queries, (place + 1) * self.queries)
            keys, values = self.pool[:, first : first + self.length]
            out[rows] = attend(self.query[rows].contiguous(), keys, values, scale=0.125)
        return out

    def is_correct(self) -> bool:
        """Whether both compute the same for the same layer."""
        self.layer = 0
        ours = self.paged()
        self.layer = 0
        return close(ours, self.one_by_one(), 2e-2)


def grouped(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """The baseline: `enable_gqa` on the same views."""
    out = functional.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        keys.transpose(0, 1)[None],
        values.transpose(0, 1)[None],
        scale=scale,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1)


def cases() -> list[Case]:
    """SmolLM2's heads at several context lengths, bf16."""
    torch.manual_seed(0)
    made = []
    if library() is not None:
        for requests, queries, length in _BATCHES:
            batch = PagedBatch(requests, queries, length)
            name = f"paged, {requests} x {queries} queries, {length} keys"
            made.append(Case(name, batch.paged, batch.one_by_one, "one by one", batch.is_correct))
    for length in (32, 160, 512, 2048):
        query = torch.randn(1, 9, 64).bfloat16()
        keys, values = torch.randn(2, length, 3, 64).bfloat16()
        ours = partial(attend, query, keys, values, scale=0.125)
        want = attend_reference(query, keys, values, scale=0.125)
        made.append(
            Case(
                f"decode, context {length}",
                ours,
                partial(grouped, query, keys, values, 0.125),
                "enable_gqa",
                lambda ours=ours, want=want: close(ours(), want, 2e-2),  # type: ignore[misc]
            )
        )
    return made


if __name__ == "__main__":
    sys.exit(main("attention", cases))
